package cni

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// eachSet runs a test with the plugins of today and with those of Debian.
func eachSet(t *testing.T, test func(t *testing.T, dir, version string)) {
	testenv.Root(t)
	t.Run("today", func(t *testing.T) { test(t, testenv.CNIPlugins(t), "1.1.0") })
	t.Run("debian", func(t *testing.T) { test(t, testenv.DebianCNIPlugins(t), "1.0.0") })
}

func TestBridgePortmap(t *testing.T) {
	eachSet(t, func(t *testing.T, dir, version string) {
		r := newRig(t, dir)
		r.config("10-a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[
			{"type":"bridge","bridge":"cbr0","isGateway":true,"ipMasq":true,"hairpinMode":true,"capabilities":{"ips":true},
			 "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/24"}],[{"subnet":"fd99::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
			{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`)
		ns := newNS(t)
		plan := r.plan("0123456789abcdef", network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}})
		res := r.attach("0123456789abcdef", plan, ns)
		n := res.Networks[0]
		if n.Name != "a" || n.Interface != "eth0" || len(n.Addresses) != 2 || n.MTU != 1500 || n.MAC == "" || len(n.Ports) != 1 {
			t.Errorf("result %+v", n)
		}
		if n.Addresses[0] != netip.MustParsePrefix("10.99.0.2/24") || n.Gateway[0].String() != "10.99.0.1" {
			t.Errorf("addresses %v, gateways %v", n.Addresses, n.Gateway)
		}
		serve(t, ns, 80, "hello")
		wantFetch(t, nil, "127.0.0.1:8080", "hello")
		wantFetch(t, nil, "10.99.0.2:80", "hello")
		wantFetch(t, ns, "10.99.0.1:8080", "hello") // hairpin
		// CHECK of Debian's portmap looks for IPv4's rules in IPv6's table.
		if err := r.Verify(t.Context(), "0123456789abcdef", plan, ns); err != nil && version != "1.0.0" {
			t.Errorf("Verify: %v", err)
		}
		r.detach("0123456789abcdef", plan, ns)
		r.detach("0123456789abcdef", plan, ns)
		r.detach("0123456789abcdef", plan, nil)
		if l := append(r.leases(), r.cached()...); len(l) > 0 {
			t.Errorf("left: %v", l)
		}
		if rules := in(t, nil, "iptables-save", "-t", "nat") + in(t, nil, "nft", "list", "ruleset"); strings.Contains(rules, "10.99.0.2") {
			t.Errorf("rules left: %s", rules)
		}
	})
}

// A member with CAP_NET_ADMIN removes the interface, a plugin is killed in the
// middle of DEL, or the namespace is gone with the pause: what the plugins would
// have read from the interface is not to be left on the host.
func TestInterfaceIsGone(t *testing.T) {
	for _, kind := range []string{"bridge", "ptp"} {
		eachSet(t, func(t *testing.T, dir, version string) {
			r := newRig(t, dir)
			r.config("10-a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[
				{"type":"`+kind+`","bridge":"cbr0","isGateway":true,"ipMasq":true,
				"ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/24"}],[{"subnet":"fd99::/64"}]]}}]}`)
			const id = "0123456789abcdef"
			plan := r.plan(id, network.Request{})
			rules := func() string {
				return in(t, nil, "nft", "list", "ruleset") + in(t, nil, "iptables-save") + in(t, nil, "ip6tables-save")
			}
			for _, gone := range []string{"interface", "namespace"} {
				ns := newNS(t)
				r.attach(id, plan, ns)
				if !strings.Contains(rules(), "10.99.0.") || !strings.Contains(rules(), "fd99::") {
					t.Fatalf("no rules: %s", rules())
				}
				in(t, ns, "ip", "link", "del", "eth0")
				if err := r.Verify(t.Context(), id, plan, ns); err == nil || !strings.Contains(err.Error(), "no interface eth0 any more") {
					t.Errorf("Verify: %v", err)
				}
				if gone == "namespace" {
					ns = nil
				}
				r.detach(id, plan, ns)
				if rs := rules(); strings.Contains(rs, "10.99.0.") || strings.Contains(rs, "fd99::") {
					t.Errorf("%s %s gone: rules left: %s", kind, gone, rs)
				}
				if l := append(r.leases(), r.cached()...); len(l) > 0 {
					t.Errorf("%s %s gone: left: %v", kind, gone, l)
				}
				if ns != nil && len(links(t, ns)) > 0 {
					t.Errorf("%s: links left: %v", kind, links(t, ns))
				}
			}
		})
	}
}
