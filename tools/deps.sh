#!/bin/bash
# Installs what building and testing everything needs, on Debian, as root, and
# fetches Go modules. What is there already is left alone, so that it may be run
# every time.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
	gcc libc6-dev linux-libc-dev                     # pause, monitor, launch for amd64, and the race detector
	gcc-aarch64-linux-gnu linux-libc-dev-arm64-cross # and arm64
	clang libclang-rt-dev                            # C under the sanitizers and libFuzzer
	protobuf-compiler libprotobuf-dev                # the native API
	qemu-user-static qemu-system-x86 cpio e2fsprogs  # arm64, and the virtual machine
	busybox-static redis-server                      # what tests run as members
	runc crun                                        # what the benchmark compares with
	containernetworking-plugins iptables dnsmasq-base # CNI: plugins of an old version, their tools, a DHCP server
	prometheus                                       # and promtool: alerts, dashboard and metrics are tried with them
	curl conntrack util-linux                        # what the samples of hooks use
	strace iproute2 nftables procps zstd attr libcap2-bin jq shellcheck make git ca-certificates
)

# attempt runs a command up to four times: networks fail now and then.
attempt() {
	local try
	for try in 1 2 3; do
		"$@" && return
		echo "deps: attempt $try of $1 did not work" >&2
		sleep $((try * 5))
	done
	"$@"
}

absent=()
for p in "${packages[@]}"; do
	if [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true) != installed ]]; then
		absent+=("$p")
	fi
done
if ((${#absent[@]})); then
	echo "deps: installing ${absent[*]}"
	# Servers are wanted as programs: their packages must not start them.
	policy=/usr/sbin/policy-rc.d
	if [[ ! -e $policy ]]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		trap 'rm -f "$policy"' EXIT
	fi
	export DEBIAN_FRONTEND=noninteractive
	attempt apt-get update -qq -o Acquire::Retries=3
	attempt apt-get install -y -qq --no-install-recommends -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 "${absent[@]}" >/dev/null
fi

if ! command -v go >/dev/null; then
	echo "deps: there is no go in PATH; see go.mod for the version" >&2
	exit 1
fi
for module in . tools tools/cni; do
	(cd "$module" && attempt go mod download)
done
