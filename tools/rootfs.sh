#!/bin/sh
# Makes a root file system for a member out of programs of this host:
#
#   rootfs.sh DIR [PROGRAM]...
#
# DIR gets busybox (Debian: busybox-static) with its applets, the usual
# directories and accounts, and each PROGRAM, a name or a path, with the shared
# libraries it needs.
set -eu
dir=$1
shift
mkdir -p "$dir/bin" "$dir/usr/bin" "$dir/sbin" "$dir/etc" "$dir/root" "$dir/proc" "$dir/sys" "$dir/dev" "$dir/var" "$dir/run"
mkdir -p "$dir/tmp"
chmod 1777 "$dir/tmp"
cp /bin/busybox "$dir/bin/busybox"
for applet in $(/bin/busybox --list); do
	[ "$applet" = busybox ] || ln -sf busybox "$dir/bin/$applet"
done
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$dir/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$dir/etc/group"
for program; do
	program=$(command -v "$program")
	cp -L "$program" "$dir/usr/bin/"
	# ldd prints "NAME => PATH (ADDRESS)" and, for the loader, "PATH (ADDRESS)".
	ldd "$program" | grep -o '/[^ ]*' | while read -r lib; do
		mkdir -p "$dir$(dirname "$lib")"
		cp -L "$lib" "$dir$lib"
	done
done
