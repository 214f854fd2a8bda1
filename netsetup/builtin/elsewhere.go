package builtin

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/hostport"
	"github.com/sandboxd/sandboxd/internal/network"
)

// elsewhere returns the ports that other installations on this host publish, as
// their tables have them. The kernel would serve one of two that publish the same port,
// and say nothing to the other.
func (t *table) elsewhere() (found []hostport.Published, err error) {
	err = t.conns.use(func(c *nftables.Conn) error {
		tables, err := c.ListTablesOfFamily(t.inet.Family)
		if isErrno(err, unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT) {
			return nil // a kernel without nftables, on which plugins publish by other means
		}
		if err != nil {
			return err
		}
		tables = slices.DeleteFunc(tables, func(other *nftables.Table) bool {
			return other.Name == t.inet.Name || !strings.HasPrefix(other.Name, tableName(""))
		})
		if len(tables) == 0 {
			return nil
		}
		return t.conns.whole(c, func() error {
			found, err = t.publishedIn(c, tables)
			return err
		})
	})
	return found, err
}

// publishedIn returns the ports that are published by tables of installations.
func (t *table) publishedIn(c *nftables.Conn, tables []*nftables.Table) (found []hostport.Published, err error) {
	for _, other := range tables {
		for _, s := range []*nftables.Set{t.any4, t.any6, t.addr4, t.addr6} {
			theirs := reference(s)
			theirs.Table = other
			vals, err := c.GetSetElements(theirs)
			if err != nil && !gone(err) {
				return nil, err
			}
			for _, v := range vals {
				if p, ok := publishedBy(s.Name, v.Key); ok {
					found = append(found, hostport.Published{Port: p, By: owner(v.Comment, other.Name)})
				}
			}
		}
	}
	return found, nil
}

// publishedBy reads a key of the map of that name, the opposite of elementsOf.
func publishedBy(set string, key []byte) (p network.Port, ok bool) {
	switch set {
	case "any4":
		p.HostIP = netip.IPv4Unspecified()
	case "any6":
		p.HostIP = netip.IPv6Unspecified()
	case "addr4", "addr6":
		n := map[string]int{"addr4": 4, "addr6": 16}[set]
		if len(key) < n {
			return p, false
		}
		p.HostIP, _ = netip.AddrFromSlice(key[:n])
		key = key[n:]
	}
	// A protocol and a port, each padded to a register.
	if len(key) != 8 {
		return p, false
	}
	p.HostPort = binary.BigEndian.Uint16(key[4:])
	switch key[0] {
	case unix.IPPROTO_TCP:
		p.Protocol = network.TCP
	case unix.IPPROTO_UDP:
		p.Protocol = network.UDP
	case unix.IPPROTO_SCTP:
		p.Protocol = network.SCTP
	default:
		return p, false
	}
	return p, true
}

func owner(id, table string) string {
	if id == "" {
		return "another installation (nftables table inet " + table + ")"
	}
	return "sandbox " + id + " of another installation (nftables table inet " + table + ")"
}
