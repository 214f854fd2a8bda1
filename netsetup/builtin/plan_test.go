package builtin

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/netsetup"
)

func TestCheck(t *testing.T) {
	addr := netip.MustParseAddr
	port := func(ports ...network.Port) network.Request { return network.Request{Ports: ports} }
	tcp := network.Port{HostPort: 80, Port: 80, Protocol: network.TCP}
	on := func(ip string, p network.Port) network.Port { p.HostIP = addr(ip); return p }
	for _, tt := range []struct {
		name  string
		req   network.Request
		only4 bool
		want  string // in the error; "" is none
	}{
		{"nothing", network.Request{}, false, ""},
		{"addresses", network.Request{Addresses: []netip.Addr{addr("10.99.0.9"), addr("fd99::9")}}, false, ""},
		{"two of a family", network.Request{Addresses: []netip.Addr{addr("10.99.0.9"), addr("10.99.0.10")}}, false, "a second one"},
		{"outside", network.Request{Addresses: []netip.Addr{addr("10.1.0.9")}}, false, "not in 10.99.0.0/24"},
		{"gateway", network.Request{Addresses: []netip.Addr{addr("10.99.0.1")}}, false, "the network's own"},
		{"broadcast", network.Request{Addresses: []netip.Addr{addr("10.99.0.255")}}, false, "broadcast"},
		{"no IPv6", network.Request{Addresses: []netip.Addr{addr("fd99::9")}}, true, "no IPv6"},
		{"mac", network.Request{MAC: "02:00:00:00:00:01"}, false, ""},
		{"mac form", network.Request{MAC: "02-00"}, false, "not of the form"},
		{"mac multicast", network.Request{MAC: "01:00:00:00:00:01"}, false, "unicast"},
		{"mac zero", network.Request{MAC: "00:00:00:00:00:00"}, false, "unicast"},
		{"mac of the bridge", network.Request{MAC: (&Driver{}).bridgeMAC().String()}, false, "that of the bridge"},
		{"mac length", network.Request{MAC: "02:00:00:00:00:00:00:01"}, false, "unicast"},
		{"bandwidth", network.Request{Bandwidth: network.Bandwidth{Ingress: 8000, Egress: 1e15}}, false, ""},
		{"bandwidth too low", network.Request{Bandwidth: network.Bandwidth{Ingress: 7999}}, false, "bandwidth of 7999"},
		{"bandwidth too high", network.Request{Bandwidth: network.Bandwidth{Egress: 1e15 + 1}}, false, "bandwidth of 1000000000000001"},
		{"networks", network.Request{Attach: []network.Attach{{Network: "lan"}}}, false, "network lan"},
		{"cni argument", network.Request{CNIArgs: [][2]string{{"A", "B"}}}, false, "CNI argument A"},
		{"port", port(tcp, on("127.0.0.1", network.Port{HostPort: 80, Port: 1, Protocol: network.UDP})), false, ""},
		{"same port", port(tcp, tcp), false, "published twice"},
		{"same port, one address", port(tcp, on("127.0.0.1", tcp)), false, "published twice"},
		{"same port, every IPv4", port(on("0.0.0.0", tcp), on("127.0.0.1", tcp)), false, "published twice"},
		{"two addresses", port(on("127.0.0.2", tcp), on("127.0.0.1", tcp)), false, ""},
		{"two families", port(on("0.0.0.0", tcp), on("::", tcp)), false, ""},
		{"port 0", port(network.Port{HostPort: 80, Protocol: network.TCP}), false, "port 0"},
		{"protocol", port(network.Port{HostPort: 80, Port: 80, Protocol: "dccp"}), false, `"dccp"`},
		{"IPv6 host address", port(on("::1", tcp)), true, "no IPv6"},
		{"zone", port(on("fe80::1%eth0", tcp)), false, "not an address"},
		{"multicast", port(on("224.0.0.1", tcp)), false, "not an address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &Driver{opts: Options{Subnet: testSubnet, Subnet6: testSubnet6}, log: slog.New(slog.DiscardHandler)}
			if tt.only4 {
				d.opts.Subnet6 = netip.Prefix{}
			}
			err := d.check(&tt.req)
			if ok := tt.want == ""; ok != (err == nil) || !ok && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("check = %v, want %q", err, tt.want)
			}
		})
	}
	d := &Driver{opts: Options{Subnet: testSubnet}}
	for _, id := range []string{"", "0123", "0123456789abcdeg", "../../../../etc"} {
		if _, err := d.Plan(t.Context(), id, &network.Request{}); !errors.Is(err, netsetup.ErrInvalid) {
			t.Errorf("id %q: %v", id, err)
		}
	}
}

func TestNames(t *testing.T) {
	const id = "0123456789abcdef"
	if got := hostName(id); got != "sb0123456789ab" || len(got) > 15 {
		t.Errorf("hostName = %s", got)
	}
	if got := macOf(netip.MustParseAddr("10.99.0.2")).String(); got != "02:5b:0a:63:00:02" {
		t.Errorf("macOf = %s", got)
	}
	if got := gateway(testSubnet6).String(); got != "fd99::1" {
		t.Errorf("gateway = %s", got)
	}
	for in, want := range map[string]string{"10.99.0.0/24": "10.99.0.255", "10.88.0.0/16": "10.88.255.255", "10.1.0.8/29": "10.1.0.15"} {
		if got := broadcast(netip.MustParsePrefix(in)).String(); got != want {
			t.Errorf("broadcast(%s) = %s, want %s", in, got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	good := Options{Bridge: "sbtest0", Subnet: testSubnet, Subnet6: testSubnet6, Mark: "0123"}
	for name, mod := range map[string]func(*Options){
		"mark":          func(o *Options) { o.Mark = "a b" },
		"no bridge":     func(o *Options) { o.Bridge = "" },
		"long bridge":   func(o *Options) { o.Bridge = "abcdefghijklmnop" },
		"bridge path":   func(o *Options) { o.Bridge = "../x" },
		"no subnet":     func(o *Options) { o.Subnet = netip.Prefix{} },
		"small subnet":  func(o *Options) { o.Subnet = netip.MustParsePrefix("10.0.0.0/31") },
		"IPv6 subnet":   func(o *Options) { o.Subnet = testSubnet6 },
		"IPv4 subnet6":  func(o *Options) { o.Subnet6 = testSubnet },
		"small subnet6": func(o *Options) { o.Subnet6 = netip.MustParsePrefix("fd99::/127") },
	} {
		o := good
		o.Root = t.TempDir()
		mod(&o)
		if d, err := New(o); err == nil {
			d.Close()
			t.Errorf("%s is accepted", name)
		}
	}
}

func FuzzDecodePlan(f *testing.F) {
	f.Add([]byte(`{"ports":[{"hostPort":8080,"port":80,"protocol":"tcp"}],"addresses":["10.0.0.1"],"isolated":true}`))
	f.Add([]byte(`{"x":1}`))
	f.Add([]byte(`{"bandwidth":{"ingress":1}} {}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := decodePlan(raw)
		if err != nil {
			return
		}
		b, err := json.Marshal(p)
		if err == nil {
			_, err = decodePlan(b)
		}
		if err != nil {
			t.Errorf("a plan that was read cannot be written and read again: %v", err)
		}
	})
}
