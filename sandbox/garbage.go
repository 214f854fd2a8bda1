package sandbox

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// GarbageNode is the part of a [Node] that finds what belongs to nobody.
type GarbageNode interface {
	// GC finds what is on the host, bears this installation's mark and belongs
	// to nothing that live names, and removes it unless dryRun is set. What
	// cannot be removed does not keep other things from being looked for.
	//
	// The node looks at the host first and calls live then, once or more often.
	// Everything is known to live before it is made and until it is gone, so that what was seen
	// before and is not live belongs to nobody: nothing in the making is taken.
	GC(ctx context.Context, live func() Live, dryRun bool) ([]garbage.Finding, error)
}

// Live names all sandboxes and members that there are, that are being made, or
// that something is left of.
type Live struct {
	Sandboxes map[string]bool // by id
	Members   map[string]bool // by SANDBOX/MEMBER, ids
}

// live returns what is live now.
func (m *Manager) live() Live {
	l := Live{map[string]bool{}, map[string]bool{}}
	for _, b := range m.all() {
		l.Sandboxes[b.id()] = true
		for _, mb := range b.list() {
			l.Members[b.id()+"/"+mb.id()] = true
		}
	}
	return l
}

// litterAge is how old a file in the state directory must be, that nobody is
// known to want, to be garbage: longer than it takes to write one.
const litterAge = time.Minute

// GC finds what belongs to nobody any more, on the host and in the directories
// of this installation, and removes it unless dryRun is set. It tries again to take down what
// is unclean. The error says what could not be looked at; the findings are valid all the same.
func (m *Manager) GC(ctx context.Context, dryRun bool) (found []garbage.Finding, err error) {
	defer m.operation("gc", &err)()
	if err := m.gc.acquire(ctx); err != nil {
		return nil, &OpError{Op: "gc", Err: err}
	}
	defer m.gc.release()
	var errs []error
	look := func(what string, fn func() ([]garbage.Finding, error)) {
		err := m.run("gc", what, func() error {
			fs, err := fn()
			found = append(found, fs...)
			return err
		})
		if err != nil {
			errs = append(errs, err)
		}
	}
	look("records", func() ([]garbage.Finding, error) { return m.uncleanRecords(ctx, dryRun), nil })
	look("state", func() ([]garbage.Finding, error) { return m.litter(dryRun) })
	look("node", func() ([]garbage.Finding, error) { return m.node.GC(ctx, m.live, dryRun) })
	if !dryRun {
		m.o.Observer.Garbage(found)
		m.tellGarbage(found)
	}
	if err := errors.Join(errs...); err != nil {
		return found, &OpError{Op: "gc", Err: err}
	}
	return found, nil
}

// tellGarbage tells of what was removed, and once of what was not.
func (m *Manager) tellGarbage(found []garbage.Finding) {
	kept := map[garbage.Finding]bool{}
	for _, f := range found {
		if f.Action != garbage.Removed {
			kept[f] = true
			if m.keptGarbage[f] {
				continue
			}
		}
		attrs := map[string]string{"kind": string(f.Kind), "name": f.Name, "action": f.Action}
		log := m.o.Log.With("kind", f.Kind, "name", f.Name, "reason", f.Reason, "action", f.Action)
		if f.Err != "" {
			attrs["error"] = f.Err
			log = log.With("err", f.Err)
		}
		log.Info("Garbage")
		m.emit(Event{Type: journal.Garbage, Reason: f.Reason, Attrs: attrs})
	}
	m.keptGarbage = kept
}

// uncleanRecords tries again to take down what could not be, and shows what is
// on record without its processes.
func (m *Manager) uncleanRecords(ctx context.Context, dryRun bool) []garbage.Finding {
	var found []garbage.Finding
	for _, b := range m.all() {
		switch r := b.rec.Load(); r.State {
		case Unclean:
			if f, ok := m.again(&b.op, dryRun, func() error {
				if b.gone || b.rec.Load().State != Unclean {
					return nil
				}
				return m.takeDown(ctx, b, "gc")
			}); ok {
				f.Name, f.Since, f.Reason = "sandbox "+b.name()+" ("+r.ID+")", r.CreatedAt, r.Reason
				found = append(found, f)
			}
			continue
		case NotReady:
			found = append(found, garbage.Finding{
				Kind: garbage.Record, Name: "sandbox " + b.name() + " (" + r.ID + ")", Since: r.CreatedAt,
				Reason: r.Reason, Action: garbage.Kept,
			})
		}
		for _, mb := range b.list() {
			r := mb.rec.Load()
			if r.State != MemberUnclean {
				continue
			}
			if f, ok := m.again(&mb.op, dryRun, func() error {
				if mb.gone || mb.rec.Load().State != MemberUnclean {
					return nil
				}
				return m.takeDownMember(ctx, b, mb, "gc")
			}); ok {
				f.Name, f.Since, f.Reason = "member "+b.name()+"/"+mb.name()+" ("+r.Sandbox+"/"+r.ID+")", r.CreatedAt, r.Reason
				found = append(found, f)
			}
		}
	}
	return found
}

// again tries to take something down, unless it is being worked on. It fills in
// the kind and what came of it.
func (m *Manager) again(op *lock, dryRun bool, takeDown func() error) (f garbage.Finding, ok bool) {
	f = garbage.Finding{Kind: garbage.Record, Action: garbage.WouldRemove}
	if dryRun {
		return f, true
	}
	select {
	case *op <- struct{}{}:
	default:
		return f, false
	}
	defer op.release()
	f.Done(takeDown())
	return f, true
}

// litter finds files in the state directory that nobody wants.
func (m *Manager) litter(dryRun bool) ([]garbage.Finding, error) {
	var found []garbage.Finding
	note := func(kind garbage.Kind, name, reason string, since time.Time, remove func() error) {
		f := garbage.Finding{Kind: kind, Name: filepath.Join(m.path, name), Since: since.UTC(), Reason: reason, Action: garbage.WouldRemove}
		switch {
		case remove == nil:
			f.Action = garbage.Kept
		case !dryRun:
			crash.Point("gc litter before")
			f.Done(remove())
			crash.Point("gc litter after")
		}
		found = append(found, f)
	}
	// What is told of is removed at once; this is what that did not work for.
	// While the journal is behind it is needed at the next start.
	if !m.o.Journal.Behind() {
		for _, e := range m.old(removedDir) {
			name := removedDir + "/" + e.Name()
			note(garbage.Temp, name, "it is of something that has been removed", changed(e), func() error { return m.root.RemoveAll(name) })
		}
	}
	for _, e := range m.old(quarantineDir) {
		note(garbage.Record, quarantineDir+"/"+e.Name(), "it could not be read and was set aside: look at it, and remove it", changed(e), nil)
	}
	err := fs.WalkDir(m.root.FS(), sandboxesDir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !d.Type().IsRegular() || !strings.HasSuffix(name, statefile.TempSuffix) {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if fi, err := d.Info(); err == nil && time.Since(fi.ModTime()) > litterAge {
			note(garbage.Temp, name, "nobody writes it any more", fi.ModTime(), func() error { return m.root.Remove(name) })
		}
		return nil
	})
	return found, err
}

// old returns what is in dir for longer than litterAge.
func (m *Manager) old(dir string) []fs.DirEntry {
	ents, err := fs.ReadDir(m.root.FS(), dir)
	if err != nil {
		return nil
	}
	var old []fs.DirEntry
	for _, e := range ents {
		if at := changed(e); !at.IsZero() && time.Since(at) > litterAge {
			old = append(old, e)
		}
	}
	return old
}

// changed is when a directory entry's inode was changed last; a rename counts.
// The zero time means that it is gone.
func changed(e fs.DirEntry) time.Time {
	fi, err := e.Info()
	if err != nil {
		return time.Time{}
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return time.Time{}
	}
	return time.Unix(st.Ctim.Unix())
}
