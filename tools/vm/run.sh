#!/bin/bash
# Runs the tests listed in tools/vm/tests in a virtual machine with Debian's
# kernel 6.1 and nothing but cgroup v2, in software emulation: no /dev/kvm is
# needed. The kernel package is fetched, not installed.
#
#   run.sh [--counts FILE] [PACKAGE]…      all that are listed, or only these
#
# For debugging: VM_SHELL=1 gives a shell on the console instead.
set -euo pipefail
cd "$(dirname "$0")/../.."

counts=build/results/vm
if [[ ${1:-} == --counts ]]; then
	counts=$2
	shift 2
fi
only=("$@")
out=build/vm
image=$out/image
timeout=${VM_TIMEOUT:-900} # seconds; what it takes is a third, on a machine with nothing else to do
boot=${VM_BOOT_TIMEOUT:-60} # it takes five

# The kernel. What apt knows of it may be from a time before the archive's.
mkdir -p "$out/cache" build/results
fetch() {
	version=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: linux-image-//p')
	[[ -n $version ]] || return 1
	kernel=$out/cache/$version
	[[ ! -e $kernel/fetched ]] || return 0
	echo "vm: fetching linux-image-$version"
	rm -rf "$kernel"
	mkdir -p "$kernel"
	(cd "$kernel" && apt-get download -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 "linux-image-$version") &&
		(cd "$kernel" && dpkg-deb -x ./*.deb . && rm ./*.deb && touch fetched)
}
for try in 1 2 3; do
	! fetch || break
	if ((try == 3)); then
		echo "vm: no kernel"
		exit 1
	fi
	sleep "$((try * 5))"
	apt-get update -qq -o Acquire::Retries=3 || true
done

# The image: busybox, modules, test binaries with their testdata.
rm -rf "$image"
mkdir -p "$image"/{bin,dev,etc,lib,mnt,proc,root,run,src,sys,tests,tmp}
cp /bin/busybox "$image/bin/"
for applet in $(/bin/busybox --list); do
	[[ $applet == busybox ]] || ln -s busybox "$image/bin/$applet"
done
ln -s bin "$image/sbin"
mkdir "$image/usr"
ln -s ../bin "$image/usr/bin"
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$image/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$image/etc/group"

modules=(virtio_pci virtio_blk overlay veth bridge br_netfilter nf_tables nft_ct nft_nat nft_masq nft_chain_nat nft_fib_inet nft_fib_ipv4 nft_fib_ipv6 nft_meta_bridge nf_nat nf_conntrack dummy tun ipvlan ifb sch_tbf sch_ingress cls_u32 act_mirred)
printf '%s\n' "${modules[@]}" >"$image/modules"
tree=lib/modules/$version
[[ -e $kernel/$tree/modules.dep ]] || /bin/busybox depmod -b "$kernel" "$version"
mkdir -p "$image/$tree"
cp "$kernel/$tree"/modules.{dep,builtin,order} "$image/$tree/"
for m in "${modules[@]}"; do
	# A line of modules.dep is a module and everything that it needs.
	grep -E "/$m\.ko:" "$kernel/$tree/modules.dep" | tr -d ':' | tr ' ' '\n' |
		while read -r ko; do
			[[ -n $ko ]] || continue
			mkdir -p "$image/$tree/$(dirname "$ko")"
			cp "$kernel/$tree/$ko" "$image/$tree/$ko"
		done
done

echo "vm: building test binaries"
: >"$image/list"
missing=$(sed -n 's/^\([a-z0-9_:-]\+\).*/,-\1/p' tools/vm/missing | tr -d '\n')
echo "export SANDBOXD_TEST_REQUIRE=all$missing" >"$image/environment"
packages=()
while read -r pkg options; do
	[[ -n $pkg && $pkg != \#* ]] || continue
	if ((${#only[@]})) && [[ " ${only[*]} " != *" $pkg "* ]]; then
		continue
	fi
	binary=$(echo "${pkg#./}" | tr / _).test
	tags=()
	if [[ $pkg == ./e2e ]]; then
		tags=(-tags=e2e)
		for b in sandboxd:"" sandboxd-crashpoints:crashpoints; do
			CGO_ENABLED=0 go build -tags="${b#*:}" -o "$image/tests/${b%%:*}" ./cmd/sandboxd
		done
		echo "export SANDBOXD_E2E_BINARY=/tests/sandboxd SANDBOXD_E2E_CRASH_BINARY=/tests/sandboxd-crashpoints" >>"$image/environment"
	fi
	if [[ $pkg == ./netsetup/cni ]]; then
		make -s build/cni/bin
		mkdir -p "$image/tests/cni"
		cp build/cni/bin/{host-local,ipvlan,static} "$image/tests/cni/"
		echo "export SANDBOXD_TEST_CNI_PLUGINS=/tests/cni" >>"$image/environment"
	fi
	CGO_ENABLED=0 go test -c "${tags[@]}" -o "$image/tests/$binary" "$pkg"
	mkdir -p "$image/src/$pkg"
	if [[ -d $pkg/testdata ]]; then
		cp -a "$pkg/testdata" "$image/src/$pkg/"
	fi
	echo "$pkg $binary $options" >>"$image/list"
	packages+=("$pkg")
done <tools/vm/tests
cp --parents pause/*.elf "$image/src/" # a program of another machine
cp tools/vm/init "$image/init"
chmod 755 "$image/init"
if [[ -n ${VM_SHELL:-} ]]; then
	sed -i 's/^while read -r pkg binary.*/setsid cttyhack sh; : >\/list\n&/' "$image/init"
fi
(cd "$image" && find . -print0 | cpio --null --quiet -o -H newc) | gzip -1 >"$out/initramfs.gz"
rm -f "$out/disk.ext4"
truncate -s 1G "$out/disk.ext4"
mkfs.ext4 -q -O ^has_journal "$out/disk.ext4"

echo "vm: booting $version"
console=$out/console.log
# Not microvm: with so few clocks the kernel cannot calibrate any if the host is busy,
# and waits for a tick for ever. no_timer_check is for the same reason.
# shellcheck disable=SC2054 # the commas are the option's
qemu=(qemu-system-x86_64 -M q35 -accel tcg -cpu max -smp 2 -m 2048
	-nodefaults -no-user-config -no-reboot -display none
	-kernel "$kernel/boot/vmlinuz-$version" -initrd "$out/initramfs.gz"
	-append "console=ttyS0 quiet loglevel=1 reboot=t panic=-1 random.trust_cpu=on no_timer_check"
	-drive "id=disk,file=$out/disk.ext4,format=raw,if=none,cache=unsafe" -device virtio-blk-pci,drive=disk)
if [[ -n ${VM_SHELL:-} ]]; then
	exec "${qemu[@]}" -serial mon:stdio
fi
pid=
trap '[[ -z $pid ]] || kill -KILL "$pid" 2>/dev/null || true' EXIT
# boot runs the machine until it ends, and at the longest for $timeout seconds.
# It returns 75 if there is no sign of the first process after $boot seconds.
boot() {
	: >"$console"
	"${qemu[@]}" -serial "file:$console" </dev/null &
	pid=$!
	local start=$SECONDS result=0
	while kill -0 "$pid" 2>/dev/null; do
		local ran=$((SECONDS - start))
		if ((ran >= boot)) && ! grep -qa '^=== VM BOOT' "$console"; then
			result=75
		elif ((ran >= timeout)); then
			result=124
		fi
		if ((result)); then
			kill -KILL "$pid"
			break
		fi
		sleep 0.5
	done
	wait "$pid" || ((result)) || result=$?
	pid=
	return "$result"
}
status=0
for try in 1 2 3; do
	start=$SECONDS
	status=0
	boot || status=$?
	echo "vm: ended after $((SECONDS - start)) s"
	((status == 75)) || break
	echo "vm: it did not boot within $boot s (attempt $try)"
done

# The console, package by package, is what `go test -json` would have said.
tr -d '\r' <"$console" >"$console.txt"
ok=true
if ((status != 0)) || ! grep -qa '^=== VM DONE$' "$console.txt"; then
	echo "vm: it did not get to its end (exit $status of at most $timeout s); the console ended with:"
	tail -n 40 "$console.txt"
	ok=false
fi
grep -a '^init: ' "$console.txt" || true
for pkg in "${packages[@]}"; do
	# Also what a TestMain says after its tests have passed is a failure.
	if ! grep -qaxF "=== VM END $pkg 0" "$console.txt"; then
		echo "vm: $pkg failed or was not run; its output ended with:"
		sed -n "\\|^=== VM BEGIN $pkg\$|,\\|^=== VM END $pkg |p" "$console.txt" | tail -n 20
		ok=false
	fi
done
for pkg in "${packages[@]}"; do
	sed -n "\\|^=== VM BEGIN $pkg\$|,\\|^=== VM END $pkg |p" "$console.txt" | grep -av '^=== VM ' |
		go tool test2json -p "vm:${pkg#./}"
done | go run ./internal/testsum --counts "$counts" --skips tools/vm/missing || ok=false
$ok
