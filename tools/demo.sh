#!/bin/bash
# The main job on real input, as a user would do it: `make demo` runs this as
# root after it has built build/sandboxd. Nothing of it stays on the host.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
export SANDBOXD_STATE=$work/state SANDBOXD_ADDRESS=unix://$work/sandboxd.sock
PATH=$PWD/build:$PATH
parent=/sandboxd-demo-$$
daemon=

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
show() { # prints a command as a user would type it, and runs it
	printf '\033[36m$ %s\033[0m\n' "${*//$work/\$work}"
	"$@"
}
serve() {
	sandboxd serve --address "$SANDBOXD_ADDRESS" --state "$SANDBOXD_STATE" --root "$work/root" --cgroup-parent $parent >>"$work/daemon.log" 2>&1 &
	daemon=$!
	for _ in $(seq 100); do
		[ -S "$work/sandboxd.sock" ] && return
		sleep 0.05
	done
	cat "$work/daemon.log" >&2
	exit 1
}
cleanup() {
	[ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true
	rm -rf "$work"
}
trap cleanup EXIT

leakcheck snapshot --dir "$work/state" --dir "$work/root" --cgroup-parent "$parent" >"$work/before.json"
tools/rootfs.sh "$work/rootfs" "$(command -v redis-server)" "$(command -v redis-cli)"
serve

say "A sandbox: namespaces that no process of yours has to keep alive"
show sandboxd create web --label app=shop
show sandboxd ls

say "A server in it, and a second member that talks to it over the sandbox's loopback"
show sandboxd run -d web --name redis --rootfs "$work/rootfs" --memory 64m -- redis-server --save '' --daemonize no
for _ in $(seq 100); do
	[ "$(sandboxd run --rm web --rootfs "$work/rootfs" -- redis-cli ping 2>/dev/null)" = PONG ] && break
	sleep 0.05
done
show sandboxd run --rm web --rootfs "$work/rootfs" -- redis-cli set answer 42
show sandboxd run --rm web --rootfs "$work/rootfs" -- redis-cli get answer

say "A third that joins the pid namespace of the first, and a program of the host in the sandbox's network"
show sandboxd run --rm web --ns pid=member:redis --rootfs "$work/rootfs" -- ps
show sandboxd join web -- ss -Htln

say "A member that writes a report into a tmpfs and crashes"
show sandboxd run web --name job --rootfs "$work/rootfs" --tmpfs /scratch:size=1m -- \
	sh -c 'echo "step 3 of 7: out of cheese" >/scratch/report; echo "crashing now" >&2; kill -SEGV $$' || echo "exit code $?"

say "The daemon is killed; the rest works without it"
show kill -9 "$daemon"
wait "$daemon" 2>/dev/null || true
daemon=
show sandboxd ps web
show sandboxd logs web/job
show sandboxd exec web/redis -- redis-cli get answer

say "The dead member is still there: its exit record, the file in its tmpfs, a shell in its mounts"
sandboxd inspect web/job | jq '{state, exit, custody}'
show sandboxd cp web/job:/scratch/report "$work/report"
show cat "$work/report"
show sandboxd join web/job -- sh -c 'mount | grep scratch; ls -l /scratch; ps'

say "The daemon comes back and knows everything"
serve
show sandboxd ps web
show sandboxd wait web/job || echo "exit code $?"

say "Teardown, on purpose"
show sandboxd stop --time 2s web
show sandboxd rm web
show sandboxd ls
kill "$daemon" && wait "$daemon" 2>/dev/null || true
daemon=
find /sys/fs/cgroup -depth -type d -name "${parent#/}" -exec rmdir {} + 2>/dev/null || true

say "The leak oracle's verdict: what is on the host now that was not before"
rm -rf "$work/state" "$work/root"
leakcheck verdict "$work/before.json"
