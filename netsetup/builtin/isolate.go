package builtin

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
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

// bridgePriority is before br_netfilter (0), which on Linux 6.1 passes over what has its own
// priority when it gives a packet back.
var bridgePriority = nftables.ChainPriorityRef(-200) // NF_BR_PRI_FILTER_BRIDGED

// bridgeChains of the bridge table: what is passed on to another port, and what
// is for the bridge itself.
var bridgeChains = []struct {
	name string
	hook *nftables.ChainHook
}{
	{"forward", nftables.ChainHookForward},
	{"input", nftables.ChainHookInput},
}

// bridgeRules drop what comes from or goes to the port of an isolated sandbox,
// except what the bridge sends back by the port that it came from (hairpin).
//
// To the bridge itself, which routes, such a sandbox sends with its own addresses
// only: the rules of the inet table know it by them. Whatever is neither IP nor ARP is
// dropped, since it might be IP in a form that is not recognised here but is later.
func (t *table) bridgeRules() map[string][][]expr.Any {
	load := func(key expr.MetaKey, register uint32) expr.Any { return &expr.Meta{Key: key, Register: register} }
	proto := func(p uint16) []expr.Any {
		return []expr.Any{load(expr.MetaKeyPROTOCOL, reg), equal(binary.BigEndian.AppendUint16(nil, p))}
	}
	port := load(expr.MetaKeyIIFNAME, slot0)
	from := func(s *nftables.Set, p uint16, offset, n uint32) []expr.Any {
		return slices.Concat(proto(p), []expr.Any{port, payload(slot0+4, expr.PayloadBaseNetworkHeader, offset, n)}, in(s), verdict(expr.VerdictAccept))
	}
	const senderInARP = 14
	input := [][]expr.Any{
		{load(expr.MetaKeyIIFNAME, reg), &expr.Lookup{SourceRegister: reg, SetName: t.isolated.Name, SetID: t.isolated.ID, Invert: true}, &expr.Verdict{Kind: expr.VerdictAccept}},
		from(t.from4, unix.ETH_P_IP, 12, 4),
		from(t.from4, unix.ETH_P_ARP, senderInARP, 4),
		drop(),
	}
	if t.subnet6.IsValid() {
		// Neighbours look for each other with link-local addresses too.
		const nextHeader = 6
		discovery := slices.Concat(proto(unix.ETH_P_IPV6), prefixAt(8, linkLocal6),
			[]expr.Any{payload(reg, expr.PayloadBaseNetworkHeader, nextHeader, 1), equal([]byte{unix.IPPROTO_ICMPV6})}, verdict(expr.VerdictAccept))
		input = slices.Insert(input, len(input)-1, from(t.from6, unix.ETH_P_IPV6, 8, 16), discovery)
	}
	return map[string][][]expr.Any{
		"forward": {
			slices.Concat([]expr.Any{port, load(expr.MetaKeyOIFNAME, slot0+4)}, in(t.own), verdict(expr.VerdictAccept)),
			slices.Concat([]expr.Any{load(expr.MetaKeyIIFNAME, reg)}, in(t.isolated), drop()),
			slices.Concat([]expr.Any{load(expr.MetaKeyOIFNAME, reg)}, in(t.isolated), drop()),
		},
		"input": input,
	}
}
