package builtin

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// What the kernel requires of a host that passes packets on (ip_forward.c,
// ip6_output.c, and tried): the device through which a packet comes in has to
// have "forwarding" in IPv4. The bridge has it for what sandboxes send; the
// devices that answers, and connections to published ports, come in by need it
// too. net.ipv4.ip_forward, which sets it for all and changes other things of the
// host with it, is not needed. In IPv6 the device's "forwarding" only says what it
// announces; what counts is that of "all" or, since Linux 6.17, the device's
// "force_forwarding".
//
// A device that we have turned into a forwarding one is a claim. It is in our
// set forward4 or forward6, whose rules keep it from passing on anything but the
// traffic of sandboxes, and what it was before is in a file. Another installation
// sees our set: it claims the device too, and who leaves last puts it back.
//
// A claim holds as long as nobody else makes a router of the host. Who does, as
// CNI's plugins, Docker and libvirt, sets forwarding of all devices: then nothing
// is claimed, and what was is let go as it is. When that is taken back, the kernel
// resets every device, and they are claimed again.

// hostFile records the sysctls that were changed, below the driver's root.
const hostFile = "host.json"

// hostRecord is its contents.
type hostRecord struct {
	Version int      `json:"version"` // 1
	Sysctls []sysctl `json:"sysctls"`
}

// sysctl is one of the host's and the value it had before us. Device and Six
// say what the claim is; Device is "all" for the one that is for every device.
type sysctl struct {
	Name   string `json:"name"` // below /proc/sys
	Was    string `json:"was"`
	Device string `json:"device,omitempty"`
	Six    bool   `json:"six,omitempty"`
}

const allDevices = "all"

func (d *Driver) readHostRecord() (hostRecord, error) {
	r := hostRecord{Version: 1}
	err := statefile.Read(d.root, hostFile, &r)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return r, nil
	case err != nil:
		return r, fmt.Errorf("which sysctls of the host were changed is not known (remove %s to go on without): %w", filepath.Join(d.root.Name(), hostFile), err)
	}
	return r, nil
}

// claim turns forwarding on where sandboxes need it, and lets go what they do not
// need any more, or what is not ours any more. d.host is held.
func (d *Driver) claim() error {
	record, err := d.readHostRecord()
	if err != nil {
		return err
	}
	want, err := d.wanted(record)
	if err != nil {
		return err
	}
	if record, err = d.letGo(record, want); err != nil {
		return err
	}
	var add []sysctl
	for _, s := range want {
		if record.has(s.Name) {
			continue
		}
		claimed, was, err := d.before(s)
		if err != nil {
			return err
		}
		if claimed {
			s.Was = was
			add = append(add, s)
		}
	}
	if len(add) > 0 {
		record.Sysctls = append(record.Sysctls, add...)
		if err := statefile.Write(d.root, hostFile, record); err != nil {
			return fmt.Errorf("record sysctls: %w", err)
		}
		crash.Point("builtin claim recorded")
	}
	if err := d.nft.claim(record.Sysctls); err != nil {
		return err
	}
	for _, s := range record.Sysctls {
		if err := writeSysctl(s.Name, claimValue(s)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// warnOff logs devices that somebody who makes a router of the host has taken out: that is
// for him to decide.
func (d *Driver) warnOff() error {
	router, err := setForAll("net/ipv4/")
	if err != nil || !router {
		return err
	}
	devs, err := d.uplinks(netlink.FAMILY_V4)
	for _, dev := range devs {
		if v, err := readSysctl("net/ipv4/conf/" + dev + "/forwarding"); err == nil && v == "0" {
			d.log.Warn("Sandboxes get no answers by a device whose forwarding is off while ip_forward is set", "device", dev)
		}
	}
	return err
}

func (r hostRecord) has(name string) bool {
	return slices.ContainsFunc(r.Sysctls, func(s sysctl) bool { return s.Name == name })
}

// letGo puts back the claims on record that are not wanted, and returns what is left.
func (d *Driver) letGo(record hostRecord, want []sysctl) (hostRecord, error) {
	left := hostRecord{Version: record.Version}
	var gone []sysctl
	for _, s := range record.Sysctls {
		if slices.ContainsFunc(want, func(w sysctl) bool { return w.Name == s.Name }) {
			left.Sysctls = append(left.Sysctls, s)
		} else {
			gone = append(gone, s)
		}
	}
	if len(gone) == 0 {
		return record, nil
	}
	for _, s := range slices.Backward(gone) {
		if err := d.putBack(s); err != nil {
			return record, err
		}
		// Devices are in a set once, for whichever sysctl.
		if slices.ContainsFunc(left.Sysctls, func(l sysctl) bool { return l.Device == s.Device && l.Six == s.Six }) {
			continue
		}
		if err := d.nft.unclaim(s); err != nil {
			return record, err
		}
	}
	crash.Point("builtin claims let go")
	if err := statefile.Write(d.root, hostFile, left); err != nil {
		return record, fmt.Errorf("record sysctls: %w", err)
	}
	return left, nil
}

// claimValue is what a sysctl on record is set to.
func claimValue(s sysctl) string {
	if strings.HasSuffix(s.Name, "/accept_ra") {
		return "2" // also when forwarding
	}
	return "1"
}

// before reports whether s has to be set, or is set only because another
// installation has claimed it, and what it was before either.
func (d *Driver) before(s sysctl) (bool, string, error) {
	for {
		now, err := readSysctl(s.Name)
		if errors.Is(err, os.ErrNotExist) {
			return false, "", nil // the device went
		}
		if err != nil {
			return false, "", err
		}
		if strings.HasSuffix(s.Name, "/accept_ra") {
			return now == "1", now, nil
		}
		if now == "0" {
			return true, now, nil
		}
		others, err := d.nft.othersClaim(s)
		if err != nil || others {
			return others, "0", err
		}
		// Nobody's claim; but one that was there when the value was read may have
		// gone meanwhile, and the value with it.
		if again, err := readSysctl(s.Name); err != nil || again == now {
			return false, "", err
		}
	}
}

// unclaim puts back what claim changed, except for what another installation
// has claimed as well. d.host is held for writing, and the table is still there.
func (d *Driver) unclaim() error {
	record, err := d.readHostRecord()
	if err != nil || len(record.Sysctls) == 0 {
		return err
	}
	var errs []error
	// The last first: accept_ra is put back when nothing forwards any more.
	for _, s := range slices.Backward(record.Sysctls) {
		errs = append(errs, d.putBack(s))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := d.root.Remove(hostFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// putBack gives a sysctl the value that it had, unless somebody else relies on ours.
func (d *Driver) putBack(s sysctl) error {
	keep, err := d.others(s)
	if err != nil || keep {
		return err
	}
	if err := writeSysctl(s.Name, s.Was); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	// One that came just now relies on it, and may have written before us.
	keep, err = d.others(s)
	if err == nil && keep {
		err = writeSysctl(s.Name, claimValue(s))
	}
	return err
}

// others reports whether s is to stay as we have set it: for another installation, or
// because somebody has set it for all devices.
func (d *Driver) others(s sysctl) (bool, error) {
	if set, err := setForAll(s.Name); err != nil || set {
		return set, err
	}
	return d.nft.othersClaim(s)
}

// setForAll reports whether somebody has set forwarding of every device to 1. The
// kernel then sets it for those that are there and those that come.
func setForAll(name string) (bool, error) {
	all := ""
	switch {
	case strings.HasPrefix(name, "net/ipv4/"):
		all = "net/ipv4/conf/all/forwarding"
	case strings.HasSuffix(name, "/force_forwarding"):
		all = "net/ipv6/conf/all/force_forwarding"
	default:
		return false, nil
	}
	v, err := readSysctl(all)
	return v == "1", err
}

// router reports whether somebody else makes a router of the host, so that there is
// nothing for us to turn on, and nothing to confine.
func (d *Driver) router(six bool, record hostRecord) (bool, error) {
	if !six {
		return setForAll("net/ipv4/")
	}
	if set, err := setForAll(forceForwarding(allDevices)); set || err != nil && !errors.Is(err, os.ErrNotExist) {
		return set, err
	}
	all := sysctl{Name: forwarding6, Device: allDevices, Six: true}
	v, err := readSysctl(all.Name)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // a host without IPv6
	}
	if err != nil || v != "1" || record.has(all.Name) {
		return false, err
	}
	others, err := d.nft.othersClaim(all)
	return !others, err
}

const forwarding6 = "net/ipv6/conf/all/forwarding"

func forceForwarding(dev string) string { return "net/ipv6/conf/" + dev + "/force_forwarding" }

// wanted returns the sysctls that matter beside the bridge's own, without
// their values.
func (d *Driver) wanted(record hostRecord) ([]sysctl, error) {
	var want []sysctl
	router, err := d.router(false, record)
	if err != nil {
		return nil, err
	}
	if !router {
		four, err := d.uplinks(netlink.FAMILY_V4)
		if err != nil {
			return nil, err
		}
		for _, dev := range four {
			want = append(want, sysctl{Name: "net/ipv4/conf/" + dev + "/forwarding", Device: dev})
		}
	}
	if !d.opts.Subnet6.IsValid() {
		return want, nil
	}
	if router, err = d.router(true, record); err != nil || router {
		return want, err
	}
	six, err := d.uplinks(netlink.FAMILY_V6)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat("/proc/sys/" + forceForwarding(allDevices)); err == nil {
		for _, dev := range six {
			want = append(want, sysctl{Name: forceForwarding(dev), Device: dev, Six: true})
		}
		return want, nil
	}
	// When "all" is set, the kernel forgets default routes that it has from router
	// advertisements, except on devices that accept them all the same.
	for _, dev := range six {
		want = append(want, sysctl{Name: "net/ipv6/conf/" + dev + "/accept_ra", Device: dev, Six: true})
	}
	return append(want, sysctl{Name: forwarding6, Device: allDevices, Six: true}), nil
}

// uplinks returns the devices by which traffic of sandboxes leaves the host: those,
// beside lo and the bridge, that routes lead through to other hosts.
func (d *Driver) uplinks(family int) ([]string, error) {
	routes, err := mainRoutes(family)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range routes {
		dst := prefixOf(r.Dst)
		if dst.Addr().IsLinkLocalUnicast() || dst.Addr().IsMulticast() {
			continue // every device has those, in IPv6
		}
		hops := append(r.MultiPath, &netlink.NexthopInfo{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via})
		for _, hop := range hops {
			link, err := netlink.LinkByIndex(hop.LinkIndex)
			if err != nil {
				continue // no device, or gone
			}
			name := link.Attrs().Name
			if link.Attrs().MasterIndex != 0 { // a port of somebody's bridge, which is where packets come in
				continue
			}
			if name == "lo" || name == d.opts.Bridge || slices.Contains(names, name) {
				continue
			}
			if hop.Gw == nil && hop.Via == nil && dst.Bits() > 0 {
				guests, err := ofGuests(link, dst)
				if err != nil {
					return nil, err
				}
				if guests {
					continue
				}
			}
			names = append(names, name)
		}
	}
	return names, nil
}

// ofGuests reports whether link, which is directly connected to dst, leads to containers
// or virtual machines of this host only. Its forwarding is for who made it to set.
func ofGuests(link netlink.Link, dst netip.Prefix) (bool, error) {
	switch link.Type() {
	case "veth":
		return dst.IsSingleIP(), nil
	case "bridge":
		links, err := allLinks()
		return !slices.ContainsFunc(links, func(l netlink.Link) bool {
			return l.Attrs().MasterIndex == link.Attrs().Index && l.Type() != "veth" && l.Type() != "tuntap"
		}), err
	}
	return false, nil
}

func mainRoutes(family int) ([]netlink.Route, error) {
	for {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		switch {
		case errors.Is(err, netlink.ErrDumpInterrupted): // they changed meanwhile
		case isErrno(err, unix.EAFNOSUPPORT, unix.EOPNOTSUPP): // a host without IPv6
			return nil, nil
		case err != nil:
			return nil, fmt.Errorf("list routes: %w", err)
		default:
			return routes, nil
		}
	}
}

// claim adds devices to the sets forward4 and forward6.
func (t *table) claim(claims []sysctl) error {
	e := make(elements)
	for _, s := range claims {
		set := t.forward4
		if s.Six {
			set = t.forward6
		}
		e[set] = append(e[set], nftables.SetElement{Key: ifname(s.Device)})
	}
	if err := t.addElements(e); err != nil {
		return fmt.Errorf("claim forwarding devices: %w", err)
	}
	return nil
}

// unclaim removes the device of s from its set, if it is there.
func (t *table) unclaim(s sysctl) error {
	set := t.forward4
	if s.Six {
		set = t.forward6
	}
	err := t.removeElements(elements{set: {{Key: ifname(s.Device)}}})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// othersClaim reports whether another installation has s in its sets.
func (t *table) othersClaim(s sysctl) (found bool, err error) {
	set := t.forward4
	if s.Six {
		set = t.forward6
	}
	var tables []*nftables.Table
	err = t.conns.use(func(c *nftables.Conn) (err error) {
		tables, err = c.ListTablesOfFamily(nftables.TableFamilyINet)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	for _, other := range tables {
		if other.Name == t.inet.Name || !strings.HasPrefix(other.Name, tableName("")) {
			continue
		}
		theirs := reference(set)
		theirs.Table = other
		// An error means that it went, or only looks like one of ours.
		t.conns.use(func(c *nftables.Conn) error {
			vals, err := c.GetSetElements(theirs)
			found = found || slices.ContainsFunc(vals, func(v element) bool { return bytes.Equal(v.Key, ifname(s.Device)) })
			return err
		})
	}
	return found, nil
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + name)
	return strings.TrimSpace(string(b)), err
}
