package builtin

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
)

// prepared makes sure that the bridge and the table are there, and stay until
// the function that it returns is called.
func (d *Driver) prepared() (unlock func(), err error) {
	for {
		d.host.RLock()
		if d.up {
			return d.host.RUnlock, nil
		}
		d.host.RUnlock()
		if err := d.prepare(); err != nil {
			return nil, err
		}
	}
}

// prepare makes what all sandboxes share, unless it is there.
func (d *Driver) prepare() error {
	d.host.Lock()
	defer d.host.Unlock()
	return d.prepareLocked()
}

// prepareLocked is prepare with d.host held for writing.
func (d *Driver) prepareLocked() error {
	if d.up {
		return nil
	}
	if err := d.checkHost(); err != nil {
		return err
	}
	if err := d.makeBridge(); err != nil {
		return fmt.Errorf("bridge %s: %w", d.opts.Bridge, err)
	}
	d.nft.loopback6 = loopback6Works()
	if d.opts.Subnet6.IsValid() && !d.nft.loopback6 {
		d.log.Warn("Ports are not published on ::1, since net.bridge.bridge-nf-call-ip6tables is set", "bridge", d.opts.Bridge)
	}
	if err := d.makeTable(); err != nil {
		return err
	}
	if err := errors.Join(d.claim(), d.warnOff()); err != nil {
		return err
	}
	crash.Point("builtin prepare claimed")
	if err := d.enslaveAll(); err != nil {
		return err
	}
	d.up = true
	return nil
}

// makeTable makes the table, unless it is there and whole: one that is has the
// elements of the sandboxes that outlived an earlier daemon.
func (d *Driver) makeTable() error {
	all := d.allElements()
	isolated := len(all[d.nft.isolated]) > 0
	whole, err := d.nft.whole(isolated)
	if err != nil || whole {
		return err
	}
	if isolated {
		if err := d.nft.makeBridgeTable(); err != nil {
			return err
		}
		if err := d.nft.addElements(d.nft.ofBridge(all)); err != nil {
			return err
		}
	}
	err = d.nft.conns.use(func(c *nftables.Conn) error { return d.nft.build(c, all) })
	if err != nil {
		return fmt.Errorf("make nftables table %s: %w", d.nft.inet.Name, err)
	}
	crash.Point("builtin prepare table after")
	return nil
}

// allElements returns those of all attachments that are known.
func (d *Driver) allElements() elements {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := make(elements)
	for id, a := range d.attached {
		d.nft.elementsOf(e, id, &a.plan, a.lease)
	}
	return e
}

// checkHost reports what is in the way: somebody else's link of the bridge's
// name, or a route to a part of the subnets.
func (d *Driver) checkHost() error {
	if link, err := findLink(d.opts.Bridge); err != nil {
		return err
	} else if link != nil {
		if err := d.ours(link); err != nil {
			return err
		}
	}
	for _, subnet := range []netip.Prefix{d.opts.Subnet, d.opts.Subnet6} {
		if !subnet.IsValid() {
			continue
		}
		family := netlink.FAMILY_V4
		if subnet.Addr().Is6() {
			family = netlink.FAMILY_V6
		}
		routes, err := mainRoutes(family)
		if err != nil {
			return err
		}
		for _, r := range routes {
			dst := prefixOf(r.Dst)
			// Routes as wide as half of all addresses are ways to everywhere else.
			if dst.Bits() <= 1 || !dst.Overlaps(subnet) {
				continue
			}
			dev := ""
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
				dev = link.Attrs().Name
			}
			if dev != d.opts.Bridge {
				return fmt.Errorf("subnet %s overlaps with the route to %s through %s: choose another one (--subnet, --subnet6)", subnet, dst, dev)
			}
		}
	}
	return nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

// findLink returns nil if there is no link of that name.
func findLink(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) {
		return nil, nil
	}
	return link, err
}

// bridgeMAC is the bridge's hardware address. It is the mark that the bridge
// bears from the moment in which it is made; the alias comes a little later.
func (d *Driver) bridgeMAC() net.HardwareAddr {
	sum := sha256.Sum256([]byte(d.opts.Mark))
	return net.HardwareAddr{0x02, 0x5b, 0xd0, sum[0], sum[1], sum[2]}
}

// ours reports why link is not this installation's bridge.
func (d *Driver) ours(link netlink.Link) error {
	a := link.Attrs()
	switch {
	case link.Type() != "bridge":
		return fmt.Errorf("there is a link %s already, which is no bridge but a %s: choose another name (--bridge)", a.Name, link.Type())
	case a.Alias == alias(d.opts.Mark, ""), a.Alias == "" && slices.Equal(a.HardwareAddr, d.bridgeMAC()):
		return nil
	case a.Alias != "":
		return fmt.Errorf("there is a bridge %s already, which belongs to %q: choose another name (--bridge)", a.Name, a.Alias)
	}
	return fmt.Errorf("there is a bridge %s already, which is somebody else's: choose another name (--bridge)", a.Name)
}

// makeBridge makes the bridge, or completes the one that is there.
func (d *Driver) makeBridge() error {
	uplink, err := uplinkMTU()
	if err != nil {
		return err
	}
	d.mtu = uplink
	link, err := findLink(d.opts.Bridge)
	if err != nil {
		return err
	}
	if link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.HardwareAddr = d.opts.Bridge, d.mtu, d.bridgeMAC()
		snooping := false
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
			return err
		}
		crash.Point("builtin prepare bridge after")
		if link, err = netlink.LinkByName(d.opts.Bridge); err != nil {
			return err
		}
	}
	d.bridge = link.Attrs().Index
	if link.Attrs().Alias == "" {
		if err := netlink.LinkSetAlias(link, alias(d.opts.Mark, "")); err != nil {
			return err
		}
	}
	if err := d.setBridgeSysctls(); err != nil {
		return err
	}
	for _, subnet := range []netip.Prefix{d.opts.Subnet, d.opts.Subnet6} {
		if !subnet.IsValid() {
			continue
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: gateway(subnet).AsSlice(), Mask: net.CIDRMask(subnet.Bits(), subnet.Addr().BitLen())}}
		if subnet.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", addr, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	if !d.opts.Subnet6.IsValid() {
		return nil
	}
	return d.routeLoopback6()
}

// routeLoopback6 makes ports published on ::1 work. A packet for ::1 is routed
// by the device that it came in by, so that an answer from a sandbox, which has
// that address once it is translated back, is dropped unless ::1 is local on the
// bridge as well. Packets with that address on the wire are dropped before (RFC
// 4291, ip6_rcv_core). The metric keeps everything else on lo.
//
// With br_netfilter (net.bridge.bridge-nf-call-ip6tables) the address is translated
// back before that check, and the answer is lost. Then ports are not published
// on ::1, so that who tries it is refused at once, and may try 127.0.0.1.
func (d *Driver) routeLoopback6() error {
	err := netlink.RouteReplace(&netlink.Route{
		Dst: &net.IPNet{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)}, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL,
		LinkIndex: d.bridge, Priority: 4096,
	})
	if err != nil {
		return fmt.Errorf("add route to ::1: %w", err)
	}
	return nil
}

func loopback6Works() bool {
	v, err := readSysctl("net/bridge/bridge-nf-call-ip6tables")
	return err != nil || v == "0" // an error means that there is no br_netfilter
}

func (d *Driver) setBridgeSysctls() error {
	for _, s := range d.bridgeSysctls() {
		if err := writeSysctl(s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// bridgeSysctls are settings of the bridge itself, which go with it.
func (d *Driver) bridgeSysctls() [][2]string {
	v4, v6 := "net/ipv4/conf/"+d.opts.Bridge+"/", "net/ipv6/conf/"+d.opts.Bridge+"/"
	s := [][2]string{{v4 + "forwarding", "1"}, {v4 + "route_localnet", "1"}}
	if !d.opts.Subnet6.IsValid() {
		return append(s, [2]string{v6 + "disable_ipv6", "1"})
	}
	return append(s, [2]string{v6 + "disable_ipv6", "0"}, [2]string{v6 + "accept_dad", "0"}, [2]string{v6 + "accept_ra", "0"},
		[2]string{v6 + "force_forwarding", "1"}) // if there is no such setting, that of "all" is used
}

// defaultMTU is that of a bridge whose host has no way out.
const defaultMTU = 1500

// uplinkMTU returns the MTU of the device of the default route.
func uplinkMTU() (int, error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := mainRoutes(family)
		if err != nil {
			return 0, err
		}
		best := -1
		mtu := 0
		for _, r := range routes {
			if prefixOf(r.Dst).Bits() > 0 || r.LinkIndex == 0 || best >= 0 && r.Priority >= best {
				continue
			}
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
				best, mtu = r.Priority, link.Attrs().MTU
			}
		}
		if mtu > 0 {
			return mtu, nil
		}
	}
	return defaultMTU, nil
}

// isErrno reports whether err is one of errnos.
func isErrno(err error, errnos ...syscall.Errno) bool {
	return slices.ContainsFunc(errnos, func(e syscall.Errno) bool { return errors.Is(err, e) })
}
