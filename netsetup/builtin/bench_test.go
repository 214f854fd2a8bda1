package builtin

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
)

func testID(n int) string { return fmt.Sprintf("%016x", n*0x10001+0x1000000000000) }

// BenchmarkBare is what the kernel takes for the same, with the netlink library
// and no more: a pair, an address and a route, as a loop that somebody would
// write. "moved" makes the pair on the host and moves one end, which costs the
// kernel grace periods; "inside" makes it where it belongs.
func BenchmarkBare(b *testing.B) {
	for name, f := range map[string]func(*os.File, netlink.Link, string, int) error{"moved": bare, "inside": bareInside} {
		b.Run(name, func(b *testing.B) {
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "bare0"}}
			if err := netlink.LinkAdd(bridge); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() {
				netlink.LinkDel(bridge)
				for links := []netlink.Link{nil, nil}; len(links) > 1; links, _ = netlink.LinkList() {
					time.Sleep(time.Millisecond) // until the kernel has removed them all
				}
			})
			netlink.LinkSetUp(bridge)
			n := 0
			var times []time.Duration
			defer func() { reportMedian(b, times) }()
			for b.Loop() {
				b.StopTimer()
				ns := newNS(b)
				n++
				b.StartTimer()
				start := time.Now()
				if err := f(ns, bridge, fmt.Sprintf("bare%d", n), n); err != nil {
					b.Fatal(err)
				}
				times = append(times, time.Since(start))
				b.StopTimer()
				ns.Close()
				b.StartTimer()
			}
		})
	}
}

// reportMedian is for a machine that does other things too, on which means say little.
func reportMedian(b *testing.B, times []time.Duration) {
	slices.Sort(times)
	if len(times) > 0 {
		b.ReportMetric(float64(times[len(times)/2]), "ns/median")
	}
}

func bareInside(ns *os.File, bridge netlink.Link, name string, n int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = name, bridge.Attrs().Index
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd()), PeerNumTxQueues: 1, PeerNumRxQueues: 1}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return err
	}
	return insideErr(ns, func() error { return bareConfigure("eth0", n) })
}

func bare(ns *os.File, bridge netlink.Link, name string, n int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	peer, err := netlink.LinkByName(name + "p")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetNsFd(peer, int(ns.Fd())); err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(veth, bridge); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return err
	}
	return insideErr(ns, func() error { return bareConfigure(name+"p", n) })
}

func bareConfigure(name string, n int) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	peer, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if name != "eth0" {
		if err := h.LinkSetName(peer, "eth0"); err != nil {
			return err
		}
	}
	if err := h.LinkSetUp(peer); err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 98, byte(n>>8), byte(n)), Mask: net.CIDRMask(16, 32)}}
	if err := h.AddrAdd(peer, addr); err != nil {
		return err
	}
	return h.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: net.IPv4(10, 98, 255, 254)})
}

// BenchmarkAttach is that of a sandbox with 0, 1 and 20 ports, with one and two
// families, and with others standing.
func BenchmarkAttach(b *testing.B) {
	for _, v := range []struct {
		name            string
		ports, standing int
		six, isolated   bool
	}{
		{name: "v4"},
		{name: "v4v6", six: true},
		{name: "v4v6 isolated", six: true, isolated: true},
		{name: "v4 port", ports: 1},
		{name: "v4 20 ports", ports: 20},
		{name: "v4 at 500", standing: 500},
	} {
		b.Run(v.name, func(b *testing.B) {
			d := newDriver(b, func(o *Options) {
				o.Subnet = netipPrefix("10.97.0.0/16")
				if !v.six {
					o.Subnet6 = netipPrefix("")
				}
			})
			n := 0
			for range v.standing {
				n++
				attach(b, d, testID(n), &network.Request{})
			}
			req := network.Request{Isolated: v.isolated}
			for i := range v.ports {
				req.Ports = append(req.Ports, network.Port{HostPort: uint16(8000 + i), Port: 80, Protocol: network.TCP})
			}
			var times []time.Duration
			defer func() { reportMedian(b, times) }()
			for b.Loop() {
				b.StopTimer()
				ns := newNS(b)
				n++
				raw := plan1(b, d, testID(n), &req)
				b.StartTimer()
				start := time.Now()
				if _, err := d.Attach(context.Background(), testID(n), raw, ns); err != nil {
					b.Fatal(err)
				}
				times = append(times, time.Since(start))
				b.StopTimer()
				if err := d.Detach(context.Background(), testID(n), raw, ns); err != nil {
					b.Fatal(err)
				}
				ns.Close()
				for len(d.leases.released()) > 0 { // the kernel's part is over
					time.Sleep(100 * time.Microsecond)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkDetach is the time to the answer.
func BenchmarkDetach(b *testing.B) {
	d := newDriver(b)
	req := network.Request{Ports: webPort}
	for n := 0; b.Loop(); n++ {
		b.StopTimer()
		ns, _, raw := attach(b, d, testID(n), &req)
		b.StartTimer()
		if err := d.Detach(context.Background(), testID(n), raw, ns); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		ns.Close()
		b.StartTimer()
	}
}
