package builtin

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
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

// claim turns forwarding on where sandboxes need it. d.host is held.
func (d *Driver) claim() error {
	record, err := d.readHostRecord()
	if err != nil {
		return err
	}
	want, err := d.wanted()
	if err != nil {
		return err
	}
	var add []sysctl
	for _, s := range want {
		if slices.ContainsFunc(record.Sysctls, func(r sysctl) bool { return r.Name == s.Name }) {
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

func (d *Driver) putBack(s sysctl) error {
	others, err := d.nft.othersClaim(s)
	if err != nil || others {
		return err
	}
	if err := writeSysctl(s.Name, s.Was); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	// One that claimed it just now relies on it, and may have written before us.
	others, err = d.nft.othersClaim(s)
	if err == nil && others {
		err = writeSysctl(s.Name, claimValue(s))
	}
	return err
}

// wanted returns the sysctls that matter beside the bridge's own, without
// their values.
func (d *Driver) wanted() ([]sysctl, error) {
	var want []sysctl
	four, err := d.uplinks(netlink.FAMILY_V4)
	if err != nil {
		return nil, err
	}
	for _, dev := range four {
		want = append(want, sysctl{Name: "net/ipv4/conf/" + dev + "/forwarding", Device: dev})
	}
	if !d.opts.Subnet6.IsValid() {
		return want, nil
	}
	six, err := d.uplinks(netlink.FAMILY_V6)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat("/proc/sys/net/ipv6/conf/all/force_forwarding"); err == nil {
		for _, dev := range six {
			want = append(want, sysctl{Name: "net/ipv6/conf/" + dev + "/force_forwarding", Device: dev, Six: true})
		}
		return want, nil
	}
	// When "all" is set, the kernel forgets default routes that it has from router
	// advertisements, except on devices that accept them all the same.
	for _, dev := range six {
		want = append(want, sysctl{Name: "net/ipv6/conf/" + dev + "/accept_ra", Device: dev, Six: true})
	}
	return append(want, sysctl{Name: "net/ipv6/conf/all/forwarding", Device: allDevices, Six: true}), nil
}

// uplinks returns the devices, beside lo and the bridge, that routes lead through.
func (d *Driver) uplinks(family int) ([]string, error) {
	routes, err := mainRoutes(family)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range routes {
		if dst := prefixOf(r.Dst).Addr(); dst.IsLinkLocalUnicast() || dst.IsMulticast() {
			continue // every device has those, in IPv6
		}
		indexes := []int{r.LinkIndex}
		for _, hop := range r.MultiPath {
			indexes = append(indexes, hop.LinkIndex)
		}
		for _, i := range indexes {
			link, err := netlink.LinkByIndex(i)
			if err != nil {
				continue // no device, or gone
			}
			name := link.Attrs().Name
			if link.Attrs().MasterIndex != 0 { // a port of somebody's bridge, which is where packets come in
				continue
			}
			if name != "lo" && name != d.opts.Bridge && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names, nil
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
