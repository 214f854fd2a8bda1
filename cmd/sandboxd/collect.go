package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/tarstream"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Collects implements [sandbox.CollectNode]. Of a failure, there is always
// something to say; but a command that could not be executed has not failed: who
// asked for it has been told why, and it has left nothing.
func (n *node) Collects(m *sandbox.MemberRecord) bool {
	failed := m.Exit != nil && (!m.Exit.Known || m.Exit.Code != 0)
	return len(m.Config.Collect) > 0 || failed && m.StartError == ""
}

// Collect implements [sandbox.CollectNode].
func (n *node) Collect(ctx context.Context, r *sandbox.Record, m *sandbox.MemberRecord, dir string) (string, error) {
	s := newSubject(r, m, dir, n.dataDir(m))
	s.Samples = n.sampler.Samples(m.ID)
	name, err := n.store.Collect(ctx, s)
	if err == nil {
		n.sampler.Remove(m.ID)
	}
	return name, err
}

// newSubject is what a member is for package collect. dir is its directory under
// the state directory, data the one under the root directory.
func newSubject(r *sandbox.Record, m *sandbox.MemberRecord, dir, data string) *collect.Subject {
	s := &collect.Subject{
		Sandbox: r.Config.Name, SandboxID: r.ID, Member: m.Config.Name, MemberID: m.ID, State: m.State.String(),
		Command: m.Config.Args, Labels: m.Config.Labels, CreatedAt: m.CreatedAt, Exit: m.Exit, StartError: m.StartError,
		Cgroup: m.Cgroup, LogPath: m.LogPath, Collect: m.Config.Collect,
		Root: func() (*os.File, error) { return openRoot(m) },
		// The kernel takes the mounts of a namespace apart that nobody holds.
		Keep: func() (*os.File, error) {
			f, err := member.OpenNamespace(m.Monitor, namespace.Mnt)
			if errors.Is(err, procid.ErrGone) || errors.Is(err, os.ErrNotExist) {
				return nil, notHeld(m)
			}
			return f, err
		},
	}
	// If it cannot be read, what it would add is not known.
	if st, err := (statusReader{}).MonitorStatus(m, dir); err == nil {
		s.LogDropped = int64(st.LogErrors)
		if st.StartedAt != 0 {
			s.StartedAt = time.Unix(0, st.StartedAt).UTC()
		}
	}
	if r.Holds(namespace.Net) && r.Pause.Alive() {
		s.NetDev = fmt.Sprintf("/proc/%d/net/dev", r.Pause.PID)
	}
	if r.IDs != nil && m.Namespaces[namespace.User].From != namespace.Host {
		s.IDs = &tarstream.IDs{Start: r.IDs.Start, Size: r.IDs.Size}
	}
	s.Targets = targets(m, dir)
	switch from := m.Namespaces[namespace.Mnt]; {
	case from.From != namespace.Private:
		s.RootFrom = from.String()
	case m.Config.Bundle != "" || m.Config.ReadOnly:
		s.RootFrom = string(namespace.Host)
	default:
		s.RootFrom, s.Layer = string(namespace.Private), filepath.Join(data, layerDir)
	}
	return s
}

// custodyOf says what of a member can still be copied out.
func custodyOf(m *sandbox.MemberRecord, i sandbox.MemberInfo, mounts []collect.Mount) collect.Custody {
	c := collect.Custody{Held: i.Custody.Held || i.Exit == nil && member.RootHeld(m.Monitor), Until: i.Custody.Until}
	switch {
	case c.Held:
		c.Mounts = mounts
	case i.Exit == nil:
		c.Why = "its monitor is gone"
	default:
		c.Why = whyNotHeld(m)
		if r := i.Custody.Released; r != nil {
			c.Released = r.At
		}
	}
	return c
}
