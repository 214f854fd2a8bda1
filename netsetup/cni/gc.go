package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/garbage"
)

const (
	// gcWait is how long GC waits for a moment in which no ADD and no DEL runs.
	gcWait = 10 * time.Second
	// gcPatience is how long ADD and DEL wait for plugins that collect garbage,
	// before those are killed. Removing a sandbox waits for its network for 10 s.
	gcPatience = 3 * time.Second
)

// cached is an entry of libcni's cache, which is written by [libcni] in this form,
// and by keep.
type cached struct {
	file  string
	since time.Time
	err   error // it cannot be read

	Kind           string         `json:"kind"`
	ContainerID    string         `json:"containerId"`
	Config         []byte         `json:"config"`
	IfName         string         `json:"ifName"`
	NetworkName    string         `json:"networkName"`
	CNIArgs        [][2]string    `json:"cniArgs,omitempty"`
	CapabilityArgs map[string]any `json:"capabilityArgs,omitempty"`
	Result         any            `json:"result,omitempty"`
}

// keep puts into the cache what was found out in place of a result of ADD, since a later
// DEL will find nothing in the namespace any more.
func (d *Driver) keep(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf, prev types.Result) error {
	data, err := json.Marshal(cached{
		Kind: libcni.CNICacheV1, ContainerID: rt.ContainerID, Config: list.Bytes, IfName: rt.IfName, NetworkName: list.Name,
		CNIArgs: rt.Args, CapabilityArgs: rt.CapabilityArgs, Result: prev,
	})
	file := d.cacheFile(list.Name, rt.ContainerID, rt.IfName)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(file), 0o700)
	}
	if err == nil {
		err = os.WriteFile(file, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep what interface %s had: %w", rt.IfName, err)
	}
	return nil
}

// GC detaches what is in the cache and belongs to nobody, and then has the
// plugins of networks that sandboxes are attached to collect what is not theirs.
// What those find, plugins do not tell.
func (d *Driver) GC(ctx context.Context, live func() map[string]json.RawMessage, dryRun bool) ([]garbage.Finding, error) {
	entries, err := d.cache()
	if err != nil {
		return nil, err
	}
	plans := live()
	var found []garbage.Finding
	for _, e := range entries {
		if _, ok := plans[e.ContainerID]; ok {
			continue
		}
		f := garbage.Finding{
			Kind: garbage.CNI, Name: e.file, Since: e.since, Action: garbage.WouldRemove,
			Reason: "no sandbox has this attachment",
		}
		if e.err != nil {
			f.Reason = "not a CNI result: " + e.err.Error()
		}
		if !dryRun {
			crash.Point("gc " + string(f.Kind) + " before")
			f.Done(d.dropCached(ctx, e))
			crash.Point("gc " + string(f.Kind) + " after")
		}
		found = append(found, f)
	}
	if dryRun {
		return found, nil
	}
	if networks, err := d.collectable(plans); err != nil || len(networks) == 0 {
		return found, err
	}
	slow, err := d.collect(ctx, live)
	return append(found, slow...), err
}

// cache reads the entries of the cache. One that cannot be read, since a crash
// cut it, has the id that its name tells, or none.
func (d *Driver) cache() ([]cached, error) {
	dir := filepath.Join(d.o.Root, "results")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var all []cached
	for _, e := range entries {
		c := cached{file: filepath.Join(dir, e.Name())}
		fi, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		c.since = fi.ModTime()
		data, err := readFile(c.file)
		if err == nil {
			err = json.Unmarshal(data, &c)
		}
		if err == nil && (c.Kind != libcni.CNICacheV1 || c.ContainerID == "") {
			err = errors.New("of an unknown kind")
		}
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if c.err = err; err != nil {
			c.ContainerID = idInName(e.Name())
		}
		all = append(all, c)
	}
	return all, err
}

// idInName returns the id in NETWORK-ID-INTERFACE. A network's name may have
// dashes, an interface's too; an id has 16 hex digits.
func idInName(name string) string {
	for part := range strings.SplitSeq(name, "-") {
		if len(part) == 16 && strings.Trim(part, "0123456789abcdef") == "" {
			return part
		}
	}
	return ""
}

// dropCached runs DEL for an entry and removes it.
func (d *Driver) dropCached(ctx context.Context, e cached) error {
	if e.err != nil {
		return os.Remove(e.file)
	}
	done, err := d.working(ctx, e.ContainerID)
	if err != nil {
		return err
	}
	defer done()
	return d.del(ctx, e.ContainerID, attachment{
		Network: e.NetworkName, Interface: e.IfName, Config: e.Config, Args: e.CNIArgs, Capabilities: e.CapabilityArgs,
	}, nil, true)
}

// working takes d.gc for ADD or DEL of a sandbox; done gives it back. Garbage can be
// collected another time: who hangs at it holds nobody up.
func (d *Driver) working(ctx context.Context, id string) (done func(), err error) {
	for end := time.Now().Add(gcPatience); !d.gc.TryRLock(); {
		if stop := d.stopGC.Load(); stop != nil && time.Now().After(end) {
			(*stop)()
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("plugins that collect garbage were waited for: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	d.atWork.Store(id, time.Now())
	return func() { d.atWork.Delete(id); d.gc.RUnlock() }, nil
}

// workingSince lists the sandboxes for which ADD or DEL has run since before t,
// as findings: nothing is asked to collect while they do.
func (d *Driver) workingSince(t time.Time) (found []garbage.Finding) {
	for id, since := range d.atWork.Range {
		if since.(time.Time).Before(t) {
			found = append(found, garbage.Finding{
				Kind: garbage.CNI, Name: id.(string), Action: garbage.Kept,
				Reason: "plugins are still at work for this sandbox: none are asked to collect garbage before they have ended",
			})
		}
	}
	slices.SortFunc(found, func(a, b garbage.Finding) int { return strings.Compare(a.Name, b.Name) })
	return found
}

// collect runs GC of the plugins of networks that have attachments. What hangs in
// ADD or DEL keeps it from that; this is found, and is no error.
func (d *Driver) collect(ctx context.Context, live func() map[string]json.RawMessage) ([]garbage.Finding, error) {
	// Somebody who waits for the lock would make all that come later wait too.
	for begin := time.Now(); !d.gc.TryLock(); {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if time.Since(begin) > gcWait {
			if slow := d.workingSince(begin); len(slow) > 0 {
				return slow, nil
			}
			return nil, errors.New("plugins were not asked to collect garbage, since some were at work all the time")
		}
		time.Sleep(5 * time.Millisecond)
	}
	defer d.gc.Unlock()
	// While this takes, nothing is attached or detached.
	ctx, cancel := context.WithTimeout(ctx, d.o.Timeout)
	defer cancel()
	d.stopGC.Store(&cancel)
	defer d.stopGC.Store(nil)
	// So this is complete.
	networks, err := d.collectable(live())
	if err != nil {
		return nil, err
	}
	// libcni's GC also runs DEL for what is in the cache, with the path of a
	// namespace that may long be another's. It is given a cache that is empty.
	none := filepath.Join(d.o.Root, "none")
	c := libcni.NewCNIConfigWithCacheDir(d.o.BinDirs, none, d.exec)
	var errs []error
	for _, n := range networks {
		if err := c.GCNetworkList(ctx, n.list, &libcni.GCArgs{ValidAttachments: n.valid}); err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", n.list.Name, err))
		}
	}
	return nil, errors.Join(errs...)
}

// collectable is a network whose plugins can be asked to collect.
type collectable struct {
	list  *libcni.NetworkConfigList
	valid []types.GCAttachment // never empty: that would mean everything
}

// collectable lists the networks of the plans whose version has GC, with all
// attachments of each, sorted by name, but those with disableGC. The configuration is the present one if there is
// one, else that of some attachment. A plan that cannot be read is an error: what it has would be freed.
func (d *Driver) collectable(plans map[string]json.RawMessage) ([]collectable, error) {
	now := d.conf.current()
	byName := map[string]*collectable{}
	for id, raw := range plans {
		p, err := readPlan(raw)
		if err != nil {
			return nil, fmt.Errorf("sandbox %s: %w", id, err)
		}
		for _, a := range p.Networks {
			n := byName[a.Network]
			if n == nil {
				n = &collectable{}
				byName[a.Network] = n
				config := a.Config
				if cur, err := now.find(a.Network); err == nil {
					config = cur.raw
				}
				if n.list, err = parseList(config); err != nil {
					return nil, fmt.Errorf("network %s: %w", a.Network, err)
				}
			}
			n.valid = append(n.valid, types.GCAttachment{ContainerID: id, IfName: a.Interface})
		}
	}
	var out []collectable
	for _, n := range byName {
		if ok, err := version.GreaterThanOrEqualTo(n.list.CNIVersion, "1.1.0"); err != nil || !ok || n.list.DisableGC {
			continue
		}
		slices.SortFunc(n.valid, func(a, b types.GCAttachment) int {
			return strings.Compare(a.ContainerID+a.IfName, b.ContainerID+b.IfName)
		})
		out = append(out, *n)
	}
	slices.SortFunc(out, func(a, b collectable) int { return strings.Compare(a.list.Name, b.list.Name) })
	return out, nil
}
