package leak

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// network reads all that somebody can have made or changed in the network
// namespace that Options.NetNS names.
func (t *taker) network() error {
	if t.o.NetNS == "" {
		return nil
	}
	f, err := os.Open(t.o.NetNS)
	if err != nil {
		return err
	}
	defer f.Close()
	return nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: f}, func() error {
		for _, look := range []func() error{t.interfaces, t.routes, t.nft, t.sysctls} {
			if err := look(); err != nil {
				return fmt.Errorf("network namespace %s: %w", t.o.NetNS, err)
			}
		}
		return nil
	})
}

// interfaces reads the links, and their addresses.
func (t *taker) interfaces() error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		name := l.Attrs().Name
		t.add(Link, name, l.Type())
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			t.add(Address, name+" "+a.IPNet.String(), "")
		}
	}
	return nil
}

// routes reads those of all tables.
func (t *taker) routes() error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range rs {
			dst := "default"
			if r.Dst != nil {
				dst = r.Dst.String()
			}
			if r.Type == unix.RTN_MULTICAST && r.Table == unix.RT_TABLE_LOCAL {
				continue // comes with a device that is up, when the kernel has time
			}
			t.add(Route, fmt.Sprintf("%s via %v dev %d table %d type %d", dst, r.Gw, r.LinkIndex, r.Table, r.Type), "")
		}
	}
	return nil
}

// nft reads every table of nftables, down to the elements of sets.
func (t *taker) nft() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return err
	}
	for _, tb := range tables {
		table := fmt.Sprintf("%d %s", tb.Family, tb.Name)
		t.add(Nft, "table "+table, "")
		sets, err := c.GetSets(tb)
		if err != nil {
			return err
		}
		for _, s := range sets {
			t.add(Nft, "set "+table+" "+s.Name, "")
			es, err := c.GetSetElements(s)
			if err != nil {
				return err
			}
			for _, e := range es {
				t.add(Nft, fmt.Sprintf("element %s %s %x", table, s.Name, e.Key), e.Comment)
			}
		}
	}
	chains, err := c.ListChains()
	if err != nil {
		return err
	}
	for _, ch := range chains {
		name := fmt.Sprintf("%d %s %s", ch.Table.Family, ch.Table.Name, ch.Name)
		t.add(Nft, "chain "+name, "")
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return err
		}
		for _, r := range rules {
			t.add(Nft, fmt.Sprintf("rule %s %d", name, r.Handle), "")
		}
	}
	return nil
}

// sysctls reads those that networks change.
func (t *taker) sysctls() error {
	const top = "/proc/sys/net"
	for _, pattern := range []string{
		"ipv4/ip_forward", "ipv4/conf/*/forwarding", "ipv4/conf/*/route_localnet", "ipv4/conf/*/rp_filter",
		"ipv6/conf/*/forwarding", "ipv6/conf/*/accept_ra", "bridge/*",
	} {
		names, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil {
			return err
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				if _, ok := err.(*fs.PathError); ok {
					continue // its link has gone
				}
				return err
			}
			t.add(Sysctl, strings.TrimPrefix(name, top+"/")+" = "+strings.TrimSpace(string(b)), "")
		}
	}
	return nil
}
