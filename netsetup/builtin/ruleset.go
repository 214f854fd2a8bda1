package builtin

import (
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Registers. The first one of 16 bytes is the same as the first four of 4 bytes.
const (
	reg   = unix.NFT_REG_1
	slot0 = unix.NFT_REG32_00
	state = expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
	dnat  = 1 << 5 // IPS_DST_NAT
	local = unix.RTN_LOCAL
	nat4  = unix.NFPROTO_IPV4
	nat6  = unix.NFPROTO_IPV6
)

// build adds the table with its rules, empty sets and the elements e to a
// transaction; a table of that name that is there already is replaced.
func (t *table) build(c *nftables.Conn, e elements) error {
	c.AddTable(t.inet) // so that there is one to delete
	c.DelTable(t.inet)
	c.AddTable(t.inet)
	for _, s := range t.inetSets() {
		if err := c.AddSet(s, nil); err != nil {
			return err
		}
		if err := addTo(c, s, e[s]); err != nil {
			return err
		}
	}
	rules := t.rules()
	accept := nftables.ChainPolicyAccept
	for _, ch := range chains {
		chain := c.AddChain(&nftables.Chain{Name: ch.name, Table: t.inet, Type: ch.kind, Hooknum: ch.hook, Priority: ch.priority, Policy: &accept})
		for _, exprs := range rules[ch.name] {
			c.AddRule(&nftables.Rule{Table: t.inet, Chain: chain, Exprs: exprs})
		}
	}
	return nil
}

// chains of the inet table. They are called what nft calls the hooks.
var chains = []struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
}{
	{"raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw},
	{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest},
	{"output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest},
	{"postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource},
	{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter},
}

// rules returns the rules of each chain.
func (t *table) rules() map[string][][]expr.Any {
	br, six := t.bridge, t.subnet6.IsValid()
	rules := make(map[string][][]expr.Any)
	add := func(chain string, parts ...[]expr.Any) { rules[chain] = append(rules[chain], slices.Concat(parts...)) }

	// What a sandbox sends comes from the bridge, and rules know it by that. But a frame to one of
	// the addresses that are for the next bridge only (01-80-C2-00-00-0X, IEEE 802.1D) is the port's.
	add("raw", iifGroup(expr.CmpOpEq, t.group), drop())

	// Loopback addresses may be routed from and to the bridge (route_localnet),
	// for ports published on 127.0.0.1. Nobody in a sandbox may make use of that:
	// an answer has the bridge's address here, since it is not translated back yet.
	// Nor may anybody there pass for the host: for the kernel only those loopback
	// addresses are its own that are on lo, and route_localnet lets the others in.
	add("raw", iif(br), daddr4(loopback4), drop())
	add("raw", iif(br), saddr4(loopback4), drop())

	// What the host sends to 127.0.0.1 is translated in output. Who sends such a packet
	// to the host is on a network of its: once translated, the kernel would not see
	// any more that it has to be dropped.
	add("prerouting", daddr4(loopback4), verdict(expr.VerdictReturn))
	for _, chain := range []string{"prerouting", "output"} {
		add(chain, family(nat4), t.publish(t.addr4, true))
		add(chain, family(nat4), localDestination(), t.publish(t.any4, false))
		if six {
			if !t.loopback6 {
				add(chain, daddr6(loopback6), verdict(expr.VerdictReturn))
			}
			add(chain, family(nat6), t.publish(t.addr6, true))
			add(chain, family(nat6), localDestination(), t.publish(t.any6, false))
		}
	}

	// What comes to a published port from the host itself, or from a sandbox, gets
	// the bridge's address: otherwise the answer would take another way back.
	add("postrouting", oif(br), translated(), saddr4(loopback4), masquerade())
	add("postrouting", oif(br), translated(), saddr4(t.subnet), masquerade())
	add("postrouting", notOif(br), saddr4(t.subnet), masquerade())
	if six {
		add("postrouting", oif(br), translated(), saddr6(loopback6), masquerade())
		add("postrouting", oif(br), translated(), saddr6(t.subnet6), masquerade())
		add("postrouting", notOif(br), saddr6(t.subnet6), masquerade())
	}

	among := func(parts ...[]expr.Any) { add("forward", append([][]expr.Any{iif(br), oif(br)}, parts...)...) }
	among(family(nat4), pair4(), in(t.self4), verdict(expr.VerdictAccept))
	among(family(nat4), load4(12), in(t.isolated4), drop())
	among(family(nat4), load4(16), in(t.isolated4), drop())
	if six {
		among(family(nat6), pair6(), in(t.self6), verdict(expr.VerdictAccept))
		among(family(nat6), load6(8), in(t.isolated6), drop())
		among(family(nat6), load6(24), in(t.isolated6), drop())
	}
	// From outside: answers, and what is published.
	add("forward", connected(), verdict(expr.VerdictAccept))
	add("forward", translated(), verdict(expr.VerdictAccept))
	add("forward", notIif(br), oif(br), drop())
	// A device that forwards because of us does so for sandboxes only.
	add("forward", family(nat4), loadIif(), in(t.forward4), drop())
	add("forward", family(nat6), loadIif(), in(t.forward6), drop())
	return rules
}

// publish translates what m says. Packets it does not have go on.
func (t *table) publish(m *nftables.Set, addr bool) []expr.Any {
	six := m == t.any6 || m == t.addr6
	var exprs []expr.Any
	next, fam, portReg := uint32(slot0), uint32(nat4), uint32(slot0+1)
	if six {
		fam, portReg = nat6, slot0+4
	}
	switch {
	case addr && six:
		exprs = append(exprs, payload(slot0, expr.PayloadBaseNetworkHeader, 24, 16))
		next += 4
	case addr:
		exprs = append(exprs, payload(slot0, expr.PayloadBaseNetworkHeader, 16, 4))
		next++
	}
	return append(exprs,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: next},
		payload(next+1, expr.PayloadBaseTransportHeader, 2, 2),
		&expr.Lookup{SourceRegister: slot0, DestRegister: slot0, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: fam, RegAddrMin: slot0, RegProtoMin: portReg, Specified: true},
	)
}

func payload(dst uint32, base expr.PayloadBase, offset, n uint32) expr.Any {
	return &expr.Payload{DestRegister: dst, Base: base, Offset: offset, Len: n}
}

func family(f byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg}, equal([]byte{f})}
}

func equal(b []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: b} }

func iif(name string) []expr.Any { return append(loadIif(), equal(ifname(name))) }
func oif(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg}, equal(ifname(name))}
}

func notIif(name string) []expr.Any {
	return append(loadIif(), &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: ifname(name)})
}

func notOif(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: ifname(name)}}
}

func iifGroup(op expr.CmpOp, group uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: reg}, &expr.Cmp{Op: op, Register: reg, Data: binaryutil.NativeEndian.PutUint32(group)}}
}

func loadIif() []expr.Any { return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg}} }

func load4(offset uint32) []expr.Any {
	return []expr.Any{payload(reg, expr.PayloadBaseNetworkHeader, offset, 4)}
}

func load6(offset uint32) []expr.Any {
	return []expr.Any{payload(reg, expr.PayloadBaseNetworkHeader, offset, 16)}
}

func pair4() []expr.Any {
	return []expr.Any{payload(slot0, expr.PayloadBaseNetworkHeader, 12, 4), payload(slot0+1, expr.PayloadBaseNetworkHeader, 16, 4)}
}

func pair6() []expr.Any {
	return []expr.Any{payload(slot0, expr.PayloadBaseNetworkHeader, 8, 16), payload(slot0+4, expr.PayloadBaseNetworkHeader, 24, 16)}
}

func in(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID}}
}

func saddr4(p netip.Prefix) []expr.Any { return address(nat4, 12, p) }
func daddr4(p netip.Prefix) []expr.Any { return address(nat4, 16, p) }
func saddr6(p netip.Prefix) []expr.Any { return address(nat6, 8, p) }
func daddr6(p netip.Prefix) []expr.Any { return address(nat6, 24, p) }

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
)

func address(fam byte, offset uint32, p netip.Prefix) []expr.Any {
	return append(family(fam), prefixAt(offset, p)...)
}

// prefixAt matches an address at an offset of the network header.
func prefixAt(offset uint32, p netip.Prefix) []expr.Any {
	n := uint32(p.Addr().BitLen() / 8)
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 1 << (7 - i%8)
	}
	return []expr.Any{payload(reg, expr.PayloadBaseNetworkHeader, offset, n),
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: n, Mask: mask, Xor: make([]byte, n)},
		equal(p.Masked().Addr().AsSlice())}
}

// localDestination matches what is sent to an address of the host's.
func localDestination() []expr.Any {
	return []expr.Any{&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true}, equal(binaryutil.NativeEndian.PutUint32(local))}
}

// translated matches packets of connections to published ports.
func translated() []expr.Any { return ctBits(expr.CtKeySTATUS, dnat) }

// connected matches packets that are not the first of a connection.
func connected() []expr.Any { return ctBits(expr.CtKeySTATE, uint32(state)) }

func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	zero := make([]byte, 4)
	return []expr.Any{&expr.Ct{Key: key, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: zero},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: zero}}
}

func masquerade() []expr.Any                { return []expr.Any{&expr.Masq{}} }
func drop() []expr.Any                      { return verdict(expr.VerdictDrop) }
func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }
