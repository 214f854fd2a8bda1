package cni

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// attachmentOf translates what the last plugin of a chain printed.
func attachmentOf(a attachment, added types.Result) (*network.Attachment, error) {
	r, err := types100.NewResultFromResult(added)
	if err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	out := &network.Attachment{
		Name: a.Network, Interface: a.Interface, Ports: a.Ports,
		Addresses: []netip.Prefix{}, Routes: []network.Route{}, Gateway: []netip.Addr{},
	}
	if out.Ports == nil {
		out.Ports = []network.Port{}
	}
	for _, i := range r.Interfaces {
		if i != nil && i.Sandbox != "" && i.Name == a.Interface {
			out.MAC, out.MTU = i.Mac, i.Mtu
		}
	}
	for _, ip := range r.IPs {
		// An address of another interface, on the host or of a pair of them, is
		// not what others reach the sandbox by.
		if ip == nil || ip.Interface != nil && !ours(r.Interfaces, *ip.Interface, a.Interface) {
			continue
		}
		p, ok := prefix(ip.Address)
		if !ok {
			return nil, fmt.Errorf("result: %v is not an address", ip.Address)
		}
		out.Addresses = append(out.Addresses, p)
		if gw, ok := netip.AddrFromSlice(ip.Gateway); ok {
			out.Gateway = append(out.Gateway, gw.Unmap())
		}
	}
	for _, rt := range r.Routes {
		if rt == nil {
			continue
		}
		dst, ok := prefix(rt.Dst)
		if !ok {
			return nil, fmt.Errorf("result: %v is not the destination of a route", rt.Dst)
		}
		gw, ok := netip.AddrFromSlice(rt.GW)
		if gw = gw.Unmap(); !ok {
			gw = gatewayFor(dst, out.Gateway)
		}
		out.Routes = append(out.Routes, network.Route{Dst: dst, GW: gw})
	}
	out.DNS = dnsOf(r.DNS)
	return out, nil
}

// observed makes up a result for an ADD whose own is not on disk, since the daemon was killed
// before the last plugin had answered: the interface and its addresses as the
// namespace has them. The plugin firewall takes the addresses whose rules it removes from
// the previous result, and removes none without one. It is nil if there is no such interface.
func observed(l *libcni.NetworkConfigList, ifname string, ns *os.File) (types.Result, error) {
	ifi, err := interfaceIn(ns, ifname)
	if err != nil || ifi == nil {
		return nil, err
	}
	var addrs []net.Addr
	err = nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() error { addrs, err = ifi.Addrs(); return err })
	if err != nil {
		return nil, err
	}
	r := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{{Name: ifname, Mac: ifi.HardwareAddr.String(), Mtu: ifi.MTU, Sandbox: nsPath(ns)}},
	}
	for _, a := range addrs {
		// The kernel makes link-local ones of IPv6 by itself.
		if n, ok := a.(*net.IPNet); ok && (n.IP.To4() != nil || !n.IP.IsLinkLocalUnicast()) {
			r.IPs = append(r.IPs, &types100.IPConfig{Interface: types100.Int(0), Address: *n})
		}
	}
	return r.GetAsVersion(l.CNIVersion)
}

func ours(all []*types100.Interface, i int, name string) bool {
	return i >= 0 && i < len(all) && all[i] != nil && all[i].Sandbox != "" && all[i].Name == name
}

// gatewayFor is the gateway that plugins use for a route without one: the first
// of its family.
func gatewayFor(dst netip.Prefix, gateways []netip.Addr) netip.Addr {
	for _, gw := range gateways {
		if gw.Is4() == dst.Addr().Is4() {
			return gw
		}
	}
	return netip.Addr{}
}

func prefix(n net.IPNet) (netip.Prefix, bool) {
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	if addr.Is4In6() {
		addr = addr.Unmap()
		if bits == 128 {
			ones -= 96
		}
	}
	p := netip.PrefixFrom(addr, ones)
	return p, p.IsValid()
}

// dnsOf translates name servers. The local domain is the list of names to search
// in, if there is no other (resolv.conf(5)). A plugin may have the words from a
// server that it asked: in the file they must not become more than that.
func dnsOf(d types.DNS) network.DNS {
	out := network.DNS{Search: words(d.Search), Options: words(d.Options)}
	for _, s := range d.Nameservers {
		if a, err := netip.ParseAddr(s); err == nil {
			out.Servers = append(out.Servers, a)
		}
	}
	if len(out.Search) == 0 {
		out.Search = words([]string{d.Domain})
	}
	return out
}

func words(all []string) []string {
	ok := strings.Fields(strings.Join(all, " "))
	ok = slices.DeleteFunc(ok, func(s string) bool {
		return strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' || r == ';' })
	})
	if len(ok) == 0 {
		return nil
	}
	return ok
}
