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
	if whole, err := t.bridgeWhole(); err != nil || whole {
		return err
	}
	c, err := nftables.New()
	if err != nil {
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
	for _, exprs := range t.bridgeRules() {
		c.AddRule(&nftables.Rule{Table: t.br, Chain: chain, Exprs: exprs})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("make nftables table %s of the bridge family: %w", t.br.Name, err)
	}
	return nil
}

const bridgeChain = "forward"

// bridgeRules drop what comes from or goes to the port of an isolated sandbox,
// except what the bridge sends back by the port that it came from (hairpin).
func (t *table) bridgeRules() [][]expr.Any {
	load := func(key expr.MetaKey, register uint32) expr.Any { return &expr.Meta{Key: key, Register: register} }
	return [][]expr.Any{
		slices.Concat([]expr.Any{load(expr.MetaKeyIIFNAME, slot0), load(expr.MetaKeyOIFNAME, slot0+4)}, in(t.own), verdict(expr.VerdictAccept)),
		slices.Concat([]expr.Any{load(expr.MetaKeyIIFNAME, reg)}, in(t.isolated), drop()),
		slices.Concat([]expr.Any{load(expr.MetaKeyOIFNAME, reg)}, in(t.isolated), drop()),
	}
}

func (t *table) bridgeWhole() (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, err
	}
	there, err := hasTable(c, t.br)
	if err != nil || !there {
		return false, err
	}
	sets, err := c.GetSets(t.br)
	if err != nil || len(sets) != 2 {
		return false, nil
	}
	rules, err := c.GetRules(t.br, &nftables.Chain{Name: bridgeChain, Table: t.br})
	return err == nil && len(rules) == len(t.bridgeRules()), nil
}

func hasTable(c *nftables.Conn, t *nftables.Table) (bool, error) {
	tables, err := c.ListTablesOfFamily(t.Family)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.Name }), nil
}
