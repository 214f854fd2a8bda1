package cni

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/netsetup"
)

func addrs(list string) (as []netip.Addr) {
	for s := range strings.FieldsSeq(list) {
		as = append(as, netip.MustParseAddr(s))
	}
	return as
}

func TestPlan(t *testing.T) {
	all := `"capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"ips":true,"mac":true,"aliases":true}`
	c := &config{dir: "/conf"}
	for _, text := range []string{
		`{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x",` + all + `},{"type":"y"}]}`,
		`{"cniVersion":"1.1.0","name":"b","plugins":[{"type":"x"},{"type":"y",` + all + `}]}`,
		`{"cniVersion":"1.1.0","name":"plain","plugins":[{"type":"x","capabilities":{"ips":false}}]}`,
	} {
		n, err := parse([]byte(text), nothingMore)
		if err != nil {
			t.Fatal(err)
		}
		c.networks = append(c.networks, *n)
	}
	c.problems = []Problem{{"z.conf", errors.New("is broken")}}
	ports := []network.Port{
		{HostPort: 8080, Port: 80, Protocol: network.TCP}, {HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 53, Port: 53, Protocol: network.UDP},
	}
	attach := func(names ...string) (as []network.Attach) {
		for _, n := range names {
			name, ifname, _ := strings.Cut(n, ":")
			as = append(as, network.Attach{Network: name, Interface: ifname})
		}
		return as
	}
	tests := []struct {
		name string
		req  network.Request
		want string // network, interface and capability arguments of each
		err  string
	}{
		{"default", network.Request{}, `a eth0 {}`, ""},
		{"named", network.Request{Attach: attach("b")}, `b eth0 {}`, ""},
		{"several", network.Request{Attach: attach("b", "a:net1", "plain", "b:eth0", "a")}, `b eth1 {}, a net1 {}, plain eth2 {}, b eth0 {}, a eth3 {}`, ""},
		{"ports", network.Request{Attach: attach("plain", "a", "b"), Ports: ports},
			`plain eth0 {}, a eth1 {"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}]}, b eth2 {}`, ""},
		{"addresses", network.Request{Attach: attach("a", "b"), Addresses: addrs("10.0.0.2 10.1.0.2 fd00::2")},
			`a eth0 {"ips":["10.0.0.2","fd00::2"]}, b eth1 {"ips":["10.1.0.2"]}`, ""},
		{"mac", network.Request{Attach: attach("plain", "b", "a"), MAC: "02:00:00:00:00:0A"}, `plain eth0 {}, b eth1 {"mac":"02:00:00:00:00:0a"}, a eth2 {}`, ""},
		{"bandwidth", network.Request{Bandwidth: network.Bandwidth{Ingress: 100_000_000, Egress: 1000}},
			`a eth0 {"bandwidth":{"ingressRate":100000000,"ingressBurst":10000000,"egressRate":1000,"egressBurst":524288}}`, ""},
		{"bandwidth one way, large", network.Request{Bandwidth: network.Bandwidth{Ingress: 1 << 62}},
			`a eth0 {"bandwidth":{"ingressRate":4611686018427387904,"ingressBurst":4294967295}}`, ""},
		{"dns", network.Request{Attach: attach("a", "plain", "b"), DNS: network.DNS{Servers: addrs("1.1.1.1"), Search: []string{"s"}, Options: []string{"ndots:1"}}},
			`a eth0 {"dns":{"servers":["1.1.1.1"],"searches":["s"],"options":["ndots:1"]}}, plain eth1 {}, b eth2 {"dns":{"servers":["1.1.1.1"],"searches":["s"],"options":["ndots:1"]}}`, ""},
		{"dns that no plugin wants", network.Request{Attach: attach("plain"), DNS: network.DNS{Search: []string{"s"}}}, `plain eth0 {}`, ""},

		{"unknown network", network.Request{Attach: attach("no")}, "", `there is no CNI network "no" in /conf, which has: a, b, plain; z.conf: is broken`},
		{"interface twice", network.Request{Attach: attach("a:x", "b:x")}, "", `interface "x": the sandbox has one of that name already`},
		{"lo", network.Request{Attach: attach("a:lo")}, "", `interface "lo"`},
		{"long name", network.Request{Attach: attach("a:a234567890123456")}, "", "interface name is too long"},
		{"path as a name", network.Request{Attach: attach("a:a/b")}, "", "contains /"},
		{"isolated", network.Request{Isolated: true}, "", "cannot be isolated"},
		{"ports without plugin", network.Request{Attach: attach("plain"), Ports: ports}, "", "published ports: no plugin of CNI network plain declares the capability portMappings"},
		{"addresses without plugin", network.Request{Attach: attach("plain"), Addresses: addrs("10.0.0.2")}, "", "static address: no plugin"},
		{"too many addresses", network.Request{Addresses: addrs("10.0.0.2 10.0.0.3")}, "", "address 10.0.0.3 is one more"},
		{"mac and bandwidth without plugin", network.Request{Attach: attach("plain"), MAC: "02:00:00:00:00:01", Bandwidth: network.Bandwidth{Egress: 1}}, "",
			"static MAC address: no plugin of CNI network plain declares the capability mac\nbandwidth: no plugin"},
		{"bad mac", network.Request{MAC: "02:00:00:00:00:01:02:03"}, "", "is not a MAC address"},
		{"argument with a semicolon", network.Request{CNIArgs: [][2]string{{"a", "b;c"}}}, "", `CNI argument "a=b;c"`},
		{"argument without a key", network.Request{CNIArgs: [][2]string{{"", "b"}}}, "", `CNI argument "=b"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := newPlan(c, &tt.req)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !errors.Is(err, netsetup.ErrInvalid) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, a := range p.Networks {
				caps, err := json.Marshal(a.Capabilities)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, a.Network+" "+a.Interface+" "+string(caps))
			}
			if s := strings.Join(got, ", "); s != tt.want {
				// Keys of one argument are in the order of its fields, those of arguments are sorted.
				t.Errorf("got  %s\nwant %s", s, tt.want)
			}
		})
	}
	if _, err := newPlan(&config{dir: "/conf", problems: c.problems}, &network.Request{}); err == nil || !strings.Contains(err.Error(), "there is no CNI network in /conf; z.conf: is broken") {
		t.Errorf("without a network: %v", err)
	}
	r := newRig(t)
	r.config("a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"absent"}]}`)
	if _, err := r.Plan(t.Context(), id, &network.Request{}); !errors.Is(err, netsetup.ErrInvalid) || !strings.Contains(err.Error(), `there is no plugin "absent" in `+r.dir+"/bin") {
		t.Errorf("a plugin that is not installed: %v", err)
	}
	absent := filepath.Join(r.dir, "bin", "absent")
	if err := os.WriteFile(absent, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Plan(t.Context(), id, &network.Request{}); !errors.Is(err, netsetup.ErrInvalid) || !strings.Contains(err.Error(), "plugin "+absent+" is not executable") {
		t.Errorf("a plugin that cannot be executed: %v", err)
	}
}

// A plugin that does not know the version of the configuration would refuse DEL as
// it refuses ADD, and the network would wait to be taken down for ever. That one
// does not tell which versions it knows is for its ADD to explain.
func TestPlanVersion(t *testing.T) {
	r := newRig(t)
	r.config("a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"one"}]}`)
	r.plugin("one", `echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}'`)
	_, err := r.Plan(t.Context(), id, &network.Request{})
	if !errors.Is(err, netsetup.ErrInvalid) || !strings.Contains(err.Error(), "/bin/one knows versions 0.4.0, 1.0.0, and not the configuration's 1.1.0") {
		t.Errorf("Plan: %v", err)
	}
	if err != nil && strings.Contains(err.Error(), netsetup.ErrInvalid.Error()) {
		t.Errorf("Plan: %v says twice that it failed", err)
	}
	r.plugin("one", "exit 1")
	r.plan(id, network.Request{})
}

// portmap itself would let two sandboxes have one port.
func TestPublishedTwice(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	r.config("a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"one","capabilities":{"portMappings":true}}]}`)
	ns := newNS(t)
	req := network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}, {Port: 80, Protocol: network.UDP}}}
	plan, same := r.plan(alive, req), r.plan(dead, req)
	res := r.attach(alive, plan, ns)
	if got := res.Networks[0].Ports; len(got) != 2 || got[1].HostPort == 0 || req.Ports[1].HostPort != 0 {
		t.Errorf("ports %v of %v", got, req.Ports)
	}
	want := "port 8080/tcp of the host is taken by sandbox " + alive
	if _, err := r.Attach(t.Context(), dead, same, ns); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Attach: %v", err)
	}
	r.detach(dead, same, ns)
	r.Close()
	r.open()
	if err := r.Restore(t.Context(), alive, plan, ns); err != nil {
		t.Error(err)
	}
	if _, err := r.Plan(t.Context(), dead, &req); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Plan: %v", err)
	}
	r.detach(alive, plan, ns)
	r.attach(dead, same, ns)
	r.detach(dead, same, ns)
	if _, err := r.Plan(t.Context(), dead, &network.Request{Ports: []network.Port{{HostPort: 80, Protocol: network.TCP}}}); !errors.Is(err, netsetup.ErrInvalid) {
		t.Errorf("port 0 of the sandbox: %v", err)
	}
	r.wantNothingLeft()
}
