#!/bin/sh
# Builds a freestanding program for both architectures:
#
#   build.sh SOURCE.c OUT_PREFIX
#
# The results are committed, so that `go build` needs no C compiler; CI builds
# them again and compares. Debian: gcc, gcc-aarch64-linux-gnu.
set -eu
src=$1 out=$2
flags="-std=c11 -Oz -fconserve-stack -Wall -Wextra -Werror -ffreestanding -fno-builtin -nostdlib -static -fno-pie -no-pie
 -fno-stack-protector -fno-asynchronous-unwind-tables -fno-unwind-tables -fcf-protection=none
 -fno-tree-loop-distribute-patterns -fno-ident -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro
 -Wl,-z,noexecstack -Wl,--gc-sections -s"
build() {
	# shellcheck disable=SC2086,SC2046 # the flags are words
	"$1" $(echo $flags | sed "s/-fcf-protection=none/$4/") -Wl,-z,max-page-size="$3" -o "${out}_$2.elf" "$src"
}
machine=$(uname -m)
case $machine in
x86_64) amd64=gcc arm64=aarch64-linux-gnu-gcc ;;
aarch64) amd64=x86_64-linux-gnu-gcc arm64=gcc ;;
*) echo "build.sh: no cross compilers known for $machine" >&2; exit 1 ;;
esac
build "$amd64" amd64 4096 -fcf-protection=none
build "$arm64" arm64 65536 -mno-outline-atomics
