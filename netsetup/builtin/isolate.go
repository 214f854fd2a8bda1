package builtin

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Frames between sandboxes are bridged, and a table of the inet family does not
// see them unless br_netfilter is used. So there is one of the bridge family as
// well, but only once a sandbox asks for isolation: its hook costs every frame
// that any bridge of the host forwards.

// makeBridgeTable makes the table of the bridge family, unless it is there and whole.
func (t *table) makeBridgeTable() error {
	t.bridgeMu.Lock()
	defer t.bridgeMu.Unlock()
	err := t.conns.use(func(c *nftables.Conn) error {
		whole, err := t.tableWhole(c, t.br, len(t.bridgeSets()), t.bridgeRules())
		if err != nil || whole {
			return err
		}
		c.AddTable(t.br) // so that there is one to delete
		c.DelTable(t.br)
		c.AddTable(t.br)
		for _, s := range t.bridgeSets() {
			if err := c.AddSet(s, nil); err != nil {
				return err
			}
		}
		rules := t.bridgeRules()
		accept := nftables.ChainPolicyAccept
		for _, ch := range bridgeChains {
			chain := c.AddChain(&nftables.Chain{
				Name: ch.name, Table: t.br, Type: nftables.ChainTypeFilter,
				Hooknum: ch.hook, Priority: bridgePriority, Policy: &accept,
			})
			for _, exprs := range rules[ch.name] {
				c.AddRule(&nftables.Rule{Table: t.br, Chain: chain, Exprs: exprs})
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("make nftables table %s of the bridge family: %w", t.br.Name, err)
	}
	return nil
}

// bridgePriority is before br_netfilter (0), which translates addresses, and which on Linux 6.1 passes
// over what has its own priority when it gives a packet back.
var bridgePriority = nftables.ChainPriorityRef(-200) // NF_BR_PRI_FILTER_BRIDGED

// bridgeChains of the bridge table: what comes from a port, before anything is made of
// it; what is passed on to another port; and what is for the bridge itself.
var bridgeChains = []struct {
	name string
	hook *nftables.ChainHook
}{
	{"prerouting", nftables.ChainHookPrerouting},
	{"forward", nftables.ChainHookForward},
	{"input", nftables.ChainHookInput},
}

// bridgeRules drop what an isolated sandbox sends under any but its own addresses, and
// what another one sends under one of these; and what comes from or goes to
// the port of an isolated sandbox, except what the bridge sends back by the port that it came from (hairpin).
//
// To the bridge itself, which routes, the rules of the inet table know a sandbox by its addresses.
// Whatever is neither IP nor ARP is dropped if it comes from an isolated one, since it might be IP in a form that is not
// recognised here but is later.
func (t *table) bridgeRules() map[string][][]expr.Any {
	load := func(key expr.MetaKey, register uint32) expr.Any { return &expr.Meta{Key: key, Register: register} }
	proto := func(p uint16) []expr.Any {
		return []expr.Any{load(expr.MetaKeyPROTOCOL, reg), equal(binary.BigEndian.AppendUint16(nil, p))}
	}
	iifname := load(expr.MetaKeyIIFNAME, slot0) // is in reg then, too
	pair := func(base expr.PayloadBase, offset, n uint32) []expr.Any {
		return []expr.Any{iifname, payload(slot0+4, base, offset, n)}
	}
	notIn := func(s *nftables.Set) []expr.Any {
		return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, Invert: true}}
	}
	var pre [][]expr.Any
	add := func(parts ...[]expr.Any) { pre = append(pre, slices.Concat(parts...)) }
	add(iifGroup(expr.CmpOpNeq, t.group), verdict(expr.VerdictAccept))
	sender := func(match []expr.Any, from, theirs *nftables.Set, offset, n uint32) {
		add(match, pair(expr.PayloadBaseNetworkHeader, offset, n), in(from), verdict(expr.VerdictAccept))
		add(match, []expr.Any{payload(reg, expr.PayloadBaseNetworkHeader, offset, n)}, in(theirs), drop())
	}
	const senderInARP = 14
	sender(proto(unix.ETH_P_IP), t.from4, t.theirs4, 12, 4)
	sender(proto(unix.ETH_P_ARP), t.from4, t.theirs4, senderInARP, 4)
	if t.subnet6.IsValid() {
		// In IPv6, what says which hardware address an address has is the target of a
		// neighbour advertisement (RFC 4861, 4.4), and else the sender.
		const advertisement, target = 136, 8
		l4 := load(expr.MetaKeyL4PROTO, reg)
		elsewhere := slices.Concat(proto(unix.ETH_P_IPV6), []expr.Any{l4, equal([]byte{unix.IPPROTO_ICMPV6}),
			payload(reg, expr.PayloadBaseTransportHeader, 0, 1), equal([]byte{advertisement})},
			pair(expr.PayloadBaseTransportHeader, target, 16), notIn(t.from6))
		add(elsewhere, []expr.Any{iifname}, in(t.isolated), drop())
		add(elsewhere, []expr.Any{payload(reg, expr.PayloadBaseTransportHeader, target, 16)}, in(t.theirs6), drop())
		// Nothing has this number; a packet whose headers cannot be followed does not match.
		const nothing = 255
		sender(slices.Concat(proto(unix.ETH_P_IPV6), []expr.Any{l4, &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: []byte{nothing}}}),
			t.from6, t.theirs6, 8, 16)
	}
	add([]expr.Any{iifname}, in(t.isolated), drop())
	// The kernel takes off VLAN tags of number 0 one after the other, but has only got to the second
	// one when it comes here: below that there may be anything.
	tagged := func(p uint16) []expr.Any {
		return slices.Concat(iifGroup(expr.CmpOpEq, t.group), proto(p), drop())
	}
	return map[string][][]expr.Any{
		"prerouting": pre,
		"forward": {
			slices.Concat([]expr.Any{iifname, load(expr.MetaKeyOIFNAME, slot0+4)}, in(t.own), verdict(expr.VerdictAccept)),
			slices.Concat([]expr.Any{iifname}, in(t.isolated), drop()),
			slices.Concat([]expr.Any{load(expr.MetaKeyOIFNAME, reg)}, in(t.isolated), drop()),
		},
		"input": {tagged(unix.ETH_P_8021Q), tagged(unix.ETH_P_8021AD)},
	}
}

// secure makes bridge and host send what is for an isolated sandbox nowhere else,
// whatever others made them believe before its elements were in the tables. The entry of
// the bridge is sticky (bridge(8), Linux 4.20): it moves to no port from which somebody else sends with
// that address, also in frames that no hook sees. The kernel removes it with the port.
func (d *Driver) secure(id string, p *plan, l lease) error {
	if !p.Isolated {
		return nil
	}
	index, err := linkIndex(hostName(id))
	if err != nil || index == 0 { // the sandbox removed it
		return err
	}
	reqs := []request{newFDBEntry(index, p.mac(l)), forgetNeighbour(d.bridge, l.v4)}
	if l.v6.IsValid() {
		reqs = append(reqs, forgetNeighbour(d.bridge, l.v6), forgetNeighbour(d.bridge, linkLocal(p.mac(l))))
	}
	if err := d.socks.do(reqs...); err != nil {
		return fmt.Errorf("isolate link %s: %w", hostName(id), err)
	}
	return nil
}

// newFDBEntry asks the bridge to send what is for mac to a port, for good.
func newFDBEntry(port int, mac net.HardwareAddr) request {
	r := newRequest("fix hardware address "+mac.String(), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, unix.ENODEV)
	r.AddData(&netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(port), State: unix.NUD_NOARP, Flags: netlink.NTF_MASTER | netlink.NTF_STICKY})
	r.AddData(nl.NewRtAttr(unix.NDA_LLADDR, mac))
	return r
}

// forgetNeighbour makes the host ask again who has an address.
func forgetNeighbour(device int, a netip.Addr) request {
	family := uint8(unix.AF_INET)
	if a.Is6() {
		family = unix.AF_INET6
	}
	r := newRequest("forget neighbour "+a.String(), unix.RTM_DELNEIGH, 0, unix.ENOENT)
	r.AddData(&netlink.Ndmsg{Family: family, Index: uint32(device)})
	r.AddData(nl.NewRtAttr(unix.NDA_DST, a.AsSlice()))
	return r
}
