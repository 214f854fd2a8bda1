package builtin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// Verify reports what is no longer as Attach made it.
func (d *Driver) Verify(_ context.Context, id string, raw json.RawMessage, ns *os.File) error {
	p, err := decodePlan(raw)
	if err != nil {
		return err
	}
	d.host.RLock()
	defer d.host.RUnlock()
	l, ok := d.leases.get(id)
	if !ok {
		return errors.New("it has no address on record")
	}
	errs := []error{d.verifyHost(id, p, l), d.verifyGateway(), d.verifyElements(id, p, l), d.ports.Elsewhere(p.Ports)}
	if ns != nil {
		errs = append(errs, d.verifyInside(l, ns))
	}
	return once(errors.Join(errs...))
}

// verifyHost looks at the bridge and at the host's end of the pair.
func (d *Driver) verifyHost(id string, p *plan, l lease) error {
	bridge, err := findLink(d.opts.Bridge)
	switch {
	case err != nil:
		return err
	case bridge == nil:
		return fmt.Errorf("bridge %s is gone", d.opts.Bridge)
	}
	if err := d.ours(bridge); err != nil {
		return err
	}
	port, err := findLink(hostName(id))
	switch {
	case err != nil:
		return err
	case port == nil:
		return fmt.Errorf("link %s is gone", hostName(id))
	case port.Attrs().MasterIndex != bridge.Attrs().Index:
		return fmt.Errorf("link %s is not in bridge %s", hostName(id), d.opts.Bridge)
	case port.Attrs().RawFlags&upFlag == 0:
		return fmt.Errorf("link %s is down", hostName(id))
	case port.Attrs().Group != portGroup(d.opts.Mark):
		return fmt.Errorf("link %s is not in group %d", hostName(id), portGroup(d.opts.Mark))
	case p.Isolated:
		return verifySecure(port, p.mac(l))
	}
	return nil
}

// verifySecure looks for what an isolated sandbox's port has of its own.
func verifySecure(port netlink.Link, mac net.HardwareAddr) error {
	name := port.Attrs().Name
	mode, err := netlink.LinkGetProtinfo(port)
	if err != nil {
		return err
	}
	if mode.Learning {
		return fmt.Errorf("the bridge learns hardware addresses from link %s", name)
	}
	entries, err := netlink.NeighList(port.Attrs().Index, unix.AF_BRIDGE)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(entries, func(n netlink.Neigh) bool {
		return bytes.Equal(n.HardwareAddr, mac) && n.State == unix.NUD_NOARP && n.Flags&netlink.NTF_STICKY != 0
	}) {
		return fmt.Errorf("the bridge has lost the entry of hardware address %s at link %s", mac, name)
	}
	return nil
}

// verifyGateway looks for what makes the bridge the gateway, if there is a bridge.
func (d *Driver) verifyGateway() error {
	bridge, err := findLink(d.opts.Bridge)
	if err != nil || bridge == nil {
		return err
	}
	if bridge.Attrs().RawFlags&upFlag == 0 {
		return fmt.Errorf("bridge %s is down", d.opts.Bridge)
	}
	addrs, err := netlink.AddrList(bridge, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, subnet := range []netip.Prefix{d.opts.Subnet, d.opts.Subnet6} {
		if subnet.IsValid() && !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return prefixOf(a.IPNet).Addr() == gateway(subnet) }) {
			return fmt.Errorf("bridge %s has lost address %s", d.opts.Bridge, gateway(subnet))
		}
	}
	return nil
}

// verifyElements looks for the sandbox's elements, and for the table.
func (d *Driver) verifyElements(id string, p *plan, l lease) error {
	whole, err := d.nft.whole(p.Isolated)
	if err != nil {
		return err
	}
	if !whole {
		return fmt.Errorf("nftables table %s is gone or was changed", d.nft.inet.Name)
	}
	want := make(elements)
	d.nft.elementsOf(want, id, p, l)
	if len(want) == 0 {
		return nil
	}
	have, err := d.nft.owned()
	if err != nil {
		return err
	}
	var errs []error
	for s, vals := range want {
		for _, v := range vals {
			i := slices.IndexFunc(have[s], func(h element) bool { return bytes.Equal(h.Key, v.Key) })
			if i < 0 || !bytes.Equal(have[s][i].Val, v.Val) {
				errs = append(errs, fmt.Errorf("nftables set %s of table %s has lost an element", s.Name, s.Table.Name))
			}
		}
	}
	return errors.Join(errs...)
}

// verifyInside looks at eth0 in the sandbox.
func (d *Driver) verifyInside(l lease, ns *os.File) error {
	var h *netlink.Handle
	err := nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(ifName)
	if err != nil {
		return fmt.Errorf("interface %s in the sandbox: %w", ifName, err)
	}
	if link.Attrs().RawFlags&upFlag == 0 {
		return fmt.Errorf("interface %s in the sandbox is down", ifName)
	}
	addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	routes, err := h.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	var errs []error
	for _, want := range []netip.Addr{l.v4, l.v6} {
		if !want.IsValid() {
			continue
		}
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return prefixOf(a.IPNet).Addr() == want }) {
			errs = append(errs, fmt.Errorf("interface %s in the sandbox has lost address %s", ifName, want))
		}
		if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
			return r.Gw != nil && prefixOf(r.Dst).Bits() <= 0 && (r.Gw.To4() != nil) == want.Is4()
		}) {
			errs = append(errs, fmt.Errorf("the sandbox has lost the default route of %s", want))
		}
	}
	return errors.Join(errs...)
}

// Restore repairs an attachment: the bridge and the table, the sandbox's
// elements and link. A pair that was deleted is made again. That another
// installation has taken a port, while ours was not there, is reported.
func (d *Driver) Restore(_ context.Context, id string, raw json.RawMessage, ns *os.File) error {
	p, err := decodePlan(raw)
	if err != nil {
		return err
	}
	return errors.Join(d.restore(id, p, ns), d.ports.Elsewhere(p.Ports))
}

func (d *Driver) restore(id string, p *plan, ns *os.File) error {
	unlock, err := d.prepared()
	if err != nil {
		return err
	}
	defer unlock()
	l, err := d.leases.restore(id, p.Addresses, func() []netip.Addr { return addressesInside(ns) })
	if err != nil {
		return err
	}
	if err := d.register(id, p, l); err != nil {
		return err
	}
	if err := d.nft.add(id, p, l); err != nil {
		return err
	}
	if d.verifyHost(id, p, l) == nil && (ns == nil || d.verifyInside(l, ns) == nil) {
		return nil
	}
	there, err := linkThere(hostName(id))
	if err != nil {
		return err
	}
	if !there {
		if ns == nil {
			return fmt.Errorf("link %s is gone, and so is the sandbox's network namespace", hostName(id))
		}
		if _, err := d.connect(id, p, l, ns); err != nil {
			return err
		}
		if err := d.shape(id, p.Bandwidth); err != nil {
			return err
		}
		return d.secure(id, p, l)
	}
	err = d.socks.do(d.newPort(id, p)...)
	if err == nil {
		err = d.secure(id, p, l)
	}
	if err == nil && ns != nil {
		err = d.configure(l, ns)
	}
	return err
}

// addressesInside returns the addresses of a sandbox's eth0.
func addressesInside(ns *os.File) []netip.Addr {
	if ns == nil {
		return nil
	}
	var found []netip.Addr
	nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName(ifName)
		if err != nil {
			return err
		}
		addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
		for _, a := range addrs {
			found = append(found, prefixOf(a.IPNet).Addr())
		}
		return err
	})
	return found
}
