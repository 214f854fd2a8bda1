package builtin

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
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
		whole, err := t.tableWhole(c, t.br, 2, t.bridgeRules())
		if err != nil || whole {
			return err
		}
		c.AddTable(t.br) // so that there is one to delete
		c.DelTable(t.br)
		c.AddTable(t.br)
		for _, s := range []*nftables.Set{t.isolated, t.own} {
			if err := c.AddSet(s, nil); err != nil {
				return err
			}
		}
		accept := nftables.ChainPolicyAccept
		chain := c.AddChain(&nftables.Chain{
			Name: bridgeChain, Table: t.br, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &accept,
		})
		for _, exprs := range t.bridgeRules()[bridgeChain] {
			c.AddRule(&nftables.Rule{Table: t.br, Chain: chain, Exprs: exprs})
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("make nftables table %s of the bridge family: %w", t.br.Name, err)
	}
	return nil
}

const bridgeChain = "forward"

// bridgeRules drop what comes from or goes to the port of an isolated sandbox,
// except what the bridge sends back by the port that it came from (hairpin).
func (t *table) bridgeRules() map[string][][]expr.Any {
	load := func(key expr.MetaKey, register uint32) expr.Any { return &expr.Meta{Key: key, Register: register} }
	return map[string][][]expr.Any{bridgeChain: {
		slices.Concat([]expr.Any{load(expr.MetaKeyIIFNAME, slot0), load(expr.MetaKeyOIFNAME, slot0+4)}, in(t.own), verdict(expr.VerdictAccept)),
		slices.Concat([]expr.Any{load(expr.MetaKeyIIFNAME, reg)}, in(t.isolated), drop()),
		slices.Concat([]expr.Any{load(expr.MetaKeyOIFNAME, reg)}, in(t.isolated), drop()),
	}}
}
