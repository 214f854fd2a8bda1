package probe

import (
	"fmt"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// builtinNetwork tries what the builtin network is made of in a network namespace
// that ends with it. A kernel may load modules for that, as it would for the network.
func builtinNetwork() (string, error) {
	ns, err := nsthread.NewNet()
	if err != nil {
		return "", err
	}
	defer ns.Close()
	return "", nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe1"}, PeerName: "probe2"}); err != nil {
			return fmt.Errorf("veth: %w", err)
		}
		c, err := nftables.New()
		if err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "probe"})
		chain := c.AddChain(&nftables.Chain{
			Name: "nat", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Masq{}}})
		if err := c.Flush(); err != nil {
			return fmt.Errorf("nftables: NAT in a table of family inet: %w", err)
		}
		return nil
	})
}
