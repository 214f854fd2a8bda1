#!/bin/bash
# Installs what building and testing everything needs, on Debian, as root. What
# is there already is left alone, so that it may be run every time. With arguments
# it installs these packages instead.
set -euo pipefail

packages=(
	gcc libc6-dev linux-libc-dev                             # pause, monitor, launch for amd64
	gcc-aarch64-linux-gnu linux-libc-dev-arm64-cross         # and arm64
	clang                                                    # the sanitizers' and the static analyzer's compiler
	protobuf-compiler libprotobuf-dev                        # the native API
	qemu-user-static qemu-system-x86 cpio e2fsprogs # arm64, and the virtual machine
	busybox-static redis-server                              # what tests run as members
	runc crun                                                # what the benchmark compares with
	strace iproute2 attr libcap2-bin jq shellcheck make git ca-certificates
)

if (($# > 0)); then
	packages=("$@")
fi

missing=()
for p in "${packages[@]}"; do
	if [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true) != installed ]]; then
		missing+=("$p")
	fi
done
if ((${#missing[@]} == 0)); then
	exit 0
fi
echo "deps: installing ${missing[*]}"

# Servers are wanted as programs: their packages must not start them.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
