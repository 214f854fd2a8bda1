package builtin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// What follows attacks from inside a sandbox, as a member with CAP_NET_RAW can:
// with frames that say of themselves whatever they like.

// peer is a sandbox of these tests. It hears what comes to its UDP port 99.
type peer struct {
	ns     *os.File
	mac    net.HardwareAddr
	v4, v6 netip.Addr
	heard  net.PacketConn
}

func newPeer(t *testing.T, d *Driver, id string, req *network.Request) *peer {
	t.Helper()
	ns, res, _ := attach(t, d, id, req)
	n := res.Networks[0]
	mac, err := net.ParseMAC(n.MAC)
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{ns: ns, mac: mac, v4: n.Addresses[0].Addr(), v6: n.Addresses[1].Addr()}
	p.heard = listenUDP(t, ns, ":99")
	return p
}

// hears reports whether a datagram with this text comes to the sandbox.
func (p *peer) hears(text string, wait time.Duration) bool {
	b := make([]byte, 100)
	p.heard.SetReadDeadline(time.Now().Add(wait))
	for {
		n, _, err := p.heard.ReadFrom(b)
		if err != nil {
			return false
		}
		if string(b[:n]) == text {
			return true
		}
	}
}

// send sends frames by the sandbox's eth0.
func (p *peer) send(t *testing.T, frames ...[]byte) {
	t.Helper()
	inside(t, p.ns, func() error {
		eth, err := net.InterfaceByName(ifName)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: eth.Index}); err != nil {
				return err
			}
		}
		return nil
	})
}

var (
	everybody = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	// Frames to these addresses are for the port and not for the bridge (IEEE 802.1D),
	// and those to the first one see no hook of nftables.
	lldp     = net.HardwareAddr{0x01, 0x80, 0xc2, 0, 0, 0x0e}
	reserved = net.HardwareAddr{0x01, 0x80, 0xc2, 0, 0, 0x03}
)

const experimental = 0x88b5 // an EtherType of nobody, IEEE 802

// frame is Ethernet, with as many empty VLAN tags as told. The kernel looks through them.
func frame(dst, src net.HardwareAddr, tags int, proto uint16, payload []byte) []byte {
	f := slices.Concat(dst, src)
	for range tags {
		f = append(f, 0x81, 0, 0, 0)
	}
	f = binary.BigEndian.AppendUint16(f, proto)
	f = append(f, payload...)
	return append(f, make([]byte, max(0, 60-len(f)))...)
}

// announce says in ARP that an address is mac's.
func announce(a netip.Addr, mac net.HardwareAddr, op byte) []byte {
	ip := a.AsSlice()
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, op}, mac, ip, everybody, ip)
}

func ip4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	h := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, proto, 0, 0}
	h = slices.Concat(h, src.AsSlice(), dst.AsSlice())
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

// ip6 fills in the checksum of its payload, which is at sum.
func ip6(src, dst netip.Addr, next, hops byte, payload []byte, sum int) []byte {
	pseudo := slices.Concat(src.AsSlice(), dst.AsSlice(), []byte{0, 0, 0, byte(len(payload)), 0, 0, 0, next})
	binary.BigEndian.PutUint16(payload[sum:], checksum(append(pseudo, payload...)))
	return slices.Concat([]byte{0x60, 0, 0, 0, 0, byte(len(payload)), next, hops}, src.AsSlice(), dst.AsSlice(), payload)
}

func udp(to uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, 99}, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(text)))
	return append(append(b, 0, 0), text...)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// Kinds of neighbour discovery, RFC 4861.
const (
	solicitation  = 135
	advertisement = 136
)

// neighbour is a solicitation or an advertisement of target, which says that the
// sender's or the target's hardware address is mac.
func neighbour(kind byte, target netip.Addr, mac net.HardwareAddr) []byte {
	const override, sourceOption, targetOption = 0x20, 1, 2
	b := []byte{kind, 0, 0, 0, 0, 0, 0, 0}
	option := byte(sourceOption)
	if kind == advertisement {
		b[4], option = override, targetOption
	}
	return slices.Concat(b, target.AsSlice(), []byte{option, 1}, mac)
}

// attack makes a frame by which one sandbox is to get what is sent to another.
type attack struct {
	name  string
	frame func(by, on *peer) []byte
}

func attacks(host net.HardwareAddr) []attack {
	gw4, gw6 := gateway(testSubnet), gateway(testSubnet6)
	discovery := func(tags int, kind byte, by *peer, src, target netip.Addr) []byte {
		return frame(host, by.mac, tags, unix.ETH_P_IPV6, ip6(src, gw6, unix.IPPROTO_ICMPV6, 255, neighbour(kind, target, by.mac), 2))
	}
	list := []attack{
		{"its hardware address", func(_, on *peer) []byte { return frame(everybody, on.mac, 0, experimental, nil) }},
		{"its hardware address and a tag", func(_, on *peer) []byte { return frame(everybody, on.mac, 1, experimental, nil) }},
		{"its hardware address in LLDP", func(_, on *peer) []byte { return frame(lldp, on.mac, 0, experimental, nil) }},
		{"its hardware address to the port", func(_, on *peer) []byte { return frame(reserved, on.mac, 0, experimental, nil) }},
		{"its hardware address in IP", func(by, on *peer) []byte {
			return frame(host, on.mac, 0, unix.ETH_P_IP, ip4(by.v4, gw4, unix.IPPROTO_UDP, udp(1, "")))
		}},
	}
	for tags := range 3 {
		list = append(list,
			attack{fmt.Sprintf("ARP request, %d tags", tags), func(by, on *peer) []byte {
				return frame(everybody, by.mac, tags, unix.ETH_P_ARP, announce(on.v4, by.mac, 1))
			}},
			attack{fmt.Sprintf("ARP reply, %d tags", tags), func(by, on *peer) []byte {
				return frame(host, by.mac, tags, unix.ETH_P_ARP, announce(on.v4, by.mac, 2))
			}},
			attack{fmt.Sprintf("advertisement, %d tags", tags), func(by, on *peer) []byte {
				return discovery(tags, advertisement, by, by.v6, on.v6)
			}},
			attack{fmt.Sprintf("advertisement of a neighbour, %d tags", tags), func(by, on *peer) []byte {
				return discovery(tags, advertisement, by, linkLocal(by.mac), on.v6)
			}},
			attack{fmt.Sprintf("advertisement as the victim, %d tags", tags), func(by, on *peer) []byte {
				return discovery(tags, advertisement, by, on.v6, on.v6)
			}},
			attack{fmt.Sprintf("solicitation as the victim, %d tags", tags), func(by, on *peer) []byte {
				return discovery(tags, solicitation, by, on.v6, gw6)
			}},
		)
	}
	return list
}

// TestSpoofing: if one of two sandboxes is isolated, neither takes over what is
// sent to the other one, whatever it makes bridge and host believe; also after
// the bridge was made again.
func TestSpoofing(t *testing.T) {
	testenv.Root(t)
	withBridgeNetfilter(t, func(t *testing.T, _ bool) {
		d := newDriver(t)
		plain := newPeer(t, d, idA, &network.Request{})
		isolated := newPeer(t, d, idB, &network.Request{Isolated: true})
		other := newPeer(t, d, testID(3), &network.Request{Isolated: true})
		try := func(t *testing.T) {
			for _, pair := range []struct {
				name   string
				by, on *peer
			}{
				{"an isolated one on another", isolated, plain},
				{"another on an isolated one", plain, isolated},
				{"an isolated one on an isolated one", other, isolated},
			} {
				for _, a := range attacks(d.bridgeMAC()) {
					t.Run(pair.name+": "+a.name, func(t *testing.T) { spoof(t, d, a, pair.by, pair.on) })
				}
			}
		}
		try(t)
		del(t, d.opts.Bridge)
		if err := d.repair(); err != nil {
			t.Fatal(err)
		}
		t.Run("bridge made again", try)
	})
}

func spoof(t *testing.T, d *Driver, a attack, by, on *peer) {
	// The bridge knows where the victim is, and the host nothing.
	if err := d.socks.do(forgetNeighbour(d.bridge, on.v4), forgetNeighbour(d.bridge, on.v6)); err != nil {
		t.Fatal(err)
	}
	on.send(t, frame(everybody, on.mac, 0, experimental, nil))
	for _, when := range []string{"before", "after"} {
		wait := soon
		if when == "after" {
			by.send(t, a.frame(by, on))
			wait = never
		}
		for _, addr := range []netip.Addr{on.v4, on.v6} {
			text := when + " " + addr.String()
			tell(t, netip.AddrPortFrom(addr, 99), text)
			if !on.hears(text, wait) {
				t.Fatalf("what the host sends to %s %s the attack does not arrive", addr, when)
			}
		}
	}
}

// tell sends a datagram from the host.
func tell(t *testing.T, to netip.AddrPort, text string) {
	t.Helper()
	c, err := net.Dial("udp", to.String())
	if err == nil {
		_, err = c.Write([]byte(text))
		err = errors.Join(err, c.Close())
	}
	if err != nil {
		t.Error(err)
	}
}

// TestSpoofedBefore: what somebody made bridge and host believe of an address
// before the isolated sandbox came that has it is forgotten.
func TestSpoofedBefore(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	by := newPeer(t, d, idA, &network.Request{})
	v4, v6 := netip.MustParseAddr("10.99.0.3"), netip.MustParseAddr("fd99::3")
	addrs := []netip.Addr{v4, v6}
	eventually(t, func() error {
		for _, a := range addrs { // the host asks who has them
			tell(t, netip.AddrPortFrom(a, 99), "nobody")
		}
		by.send(t,
			frame(d.bridgeMAC(), macOf(v4), 0, experimental, nil),
			frame(d.bridgeMAC(), by.mac, 0, unix.ETH_P_ARP, announce(v4, by.mac, 2)),
			frame(d.bridgeMAC(), by.mac, 0, unix.ETH_P_IPV6, ip6(v6, gateway(testSubnet6), unix.IPPROTO_ICMPV6, 255, neighbour(advertisement, v6, by.mac), 2)),
		)
		known, err := netlink.NeighList(d.bridge, netlink.FAMILY_ALL)
		for _, a := range addrs {
			if !slices.ContainsFunc(known, func(n netlink.Neigh) bool { return n.IP.Equal(a.AsSlice()) && bytes.Equal(n.HardwareAddr, by.mac) }) {
				err = errors.Join(err, fmt.Errorf("the host does not believe that %s is the attacker's", a))
			}
		}
		return err
	})
	on := newPeer(t, d, idB, &network.Request{Isolated: true, Addresses: addrs})
	for _, a := range addrs {
		tell(t, netip.AddrPortFrom(a, 99), a.String())
		if !on.hears(a.String(), soon) {
			t.Errorf("what the host sends to %s does not arrive", a)
		}
	}
}

// TestSpoofedSource: with an isolated sandbox's address as its own nobody reaches
// that sandbox's published ports, which only it reaches among sandboxes.
func TestSpoofedSource(t *testing.T) {
	testenv.Root(t)
	withBridgeNetfilter(t, func(t *testing.T, _ bool) {
		d := newDriver(t)
		by := newPeer(t, d, idA, &network.Request{})
		on := newPeer(t, d, idB, &network.Request{Isolated: true, Ports: []network.Port{{HostPort: 8080, Port: 99, Protocol: network.UDP}}})
		gw4, gw6 := gateway(testSubnet), gateway(testSubnet6)
		datagram := func(src net.HardwareAddr, tags, proto int) []byte {
			if proto == unix.ETH_P_IP {
				return frame(d.bridgeMAC(), src, tags, unix.ETH_P_IP, ip4(on.v4, gw4, unix.IPPROTO_UDP, udp(8080, "spoofed")))
			}
			return frame(d.bridgeMAC(), src, tags, unix.ETH_P_IPV6, ip6(on.v6, gw6, unix.IPPROTO_UDP, 64, udp(8080, "spoofed"), 6))
		}
		for _, proto := range []int{unix.ETH_P_IP, unix.ETH_P_IPV6} {
			on.send(t, datagram(on.mac, 0, proto)) // the datagrams are right
			if !on.hears("spoofed", soon) {
				t.Errorf("%#x: the sandbox does not reach its own port", proto)
			}
			for _, src := range []net.HardwareAddr{by.mac, on.mac} {
				for tags := range 4 {
					by.send(t, datagram(src, tags, proto))
				}
			}
			if on.hears("spoofed", never) {
				t.Errorf("%#x: another one reaches it", proto)
			}
		}
	})
}

// TestAroundTheBridge: what an isolated sandbox sends in frames that the kernel takes for
// the port's own, and not for the bridge's, must have its own address, too.
func TestAroundTheBridge(t *testing.T) {
	testenv.Root(t)
	withBridgeNetfilter(t, func(t *testing.T, _ bool) {
		d := newDriver(t)
		p := newPeer(t, d, idB, &network.Request{Isolated: true})
		gw4, gw6 := gateway(testSubnet), gateway(testSubnet6)
		heard := []net.PacketConn{listenUDP(t, nil, netip.AddrPortFrom(gw4, 98).String()), listenUDP(t, nil, netip.AddrPortFrom(gw6, 98).String())}
		send := func(to net.HardwareAddr, v4, v6 netip.Addr) {
			t.Helper()
			p.send(t, frame(to, p.mac, 0, unix.ETH_P_IP, ip4(v4, gw4, unix.IPPROTO_UDP, udp(98, "it"))),
				frame(to, p.mac, 0, unix.ETH_P_IPV6, ip6(v6, gw6, unix.IPPROTO_UDP, 64, udp(98, "it"), 6)))
		}
		hears := func(i int, wait time.Duration) bool {
			heard[i].SetReadDeadline(time.Now().Add(wait))
			_, _, err := heard[i].ReadFrom(make([]byte, 10))
			return err == nil
		}
		for i := range heard {
			eventually(t, func() error { // the bridge takes nothing before it has noticed that the port is up
				if send(d.bridgeMAC(), p.v4, p.v6); !hears(i, never) {
					return fmt.Errorf("%s: it is not heard with its own address", heard[i].LocalAddr())
				}
				return nil
			})
		}
		for i := range heard {
			for hears(i, never) { // what was sent more than once
			}
		}
		for _, to := range []net.HardwareAddr{d.bridgeMAC(), lldp, reserved} {
			send(to, netip.MustParseAddr("10.99.0.77"), netip.MustParseAddr("fd99::77"))
			for i := range heard {
				if hears(i, never) {
					t.Errorf("%s: it is heard as another by a frame to %s", heard[i].LocalAddr(), to)
				}
			}
		}
	})
}

// TestARPToThePort: the host takes no ARP that a sandbox sends to the port itself, and not to the
// bridge: it neither answers nor learns of anybody there.
func TestARPToThePort(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	p := newPeer(t, d, idB, &network.Request{Isolated: true})
	port, err := netlink.LinkByName(hostName(idB))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(to net.HardwareAddr) {
		t.Helper()
		p.send(t, frame(to, p.mac, 0, unix.ETH_P_ARP, slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 1},
			p.mac, p.v4.AsSlice(), make([]byte, 6), gateway(testSubnet).AsSlice())))
	}
	known := func(link int) bool {
		t.Helper()
		ns, err := netlink.NeighList(link, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(ns, func(n netlink.Neigh) bool { return n.IP.Equal(p.v4.AsSlice()) && bytes.Equal(n.HardwareAddr, p.mac) })
	}
	eventually(t, func() error { // the frames are right, and the port is up
		if ask(everybody); !known(d.bridge) {
			return errors.New("the host does not learn of it by the bridge")
		}
		return nil
	})
	for _, to := range []net.HardwareAddr{lldp, reserved} {
		ask(to)
		if time.Sleep(never); known(port.Attrs().Index) {
			t.Errorf("the host learns of it at the port, by a frame to %s", to)
		}
	}
}

// TestSameMAC: two sandboxes do not have one hardware address.
func TestSameMAC(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	v4 := netip.MustParseAddr("10.99.0.4")
	attach(t, d, idA, &network.Request{MAC: "02:00:00:00:00:07"})
	attach(t, d, testID(3), &network.Request{Addresses: []netip.Addr{v4}})
	for mac, id := range map[string]string{"02:00:00:00:00:07": idA, macOf(v4).String(): testID(3)} {
		raw := plan1(t, d, idB, &network.Request{MAC: mac})
		_, err := d.Attach(t.Context(), idB, raw, newNS(t))
		if want := "MAC address " + mac + " belongs to sandbox " + id; err == nil || err.Error() != want {
			t.Errorf("Attach = %v, want %s", err, want)
		}
		if err := d.Detach(t.Context(), idB, raw, nil); err != nil {
			t.Error(err)
		}
		eventually(t, func() error {
			if n := len(d.leases.released()); n > 0 {
				return fmt.Errorf("%d leases are not free", n)
			}
			return nil
		})
	}
}
