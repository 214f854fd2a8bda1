package cni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

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
			if kind == "ptp" && version != "1.1.0" {
				return // its code is that of bridge, and each attachment takes a second
			}
			six := kind == "bridge" && version == "1.1.0" // plugins wait for duplicate address detection
			ranges := `[{"subnet":"10.99.0.0/24"}]`
			if six {
				ranges += `,[{"subnet":"fd99::/64"}]`
			}
			r := newRig(t, dir)
			r.config("10-a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[
				{"type":"`+kind+`","bridge":"cbr0","isGateway":true,"ipMasq":true,
				"ipam":{"type":"host-local","dataDir":"LEASES","ranges":[`+ranges+`]}}]}`)
			const id = "0123456789abcdef"
			plan := r.plan(id, network.Request{})
			rules := func() string {
				return in(t, nil, "nft", "list", "ruleset") + in(t, nil, "iptables-save") + in(t, nil, "ip6tables-save")
			}
			for _, gone := range []string{"interface", "namespace", "everything, by a reboot"} {
				ns := newNS(t)
				r.attach(id, plan, ns)
				if !strings.Contains(rules(), "10.99.0.") || six != strings.Contains(rules(), "fd99::") {
					t.Fatalf("no rules: %s", rules())
				}
				in(t, ns, "ip", "link", "del", "eth0")
				if err := r.Verify(t.Context(), id, plan, ns); err == nil || !strings.Contains(err.Error(), "no interface eth0 any more") {
					t.Errorf("Verify: %v", err)
				}
				if gone != "interface" {
					ns = nil
				}
				if gone != "interface" && gone != "namespace" {
					in(t, nil, "nft", "flush", "ruleset")
					for _, l := range links(t, nil) {
						in(t, nil, "ip", "link", "del", l)
					}
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

// Plugins that free nothing, or fail, without a namespace: it is gone with the pause.
func TestNamespaceIsGone(t *testing.T) {
	ipam := `"ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}`
	for name, plugins := range map[string]string{
		"host-device": `{"type":"host-device","device":"device",` + ipam + `}`,
		"sbr":         `{"type":"bridge","bridge":"cbr0","isGateway":true,` + ipam + `},{"type":"sbr"}`,
	} {
		t.Run(name, func(t *testing.T) {
			eachSet(t, func(t *testing.T, dir, version string) {
				in(t, nil, "ip", "link", "add", "device", "type", "veth", "peer", "name", "other-end")
				t.Cleanup(func() { exec.Command("ip", "link", "del", "other-end").Run() })
				r := newRig(t, dir)
				r.config("10-a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[`+plugins+`]}`)
				ns := newNS(t)
				plan := r.plan(id, network.Request{})
				r.attach(id, plan, ns)
				if len(r.leases()) != 1 {
					t.Fatalf("leases: %v", r.leases())
				}
				ns.Close()
				r.detach(id, plan, nil)
				r.wantNothingLeft()
			})
		})
	}
}

// A daemon that is killed before the result of a chain is on disk: DEL gets what
// the namespace has.
func TestNoResult(t *testing.T) {
	eachSet(t, func(t *testing.T, dir, version string) {
		r := newRig(t, dir)
		r.config("10-a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[
			{"type":"bridge","bridge":"cbr0","isGateway":true,"ipMasq":true,
			 "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
			{"type":"portmap","capabilities":{"portMappings":true},"snat":true},{"type":"firewall","backend":"iptables"}]}`)
		ns := newNS(t)
		plan := r.plan(id, network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}})
		r.attach(id, plan, ns)
		rules := func() string { return in(t, nil, "iptables-save") + in(t, nil, "nft", "list", "ruleset") }
		if !strings.Contains(rules(), "-A CNI-FORWARD -s 10.99.0.2/32") {
			t.Fatalf("no rules: %s", rules())
		}
		if err := os.RemoveAll(r.opts.Root); err != nil {
			t.Fatal(err)
		}
		r.detach(id, plan, ns)
		if rs := rules(); strings.Contains(rs, "10.99.0.2") {
			t.Errorf("rules left: %s", rs)
		}
		if l := append(r.leases(), links(t, ns)...); len(l) > 0 {
			t.Errorf("left: %v", l)
		}
	})
}

// outside makes a namespace that stands for the network beyond the host, joined by
// the link "uplink", and returns it. Its address is 10.98.0.1/24.
func outside(t *testing.T) *os.File {
	ns := newNS(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	uplink := &netlink.Veth{LinkAttrs: attrs, PeerName: "beyond", PeerNamespace: netlink.NsFd(ns.Fd())}
	if err := netlink.LinkAdd(uplink); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(uplink) })
	if err := netlink.LinkSetUp(uplink); err != nil {
		t.Fatal(err)
	}
	within(t, ns, func() error {
		l, err := netlink.LinkByName("beyond")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr("10.98.0.1/24")
		return errors.Join(err, netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
	})
	return ns
}

// ruleset is what there is in nftables, rules of iptables among them.
func ruleset(t *testing.T) string { return in(t, nil, "nft", "list", "ruleset") }

// Each plugin is run for real, with traffic where it is about traffic; what it
// made on the host is gone afterwards.
func TestPlugins(t *testing.T) {
	ports := []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}
	ipam := `"ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}`
	bridge := `{"type":"bridge","bridge":"cbr0","isGateway":true,"capabilities":{"mac":true},` + ipam + `}`
	tests := []struct {
		name    string
		plugins string
		today   bool // Debian's do not have it
		req     network.Request
		check   func(t *testing.T, n network.Attachment, ns, beyond *os.File)
	}{
		{"ptp", `{"type":"ptp","ipMasq":true,` + ipam + `}`, false, network.Request{}, func(t *testing.T, n network.Attachment, ns, beyond *os.File) {
			in(t, nil, "ip", "addr", "add", "10.98.0.2/24", "dev", "uplink")
			serve(t, beyond, 81, "beyond")
			wantFetch(t, ns, "10.98.0.1:81", "beyond") // there is no way back but by masquerading
		}},
		{"portmap with iptables", bridge + `,{"type":"portmap","backend":"iptables","capabilities":{"portMappings":true}}`, false, network.Request{Ports: ports}, checkPublished},
		{"portmap with nftables", bridge + `,{"type":"portmap","backend":"nftables","capabilities":{"portMappings":true}}`, true, network.Request{Ports: ports}, checkPublished},
		{"macvlan and static", `{"type":"macvlan","master":"uplink","mode":"bridge","capabilities":{"mac":true},"ipam":{"type":"static","addresses":[{"address":"10.98.0.7/24"}]},"dns":{"nameservers":["10.98.0.53"]}}`, false,
			network.Request{MAC: "02:00:00:00:00:07"}, func(t *testing.T, n network.Attachment, ns, beyond *os.File) {
				if n.MAC != "02:00:00:00:00:07" || len(n.DNS.Servers) != 1 || !strings.Contains(in(t, ns, "ip", "link", "show", "eth0"), n.MAC) {
					t.Errorf("%+v", n)
				}
				serve(t, ns, 80, "hello")
				wantFetch(t, beyond, "10.98.0.7:80", "hello")
			}},
		{"bandwidth", bridge + `,{"type":"bandwidth","capabilities":{"bandwidth":true}}`, false,
			network.Request{Bandwidth: network.Bandwidth{Ingress: 8_000_000, Egress: 16_000_000}}, func(t *testing.T, n network.Attachment, ns, beyond *os.File) {
				// Debian's has no classes, so that tbf is at the root.
				if got := in(t, nil, "tc", "qdisc", "show"); strings.Count(got, "tbf")+strings.Count(got, "htb") < 2 {
					t.Errorf("qdiscs: %s", got)
				}
				serve(t, ns, 80, "hello")
				wantFetch(t, nil, n.Addresses[0].Addr().String()+":80", "hello")
			}},
		{"firewall", bridge + `,{"type":"firewall","backend":"iptables"}`, false, network.Request{}, func(t *testing.T, n network.Attachment, ns, beyond *os.File) {
			if got := ruleset(t); !strings.Contains(got, "CNI-FORWARD") || !strings.Contains(got, n.Addresses[0].Addr().String()) {
				t.Errorf("rules: %s", got)
			}
		}},
		{"tuning", bridge + `,{"type":"tuning","sysctl":{"net.ipv4.conf.IFNAME.rp_filter":"2"},"mtu":1400,"promisc":true,"capabilities":{"mac":true}}`, false,
			network.Request{MAC: "02:00:00:00:00:09"}, func(t *testing.T, n network.Attachment, ns, beyond *os.File) {
				got := in(t, ns, "ip", "link", "show", "eth0") + in(t, ns, "cat", "/proc/sys/net/ipv4/conf/eth0/rp_filter")
				for _, want := range []string{"mtu 1400", "PROMISC", "02:00:00:00:00:09", "\n2\n"} {
					if !strings.Contains(got, want) {
						t.Errorf("%s is not %s", got, want)
					}
				}
				if n.MTU != 1400 || n.MAC != "02:00:00:00:00:09" {
					t.Errorf("%+v", n)
				}
			}},
		{"loopback", `{"type":"loopback"}`, false, network.Request{}, func(t *testing.T, n network.Attachment, ns, beyond *os.File) {
			if n.Interface != "lo" || !slices.Contains(n.Addresses, netip.MustParsePrefix("127.0.0.1/8")) {
				t.Errorf("%+v", n)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachSet(t, func(t *testing.T, dir, version string) {
				if tt.today && version != "1.1.0" {
					return
				}
				beyond := outside(t)
				r := newRig(t, dir)
				r.config("a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[`+tt.plugins+`]}`)
				if err := r.Status(t.Context()); err != nil {
					t.Errorf("Status: %v", err)
				}
				ns := newNS(t)
				plan := r.plan(id, tt.req)
				// The first use leaves chains and a bridge; the second must leave nothing more.
				r.attach(id, plan, ns)
				r.detach(id, plan, ns)
				rules, before := ruleset(t), links(t, nil)
				res := r.attach(id, plan, ns)
				tt.check(t, res.Networks[0], ns, beyond)
				if err := r.Verify(t.Context(), id, plan, ns); err != nil && !oldCheck(tt.name, version) {
					t.Errorf("Verify: %v", err)
				}
				r.detach(id, plan, ns)
				r.wantNothingLeft()
				if after := links(t, nil); !slices.Equal(before, after) {
					t.Errorf("links %v, before %v", after, before)
				}
				if after := links(t, ns); len(after) > 0 {
					t.Errorf("links in the sandbox: %v", after)
				}
				if after := ruleset(t); counters(after) != counters(rules) {
					t.Errorf("rules\n%s\nbefore\n%s", after, rules)
				}
			})
		})
	}
}

// oldCheck reports whether CHECK of an old plugin has a bug that is mended since.
func oldCheck(name, version string) bool {
	return version == "1.0.0" && (strings.HasPrefix(name, "portmap") || // looks for IPv4's rules in IPv6's table
		name == "tuning") // takes IFNAME in a sysctl for a name
}

func checkPublished(t *testing.T, n network.Attachment, ns, beyond *os.File) {
	t.Helper()
	in(t, nil, "ip", "addr", "replace", "10.98.0.2/24", "dev", "uplink")
	serve(t, ns, 80, "hello")
	wantFetch(t, nil, "127.0.0.1:8080", "hello")
	wantFetch(t, beyond, "10.98.0.2:8080", "hello")
}

// Not with the others, since this runs in the virtual machine too, which has no
// programs but the plugins.
func TestIPVLAN(t *testing.T) {
	testenv.Kernel(t, testenv.IPVLAN)
	eachSet(t, func(t *testing.T, dir, version string) {
		beyond := outside(t)
		r := newRig(t, dir)
		r.config("a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[{"type":"ipvlan","master":"uplink","ipam":{"type":"static"}}]}`)
		ns := newNS(t)
		plan := r.plan(id, network.Request{CNIArgs: [][2]string{{"IP", "10.98.0.8/24"}, {"UNKNOWN", "x"}}})
		r.attach(id, plan, ns)
		serve(t, ns, 80, "hello")
		wantFetch(t, beyond, "10.98.0.8:80", "hello")
		if err := r.Verify(t.Context(), id, plan, ns); err != nil {
			t.Errorf("Verify: %v", err)
		}
		r.detach(id, plan, ns)
		r.wantNothingLeft()
		if left := links(t, ns); len(left) > 0 {
			t.Errorf("links in the sandbox: %v", left)
		}
	})
}

// counters removes counters and handles from a listing of nft.
func counters(s string) string {
	var out []string
	for line := range strings.SplitSeq(s, "\n") {
		f := strings.Fields(line)
		for i := 1; i < len(f); i++ {
			if f[i-1] == "packets" || f[i-1] == "bytes" {
				f[i] = "N"
			}
		}
		out = append(out, strings.Join(f, " "))
	}
	return strings.Join(out, "\n")
}

// The dhcp plugin asks a daemon of its own, which asks a server beyond the host.
func TestDHCP(t *testing.T) {
	dnsmasq := testenv.Program(t, "dnsmasq")
	eachSet(t, func(t *testing.T, dir, version string) {
		beyond := outside(t)
		r := newRig(t, dir)
		start := func(cmd *exec.Cmd) *buffer {
			t.Helper()
			out := &buffer{}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				cmd.Process.Kill()
				cmd.Wait()
				if t.Failed() {
					t.Logf("%v: %s", cmd, out)
				}
			})
			return out
		}
		leases := filepath.Join(r.dir, "dnsmasq.leases")
		server := exec.Command("nsenter", "--net=/proc/self/fd/3", "--", dnsmasq, "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping",
			"--interface=beyond", "--bind-interfaces", "--user=root", "--pid-file=", "--dhcp-range=10.98.0.100,10.98.0.101,1h", "--dhcp-leasefile="+leases,
			"--dhcp-option=option:router,10.98.0.1", "--dhcp-option=option:dns-server,10.98.0.53", "--dhcp-authoritative", "--log-facility=-")
		server.ExtraFiles = []*os.File{beyond}
		start(server)
		socket := filepath.Join(r.dir, "dhcp.sock")
		said := start(exec.Command(filepath.Join(dir, "dhcp"), "daemon", "-socketpath", socket))
		eventually(t, func() bool {
			c, err := net.Dial("unix", socket)
			if err == nil {
				c.Close()
			}
			return err == nil
		}, func() string { return "the daemon of dhcp does not answer" })
		r.config("a.conflist", fmt.Sprintf(`{"cniVersion":%q,"name":"a","plugins":[{"type":"macvlan","master":"uplink","ipam":{"type":"dhcp","daemonSocketPath":%q}}]}`, version, socket))
		ns := newNS(t)
		plan := r.plan(id, network.Request{})
		n := r.attach(id, plan, ns).Networks[0]
		if len(n.Addresses) != 1 || !netip.MustParsePrefix("10.98.0.100/31").Contains(n.Addresses[0].Addr()) || len(n.Gateway) == 0 || n.Gateway[0].String() != "10.98.0.1" {
			t.Errorf("%+v", n)
		}
		serve(t, ns, 80, "hello")
		wantFetch(t, beyond, n.Addresses[0].Addr().String()+":80", "hello")
		if got, err := os.ReadFile(leases); err != nil || !strings.Contains(string(got), n.Addresses[0].Addr().String()) {
			t.Errorf("the server has given %q, %v", got, err)
		}
		r.detach(id, plan, ns)
		r.wantNothingLeft()
		// Whether the message reaches the server before the interface is gone is up to the plugins.
		eventually(t, func() bool { return strings.Contains(said.String(), "releasing lease") }, func() string { return "the lease was not released: " + said.String() })
	})
}
