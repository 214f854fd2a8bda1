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
	# The hierarchy stays, unmounted, if cgroups in it are still being freed; a
	# later umount then takes it along.
	restore() {
		for _ in 1 2 3 4 5 6 7 8 9 10; do
			umount $dir 2>/dev/null || true
			grep -q :hugetlb: /proc/self/cgroup || break
			sleep 0.5
			mount -t cgroup -o hugetlb cgroup $dir 2>/dev/null || true
		done
		rmdir $dir
	}
	trap restore EXIT
	mount -t cgroup -o hugetlb cgroup $dir 2>/dev/null || echo "bench: hugetlb stays in cgroup v2: crun may refuse to run"
fi
build/bench "$@"
