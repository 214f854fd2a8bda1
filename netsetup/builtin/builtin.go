// Package builtin makes networks without executing anything: a bridge, a veth
// pair and an address for each sandbox, and one nftables table, all by netlink.
//
// What it keeps on disk is which sandbox has which address, and what it changed
// of the host ([Options].Root). Everything else follows from that and from the
// plan of an attachment, and is made again when somebody removes it.
//
// On the host it makes, and it touches nothing else:
//
//   - the bridge, whose alias is "sandboxd MARK";
//   - a link sbID for each sandbox (ID: the first 12 digits of its id), whose
//     other end is eth0 in the sandbox, and for one with a limit on what it
//     sends a link siID, all with the alias "sandboxd MARK SID";
//   - the nftables tables "inet sandboxd_MARK" and "bridge sandboxd_MARK";
//   - the sysctls that ARCHITECTURE.md lists.
package builtin

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/hostport"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/netsetup"
)

// ifName is what a sandbox's interface is called.
const ifName = "eth0"

// Options say where and how.
type Options struct {
	Root    string       // directory of what is durable, made if it is not there
	Bridge  string       // name of the bridge
	Subnet  netip.Prefix // IPv4; its first address is the bridge's
	Subnet6 netip.Prefix // IPv6; the zero value is none
	Mark    string       // the installation's: 1 to 16 letters and digits
	Log     *slog.Logger
	Ports   *hostport.Registry // shared with other drivers; nil: not shared
}

// Driver is a [netsetup.Driver].
type Driver struct {
	opts   Options
	log    *slog.Logger
	root   *os.Root
	leases *leases
	socks  *socketPool
	nft    *table
	ports  *hostport.Registry // what is published, by other drivers too

	// host is held, for reading, by everything that relies on the bridge and the
	// table being there, and for writing by what makes or removes them.
	host   sync.RWMutex
	up     bool // the host is prepared
	mtu    int  // of the bridge, while up is set
	bridge int  // its index, likewise

	mu       sync.Mutex
	attached map[string]*attachment // what Attach and Restore have seen, by id

	wake   chan struct{} // one element: there is something for the background to do
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// attachment is what is known of one that is, or is being, attached.
type attachment struct {
	plan  plan
	lease lease
}

var _ netsetup.Driver = (*Driver)(nil)

var (
	markRE   = regexp.MustCompile(`^[0-9A-Za-z]{1,16}$`)
	bridgeRE = regexp.MustCompile(`^[0-9A-Za-z._-]{1,15}$`)
)

// New reads what is on disk, and watches the host from then on: what somebody
// removes is made again, and what is no longer needed is removed.
func New(o Options) (*Driver, error) {
	switch {
	case !markRE.MatchString(o.Mark):
		return nil, fmt.Errorf("installation mark %q is not 1 to 16 letters and digits", o.Mark)
	case !bridgeRE.MatchString(o.Bridge) || strings.Trim(o.Bridge, ".") == "":
		return nil, fmt.Errorf("bridge name %q is not 1 to 15 letters, digits, dots, dashes and underscores", o.Bridge)
	case !o.Subnet.IsValid() || !o.Subnet.Addr().Is4() || o.Subnet.Bits() > 30:
		return nil, fmt.Errorf("subnet %v is not an IPv4 one of at most 30 bits", o.Subnet)
	case o.Subnet6.IsValid() && (!o.Subnet6.Addr().Is6() || o.Subnet6.Addr().Is4In6() || o.Subnet6.Bits() > 126):
		return nil, fmt.Errorf("subnet6 %v is not an IPv6 one of at most 126 bits", o.Subnet6)
	}
	o.Subnet = o.Subnet.Masked()
	if o.Subnet6.IsValid() {
		o.Subnet6 = o.Subnet6.Masked()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(filepath.Join(o.Root, leaseDir), 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(o.Root)
	if err != nil {
		return nil, err
	}
	d := &Driver{opts: o, log: o.Log, root: root, socks: newSocketPool(), attached: make(map[string]*attachment), ports: cmp.Or(o.Ports, new(hostport.Registry)), wake: make(chan struct{}, 1)}
	d.nft = newTable(o)
	d.ports.Others = d.nft.elsewhere
	if d.leases, err = openLeases(root, o.Subnet, o.Subnet6, o.Log); err != nil {
		root.Close()
		return nil, err
	}
	if err := errors.Join(d.socks.open(), d.nft.conns.open()); err != nil {
		o.Log.Warn("The kernel's networks cannot be reached", "err", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	events := d.watch(ctx)
	d.done.Go(func() { d.background(ctx, events) })
	return d, nil
}

// Status reports why the driver cannot make networks now; nil if it can.
func (d *Driver) Status(context.Context) error {
	d.host.Lock()
	defer d.host.Unlock()
	if d.up {
		return nil
	}
	return d.checkHost()
}

// Attach gives the namespace its network.
func (d *Driver) Attach(_ context.Context, id string, raw json.RawMessage, ns *os.File) (*network.Result, error) {
	p, err := decodePlan(raw)
	if err != nil {
		return nil, err
	}
	res, err := d.attach(id, p, ns)
	if err == nil || !d.lost() {
		return res, err
	}
	// Somebody has just removed the bridge or the table, and the background has
	// not seen to it yet.
	if rerr := errors.Join(d.removeEach([]string{id}), d.repair()); rerr != nil {
		return nil, errors.Join(err, rerr)
	}
	return d.attach(id, p, ns)
}

func (d *Driver) attach(id string, p *plan, ns *os.File) (*network.Result, error) {
	unlock, err := d.prepared()
	if err != nil {
		return nil, err
	}
	defer unlock()
	crash.Point("builtin attach lease before")
	l, err := d.leases.take(id, p.Addresses)
	if err != nil {
		return nil, err
	}
	crash.Point("builtin attach lease after")
	if err := d.register(id, p, l); err != nil {
		return nil, err
	}
	mac, err := d.connect(id, p, l, ns)
	if err != nil {
		return nil, err
	}
	crash.Point("builtin attach link after")
	if err := d.shape(id, p.Bandwidth); err != nil {
		return nil, err
	}
	if err := d.nft.add(id, p, l); err != nil {
		return nil, err
	}
	crash.Point("builtin attach nft after")
	if err := d.ports.Elsewhere(p.Ports); err != nil {
		return nil, err
	}
	if err := d.secure(id, p, l); err != nil {
		return nil, err
	}
	return d.result(p, l, mac), nil
}

// lost reports whether the bridge or the table is no longer what it was when
// the host was prepared.
func (d *Driver) lost() bool {
	d.host.RLock()
	defer d.host.RUnlock()
	if !d.up {
		return false
	}
	link, err := findLink(d.opts.Bridge)
	if err != nil {
		return false
	}
	whole, err := d.nft.whole(d.anyIsolated())
	return err == nil && (!whole || link == nil || link.Attrs().Index != d.bridge)
}

func (d *Driver) result(p *plan, l lease, mac net.HardwareAddr) *network.Result {
	a := network.Attachment{
		Name: d.opts.Bridge, Interface: ifName, MAC: mac.String(), MTU: d.mtu, Ports: p.Ports,
		Addresses: []netip.Prefix{netip.PrefixFrom(l.v4, d.opts.Subnet.Bits())},
		Gateway:   []netip.Addr{gateway(d.opts.Subnet)},
		Routes:    []network.Route{{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), GW: gateway(d.opts.Subnet)}},
	}
	if l.v6.IsValid() {
		a.Addresses = append(a.Addresses, netip.PrefixFrom(l.v6, d.opts.Subnet6.Bits()))
		a.Gateway = append(a.Gateway, gateway(d.opts.Subnet6))
		a.Routes = append(a.Routes, network.Route{Dst: netip.PrefixFrom(netip.IPv6Unspecified(), 0), GW: gateway(d.opts.Subnet6)})
	}
	return &network.Result{Networks: []network.Attachment{a}}
}

// register notes an attachment, unless one of its ports, or its hardware address, is
// another's already.
func (d *Driver) register(id string, p *plan, l lease) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for other, a := range d.attached {
		// Those that are derived from leases are all different.
		if other != id && (p.MAC != "" || a.plan.MAC != "") && bytes.Equal(p.mac(l), a.plan.mac(a.lease)) {
			return fmt.Errorf("MAC address %s belongs to sandbox %s", p.mac(l), other)
		}
	}
	if err := d.ports.Claim(id, p.Ports); err != nil {
		return err
	}
	d.attached[id] = &attachment{*p, l}
	return nil
}

func (d *Driver) unregister(id string) {
	d.ports.Release(id)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.attached, id)
}
