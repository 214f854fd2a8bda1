package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/hostport"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/metrics"
	"github.com/sandboxd/sandboxd/netsetup"
	"github.com/sandboxd/sandboxd/netsetup/builtin"
	"github.com/sandboxd/sandboxd/netsetup/cni"
	"github.com/sandboxd/sandboxd/pause"
	"github.com/sandboxd/sandboxd/sandbox"
)

// networkOptions are the flags of serve that concern networks.
type networkOptions struct {
	def     string // mode of sandboxes that ask for none; empty: cni if it is configured, else builtin
	bridge  string
	subnet  netip.Prefix
	subnet6 netip.Prefix // the zero value: no IPv6
	confDir string
	binDirs []string
}

// networkFlags declares them.
func networkFlags(cmd *cobra.Command, o *networkOptions) {
	o.subnet = netip.MustParsePrefix("10.88.0.0/16")
	f := cmd.Flags()
	f.Var(&value[string]{p: &o.def, typ: "mode", parse: parseMode}, "network-default", "network of sandboxes that ask for none: builtin|cni|none|host (default cni if it is configured, else builtin)")
	f.StringVar(&o.bridge, "bridge", "sandboxd0", "`name` of the bridge of the builtin network")
	f.Var(&value[netip.Prefix]{p: &o.subnet, typ: "prefix", parse: parseSubnet}, "subnet", "IPv4 addresses of the builtin network (default 10.88.0.0/16)")
	f.Var(&value[netip.Prefix]{p: &o.subnet6, typ: "prefix", parse: parseSubnet6}, "subnet6", "IPv6 addresses of the builtin network, such as fd00:88::/64 (default none)")
	f.StringVar(&o.confDir, "cni-conf-dir", "/etc/cni/net.d", "`directory` with CNI configurations; it is watched")
	f.StringSliceVar(&o.binDirs, "cni-bin-dir", []string{"/opt/cni/bin", "/usr/lib/cni"}, "`directories` with CNI plugins")
	cmd.RegisterFlagCompletionFunc("network-default", oneOf("builtin", "cni", "none", "host"))
}

func parseMode(s string) (string, error) {
	switch m := network.Mode(s); m {
	case network.ModeBuiltin, network.ModeCNI, network.ModeHost, network.ModeNone:
		return s, nil
	}
	return "", fmt.Errorf("unknown network %q (one of builtin, cni, host, none)", s)
}

func parseSubnet(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p != p.Masked() || p.Bits() > 29 {
		return p, fmt.Errorf("subnet %q is not the prefix of an IPv4 network with room for sandboxes, such as 10.88.0.0/16", s)
	}
	return p, nil
}

func parseSubnet6(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is6() || p.Addr().Is4In6() || p != p.Masked() || p.Bits() > 120 {
		return p, fmt.Errorf("subnet %q is not the prefix of an IPv6 network with room for sandboxes, such as fd00:88::/64", s)
	}
	return p, nil
}

// networks is the part of a [node] that gives sandboxes their networks.
type networks struct {
	o       networkOptions
	store   *netsetup.Store
	cni     *cni.Driver
	builtin *builtin.Driver
	pause   func(id string) *pause.Pause
	hosted  *hosted
	tried   atomic.Pointer[func(sandbox.Tombstone, error)]
}

// openNetworks opens what belongs to the installation called mark below root.
func openNetworks(o networkOptions, root, mark string, mt *metrics.Metrics, log *slog.Logger, pauses func(string) *pause.Pause) (_ *networks, err error) {
	n := &networks{o: o, pause: pauses, hosted: newHosted(root)}
	drivers := map[network.Mode]netsetup.Driver{}
	defer func() {
		if err != nil && n.store == nil {
			for _, d := range drivers {
				err = errors.Join(err, d.Close())
			}
		}
	}()
	confDir, err := filepath.Abs(o.confDir)
	if err != nil {
		return nil, err
	}
	ports := new(hostport.Registry)
	n.cni, err = cni.Open(cni.Options{Root: filepath.Join(root, "network/cni"), ConfDir: confDir, BinDirs: o.binDirs, Mark: mark, Log: log, Ran: mt.Plugin, Ports: ports})
	if err != nil {
		return nil, fmt.Errorf("cni networks: %w", err)
	}
	drivers[network.ModeCNI] = observedDriver{n.cni, network.ModeCNI, mt}
	n.builtin, err = builtin.New(builtin.Options{
		Root: filepath.Join(root, "network/builtin"), Bridge: o.bridge, Subnet: o.subnet, Subnet6: o.subnet6, Mark: mark, Log: log, Ports: ports,
	})
	if err != nil {
		return nil, fmt.Errorf("builtin network: %w", err)
	}
	drivers[network.ModeBuiltin] = observedDriver{n.builtin, network.ModeBuiltin, mt}
	if n.store, err = netsetup.Open(filepath.Join(root, "network"), drivers, netsetup.Options{Log: log, Tried: n.told}); err != nil {
		return nil, fmt.Errorf("networks: %w", err)
	}
	return n, nil
}

// Close lets go of everything; networks stay.
func (n *networks) Close() error {
	if n == nil {
		return nil
	}
	return n.store.Close()
}

// DefaultNetwork implements [sandbox.NetworkNode]. Files that cannot be used are a
// configuration too: that a network is missing is better said than made up for.
func (n *networks) DefaultNetwork() sandbox.NetworkMode {
	switch {
	case n.o.def != "":
		return network.Mode(n.o.def)
	case len(n.cni.Networks())+len(n.cni.Problems()) > 0:
		return network.ModeCNI
	}
	return network.ModeBuiltin
}

// ns is the sandbox's network namespace, or nil if nobody holds it.
func (n *networks) ns(r *sandbox.Record) *os.File {
	if p := n.pause(r.ID); p != nil {
		return p.Namespace(namespace.Net)
	}
	return nil
}

var errNoNetNS = errors.New("the network namespace is gone: nobody holds it")

// PlanNetwork implements [sandbox.NetworkNode].
func (n *networks) PlanNetwork(ctx context.Context, r *sandbox.Record) (json.RawMessage, error) {
	plan, err := n.store.Plan(ctx, r.ID, r.Config.Network, &r.Config.Net)
	if errors.Is(err, netsetup.ErrInvalid) {
		return nil, invalid(err)
	}
	return plan, err
}

// AttachNetwork implements [sandbox.NetworkNode].
func (n *networks) AttachNetwork(ctx context.Context, r *sandbox.Record, plan json.RawMessage) ([]network.Attachment, error) {
	ns := n.ns(r)
	if ns == nil {
		return nil, errNoNetNS
	}
	res, err := n.store.Attach(ctx, r.ID, r.Config.Name, r.Config.Network, plan, ns)
	if err != nil {
		return nil, err
	}
	return res.Networks, nil
}

// DetachNetwork implements [sandbox.NetworkNode].
func (n *networks) DetachNetwork(ctx context.Context, r *sandbox.Record) error {
	_, err := n.store.Detach(ctx, r.ID, n.ns(r))
	return err
}

// RestoreNetwork implements [sandbox.NetworkNode].
func (n *networks) RestoreNetwork(ctx context.Context, r *sandbox.Record) error {
	ns := n.ns(r)
	if ns == nil {
		return errNoNetNS
	}
	return n.store.Restore(ctx, r.ID, ns)
}

// VerifyNetwork implements [sandbox.NetworkNode].
func (n *networks) VerifyNetwork(ctx context.Context, r *sandbox.Record) error {
	ns := n.ns(r)
	if ns == nil {
		return errNoNetNS
	}
	return n.store.Verify(ctx, r.ID, ns)
}

// SettleNetworks implements [sandbox.NetworkNode].
func (n *networks) SettleNetworks(alive func(id string) bool, tried func(sandbox.Tombstone, error)) {
	n.tried.Store(&tried)
	n.store.Settle(alive)
}

// ForgetNetwork implements [sandbox.NetworkNode].
func (n *networks) ForgetNetwork(id string) (sandbox.Tombstone, error) {
	t, err := n.store.Forget(id)
	if errors.Is(err, netsetup.ErrNoTombstone) {
		err = notFound(fmt.Errorf("%w (ls -a lists those that do, by id)", err))
	}
	return tombstone(t), err
}

// told passes on what the store tells.
func (n *networks) told(t netsetup.Tombstone, err error) {
	if f := n.tried.Load(); f != nil {
		(*f)(tombstone(t), err)
	}
}

func tombstone(t netsetup.Tombstone) sandbox.Tombstone {
	return sandbox.Tombstone{
		ID: t.ID, Name: t.Name, Mode: t.Mode, CreatedAt: t.CreatedAt,
		TombstoneInfo: sandbox.TombstoneInfo{Since: t.Since, Attempts: t.Attempts, LastError: t.LastError, NextTry: t.NextTry},
	}
}

// Tombstones implements [sandbox.NetworkNode].
func (n *networks) Tombstones() []sandbox.Tombstone {
	var out []sandbox.Tombstone
	for _, t := range n.store.Tombstones() {
		out = append(out, tombstone(t))
	}
	return out
}
