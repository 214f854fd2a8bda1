package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
)

// table is this installation's part of nftables: the table "inet sandboxd_MARK"
// with rules that are the same for every sandbox, and sets and maps that have
// elements for each; and "bridge sandboxd_MARK" once somebody asks for
// isolation. ruleset.go has the rules.
type table struct {
	bridge          string
	subnet, subnet6 netip.Prefix

	conns *nftPool

	// Ports are published on ::1. Changed only while nobody uses the table.
	loopback6 bool

	inet *nftables.Table
	// Maps from what a packet is sent to, to a sandbox's address and port: of
	// every local address, and of a certain one.
	any4, any6, addr4, addr6 *nftables.Set
	// Addresses of isolated sandboxes, and pairs of an address with itself.
	isolated4, isolated6, self4, self6 *nftables.Set
	// Devices that forward only because of us.
	forward4, forward6 *nftables.Set

	bridgeMu      sync.Mutex // held while the bridge table is made
	br            *nftables.Table
	isolated, own *nftables.Set // ports of isolated sandboxes, and pairs of a port with itself
	from4, from6  *nftables.Set // pairs of such a port with an address of the sandbox
	theirs4       *nftables.Set // addresses of isolated sandboxes
	theirs6       *nftables.Set
	group         uint32 // of all our ports
}

func tableName(mark string) string { return "sandboxd_" + mark }

func newTable(o Options) *table {
	inet := &nftables.Table{Name: tableName(o.Mark), Family: nftables.TableFamilyINet}
	br := &nftables.Table{Name: tableName(o.Mark), Family: nftables.TableFamilyBridge}
	t := &table{conns: newNftPool(), bridge: o.Bridge, subnet: o.Subnet, subnet6: o.Subnet6, inet: inet, br: br, group: portGroup(o.Mark)}
	ip4, ip6, name := nftables.TypeIPAddr, nftables.TypeIP6Addr, nftables.TypeIFName
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	concat := nftables.MustConcatSetType
	to4, to6 := concat(ip4, port), concat(ip6, port)
	t.any4 = &nftables.Set{Name: "any4", KeyType: concat(proto, port), DataType: to4}
	t.any6 = &nftables.Set{Name: "any6", KeyType: concat(proto, port), DataType: to6}
	t.addr4 = &nftables.Set{Name: "addr4", KeyType: concat(ip4, proto, port), DataType: to4}
	t.addr6 = &nftables.Set{Name: "addr6", KeyType: concat(ip6, proto, port), DataType: to6}
	t.isolated4 = &nftables.Set{Name: "isolated4", KeyType: ip4}
	t.isolated6 = &nftables.Set{Name: "isolated6", KeyType: ip6}
	t.self4 = &nftables.Set{Name: "self4", KeyType: concat(ip4, ip4)}
	t.self6 = &nftables.Set{Name: "self6", KeyType: concat(ip6, ip6)}
	t.forward4 = &nftables.Set{Name: "forward4", KeyType: name}
	t.forward6 = &nftables.Set{Name: "forward6", KeyType: name}
	// Numbers by which the rules of one transaction refer to its sets.
	for i, s := range t.inetSets() {
		s.Table, s.ID, s.IsMap = inet, uint32(i+1), s.DataType.Bytes > 0
	}
	t.isolated = &nftables.Set{Table: br, ID: 1, Name: "isolated", KeyType: name}
	t.own = &nftables.Set{Table: br, ID: 2, Name: "self", KeyType: concat(name, name)}
	t.from4 = &nftables.Set{Table: br, ID: 3, Name: "from4", KeyType: concat(name, ip4)}
	t.from6 = &nftables.Set{Table: br, ID: 4, Name: "from6", KeyType: concat(name, ip6)}
	t.theirs4 = &nftables.Set{Table: br, ID: 5, Name: "isolated4", KeyType: ip4}
	t.theirs6 = &nftables.Set{Table: br, ID: 6, Name: "isolated6", KeyType: ip6}
	return t
}

func (t *table) inetSets() []*nftables.Set {
	return []*nftables.Set{t.any4, t.any6, t.addr4, t.addr6, t.isolated4, t.isolated6, t.self4, t.self6, t.forward4, t.forward6}
}

func (t *table) bridgeSets() []*nftables.Set {
	return []*nftables.Set{t.isolated, t.own, t.from4, t.from6, t.theirs4, t.theirs6}
}

type element = nftables.SetElement

// elements are those of one sandbox, or of several, by their set.
type elements map[*nftables.Set][]element

func (e elements) add(s *nftables.Set, id string, key, val []byte) {
	e[s] = append(e[s], nftables.SetElement{Key: key, Val: val, Comment: id})
}

// elementsOf adds to e what id needs in the tables. A sandbox that publishes
// nothing and is not isolated needs nothing: it is masqueraded by the subnet.
func (t *table) elementsOf(e elements, id string, p *plan, l lease) {
	for _, port := range p.Ports {
		to := l.v4
		only := port.HostIP.IsValid() && !port.HostIP.IsUnspecified()
		switch every := !port.HostIP.IsValid(); {
		case only && port.HostIP.Is4():
			e.add(t.addr4, id, field(port.HostIP.AsSlice(), portKey(port)), target(l.v4, port.Port))
		case only:
			e.add(t.addr6, id, field(port.HostIP.AsSlice(), portKey(port)), target(l.v6, port.Port))
		default:
			if every || port.HostIP.Is4() {
				e.add(t.any4, id, portKey(port), target(to, port.Port))
			}
			if l.v6.IsValid() && (every || port.HostIP.Is6()) {
				e.add(t.any6, id, portKey(port), target(l.v6, port.Port))
			}
		}
	}
	if !p.Isolated {
		return
	}
	name := ifname(hostName(id))
	e.add(t.isolated, id, name, nil)
	e.add(t.own, id, field(name, name), nil)
	own := func(a netip.Addr, inet, from, theirs *nftables.Set) {
		e.add(inet, id, a.AsSlice(), nil)
		e.add(from, id, field(name, a.AsSlice()), nil)
		e.add(theirs, id, a.AsSlice(), nil)
	}
	own(l.v4, t.isolated4, t.from4, t.theirs4)
	e.add(t.self4, id, field(l.v4.AsSlice(), l.v4.AsSlice()), nil)
	if l.v6.IsValid() {
		own(l.v6, t.isolated6, t.from6, t.theirs6)
		own(linkLocal(p.mac(l)), t.isolated6, t.from6, t.theirs6)
		e.add(t.self6, id, field(l.v6.AsSlice(), l.v6.AsSlice()), nil)
	}
}

// field concatenates parts of a key, each of which begins at a register of
// four bytes.
func field(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

func portKey(p network.Port) []byte {
	return field([]byte{protocol(p.Protocol)}, binary.BigEndian.AppendUint16(nil, p.HostPort))
}

func target(a netip.Addr, port uint16) []byte {
	return field(a.AsSlice(), binary.BigEndian.AppendUint16(nil, port))
}

func protocol(p network.Protocol) byte {
	switch p {
	case network.UDP:
		return unix.IPPROTO_UDP
	case network.SCTP:
		return unix.IPPROTO_SCTP
	default:
		return unix.IPPROTO_TCP
	}
}

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// add adds what id needs, in one transaction, unless it needs nothing.
func (t *table) add(id string, p *plan, l lease) error {
	e := make(elements)
	t.elementsOf(e, id, p, l)
	if len(e) == 0 {
		return nil
	}
	if len(e[t.isolated]) > 0 {
		if err := t.makeBridgeTable(); err != nil {
			return err
		}
	}
	if err := t.addElements(e); err != nil {
		return fmt.Errorf("add nftables elements: %w", err)
	}
	return nil
}

// ofBridge returns those of all that are in the bridge table.
func (t *table) ofBridge(all elements) elements {
	e := make(elements)
	for _, s := range t.bridgeSets() {
		if len(all[s]) > 0 {
			e[s] = all[s]
		}
	}
	return e
}

func (t *table) addElements(e elements) error {
	if len(e) == 0 {
		return nil
	}
	return t.conns.use(func(c *nftables.Conn) error {
		for s, vals := range e {
			if err := addTo(c, reference(s), vals); err != nil {
				return err
			}
		}
		return nil
	})
}

// remove removes what add added, in one transaction. It succeeds if nothing is there.
func (t *table) remove(id string, p *plan, l lease) error {
	e := make(elements)
	t.elementsOf(e, id, p, l)
	if len(e) == 0 {
		return nil
	}
	err := t.removeElements(e)
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	// A transaction is all or nothing, so what is missing goes element by element.
	var errs []error
	for s, vals := range e {
		for _, v := range vals {
			if err := t.removeElements(elements{s: {v}}); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, err)
			}
		}
	}
	return once(errors.Join(errs...))
}

func (t *table) removeElements(e elements) error {
	err := t.conns.use(func(c *nftables.Conn) error {
		for s, vals := range e {
			keys := make([]element, len(vals))
			for i, v := range vals {
				keys[i].Key = v.Key
			}
			for part := range slices.Chunk(keys, elementsPerMessage) {
				if err := c.SetDeleteElements(reference(s), part); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove nftables elements: %w", err)
	}
	return nil
}

// removeByID removes the elements of ids, whatever they are.
func (t *table) removeByID(ids map[string]bool) error {
	found, err := t.owned()
	if err != nil {
		return err
	}
	e := make(elements)
	for s, vals := range found {
		for _, v := range vals {
			if ids[v.Comment] {
				e[s] = append(e[s], v)
			}
		}
	}
	if len(e) == 0 {
		return nil
	}
	return t.removeElements(e)
}

// owned returns the elements in the kernel that belong to sandboxes, with the
// sandbox's id as comment.
func (t *table) owned() (elements, error) {
	e := make(elements)
	for _, s := range append(t.inetSets(), t.bridgeSets()...) {
		var vals []element
		err := t.conns.use(func(c *nftables.Conn) error {
			return t.conns.whole(c, func() (err error) {
				vals, err = c.GetSetElements(reference(s))
				return err
			})
		})
		if err != nil {
			if gone(err) {
				continue
			}
			return nil, fmt.Errorf("list nftables set %s: %w", s.Name, err)
		}
		for _, v := range vals {
			if v.Comment != "" {
				e[s] = append(e[s], v)
			}
		}
	}
	return e, nil
}

// gone reports whether err is that of a set or table that is not there, which the
// library does not wrap.
func gone(err error) bool { return strings.Contains(err.Error(), unix.ENOENT.Error()) }

// whole reports whether the tables are as they were made, elements apart. That
// of the bridge family is looked at if somebody is isolated.
func (t *table) whole(isolated bool) (whole bool, err error) {
	err = t.conns.use(func(c *nftables.Conn) error {
		whole, err = t.tableWhole(c, t.inet, len(t.inetSets()), t.rules())
		if whole && err == nil && isolated {
			whole, err = t.tableWhole(c, t.br, len(t.bridgeSets()), t.bridgeRules())
		}
		return err
	})
	return whole, err
}

// tableWhole compares a table's number of sets, and of rules in each chain.
func (t *table) tableWhole(c *nftables.Conn, table *nftables.Table, nsets int, rules map[string][][]expr.Any) (bool, error) {
	there, err := hasTable(c, table)
	if err != nil || !there {
		return false, err
	}
	sets, err := c.GetSets(table)
	if err != nil {
		return false, err
	}
	if len(sets) != nsets {
		return false, nil
	}
	for name, want := range rules {
		have, err := c.GetRules(table, &nftables.Chain{Name: name, Table: table})
		if err != nil {
			return false, err
		}
		if len(have) != len(want) {
			return false, nil
		}
	}
	return true, nil
}

func hasTable(c *nftables.Conn, t *nftables.Table) (bool, error) {
	tables, err := c.ListTablesOfFamily(t.Family)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.Name }), nil
}

// delete removes the tables.
func (t *table) delete() error {
	for _, table := range []*nftables.Table{t.inet, t.br} {
		err := t.conns.use(func(c *nftables.Conn) error {
			c.DelTable(table)
			return nil
		})
		if err != nil && !isErrno(err, unix.ENOENT, unix.EAFNOSUPPORT) {
			return fmt.Errorf("delete nftables table %s: %w", table.Name, err)
		}
	}
	return nil
}

// reference names a set that is in the kernel already, unlike one that the
// same transaction makes.
func reference(s *nftables.Set) *nftables.Set {
	return &nftables.Set{Table: s.Table, Name: s.Name, IsMap: s.IsMap, KeyType: s.KeyType, DataType: s.DataType}
}
