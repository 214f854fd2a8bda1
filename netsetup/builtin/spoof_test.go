package builtin

import (
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// peer is a sandbox that hears what comes to its UDP port 99.
type peer struct {
	ns    *os.File
	mac   net.HardwareAddr
	addr  string
	heard net.PacketConn
}

func newPeer(t *testing.T, d *Driver, id string, req *network.Request) *peer {
	t.Helper()
	ns, res, _ := attach(t, d, id, req)
	n := res.Networks[0]
	mac, err := net.ParseMAC(n.MAC)
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{ns: ns, mac: mac, addr: net.JoinHostPort(n.Addresses[0].Addr().String(), "99")}
	inside(t, ns, func() (err error) {
		p.heard, err = net.ListenPacket("udp", ":99")
		return err
	})
	t.Cleanup(func() { p.heard.Close() })
	return p
}

// told reports whether what the host sends to the sandbox now arrives.
func (p *peer) told(t *testing.T, text string, wait time.Duration) bool {
	t.Helper()
	c, err := net.Dial("udp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
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

// claim sends a frame to everybody that says that it is from mac, as a member with
// CAP_NET_RAW can.
func (p *peer) claim(t *testing.T, mac net.HardwareAddr) {
	t.Helper()
	everybody := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	frame := append(slices.Concat(everybody, mac, []byte{0x88, 0xb5}), make([]byte, 46)...) // an EtherType for experiments
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
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth.Index})
	})
}

// TestMACTakeover: if one of two sandboxes is isolated, neither takes over in the
// bridge what is sent to the other one; also after the bridge was made again.
func TestMACTakeover(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	plain := newPeer(t, d, idA, &network.Request{})
	isolated := newPeer(t, d, idB, &network.Request{Isolated: true})
	other := newPeer(t, d, testID(3), &network.Request{Isolated: true})
	try := func(t *testing.T) {
		for name, pair := range map[string]struct{ by, on *peer }{
			"an isolated one on another":         {isolated, plain},
			"another on an isolated one":         {plain, isolated},
			"an isolated one on an isolated one": {other, isolated},
		} {
			t.Run(name, func(t *testing.T) {
				if !pair.on.told(t, "before", soon) {
					t.Fatal("what the host sends does not arrive before")
				}
				pair.by.claim(t, pair.on.mac)
				if !pair.on.told(t, "after", soon) {
					t.Error("what the host sends goes elsewhere")
				}
			})
		}
	}
	try(t)
	t.Run("bridge made again", func(t *testing.T) {
		link, err := netlink.LinkByName(d.opts.Bridge)
		if err == nil {
			err = netlink.LinkDel(link)
		}
		if err == nil {
			err = d.repair()
		}
		if err != nil {
			t.Fatal(err)
		}
		try(t)
	})
}
