package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/garbage"
)

// What GC says it did.
const (
	removed     = "removed"
	wouldRemove = "would remove"
)

// GC finds leases, links and elements of sandboxes that have no attachment,
// and what is in the lease directory but is no lease.
func (d *Driver) GC(_ context.Context, live func() map[string]json.RawMessage, dryRun bool) ([]garbage.Finding, error) {
	d.host.RLock()
	defer d.host.RUnlock()
	found, err := d.look()
	if err != nil {
		return nil, err
	}
	alive := live()
	gone := func(f find) bool {
		_, ok := alive[f.id]
		return !ok || f.id == ""
	}
	found = slices.DeleteFunc(found, func(f find) bool { return !gone(f) })
	var errs []error
	findings := make([]garbage.Finding, len(found))
	for i, f := range found {
		f.Action = wouldRemove
		if !dryRun {
			f.Action = removed
			crash.Point("gc " + string(f.Kind) + " before")
			if err := f.remove(); err != nil {
				f.Err = err.Error()
				errs = append(errs, err)
			}
			crash.Point("gc " + string(f.Kind) + " after")
		}
		findings[i] = f.Finding
	}
	if !dryRun {
		d.wakeUp()
	}
	return findings, errors.Join(errs...)
}

// find is a thing that may be garbage.
type find struct {
	garbage.Finding
	id     string // of the sandbox that it was made for; "" for none
	remove func() error
}

// look lists everything that this installation has made for sandboxes that are
// not being detached: the background sees to those.
func (d *Driver) look() ([]find, error) {
	const nobody = "its sandbox has no network on record"
	var found []find
	add := func(kind garbage.Kind, name, id, reason string, remove func() error) {
		found = append(found, find{garbage.Finding{Kind: kind, Name: name, Reason: reason}, id, remove})
	}
	released := d.leases.released()

	links, err := netlink.LinkList()
	for ; errors.Is(err, netlink.ErrDumpInterrupted); links, err = netlink.LinkList() {
	}
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		a := l.Attrs()
		id, ours := strings.CutPrefix(a.Alias, alias(d.opts.Mark, "")+" ")
		if _, going := released[id]; !ours || going {
			continue
		}
		add(garbage.Link, a.Name, id, nobody, func() error { return d.socks.do(deleteLink(a.Name)) })
	}
	elements, err := d.nft.owned()
	if err != nil {
		return nil, err
	}
	byID := make(map[string]int)
	for _, vals := range elements {
		for _, v := range vals {
			byID[v.Comment]++
		}
	}
	for id := range byID {
		add(garbage.Nft, d.nft.inet.Name+" "+id, id, nobody, func() error { return d.nft.removeByID(map[string]bool{id: true}) })
	}
	// Leases come last: while one is there, nobody else gets the address.
	for _, id := range d.leases.ids() {
		l, _ := d.leases.get(id)
		add(garbage.Lease, l.String(), id, nobody, func() error {
			d.unregister(id)
			return d.leases.release(id, time.Now())
		})
	}
	damaged, err := d.leases.damaged()
	if err != nil {
		return nil, err
	}
	for _, name := range damaged {
		add(garbage.Lease, path.Join(d.root.Name(), leaseDir, name), "", "it cannot be read", func() error {
			if err := d.root.RemoveAll(path.Join(leaseDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		})
	}
	return found, nil
}
