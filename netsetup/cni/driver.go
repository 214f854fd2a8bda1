package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/sandboxd/sandboxd/internal/hostport"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/netsetup"
)

// DefaultTimeout is how long one plugin may take.
const DefaultTimeout = 30 * time.Second

// Options are what a Driver needs to know.
type Options struct {
	Root    string             // directory for libcni's cache, made if it is not there; not shared with anybody
	ConfDir string             // configuration directory; need not exist
	BinDirs []string           // where plugins are, the first one first
	Timeout time.Duration      // of one plugin; 0 is DefaultTimeout
	Mark    string             // the installation's
	Log     *slog.Logger       // nil: nothing is logged
	Ports   *hostport.Registry // shared with other drivers; nil: not shared

	// Ran is told of each plugin that was run, as it happens and from many
	// goroutines. Default: nobody is told.
	Ran func(plugin, command string, took time.Duration, err error)
}

// Driver is a [netsetup.Driver].
type Driver struct {
	o     Options
	exec  *runner
	cni   *libcni.CNIConfig
	conf  *watcher
	log   *slog.Logger
	known versions

	// gc is held shared by ADD and DEL, by [Driver.working], and exclusively while
	// plugins are asked to collect garbage (specification, "GC").
	gc     sync.RWMutex
	stopGC atomic.Pointer[context.CancelFunc] // kills those plugins
	atWork sync.Map                           // by sandbox's id, for whom ADD or DEL runs: since when, a time.Time
}

var _ netsetup.Driver = (*Driver)(nil)

// Open returns a Driver, after it has killed plugins that an earlier daemon of
// this installation has left running.
func Open(o Options) (*Driver, error) {
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Ports == nil {
		o.Ports = new(hostport.Registry)
	}
	if err := os.MkdirAll(o.Root, 0o700); err != nil {
		return nil, err
	}
	if err := killLeft(o.Mark); err != nil {
		return nil, err
	}
	conf, err := watch(o.ConfDir, o.Log)
	if err != nil {
		return nil, err
	}
	r := newRunner(o.Mark, o.Timeout)
	r.ran = o.Ran
	return &Driver{
		o: o, exec: r, conf: conf, log: o.Log,
		cni: libcni.NewCNIConfigWithCacheDir(o.BinDirs, o.Root, r),
	}, nil
}

// Close ends the watch of the configuration directory.
func (d *Driver) Close() error { return d.conf.close() }

// Plan chooses the networks and puts all that ADD and DEL need into the plan.
func (d *Driver) Plan(ctx context.Context, id string, req *network.Request) (json.RawMessage, error) {
	if err := hostport.Check(req.Ports); err != nil {
		return nil, invalid("%w", err)
	}
	chosen := *req
	chosen.Ports = slices.Clone(req.Ports)
	if err := d.o.Ports.Choose(id, chosen.Ports); err != nil {
		return nil, err
	}
	p, err := newPlan(d.conf.current(), &chosen)
	if err != nil {
		return nil, err
	}
	for _, a := range p.Networks {
		list, err := a.list()
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", a.Network, err)
		}
		for _, pl := range list.Plugins {
			if err := d.known.suits(ctx, d, pl.Network.Type, list.CNIVersion); err != nil {
				return nil, invalid("network %s: %w", a.Network, err)
			}
		}
	}
	return json.Marshal(p)
}

// Attach runs ADD for each network of the plan, in order.
func (d *Driver) Attach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) (*network.Result, error) {
	if ns == nil {
		return nil, errors.New("there is no network namespace to attach")
	}
	p, err := readPlan(plan)
	if err != nil {
		return nil, err
	}
	// portmap would add a second rule for the same port, which nothing ever reaches.
	if err := d.o.Ports.Claim(id, p.ports()); err != nil {
		return nil, err
	}
	done, err := d.working(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	res := &network.Result{Networks: []network.Attachment{}}
	for _, a := range p.Networks {
		list, err := a.list()
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", a.Network, err)
		}
		added, err := d.cni.AddNetworkList(ctx, list, a.runtimeConf(id, nsPath(ns)))
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", a.Network, err)
		}
		got, err := attachmentOf(a, added)
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", a.Network, err)
		}
		if got.MTU == 0 || got.MAC == "" {
			if err := fillFromKernel(ns, got); err != nil {
				return nil, fmt.Errorf("network %s: %w", a.Network, err)
			}
		}
		res.Networks = append(res.Networks, *got)
	}
	return res, nil
}

// Detach runs DEL of each plugin of each network, in reverse order, also after one that
// fails; but plugins that give addresses back are not called before the others of their
// chain that come before them have succeeded: an address that others still have rules for is
// not to be somebody else's.
func (d *Driver) Detach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error {
	p, err := readPlan(plan)
	if err != nil {
		return err
	}
	done, err := d.working(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	var errs []error
	for i, a := range slices.Backward(p.Networks) {
		ctx, cancel := share(ctx, i+1)
		err := d.del(ctx, id, a, ns, true)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", a.Network, err))
		}
	}
	if len(errs) > 0 {
		return joined(errs)
	}
	d.o.Ports.Release(id)
	return nil
}

// joined is what errors.Join makes, in one line: it is shown in tables and events.
type joined []error

func (errs joined) Error() string {
	var texts []string
	for _, err := range errs {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

func (errs joined) Unwrap() []error { return errs }

// Forget runs DEL a last time, also of plugins that wait for others, removes the cached
// results, for which GC would run it again, and lets the ports go.
func (d *Driver) Forget(ctx context.Context, id string, plan json.RawMessage) error {
	p, err := readPlan(plan)
	if err != nil {
		return err
	}
	done, err := d.working(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	var errs []error
	for i, a := range slices.Backward(p.Networks) {
		ctx, cancel := share(ctx, i+1)
		if err := d.del(ctx, id, a, nil, false); err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", a.Network, err))
		}
		cancel()
		if err := os.Remove(d.cacheFile(a.Network, id, a.Interface)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	d.o.Ports.Release(id)
	return errors.Join(errs...)
}

// del runs DEL of each plugin of a network, the last one first, also after one
// that fails, and forgets the cached result when all have succeeded.
// With wait set, plugins that give addresses back wait for the others.
func (d *Driver) del(ctx context.Context, id string, a attachment, ns *os.File, wait bool) error {
	list, err := a.list()
	if err != nil {
		return err
	}
	prev := d.previous(list, id, a)
	cached := prev != nil
	var errs []error
	if prev == nil && ns != nil {
		if prev, err = observed(list, a.Interface, ns); err != nil {
			errs = append(errs, fmt.Errorf("look at interface %s: %w", a.Interface, err))
		}
	}
	ns, made, done, err := standIn(list, a.Interface, prev, ns)
	defer done()
	if err != nil {
		errs = append(errs, err)
	}
	rt := a.runtimeConf(id, nsPath(ns))
	inject := map[string]any{"name": list.Name, "cniVersion": list.CNIVersion}
	// The previous result came to DEL with version 0.4.0.
	if ok, err := version.GreaterThanOrEqualTo(list.CNIVersion, "0.4.0"); err == nil && ok && prev != nil {
		inject["prevResult"] = prev
	}
	failed := false
	for i, pl := range slices.Backward(list.Plugins) {
		if wait && failed && holdsAddress(pl) {
			errs = append(errs, fmt.Errorf("plugin %s waits until the others have succeeded: the address is not given away before", pl.Network.Type))
			continue
		}
		ctx, cancel := share(ctx, i+1)
		err := d.delPlugin(ctx, pl, inject, rt)
		if made && said(err) {
			// Old ones (1.1.1) complain if the rules are gone too, as after a reboot.
			// The interface is gone now, so that they do not look for rules again.
			err = d.delPlugin(ctx, pl, inject, rt)
		}
		cancel()
		if err != nil {
			failed = true
			errs = append(errs, fmt.Errorf("plugin %s failed (delete): %w", pl.Network.Type, err))
		}
	}
	if len(errs) > 0 {
		if prev != nil && !cached {
			if err := d.keep(list, rt, prev); err != nil { // the namespace will be gone
				errs = append(errs, err)
			}
		}
		return joined(errs)
	}
	err = os.Remove(d.cacheFile(list.Name, id, a.Interface))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// holdsAddress reports whether DEL of a plugin gives addresses back, by an IPAM
// plugin or (flannel) by a plugin that it calls. host-device does so too, but only as long as
// the namespace is there, so that it cannot wait.
func holdsAddress(p *libcni.PluginConfig) bool {
	var conf struct {
		Delegate json.RawMessage `json:"delegate"`
	}
	json.Unmarshal(p.Bytes, &conf)
	return (p.Network.IPAM.Type != "" || conf.Delegate != nil) && p.Network.Type != "host-device"
}

// said reports whether err is what a plugin itself complains of.
func said(err error) bool {
	var pe *PluginError
	return errors.As(err, &pe) && pe.Code != 0
}

// previous returns the result of ADD, nil if there is none.
func (d *Driver) previous(list *libcni.NetworkConfigList, id string, a attachment) types.Result {
	prev, err := d.cni.GetNetworkListCachedResult(list, a.runtimeConf(id, ""))
	if err != nil {
		// Left by a crash in the middle of writing it.
		d.log.Warn("CNI result cannot be read", "sandbox", id, "network", list.Name, "err", err)
		return nil
	}
	return prev
}

func (d *Driver) delPlugin(ctx context.Context, pl *libcni.PluginConfig, inject map[string]any, rt *libcni.RuntimeConf) error {
	pl, err := libcni.InjectConf(pl, inject)
	if err != nil {
		return err
	}
	args := make(map[string]any)
	for name, on := range pl.Network.Capabilities {
		if v, ok := rt.CapabilityArgs[name]; ok && on {
			args[name] = v
		}
	}
	if len(args) > 0 {
		if pl, err = libcni.InjectConf(pl, map[string]any{"runtimeConfig": args}); err != nil {
			return err
		}
	}
	err = d.runDEL(ctx, pl.Network.Type, pl.Bytes, rt)
	if err == nil && pl.Network.Type == "host-device" && rt.NetNS == "" && pl.Network.IPAM.Type != "" {
		// It has done nothing, and the device is back on the host; the address is still given out.
		err = d.runDEL(ctx, pl.Network.IPAM.Type, pl.Bytes, rt)
	}
	return err
}

// runDEL runs DEL of the plugin of that name.
func (d *Driver) runDEL(ctx context.Context, name string, config []byte, rt *libcni.RuntimeConf) error {
	file, err := d.exec.FindInPath(name, d.o.BinDirs)
	if err != nil {
		return err
	}
	err = invoke.ExecPluginWithoutResult(ctx, file, config, &invoke.Args{
		Command: "DEL", ContainerID: rt.ContainerID, NetNS: rt.NetNS, PluginArgs: rt.Args, IfName: rt.IfName,
		Path: strings.Join(d.o.BinDirs, string(os.PathListSeparator)),
	}, d.exec)
	// "The container is unknown: the runtime need not clean up" (specification, "Error").
	var pe *PluginError
	if errors.As(err, &pe) && pe.Code == types.ErrUnknownContainer {
		return nil
	}
	return err
}

// share gives the next of n calls, if the context has a deadline, its part of
// what is left, so that one that hangs leaves time for the others.
func share(ctx context.Context, n int) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok || n < 2 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(end)/time.Duration(n))
}

// Verify runs CHECK for each network, where its version has it and the
// configuration does not forbid it, and looks whether the interface is there.
func (d *Driver) Verify(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error {
	if ns == nil {
		return errors.New("there is no network namespace")
	}
	p, err := readPlan(plan)
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range p.Networks {
		if err := d.verify(ctx, id, a, ns); err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", a.Network, err))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return joined(errs)
}

func (d *Driver) verify(ctx context.Context, id string, a attachment, ns *os.File) error {
	list, err := a.list()
	if err != nil {
		return err
	}
	if ifi, err := interfaceIn(ns, a.Interface); err != nil {
		return err
	} else if ifi == nil {
		return fmt.Errorf("there is no interface %s any more", a.Interface)
	}
	if ok, err := version.GreaterThanOrEqualTo(list.CNIVersion, "0.4.0"); err != nil || !ok || list.DisableCheck {
		return err
	}
	rt := a.runtimeConf(id, nsPath(ns))
	if prev, err := d.cni.GetNetworkListCachedResult(list, rt); err != nil || prev == nil {
		// CHECK cannot do without it.
		return errors.Join(fmt.Errorf("the result of ADD is not in %s", d.cacheFile(list.Name, id, a.Interface)), err)
	}
	err = d.cni.CheckNetworkList(ctx, list, rt)
	if pe, ok := errors.AsType[*PluginError](err); ok {
		return fmt.Errorf("plugin %s failed (check): %w", pe.Plugin, err)
	}
	return err
}

// Restore notes which ports are published. Networks it leaves alone: CNI has no
// verb to repair one, and a second ADD without a DEL is not allowed.
func (d *Driver) Restore(_ context.Context, id string, plan json.RawMessage, _ *os.File) error {
	p, err := readPlan(plan)
	if err != nil {
		return err
	}
	return d.o.Ports.Claim(id, p.ports())
}

func (d *Driver) cacheFile(network, id, ifname string) string {
	return filepath.Join(d.o.Root, "results", network+"-"+id+"-"+ifname) // as libcni names it
}

// nsPath is how a plugin reaches the namespace: by our descriptor, which the
// caller holds until the call returns. It is empty without a namespace.
func nsPath(ns *os.File) string {
	if ns == nil {
		return ""
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
}

// interfaceIn looks for an interface in a namespace; nil if it is not there.
func interfaceIn(ns *os.File, name string) (ifi *net.Interface, err error) {
	err = nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() error {
		all, err := net.Interfaces()
		if i := slices.IndexFunc(all, func(i net.Interface) bool { return i.Name == name }); i >= 0 {
			ifi = &all[i]
		}
		return err
	})
	return ifi, err
}

// fillFromKernel completes what results of plugins older than version 1.1.0,
// which brought the MTU, do not say.
func fillFromKernel(ns *os.File, a *network.Attachment) error {
	ifi, err := interfaceIn(ns, a.Interface)
	if err != nil || ifi == nil {
		return err
	}
	a.MTU = ifi.MTU
	if a.MAC == "" {
		a.MAC = ifi.HardwareAddr.String()
	}
	return nil
}
