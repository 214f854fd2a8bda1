package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// standIn makes up for gaps in plugins. DEL of bridge and ptp takes the
// addresses whose masquerading rules it removes from the interface, and nothing
// from the previous result: with the interface or the namespace gone, or killed after the interface
// but before the rules, it succeeds and leaves the rules
// for ever (containernetworking/plugins issue 810). So they get an interface of
// that name with those addresses to delete, in ns or, without one, in a namespace
// made for this. sbr, which fails without an interface (1.1.1) or a namespace, gets one
// too, and for bridge, which leaves the rules of macspoofchk without a namespace, it may
// be empty.
//
// It returns the namespace to use, also with an error, whether it has made
// an interface, and what takes the rest away when DEL has run.
func standIn(l *libcni.NetworkConfigList, ifname string, prev types.Result, ns *os.File) (_ *os.File, made bool, done func(), err error) {
	done = func() {}
	masquerades, spoofchk, sbr := gaps(l)
	r := &types100.Result{}
	if prev != nil {
		if r, err = types100.NewResultFromResult(prev); err != nil {
			r = &types100.Result{}
		}
	}
	iface := masquerades && len(r.IPs) > 0 || sbr
	if ns == nil && (iface || spoofchk) {
		if ns, err = nsthread.NewNet(); err != nil {
			return nil, false, done, fmt.Errorf("a namespace to delete from: %w", err)
		}
		done = func() { ns.Close() }
	}
	if !iface {
		return ns, false, done, nil
	}
	err = nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() error { made, err = addStandIn(ifname, r); return err })
	if err != nil {
		err = fmt.Errorf("an interface to delete: %w", err)
	}
	return ns, made, done, err
}

// gaps reports for which plugins of the list something has to stand in.
func gaps(l *libcni.NetworkConfigList) (masquerades, spoofchk, sbr bool) {
	for _, p := range l.Plugins {
		var conf struct {
			IPMasq      bool `json:"ipMasq"`
			MacSpoofChk bool `json:"macspoofchk"`
		}
		if json.Unmarshal(p.Bytes, &conf) != nil {
			continue
		}
		kind := p.Network.Type
		masquerades = masquerades || (kind == "bridge" || kind == "ptp") && conf.IPMasq
		spoofchk = spoofchk || kind == "bridge" && conf.MacSpoofChk
		sbr = sbr || kind == "sbr"
	}
	return masquerades, spoofchk, sbr
}

// addStandIn makes an interface with the addresses of a result, if there is none
// of that name, in the namespace of the thread.
func addStandIn(name string, r *types100.Result) (made bool, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	// Those plugins need veth as well; the kernel may lack dummy.
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}
	if err := netlink.LinkAdd(link); errors.Is(err, os.ErrExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("add %s: %w", name, err)
	}
	for _, ip := range r.IPs {
		if ip.Interface != nil && !ours(r.Interfaces, *ip.Interface, name) {
			continue
		}
		// Without duplicate address detection, which would hide it for a while.
		err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &ip.Address, Flags: nodad(ip)})
		if err != nil && !errors.Is(err, os.ErrExist) {
			return false, errors.Join(fmt.Errorf("address %s: %w", &ip.Address, err), netlink.LinkDel(link))
		}
	}
	return true, nil
}

func nodad(ip *types100.IPConfig) int {
	const flag = 0x02 // IFA_F_NODAD
	if ip.Address.IP.To4() != nil {
		return 0
	}
	return flag
}
