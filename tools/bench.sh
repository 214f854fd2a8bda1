#!/bin/sh
# Measures sandboxd beside runc and crun: bench.sh [FLAG of e2e/bench]...
#
# crun refuses a hybrid cgroup layout whose v2 hierarchy holds a controller.
# Where only hugetlb is left there, it is mounted as v1 for the time being; that
# works as long as v2 has no cgroups.
set -eu
cd "$(dirname "$0")/.."
dir=/sys/fs/cgroup/hugetlb
v2=/sys/fs/cgroup/unified/cgroup.controllers
if [ -f $v2 ] && [ "$(cat $v2)" = hugetlb ] && [ ! -e $dir ]; then
	mkdir $dir
	# As long as there are cgroups in a hierarchy it stays when it is unmounted, and
	# keeps its controller. Hundreds that were removed take the kernel seconds to free.
	restore() {
		for _ in $(seq 60); do
			if mountpoint -q $dir; then
				[ "$(awk '$1 == "hugetlb" { print $3 }' /proc/cgroups)" = 1 ] && umount $dir
			fi
			! mountpoint -q $dir && rmdir $dir && return
			sleep 1
		done
		echo "bench: $dir stays: there are cgroups in it" >&2
	}
	trap restore EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	mount -t cgroup -o hugetlb cgroup $dir 2>/dev/null || echo "bench: hugetlb stays in cgroup v2: crun may refuse to run"
fi
build/bench "$@"
