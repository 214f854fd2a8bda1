package leak

import (
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// In a network namespace of its own, each kind of thing is planted, found, and
// no longer found when it has been taken away.
func TestNetworkNamespace(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "nft")
	pid, _ := start(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET})
	in := func(line string) {
		t.Helper()
		args := append([]string{"-t", strconv.Itoa(pid), "-n"}, strings.Fields(line)...)
		if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	in("ip link set lo up")
	in("ip link add up0 type veth peer name up1")
	in("ip link set up0 up")
	in("nft add table inet other")
	in("nft add set inet other s { type inet_service; }")
	in("nft add chain inet other c")
	o := Options{Ancestor: -1, NetNS: "/proc/" + strconv.Itoa(pid) + "/ns/net"}
	for _, tt := range []struct {
		kind     Kind
		add, del string
		want     string
	}{
		{Link, "ip link add br0 type bridge", "ip link del br0", "br0: bridge"},
		{Address, "ip addr add 192.0.2.1/24 dev up0", "ip addr del 192.0.2.1/24 dev up0", "up0 192.0.2.1/24"},
		{Route, "ip route add 198.51.100.0/24 dev up0 table 7", "ip route del 198.51.100.0/24 dev up0 table 7", "198.51.100.0/24"},
		{Nft, "nft add table ip mine", "nft delete table ip mine", "table 2 mine"},
		{Nft, "nft add element inet other s { 80 }", "nft delete element inet other s { 80 }", "element 1 other s 0050"},
		{Nft, "nft add rule inet other c counter", "nft flush chain inet other c", "rule 1 other c"},
		{Sysctl, "sysctl -qw net.ipv4.conf.up0.forwarding=1", "sysctl -qw net.ipv4.conf.up0.forwarding=0", "ipv4/conf/up0/forwarding = 1"},
	} {
		before, err := Take(o)
		if err != nil {
			t.Fatal(err)
		}
		in(tt.add)
		now, err := Take(o)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, f := range Diff(before, now) {
			found = found || f.Kind == tt.kind && strings.Contains(f.String(), tt.want)
		}
		if !found {
			t.Errorf("%s: found %s; want %s %q", tt.add, Report(Diff(before, now)), tt.kind, tt.want)
		}
		in(tt.del)
		if fs, err := before.Wait(grace); err != nil || len(fs) > 0 {
			t.Errorf("after %s: %v, %s", tt.del, err, Report(fs))
		}
	}
}
