#!/bin/bash
# What sandboxd is for, on real input:
#
#   demo.sh [DIR]
#
# runs sandboxd and leakcheck from DIR, or from build, where `make demo` puts
# them, as root. Every command that it shows is the one that it runs; whatever does
# not come out as it should ends it with an error. It leaves nothing on the host.
set -euo pipefail
PATH=$(realpath "${1:-$(dirname "$0")/../build}"):$PATH
cd "$(dirname "$0")/.."
if [[ $(id -u) != 0 ]]; then
	echo "demo: must be run as root" >&2
	exit 1
fi
if command -v apt-get >/dev/null; then
	tools/deps.sh busybox-static redis-server iproute2
fi

work=$(mktemp -d)
parent=sandboxd-demo-$$
daemon=
export SANDBOXD_STATE=$work/state
touch "$work/daemon.log" "$work/serve.log"
bold='' cyan='' plain=''
if [[ -t 1 ]]; then
	bold=$'\e[1m' cyan=$'\e[36m' plain=$'\e[0m'
fi

say() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }
prompt() { printf '%s$ %s%s\n' "$cyan" "$1" "$plain"; }
die() {
	echo "demo: $*" >&2
	exit 1
}

# run COMMAND [PATTERN [CODE]] shows a command, runs it, shows what it prints, and
# insists on a pattern in that and on an exit code.
run() {
	local out code=0
	prompt "$1"
	out=$(eval "$1" 2>&1) || code=$?
	[[ -z $out ]] || cut -c1-120 <<<"$out"
	[[ $code == "${3:-0}" ]] || die "exit code $code, want ${3:-0}: $1"
	grep -qE -- "${2:-}" <<<"$out" || die "no \"$2\" in the output of: $1"
}

serve() {
	cat "$work/serve.log" >>"$work/daemon.log"
	: >"$work/serve.log"
	# In a session of its own: an interrupt of this script is not one of the daemon.
	setsid sandboxd serve --root "$work/root" --cgroup-parent "/$parent" --bridge sbdemo0 --subnet 10.231.88.0/24 >"$work/serve.log" 2>&1 &
	daemon=$!
	disown
	until grep -q msg=Ready "$work/serve.log"; do
		kill -0 "$daemon" 2>/dev/null || die "the daemon has ended"
		sleep 0.02
	done
}

# end SIGNAL ends the daemon, and returns when it is gone.
end() {
	kill "-$1" "$daemon" 2>/dev/null || true
	while kill -0 "$daemon" 2>/dev/null; do sleep 0.02; done
	daemon=
}

cleanup() {
	local code=$?
	set +e
	trap '' INT TERM
	trap - EXIT
	if [[ -n $(ls "$SANDBOXD_STATE/sandboxes" 2>/dev/null) ]]; then
		if [[ -z $daemon ]] || ! kill -0 "$daemon" 2>/dev/null; then
			serve
		fi
		sandboxd ls -q | xargs -r sandboxd rm -f
	fi
	[[ -z $daemon ]] || end TERM
	find /sys/fs/cgroup -depth -type d -path "*/$parent*" -exec rmdir {} + || code=1
	if ((code)); then
		echo "demo: the daemon's log ends with:" >&2
		cat "$work/daemon.log" "$work/serve.log" | tail -n 20 >&2
	fi
	rm -rf "$work"
	exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

tools/rootfs.sh "$work/rootfs" redis-server redis-cli
cd "$work"

# What a daemon makes once and keeps (its directories, its cgroup) is no leak:
# the oracle looks for the first time after a daemon has done all of it.
serve
sandboxd create first >/dev/null
sandboxd run --rm first --rootfs rootfs -- true
sandboxd rm first
end TERM
leakcheck snapshot --netns /proc/self/ns/net --dir "$work/state" --dir "$work/root" --keep "$work/root/events" --keep "$work/root/collected" --cgroup-parent "/$parent" >before.json
serve

say "A sandbox: a network, IPC objects and a host name that need no process of yours to stay"
run 'sandboxd create web --label app=shop --net builtin --publish 16379:6379' '^[0-9a-f]{16}$'
run 'sandboxd ls' 'web +Ready .* builtin'

say "A member: Debian's redis-server. What it saves goes to a tmpfs"
run 'sandboxd run web -d --name redis --rootfs rootfs --memory 64m --tmpfs /data -- redis-server --dir /data --protected-mode no --enable-debug-command yes' '^[0-9a-f]{16}$'
until [[ $(sandboxd exec web/redis -- redis-cli ping 2>/dev/null) == PONG ]]; do sleep 0.05; done

say "A second member talks to it over the sandbox's loopback"
run 'sandboxd run web --rm --rootfs rootfs -- redis-cli set answer 42' '^OK$'
run 'sandboxd run web --rm --rootfs rootfs -- redis-cli save' '^OK$'

say "The host asks too, at the port that the sandbox publishes"
run 'redis-cli -p 16379 get answer' '42'
run 'sandboxd check --sandbox web && sandboxd inspect web | grep -A1 addresses' '10\.231\.88\.'

say "A third joins the first one's pid namespace, and a program of the host the sandbox's network"
run 'sandboxd run web --rm --rootfs rootfs --ns pid=member:redis -- ps' '^ +1 .*redis-server'
run 'sandboxd join web -- ss -Hltn' '^LISTEN .*:6379 '

say "The daemon is killed. Nothing stops, and what follows works without it"
prompt "kill -9 $daemon"
end KILL
run 'sandboxd exec web/redis -- redis-cli get answer' '^42$'

say "Now redis crashes: a real segmentation fault, while there is no daemon"
run 'sandboxd join web -- redis-cli debug segfault' 'closed the connection' 1
run 'sandboxd wait -o json web/redis' '"signal": 11' 139
run 'sandboxd ps web' 'redis +Exited \(139\) .* held'
run 'sandboxd logs web/redis | grep crashed' 'crashed by signal: 11'

say "It is dead, and its mounts are still there: a shell in them, and the file out of its tmpfs"
run "sandboxd join web/redis -- sh -c 'grep /data /proc/self/mounts; ls -l /data'" 'dump\.rdb'
run 'sandboxd cp web/redis:/data/dump.rdb .'
run 'ls -l dump.rdb' ' dump\.rdb'

say "The daemon comes back, and knows what happened while it was dead"
prompt 'sandboxd serve &'
serve
run 'sandboxd ps web' 'redis +Exited \(139\) .* held'

say "A successor in the same sandbox: created, given the file, and only then started"
run 'sandboxd add web --name redis2 --rootfs rootfs --tmpfs /data -- redis-server --dir /data --protected-mode no' '^[0-9a-f]{16}$'
run 'sandboxd cp dump.rdb web/redis2:/data'
run 'sandboxd start web/redis2'
until [[ $(sandboxd exec web/redis2 -- redis-cli ping 2>/dev/null) == PONG ]]; do sleep 0.05; done
run 'sandboxd run web --rm --rootfs rootfs -- redis-cli get answer' '^42$'
run 'redis-cli -p 16379 get answer' '42'

say "Teardown, on purpose"
run 'sandboxd stop web'
run 'sandboxd ps web' 'redis2 +Exited \(0\)'
run 'sandboxd rm web'
run 'sandboxd ls -o json' '^\[\]$'

say "Nothing of it is left but what was taken down at its death: its postmortem"
run 'sandboxd collected ls' 'web/redis-1 .* 139, SIGSEGV'
run 'sandboxd postmortem web/redis' 'web/redis: It was killed by signal 11 .SIGSEGV.'
end TERM

say "The leak oracle: processes, namespaces, mounts, cgroups, files, links, routes, rules that were not there before"
run 'leakcheck verdict before.json'
