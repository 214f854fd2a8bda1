package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/proctree"
	"github.com/sandboxd/sandboxd/sandbox"
)

// GC implements [sandbox.GarbageNode].
func (n *node) GC(ctx context.Context, live func() sandbox.Live, dryRun bool) ([]garbage.Finding, error) {
	c := &collector{node: n, ctx: ctx, live: live, dryRun: dryRun}
	// In this order: processes keep cgroups and mounts from going.
	c.look("processes", c.processes)
	c.look("cgroups", c.cgroups)
	c.look("networks", func() error {
		fs, err := n.networks.store.GC(ctx, dryRun)
		c.found = append(c.found, fs...)
		return err
	})
	c.look("directories", c.directories)
	c.look("temporary files", c.tempFiles)
	c.look("collections", func() error {
		fs, err := n.store.Sweep(ctx, dryRun)
		c.found = append(c.found, fs...)
		return err
	})
	return c.found, errors.Join(c.errs...)
}

// collector is one run of [node.GC].
type collector struct {
	*node
	ctx    context.Context
	live   func() sandbox.Live
	dryRun bool
	found  []garbage.Finding
	errs   []error
}

func (c *collector) look(at string, fn func() error) {
	if err := fn(); err != nil {
		c.errs = append(c.errs, fmt.Errorf("%s: %w", at, err))
	}
}

// note records a finding and removes the thing, unless that is not wanted. With
// a nil remove it is kept.
func (c *collector) note(f garbage.Finding, remove func() error) {
	f.Action = garbage.Kept
	switch {
	case remove == nil:
	case c.dryRun:
		f.Action = garbage.WouldRemove
	default:
		crash.Point("gc " + string(f.Kind) + " before")
		f.Done(remove())
		crash.Point("gc " + string(f.Kind) + " after")
	}
	c.found = append(c.found, f)
}

// isID reports whether s can be the id of a sandbox or member.
var isID = regexp.MustCompile(`^[0-9a-f]{16}$`).MatchString

// killWait bounds how long a killed process may take to end.
const killWait = 5 * time.Second

// processes finds pauses, monitors and launchers that nobody knows.
func (c *collector) processes() error {
	prefix := c.mark + "."
	found, err := proctree.Find(prefix)
	if err != nil {
		return err
	}
	live := c.live()
	for _, f := range found {
		ids := strings.TrimPrefix(f.Mark, prefix)
		sid, mid, member := strings.Cut(ids, "/")
		if !isID(sid) || member && !isID(mid) {
			continue // not made by us
		}
		if member && live.Members[ids] || !member && live.Sandboxes[sid] || !f.ID.Alive() {
			continue
		}
		g := garbage.Finding{
			Kind: garbage.Pause, Name: fmt.Sprintf("process %d (sandboxd-%s of %s)", f.ID.PID, f.Kind, ids),
			Since: startOf(f.ID), Reason: "its sandbox is not on record",
		}
		if f.Kind != proctree.Pause {
			g.Kind = garbage.Monitor
		}
		if member && live.Sandboxes[sid] {
			g.Reason = "its member is not on record"
		}
		// A daemon in a container can have a state directory of the same path, and
		// so the same mark. Its processes are in cgroups of its own.
		if !c.inOurs(f.ID, sid) {
			g.Reason += ", but it is not in a cgroup below " + filepath.Join(c.CgroupParent, sid)
			c.note(g, nil)
			continue
		}
		c.note(g, func() error {
			ctx, cancel := context.WithTimeout(c.ctx, killWait)
			defer cancel()
			return killProcess(ctx, f.ID)
		})
	}
	return nil
}

// inOurs reports whether the process is in the cgroup that a sandbox with that
// id has.
func (c *collector) inOurs(id procid.ID, sid string) bool {
	paths, _ := cgroupPaths(id)
	own := filepath.Join(c.CgroupParent, sid)
	return slices.ContainsFunc(paths, func(p string) bool { return p == own || strings.HasPrefix(p, own+"/") })
}

// startOf is when the process started; the zero time if it is gone.
func startOf(id procid.ID) time.Time {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return time.Time{}
	}
	const ticks = 100 // USER_HZ, the same everywhere
	age := time.Duration(now.Nano()) - time.Duration(id.Start)*(time.Second/ticks)
	return time.Now().Add(-age).UTC().Truncate(time.Second / ticks)
}

// cgroups finds those of sandboxes and members that nobody knows.
func (c *collector) cgroups() error {
	boxes, err := c.cg.List(c.CgroupParent)
	if err != nil {
		return err
	}
	var paths []string // of sandboxes and members
	for _, sid := range boxes {
		if !isID(sid) {
			continue
		}
		path := filepath.Join(c.CgroupParent, sid)
		paths = append(paths, path)
		members, err := c.cg.List(path)
		if err != nil {
			return err
		}
		for _, mid := range members {
			if isID(mid) {
				paths = append(paths, filepath.Join(path, mid))
			}
		}
	}
	live := c.live()
	dead := "" // a sandbox's, whose members go with it
	for _, path := range paths {
		ids := strings.TrimPrefix(strings.TrimPrefix(path, c.CgroupParent), "/")
		sid, _, member := strings.Cut(ids, "/")
		f := garbage.Finding{Kind: garbage.Cgroup, Name: path, Since: c.cg.Since(path), Reason: "its sandbox is not on record"}
		switch {
		case !c.cg.Exists(path), member && (live.Members[ids] || sid == dead), !member && live.Sandboxes[sid]:
			continue
		case member && live.Sandboxes[sid]:
			f.Reason = "its member is not on record"
		case member:
			continue // of a sandbox that is not ours
		case !c.ours(path, sid):
			continue
		default:
			dead = sid
		}
		c.note(f, func() error {
			ctx, cancel := context.WithTimeout(c.ctx, killWait)
			defer cancel()
			return c.cg.Remove(ctx, path)
		})
	}
	return nil
}

// ours reports whether the cgroup of a sandbox is this installation's: it says
// so itself, or where cgroups cannot, what is in it does.
func (c *collector) ours(path, sid string) bool {
	if mark := c.cg.MarkOf(path); mark != "" {
		return mark == c.mark
	}
	pids, err := c.cg.Processes(path)
	if err != nil {
		return false
	}
	for _, pid := range pids {
		id, err := procid.Of(pid)
		if err == nil && proctree.Bears(id, c.sandboxMark(sid)) {
			return true
		}
	}
	return false
}

// directories finds the data directories of sandboxes and members that nobody
// knows, those of an earlier boot among them.
func (c *collector) directories() error {
	top := filepath.Join(c.Root, "sandboxes")
	// What is mounted there is not looked at: it may not answer.
	mounts, err := mountPoints(top)
	if err != nil {
		return err
	}
	ents, err := os.ReadDir(top)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var names []string // SANDBOX and SANDBOX/MEMBER
	for _, e := range ents {
		if !e.IsDir() || !isID(e.Name()) {
			continue
		}
		names = append(names, e.Name())
		dir := filepath.Join(top, e.Name())
		if slices.Contains(mounts, dir) {
			continue
		}
		subs, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, s := range subs {
			if s.IsDir() && isID(s.Name()) {
				names = append(names, e.Name()+"/"+s.Name())
			}
		}
	}
	others, foreign, err := otherStates(c.Root, c.State)
	if err != nil {
		return err
	}
	for _, path := range foreign {
		c.note(garbage.Finding{Kind: garbage.Foreign, Name: path, Reason: "it is not a link to a state directory"}, nil)
	}
	live := c.live()
	dead := ""
	for _, name := range names {
		sid, _, member := strings.Cut(name, "/")
		dir := filepath.Join(top, name)
		f := garbage.Finding{Kind: garbage.Layer, Name: dir, Reason: "its sandbox is not on record"}
		switch {
		case member && (live.Members[name] || sid == dead), !member && live.Sandboxes[sid]:
			continue
		case member && live.Sandboxes[sid]:
			f.Reason = "its member is not on record"
		case member:
			continue // of one that another state directory knows
		case knownElsewhere(others, sid):
			continue
		default:
			dead = sid
		}
		if !slices.Contains(mounts, dir) {
			fi, err := os.Lstat(dir)
			if err != nil {
				continue // removed meanwhile
			}
			f.Since = fi.ModTime().UTC()
		}
		if !c.mountsBelow(dir) {
			f.Err = "something is mounted in it"
			c.note(f, nil)
			continue
		}
		c.note(f, func() error { return removeAll(dir) })
	}
	return nil
}

// mountsBelow takes what is mounted in dir down, and reports whether nothing is
// mounted there any more, or would be.
func (c *collector) mountsBelow(dir string) bool {
	points, err := mountPoints(dir)
	if err != nil {
		return false
	}
	for _, p := range tops(points) {
		f := garbage.Finding{Kind: garbage.Mount, Name: p, Reason: "it is in a directory that belongs to nobody"}
		c.note(f, func() error { return detach(p) })
	}
	if c.dryRun || len(points) == 0 {
		return true
	}
	points, err = mountPoints(dir)
	return err == nil && len(points) == 0
}

// tempAge is how old a temporary file must be to be garbage.
const tempAge = time.Minute

// isProgram matches the names of files that programs are put into where memfds
// cannot be executed (package memexec). They have a name for milliseconds.
var isProgram = regexp.MustCompile(`^sandboxd-(pause|monitor|launch)-[0-9]+$`).MatchString

// tempFiles finds what was left in the root directory by a daemon that was
// killed while it wrote.
func (c *collector) tempFiles() error {
	ents, err := os.ReadDir(c.Root)
	if err != nil {
		return err
	}
	for _, e := range ents {
		if !isProgram(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		fi, err := e.Info()
		if err != nil || time.Since(fi.ModTime()) < tempAge {
			continue
		}
		path := filepath.Join(c.Root, e.Name())
		c.note(garbage.Finding{Kind: garbage.Temp, Name: path, Since: fi.ModTime().UTC(), Reason: "nobody executes it any more"},
			func() error { return os.Remove(path) })
	}
	return nil
}
