package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// How long to wait for an answer, and for the absence of one.
const (
	soon  = 5 * time.Second
	never = 300 * time.Millisecond
)

// newOutside returns a namespace that is connected to the host by a device up<n> of
// the host, which has the addresses 192.0.<n>.1 and 2001:db8:<n>::1; outside has
// those with 2. Network 2 is where the host's default routes lead.
func newOutside(t *testing.T, n int) *os.File {
	t.Helper()
	ns := newNS(t)
	name := fmt.Sprintf("up%d", n)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, 1420
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			netlink.LinkDel(l)
		}
	})
	configure := func(dev string, host int) error {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		for _, set := range [][2]string{{"accept_dad", "0"}, {"addr_gen_mode", "1"}} { // no other addresses, and none later
			if err := writeSysctl("net/ipv6/conf/"+dev+"/"+set[0], set[1]); err != nil {
				return err
			}
		}
		for _, a := range []string{fmt.Sprintf("192.0.%d.%d/24", n, host), fmt.Sprintf("2001:db8:%d::%d/64", n, host)} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			if addr.IP.To4() == nil {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil || n != 2 && host == 1 {
			return err
		}
		for _, gw := range []string{fmt.Sprintf("192.0.%d.%d", n, 3-host), fmt.Sprintf("2001:db8:%d::%d", n, 3-host)} {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
				return err
			}
		}
		return nil
	}
	if err := configure(name, 1); err != nil {
		t.Fatal(err)
	}
	inside(t, ns, func() error { return configure("eth0", 2) })
	// The kernel adds a route when it has seen that the link is up.
	eventually(t, func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		if err == nil && !slices.ContainsFunc(routes, func(r netlink.Route) bool { return prefixOf(r.Dst).Addr().String() == fmt.Sprintf("2001:db8:%d::1", n) }) {
			err = fmt.Errorf("%s does not come up", name)
		}
		return err
	})
	return ns
}

// withBridgeNetfilter runs f without and, if the kernel has it, with br_netfilter's
// look at bridged packets.
func withBridgeNetfilter(t *testing.T, f func(t *testing.T, on bool)) {
	const dir = "/proc/sys/net/bridge/bridge-nf-call-ip"
	_, err := os.Stat(dir + "tables")
	for _, on := range []bool{false, true} {
		t.Run(fmt.Sprintf("br_netfilter=%t", on), func(t *testing.T) {
			if on {
				testenv.Kernel(t, testenv.BridgeNetfilter)
			}
			for _, s := range []string{"tables", "6tables"} {
				if err == nil {
					os.WriteFile(dir+s, []byte(map[bool]string{true: "1", false: "0"}[on]), 0)
				}
			}
			f(t, on)
		})
	}
}

func expect(t *testing.T, who string, ns *os.File, network, addr, want string) {
	t.Helper()
	wait := soon
	if want == "" {
		wait = never
	}
	got, err := fetch(ns, network, addr, wait)
	switch {
	case want == "" && err == nil && got != "":
		t.Errorf("%s reaches %s %s: %q", who, network, addr, got)
	case want != "" && (err != nil || got != want):
		t.Errorf("%s, %s %s: %q, %v; want %q", who, network, addr, got, err, want)
	}
}

func TestPublish(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	withBridgeNetfilter(t, func(t *testing.T, on bool) {
		d := newDriver(t)
		a, res, _ := attach(t, d, idA, &network.Request{Ports: []network.Port{
			{HostPort: 8080, Port: 80, Protocol: network.TCP},
			{HostPort: 8080, Port: 81, Protocol: network.UDP},
			{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8082, Port: 80, Protocol: network.TCP},
			{HostIP: netip.MustParseAddr("2001:db8:2::1"), HostPort: 8083, Port: 80, Protocol: network.TCP},
			{HostIP: netip.MustParseAddr("0.0.0.0"), HostPort: 8084, Port: 80, Protocol: network.TCP},
		}})
		if mtu := res.Networks[0].MTU; mtu != 1420 {
			t.Errorf("MTU %d, want the uplink's 1420", mtu)
		}
		b, _, _ := attach(t, d, idB, &network.Request{})
		serve(t, a, "tcp", ":80", "A")
		// One socket for each address: a datagram's answer must come from where it was sent.
		serve(t, a, "udp", "10.99.0.2:81", "A")
		serve(t, a, "udp", "[fd99::2]:81", "A")

		for _, proto := range []string{"tcp", "udp"} {
			for _, addr := range []string{"127.0.0.1:8080", "127.0.0.2:8080", "192.0.2.1:8080"} {
				expect(t, "the host", nil, proto, addr, "A "+map[bool]string{true: "10.99.0.1", false: addr[:9]}[addr[:3] == "127"])
			}
			six := "A fd99::1"
			if on {
				six = ""
			}
			expect(t, "the host", nil, proto, "[::1]:8080", six)
			expect(t, "the host", nil, proto, "[2001:db8:2::1]:8080", "A 2001:db8:2::1")
			expect(t, "outside", outside, proto, "192.0.2.1:8080", "A 192.0.2.2")
			expect(t, "outside", outside, proto, "[2001:db8:2::1]:8080", "A 2001:db8:2::2")
			for who, ns := range map[string]*os.File{"A": a, "B": b} {
				for _, addr := range []string{"10.99.0.1:8080", "192.0.2.1:8080"} {
					expect(t, who, ns, proto, addr, "A 10.99.0.1")
				}
				for _, addr := range []string{"[fd99::1]:8080", "[2001:db8:2::1]:8080"} {
					expect(t, who, ns, proto, addr, "A fd99::1")
				}
			}
		}
		// Without translation.
		expect(t, "B", b, "tcp", "10.99.0.2:80", "A 10.99.0.3")
		expect(t, "B", b, "tcp", "[fd99::2]:80", "A fd99::3")
		expect(t, "the host", nil, "tcp", "10.99.0.2:80", "A 10.99.0.1")
		// Published on one address, or one family, only.
		expect(t, "the host", nil, "tcp", "127.0.0.1:8082", "A 10.99.0.1")
		expect(t, "outside", outside, "tcp", "192.0.2.1:8082", "")
		expect(t, "outside", outside, "tcp", "[2001:db8:2::1]:8083", "A 2001:db8:2::2")
		expect(t, "outside", outside, "tcp", "192.0.2.1:8083", "")
		expect(t, "outside", outside, "tcp", "192.0.2.1:8084", "A 192.0.2.2")
		expect(t, "outside", outside, "tcp", "[2001:db8:2::1]:8084", "")
		// Not published, with a route.
		expect(t, "outside", outside, "tcp", "10.99.0.2:80", "")
		expect(t, "outside", outside, "tcp", "[fd99::2]:80", "")

		// What leaves has the host's address.
		serve(t, outside, "tcp", ":90", "outside")
		expect(t, "B", b, "tcp", "192.0.2.2:90", "outside 192.0.2.1")
		expect(t, "B", b, "tcp", "[2001:db8:2::2]:90", "outside 2001:db8:2::1")
	})
}

// TestLoopbackIsSafe: that the bridge routes loopback addresses gives nobody in
// a sandbox a way to what listens on the host's loopback only.
func TestLoopbackIsSafe(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{})
	serve(t, nil, "tcp", "127.0.0.1:99", "host")
	serve(t, nil, "tcp", "[::1]:99", "host")
	sendLoopbackTo(t, a, gateway(testSubnet), gateway(testSubnet6))
	expect(t, "A", a, "tcp", "127.0.0.1:99", "")
	expect(t, "A", a, "tcp", "[::1]:99", "")
}

// sendLoopbackTo makes the namespace, which has eth0, send what is for 127.0.0.1
// and ::1 to gateways.
func sendLoopbackTo(t *testing.T, ns *os.File, gateways ...netip.Addr) {
	t.Helper()
	inside(t, ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := writeSysctl("net/ipv4/conf/eth0/route_localnet", "1"); err != nil {
			return err
		}
		// As long as lo has the addresses they are the namespace's own.
		addrs, err := netlink.AddrList(lo, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.AddrDel(lo, &a); err != nil {
				return err
			}
		}
		for _, gw := range gateways {
			dst := &net.IPNet{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)}
			if gw.Is4() {
				dst = &net.IPNet{IP: net.IPv4(127, 0, 0, 1), Mask: net.CIDRMask(32, 32)}
			}
			if err := netlink.RouteReplace(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: dst, Gw: gw.AsSlice()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestLoopbackIsTheHosts: nobody but the host reaches what is published on its
// loopback addresses, also not by sending it packets for them.
func TestLoopbackIsTheHosts(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	withBridgeNetfilter(t, func(t *testing.T, on bool) {
		d := newDriver(t)
		ports := []network.Port{
			{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, Port: 80, Protocol: network.TCP},
			{HostIP: netip.MustParseAddr("::1"), HostPort: 8080, Port: 80, Protocol: network.TCP},
		}
		if on { // the second one would answer nobody
			if _, err := d.Plan(t.Context(), idA, &network.Request{Ports: ports}); err == nil || !strings.Contains(err.Error(), "port [::1]:8080/tcp: nothing can be published on ::1") {
				t.Errorf("Plan = %v", err)
			}
			ports = ports[:1]
		}
		a, _, _ := attach(t, d, idA, &network.Request{Ports: ports})
		b, _, _ := attach(t, d, idB, &network.Request{})
		serve(t, a, "tcp", ":80", "A")
		sendLoopbackTo(t, outside, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1"))
		sendLoopbackTo(t, b, gateway(testSubnet), gateway(testSubnet6))
		for _, addr := range []string{"127.0.0.1:8080", "[::1]:8080"} {
			expect(t, "outside", outside, "tcp", addr, "")
			expect(t, "B", b, "tcp", addr, "")
		}
		expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
		if !on {
			expect(t, "the host", nil, "tcp", "[::1]:8080", "A fd99::1")
		}
	})
}

// TestLoopbackSource: a sandbox that sends with a loopback address as its own is
// not heard by the host, some of whose services trust those.
func TestLoopbackSource(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{})
	heard, err := net.ListenPacket("udp4", "10.99.0.1:99")
	if err != nil {
		t.Fatal(err)
	}
	defer heard.Close()
	inside(t, a, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := gateway(testSubnet).As4()
		for _, from := range []string{"127.0.0.1", "127.0.0.2", "10.99.0.2"} { // the last one is its own
			p := []byte{0x45, 0, 0, 28, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0, 12: 0, 19: 0, 21: 99, 23: 99, 25: 8, 27: 0}
			copy(p[12:], netip.MustParseAddr(from).AsSlice())
			copy(p[16:], to[:])
			if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: to}); err != nil {
				return err
			}
		}
		return nil
	})
	heard.SetReadDeadline(time.Now().Add(soon))
	if _, from, err := heard.ReadFrom(make([]byte, 10)); err != nil || from.String() != "10.99.0.2:99" {
		t.Errorf("the host hears %v, %v; want 10.99.0.2:99", from, err)
	}
}

// TestNoRouter: that the host passes on what is for sandboxes makes it no
// router between the networks that it is in.
func TestNoRouter(t *testing.T) {
	testenv.Root(t)
	one, two := newOutside(t, 2), newOutside(t, 3)
	d := newDriver(t)
	attach(t, d, idA, &network.Request{})
	serve(t, two, "tcp", ":90", "two")
	expect(t, "the host", nil, "tcp", "192.0.3.2:90", "two 192.0.3.1")
	expect(t, "one", one, "tcp", "192.0.3.2:90", "")
	expect(t, "one", one, "tcp", "[2001:db8:3::2]:90", "")
	if v, err := readSysctl("net/ipv4/ip_forward"); err != nil || v != "0" {
		t.Errorf("ip_forward is %q, %v: want it left alone", v, err)
	}
}

// TestLateUplink: a device that comes after the first sandbox gets what it needs.
func TestLateUplink(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}})
	serve(t, a, "tcp", ":80", "A")
	outside := newOutside(t, 2)
	eventually(t, func() error {
		got, err := fetch(outside, "tcp", "192.0.2.1:8080", never)
		if err == nil && got != "A 192.0.2.2" {
			err = fmt.Errorf("got %q", got)
		}
		return err
	})
	link, err := netlink.LinkByName("up2")
	if err != nil {
		t.Fatal(err)
	}
	netlink.LinkDel(link) // before the host is compared with what it was
}

// TestAnotherRouter: somebody makes bridges for guests of his own, and then a router of the
// host, as CNI's bridge plugin does it: what he passes on is none of our business any
// more, and stays on when we go. When he takes it back, we confine again.
func TestAnotherRouter(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	d := newDriver(t)
	a, _, raw := attach(t, d, idA, &network.Request{Ports: webPort})
	serve(t, a, "tcp", ":80", "A")
	claimed := func(six bool) (devices []string) {
		t.Helper()
		d.host.RLock()
		defer d.host.RUnlock()
		r, err := d.readHostRecord()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range r.Sysctls {
			if s.Six == six {
				devices = append(devices, s.Device)
			}
		}
		return devices
	}
	set := func(name, value string) {
		t.Helper()
		if err := writeSysctl(name, value); err != nil {
			t.Fatal(err)
		}
	}
	inSet := func(s *nftables.Set) (names []string) {
		t.Helper()
		err := d.nft.conns.use(func(c *nftables.Conn) error {
			vals, err := c.GetSetElements(reference(s))
			for _, v := range vals {
				names = append(names, unix.ByteSliceToString(v.Key))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	guest := newGuest(t, "lan0", 201)
	serve(t, guest, "tcp", ":90", "guest")
	// Events come in order: when the second uplink is claimed, the bridge was looked at.
	newOutside(t, 3)
	eventually(t, func() error {
		if names := inSet(d.nft.forward4); !slices.Contains(names, "up3") {
			return fmt.Errorf("forward4 has %v", names)
		}
		return nil
	})
	for _, s := range []*nftables.Set{d.nft.forward4, d.nft.forward6} {
		if names := inSet(s); slices.Contains(names, "lan0") {
			t.Errorf("%s has %v: a bridge of somebody's guests", s.Name, names)
		}
	}
	expect(t, "outside, before", outside, "tcp", "10.201.0.2:90", "")

	set("net/ipv4/ip_forward", "1")
	// Before Linux 6.17 we have set this ourselves.
	_, err := os.Stat("/proc/sys/" + forceForwarding(allDevices))
	six := err == nil
	if six {
		set("net/ipv6/conf/all/forwarding", "1")
	}
	eventually(t, func() error {
		if names := inSet(d.nft.forward4); len(names) > 0 {
			return fmt.Errorf("somebody else forwards, and forward4 has %v", names)
		}
		if names := inSet(d.nft.forward6); six && len(names) > 0 {
			return fmt.Errorf("somebody else forwards, and forward6 has %v", names)
		}
		return nil
	})
	eventually(t, func() error {
		if names := claimed(false); len(names) > 0 {
			return fmt.Errorf("somebody else forwards, and %v are claimed", names)
		}
		if names := claimed(true); six && len(names) > 0 {
			return fmt.Errorf("somebody else forwards, and %v are claimed for IPv6", names)
		}
		return nil
	})
	expect(t, "outside", outside, "tcp", "10.201.0.2:90", "guest 192.0.2.2")
	if six {
		expect(t, "outside", outside, "tcp", "[fd00:201::2]:90", "guest 2001:db8:2::2")
	}
	expect(t, "outside", outside, "tcp", "192.0.2.1:8080", "A 192.0.2.2")
	// A later route changes nothing.
	newGuest(t, "lan1", 202)
	expect(t, "outside, later", outside, "tcp", "10.201.0.2:90", "guest 192.0.2.2")

	set("net/ipv4/ip_forward", "0")
	if six {
		set("net/ipv6/conf/all/forwarding", "0")
	}
	eventually(t, func() error {
		got, err := fetch(outside, "tcp", "192.0.2.1:8080", never)
		if err == nil && got != "A 192.0.2.2" {
			err = fmt.Errorf("got %q", got)
		}
		return err
	})
	eventually(t, func() error {
		if names := claimed(false); !slices.Contains(names, "up2") {
			return fmt.Errorf("nobody else forwards any more, and %v are claimed", names)
		}
		if names := claimed(true); six && !slices.Contains(names, "up2") {
			return fmt.Errorf("nobody else forwards any more, and %v are claimed for IPv6", names)
		}
		return nil
	})
	expect(t, "outside, after", outside, "tcp", "10.201.0.2:90", "")

	// We go in the moment in which he comes.
	d.cancel()
	d.done.Wait()
	set("net/ipv4/ip_forward", "1")
	if err := d.Detach(t.Context(), idA, raw, a); err != nil {
		t.Fatal(err)
	}
	if err := settled(d); err != nil {
		t.Fatal(err)
	}
	if v, err := readSysctl("net/ipv4/conf/up2/forwarding"); v != "1" {
		t.Errorf("forwarding of up2 is %q, %v, after we went", v, err)
	}
	set("net/ipv4/ip_forward", "0")
	for _, name := range []string{"portlan0", "lan0", "portlan1", "lan1", "up3"} { // before the host is compared with what it was
		del(t, name)
	}
}

// TestDeviceTakenOut: who makes a router of the host, and has taken one of its devices out, is
// told that sandboxes miss it, and it stays as it is.
func TestDeviceTakenOut(t *testing.T) {
	testenv.Root(t)
	newOutside(t, 2)
	if err := writeSysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { writeSysctl("net/ipv4/ip_forward", "0") })
	const forwarding = "net/ipv4/conf/up2/forwarding"
	if err := writeSysctl(forwarding, "0"); err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	d := newDriver(t, func(o *Options) { o.Log = slog.New(slog.NewTextHandler(log, nil)) })
	attach(t, d, idA, &network.Request{})
	if v, err := readSysctl(forwarding); v != "0" {
		t.Errorf("%s is %q, %v", forwarding, v, err)
	}
	if s := log.String(); !strings.Contains(s, "device=up2") {
		t.Errorf("log:\n%s", s)
	}
}

// newGuest returns a namespace that is a port of a new bridge of the host's: a network
// 10.<n>.0.0/24 and fd00:<n>::/64, in which the host has the address 1, and the guest 2.
func newGuest(t *testing.T, bridge string, n int) *os.File {
	t.Helper()
	ns := newNS(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridge
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, name := range []string{"port" + bridge, bridge} {
			if l, err := netlink.LinkByName(name); err == nil {
				netlink.LinkDel(l)
			}
		}
	})
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	attrs = netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = "port"+bridge, br.Attrs().Index
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}); err != nil {
		t.Fatal(err)
	}
	if err := setUp(attrs.Name); err != nil {
		t.Fatal(err)
	}
	configure := func(dev string, host int) error {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, a := range []string{fmt.Sprintf("10.%d.0.%d/24", n, host), fmt.Sprintf("fd00:%d::%d/64", n, host)} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			if addr.IP.To4() == nil {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		return nil
	}
	inside(t, ns, func() error {
		if err := configure("eth0", 2); err != nil {
			return err
		}
		for _, gw := range []string{fmt.Sprintf("10.%d.0.1", n), fmt.Sprintf("fd00:%d::1", n)} {
			if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)}); err != nil {
				return err
			}
		}
		return nil
	})
	if err := configure(bridge, 1); err != nil {
		t.Fatal(err)
	}
	return ns
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

func TestIsolated(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	serve(t, outside, "tcp", ":90", "outside")
	withBridgeNetfilter(t, func(t *testing.T, _ bool) {
		d := newDriver(t)
		port := func(host uint16) []network.Port {
			return []network.Port{{HostPort: host, Port: 80, Protocol: network.TCP}}
		}
		a, _, _ := attach(t, d, idA, &network.Request{Isolated: true, Ports: port(8080)})
		b, _, _ := attach(t, d, idB, &network.Request{Ports: port(8081)})
		c, _, _ := attach(t, d, testID(3), &network.Request{Isolated: true})
		serve(t, a, "tcp", ":80", "A")
		serve(t, b, "tcp", ":80", "B")
		var wg sync.WaitGroup
		for _, addr := range []string{"10.99.0.2:80", "[fd99::2]:80", "10.99.0.1:8080", "[fd99::1]:8080"} {
			wg.Go(func() { expect(t, "B", b, "tcp", addr, "") })
			wg.Go(func() { expect(t, "C", c, "tcp", addr, "") })
		}
		for _, addr := range []string{"10.99.0.3:80", "[fd99::3]:80", "192.0.2.1:8081", "[fd99::1]:8081"} {
			wg.Go(func() { expect(t, "A", a, "tcp", addr, "") })
		}
		wg.Wait()
		expect(t, "A", a, "tcp", "192.0.2.1:8080", "A 10.99.0.1")
		expect(t, "A", a, "tcp", "[fd99::1]:8080", "A fd99::1")
		expect(t, "A", a, "tcp", "192.0.2.2:90", "outside 192.0.2.1")
		expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
		expect(t, "outside", outside, "tcp", "192.0.2.1:8080", "A 192.0.2.2")
		expect(t, "B", b, "tcp", "192.0.2.2:90", "outside 192.0.2.1")
	})
}

// TestIsolatedAsAnother: an isolated sandbox reaches no other one by taking an
// address that is not its own.
func TestIsolatedAsAnother(t *testing.T) {
	testenv.Root(t)
	withBridgeNetfilter(t, func(t *testing.T, _ bool) {
		d := newDriver(t)
		a, _, _ := attach(t, d, idA, &network.Request{Isolated: true})
		b, _, _ := attach(t, d, idB, &network.Request{Ports: []network.Port{{HostPort: 8081, Port: 80, Protocol: network.TCP}}})
		serve(t, b, "tcp", ":80", "B")
		serve(t, nil, "tcp", ":99", "host")
		expect(t, "A", a, "tcp", "10.99.0.1:99", "host 10.99.0.2")
		expect(t, "A", a, "tcp", "[fd99::1]:99", "host fd99::2")
		inside(t, a, func() error {
			eth, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			for _, s := range []string{"10.99.0.77/24", "fd99::77/64"} {
				addr, err := netlink.ParseAddr(s)
				if err != nil {
					return err
				}
				if err := netlink.AddrAdd(eth, addr); err != nil {
					return err
				}
			}
			for _, s := range []string{"10.99.0.2/24", "fd99::2/64"} {
				addr, err := netlink.ParseAddr(s)
				if err != nil {
					return err
				}
				if err := netlink.AddrDel(eth, addr); err != nil {
					return err
				}
			}
			return nil
		})
		for _, addr := range []string{"10.99.0.1:8081", "[fd99::1]:8081", "10.99.0.3:80", "[fd99::3]:80"} {
			expect(t, "A as another", a, "tcp", addr, "")
		}
		// It may know where the others are without asking, and need no answer.
		inside(t, a, func() error {
			eth, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			macB := macOf(netip.MustParseAddr("10.99.0.3"))
			for addr, mac := range map[string]net.HardwareAddr{"10.99.0.1": d.bridgeMAC(), "fd99::1": d.bridgeMAC(), "10.99.0.3": macB, "fd99::3": macB} {
				err = errors.Join(err, netlink.NeighSet(&netlink.Neigh{LinkIndex: eth.Attrs().Index, State: unix.NUD_PERMANENT, IP: net.ParseIP(addr), HardwareAddr: mac}))
			}
			return err
		})
		for _, addr := range []string{"10.99.0.3:81", "[fd99::3]:81"} {
			heard := listenUDP(t, b, addr)
			fetch(a, "udp", addr, never)
			heard.SetReadDeadline(time.Now().Add(never))
			if _, from, err := heard.ReadFrom(make([]byte, 10)); err == nil {
				t.Errorf("B hears A as another, %v", from)
			}
		}
		for _, addr := range []string{"10.99.0.1:8081", "[fd99::1]:8081", "10.99.0.3:80", "[fd99::3]:80"} {
			expect(t, "A as another that knows where it is", a, "tcp", addr, "")
		}
		expect(t, "B", b, "tcp", "10.99.0.1:99", "host 10.99.0.3")
	})
}

// TestPublishSCTP sends the first packet of an association, since not every
// kernel has sockets for it.
func TestPublishSCTP(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.SCTP}}})
	var in, out int
	inside(t, a, func() (err error) {
		in, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	})
	defer unix.Close(in)
	inside(t, outside, func() (err error) {
		out, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	})
	defer unix.Close(out)
	tv := unix.NsecToTimeval(int64(never))
	if err := unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 200)
	var from unix.Sockaddr
	eventually(t, func() error { // nobody sends it again for us
		if err := unix.Sendto(out, sctpInit(4000, 8080), 0, &unix.SockaddrInet4{Addr: [4]byte{192, 0, 2, 1}}); err != nil {
			return err
		}
		var n int
		var err error
		if n, from, err = unix.Recvfrom(in, b, 0); err == nil && n < 20+12 {
			err = fmt.Errorf("%d bytes", n)
		}
		return err
	})
	if got := binary.BigEndian.Uint16(b[22:]); got != 80 {
		t.Errorf("it arrives for port %d, want 80", got)
	}
	if got := from.(*unix.SockaddrInet4).Addr; got != [4]byte{192, 0, 2, 2} {
		t.Errorf("it comes from %v", got)
	}
}

// sctpInit returns an INIT chunk (RFC 9260, 3.3.2) behind a common header.
func sctpInit(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // verification tag, checksum
	b = append(b, 1, 0, 0, 20)            // INIT, length
	b = append(b, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 5, 6, 7, 8)
	sum := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(b[8:], sum)
	return b
}

func TestPortTaken(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	tcp := func(port uint16) *network.Request {
		return &network.Request{Ports: []network.Port{{HostPort: port, Port: 80, Protocol: network.TCP}}}
	}
	serve(t, nil, "tcp4", "127.0.0.1:7000", "host")
	serve(t, nil, "udp6", "[::1]:7001", "host")
	for _, req := range []*network.Request{tcp(7000), {Ports: []network.Port{{HostPort: 7001, Port: 80, Protocol: network.UDP}}}} {
		_, err := d.Plan(t.Context(), idA, req)
		if want := fmt.Sprintf("(pid %d)", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Plan(%v) = %v, want who has the port, %s", req.Ports, err, want)
		}
	}
	_, err := d.Plan(t.Context(), idA, &network.Request{Ports: []network.Port{
		{HostIP: netip.MustParseAddr("198.51.100.1"), HostPort: 7002, Port: 80, Protocol: network.TCP},
	}})
	if err == nil || !strings.Contains(err.Error(), "198.51.100.1") {
		t.Errorf("Plan with an address that the host has not = %v", err)
	}

	attach(t, d, idA, tcp(8080))
	if _, err := d.Plan(t.Context(), idB, tcp(8080)); err == nil || !strings.Contains(err.Error(), idA) {
		t.Errorf("Plan with another sandbox's port = %v", err)
	}
	// Two that were planned at the same time.
	late := []byte(`{"ports":[{"hostPort":8080,"port":80,"protocol":"tcp"}]}`)
	if _, err := d.Attach(t.Context(), idB, late, newNS(t)); err == nil || !strings.Contains(err.Error(), idA) {
		t.Errorf("Attach with another sandbox's port = %v", err)
	}
	if err := d.Detach(t.Context(), idB, late, nil); err != nil {
		t.Error(err)
	}
	if _, ok := d.attached[idA]; !ok {
		t.Error("the one that has the port is forgotten")
	}

	// Chosen by us. For a third one, as the lease of the other may still be going.
	ns, res, _ := attach(t, d, testID(3), &network.Request{Ports: []network.Port{
		{Port: 80, Protocol: network.TCP}, {Port: 81, Protocol: network.TCP},
	}})
	serve(t, ns, "tcp", ":81", "B")
	if p := res.Networks[0].Ports[1].HostPort; p == 0 {
		t.Error("no port was chosen")
	} else {
		expect(t, "the host", nil, "tcp", fmt.Sprintf("127.0.0.1:%d", p), "B 10.99.0.1")
	}
}

// TestForeignFirewall: beside somebody's firewall that forwards nothing, the
// rules that docs/operations.md gives for it are enough, and needed. It is not touched.
func TestForeignFirewall(t *testing.T) {
	testenv.Root(t)
	nft := testenv.Program(t, "nft")
	run := func(stdin string, args ...string) string {
		t.Helper()
		cmd := exec.Command(nft, args...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
		return string(out)
	}
	outside := newOutside(t, 2)
	serve(t, outside, "tcp", ":90", "outside")
	run("table inet corp { chain forward { type filter hook forward priority 0; policy drop; }; }", "-f", "-")
	t.Cleanup(func() { run("", "delete", "table", "inet", "corp") })
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}})
	serve(t, a, "tcp", ":80", "A")
	expect(t, "outside", outside, "tcp", "192.0.2.1:8080", "")
	expect(t, "A", a, "tcp", "192.0.2.2:90", "")
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1") // is not forwarded
	run(`add rule inet corp forward iifname "sbtest0" accept
add rule inet corp forward oifname "sbtest0" ct state established,related accept
add rule inet corp forward oifname "sbtest0" ct status dnat accept`, "-f", "-")
	before := run("", "list", "table", "inet", "corp")
	for _, addr := range []string{"192.0.2.1:8080", "[2001:db8:2::1]:8080"} {
		expect(t, "outside", outside, "tcp", addr, map[bool]string{true: "A 192.0.2.2", false: "A 2001:db8:2::2"}[addr[0] == '1'])
	}
	expect(t, "A", a, "tcp", "192.0.2.2:90", "outside 192.0.2.1")
	expect(t, "A", a, "tcp", "10.99.0.1:8080", "A 10.99.0.1")
	if after := run("", "list", "table", "inet", "corp"); after != before {
		t.Errorf("somebody's table was %s and is %s", before, after)
	}
}

func listenUDP(t *testing.T, ns *os.File, addr string) (c net.PacketConn) {
	t.Helper()
	inside(t, ns, func() (err error) {
		c, err = net.ListenPacket("udp", addr)
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}
