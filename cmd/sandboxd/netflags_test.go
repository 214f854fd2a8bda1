package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandboxd/sandboxd/internal/network"
)

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestParsePublish(t *testing.T) {
	for text, want := range map[string]network.Port{
		"8080:80":             {HostPort: 8080, Port: 80, Protocol: network.TCP},
		"53:53/udp":           {HostPort: 53, Port: 53, Protocol: network.UDP},
		"9:9/SCTP":            {HostPort: 9, Port: 9, Protocol: network.SCTP},
		"127.0.0.1:8080:80":   {HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, Port: 80, Protocol: network.TCP},
		"[fd00::1]:80:80/tcp": {HostIP: netip.MustParseAddr("fd00::1"), HostPort: 80, Port: 80, Protocol: network.TCP},
		"0:80":                {Port: 80, Protocol: network.TCP},
	} {
		got, err := parsePublish(text)
		if err != nil || !cmp.Equal(got, want, sameAddr) {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "80", ":80", "80:", "80:0", "80:65536", "-1:80", "80:80/icmp", "80:80/", "fd00::1:80:80", "[127.0.0.1]:80:80", "[fd00::1:80:80",
		"x:80:80", "1.2.3:80:80", "80:80:80:80", "80 :80",
	} {
		if got, err := parsePublish(text); err == nil {
			t.Errorf("%q is %+v", text, got)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzParsePublish(f *testing.F) {
	f.Add("127.0.0.1:8080:80/tcp")
	f.Add("[::1]:1:2/udp")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := parsePublish(text)
		if err == nil && (p.Port == 0 || p.Protocol == "") {
			t.Errorf("%q is %+v", text, p)
		}
	})
}

func TestParseNet(t *testing.T) {
	for text, want := range map[string][]network.Attach{
		"builtin": nil, "none": nil, "host": nil, "cni": nil,
		"cni:lan":               {{Network: "lan"}},
		"cni:lan,storage:store": {{Network: "lan"}, {Network: "storage", Interface: "store"}},
	} {
		q := networkRequest{Request: network.Request{MAC: "kept", Attach: []network.Attach{{Network: "old"}}}}
		mode, _, _ := strings.Cut(text, ":")
		if err := parseNet(text, &q); err != nil || string(q.mode) != mode || q.MAC != "kept" || !cmp.Equal(q.Attach, want) {
			t.Errorf("%s: %+v, %v", text, q, err)
		}
	}
	for _, text := range []string{"", "bridge", "builtin:x", "host:x", "cni:", "cni:a,", "cni:,a", "cni:a:", "cni::eth0"} {
		if err := parseNet(text, new(networkRequest)); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

func TestParseBandwidth(t *testing.T) {
	for text, want := range map[string]network.Bandwidth{
		"ingress=10M":            {Ingress: 10e6},
		"egress=1g,ingress=500k": {Ingress: 500e3, Egress: 1e9},
		"egress=7":               {Egress: 7},
	} {
		if got, err := parseBandwidth(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "10M", "ingress=", "ingress=0", "ingress=1,ingress=2", "up=1", "ingress=1t", "ingress=-1", "ingress=99999999999999999999", "ingress=99999999999g"} {
		if got, err := parseBandwidth(text); err == nil {
			t.Errorf("%q is %+v", text, got)
		}
	}
}

func TestParseSubnets(t *testing.T) {
	for _, s := range []string{"", "10.88.0.0", "10.88.0.1/16", "10.88.0.0/30", "fd00::/64", "10.88.0.0/33"} {
		if p, err := parseSubnet(s); err == nil {
			t.Errorf("%q is %v", s, p)
		}
	}
	for _, s := range []string{"", "fd00::", "fd00::1/64", "10.88.0.0/16", "fd00::/121", "::ffff:10.0.0.0/104"} {
		if p, err := parseSubnet6(s); err == nil {
			t.Errorf("%q is %v", s, p)
		}
	}
	if _, err := parseSubnet("10.88.0.0/16"); err != nil {
		t.Error(err)
	}
	if _, err := parseSubnet6("fd00:88::/64"); err != nil {
		t.Error(err)
	}
}
