package sandbox

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
)

func TestCompleteNetwork(t *testing.T) {
	addr := netip.MustParseAddr
	good := network.Request{
		Ports: []network.Port{{HostPort: 80, Port: 80}, {HostPort: 80, Port: 81, Protocol: network.UDP}, {HostIP: addr("127.0.0.1"), HostPort: 80, Port: 80, Protocol: network.TCP}},
		MAC:   "02-42-AC-11-00-02", Addresses: []netip.Addr{addr("10.88.0.7"), addr("fd00::7")},
		DNS:   network.DNS{Servers: []netip.Addr{addr("fe80::1%eth0")}, Search: []string{"a.example", "_x"}, Options: []string{"ndots:2"}},
		Hosts: []network.Host{{Name: "db_1.example", IP: addr("10.0.0.1")}},
	}
	got, err := completeNetwork(network.ModeBuiltin, good)
	if err != nil {
		t.Fatal(err)
	}
	if got.MAC != "02:42:ac:11:00:02" || got.Ports[0].Protocol != network.TCP {
		t.Errorf("completed to %+v", got)
	}
	if good.Ports[0].Protocol != "" {
		t.Error("the caller's ports were changed")
	}
	for _, tt := range []struct {
		mode NetworkMode
		q    network.Request
		want string
	}{
		{network.ModeNone, network.Request{Ports: good.Ports}, "published ports"},
		{network.ModeHost, network.Request{Addresses: good.Addresses}, "addresses"},
		{network.ModeBuiltin, network.Request{Attach: []network.Attach{{Network: "lan"}}}, "names of networks can be given for cni only"},
		{network.ModeCNI, network.Request{Isolated: true}, "isolation"},
		{network.ModeBuiltin, network.Request{Addresses: []netip.Addr{addr("0.0.0.0")}}, "0.0.0.0"},
		{network.ModeBuiltin, network.Request{Addresses: []netip.Addr{addr("10.0.0.1"), addr("10.0.0.1")}}, "twice"},
		{network.ModeBuiltin, network.Request{Addresses: []netip.Addr{{}}}, "address"},
		{network.ModeBuiltin, network.Request{MAC: "02:42"}, "six bytes"},
		{network.ModeBuiltin, network.Request{MAC: "00:00:00:00:00:00"}, "cannot be given"},
		{network.ModeBuiltin, network.Request{MAC: "01:00:00:00:00:00"}, "multicast"},
		{network.ModeBuiltin, network.Request{Ports: []network.Port{{HostPort: 1}}}, "port is 0"},
		{network.ModeBuiltin, network.Request{Ports: []network.Port{{HostPort: 1, Port: 1, Protocol: "icmp"}}}, "icmp"},
		{network.ModeBuiltin, network.Request{Ports: []network.Port{{HostPort: 1, Port: 1}, {HostPort: 1, Port: 2}}}, "twice"},
		{network.ModeBuiltin, network.Request{Ports: []network.Port{{HostIP: addr("224.0.0.1"), HostPort: 1, Port: 1}}}, "224.0.0.1"},
		{network.ModeBuiltin, network.Request{Ports: []network.Port{{HostIP: addr("255.255.255.255"), HostPort: 1, Port: 1}}}, "255.255.255.255 is not an address that the host can have"},
		{network.ModeBuiltin, network.Request{Ports: make([]network.Port, maxPorts+1)}, "more than"},
		{network.ModeNone, network.Request{DNS: network.DNS{Search: []string{"a\nb"}}}, "search domain"},
		{network.ModeNone, network.Request{DNS: network.DNS{Search: []string{"a,b"}}}, "search domain"},
		{network.ModeNone, network.Request{DNS: network.DNS{Search: []string{strings.Repeat("a", 256)}}}, "search domain"},
		{network.ModeNone, network.Request{DNS: network.DNS{Options: []string{"ndots:" + strings.Repeat("1", 250)}}}, "dns option"},
		{network.ModeNone, network.Request{DNS: network.DNS{Options: []string{"a b"}}}, "one word"},
		{network.ModeNone, network.Request{DNS: network.DNS{Servers: []netip.Addr{{}}}}, "dns server"},
		{network.ModeNone, network.Request{Hosts: []network.Host{{Name: "a b", IP: addr("10.0.0.1")}}}, `"a b"`},
		{network.ModeNone, network.Request{Hosts: []network.Host{{Name: "ä", IP: addr("10.0.0.1")}}}, "additional host"},
		{network.ModeNone, network.Request{Hosts: []network.Host{{Name: "a"}}}, "no address"},
	} {
		_, err := completeNetwork(tt.mode, tt.q)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s, %+v: %v; want %q", tt.mode, tt.q, err, tt.want)
		}
	}
}

// The mode that nobody named is the node's, if the sandbox can have a network.
func TestDefaultNetwork(t *testing.T) {
	n := newFakeNode()
	n.network = network.ModeCNI
	m := open(t, t.TempDir(), n)
	for _, tt := range []struct {
		c    Config
		want NetworkMode
	}{
		{Config{}, network.ModeCNI},
		{Config{Share: []namespace.Kind{namespace.Net}}, network.ModeCNI},
		{Config{Share: []namespace.Kind{namespace.UTS}}, network.ModeNone},
		{Config{Network: network.ModeNone}, network.ModeNone},
		{Config{Network: network.ModeHost}, network.ModeHost},
	} {
		i, err := m.Create(t.Context(), tt.c)
		if err != nil || i.Network.Mode != tt.want || (len(i.Network.Networks) > 0) != (tt.want == network.ModeCNI) {
			t.Errorf("%+v: %+v, %v; want %s", tt.c, i.Network, err, tt.want)
		}
		if err := m.Remove(t.Context(), i.ID, false); err != nil {
			t.Error(err)
		}
	}
	if _, err := m.Create(t.Context(), Config{Network: network.ModeCNI, Share: []namespace.Kind{namespace.UTS}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a network without a namespace: %v", err)
	}
	if err := n.empty(); err != nil {
		t.Error(err)
	}
}

// A network that does not go down is shown, and holds nothing up.
func TestTombstones(t *testing.T) {
	n := newFakeNode()
	m := openWithJournal(t, t.TempDir(), n)
	i, err := m.Create(t.Context(), Config{Name: "box", Network: network.ModeCNI})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.VerifyNetwork(t.Context(), "box"); err != nil {
		t.Errorf("verify: %v", err)
	}
	n.with(func() { n.faults["plugin"] = fails })
	if err := m.Remove(t.Context(), "box", false); err != nil {
		t.Fatal(err)
	}
	if err := n.empty(); err != nil {
		t.Error(err)
	}
	ts := m.Tombstones()
	if len(ts) != 1 || ts[0].ID != i.ID || ts[0].State != "Removed" || ts[0].Network.Tombstone == nil || ts[0].Reason == "" {
		t.Errorf("tombstones %+v", ts)
	}
	if l := m.List(); len(l) != 0 {
		t.Errorf("list %+v", l)
	}
	if err := m.VerifyNetwork(t.Context(), "box"); !errors.Is(err, ErrNotFound) {
		t.Errorf("verify: %v", err)
	}
	if err := m.ForgetNetwork(t.Context(), "box"); !errors.Is(err, ErrNotFound) {
		t.Errorf("forget by name: %v", err)
	}
	if err := m.ForgetNetwork(t.Context(), i.ID); err != nil || len(m.Tombstones()) > 0 {
		t.Errorf("forget: %v, tombstones %+v", err, m.Tombstones())
	}
	var last Event
	for e, err := range m.Events(t.Context(), EventQuery{}) {
		if err != nil {
			t.Fatal(err)
		}
		last = e
	}
	if last.Attrs["action"] != "forget" || last.Sandbox != i.ID || last.Reason != "no" {
		t.Errorf("last event %+v", last)
	}
}
