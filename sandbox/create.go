package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/idrange"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// Create makes a sandbox and returns when it is [Ready].
//
// If it fails and everything it made could be taken back, there is no such
// sandbox. If something could not, the sandbox is there, is [Unclean], and
// Remove tries again. A request equal to one that is being carried out waits
// for that one and returns the same sandbox.
func (m *Manager) Create(ctx context.Context, c Config) (_ Info, err error) {
	defer m.operation("create", &err)()
	ref := c.Name
	id := m.o.NewID()
	if c.Network == "" && (c.Share == nil || slices.Contains(c.Share, namespace.Net)) {
		c.Network = m.node.DefaultNetwork()
	}
	c, err = completeSandbox(c, id)
	if err != nil {
		return Info{}, &OpError{Op: "create", Err: err}
	}
	if err := m.node.CheckSandbox(&c); err != nil {
		return Info{}, &OpError{Op: "create", Ref: ref, Err: err}
	}
	hooks, err := m.node.SandboxHooks(&c)
	if err != nil {
		return Info{}, &OpError{Op: "create", Ref: ref, Err: err}
	}
	for {
		if err := ctx.Err(); err != nil {
			return Info{}, &OpError{Op: "create", Ref: ref, Err: err}
		}
		b, mine, err := m.claim(id, c, hooks)
		if err != nil {
			return Info{}, &OpError{Op: "create", Err: err}
		}
		if mine {
			defer b.op.release()
			defer close(b.created)
			if err := m.create(ctx, b); err != nil {
				return Info{}, err
			}
			return m.info(b), nil
		}
		select {
		case <-b.created:
		case <-ctx.Done():
			return Info{}, &OpError{Op: "create", Ref: ref, Err: ctx.Err()}
		}
		if b.rec.Load().State == Ready {
			return m.info(b), nil
		}
		// The other one failed, perhaps because its client has gone away: now
		// it is this one's turn.
	}
}

// claim enters a new sandbox under its name, with its op lock held. If one with
// an equal configuration is being created, claim returns that one instead.
func (m *Manager) claim(id string, c Config, hooks []request.Hook) (b *box, mine bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b := m.names[c.Name]; b != nil {
		r := b.rec.Load()
		if r.State == Creating && reflect.DeepEqual(r.Config, c) {
			return b, false, nil
		}
		return nil, false, &kindError{fmt.Sprintf("sandbox %q already exists (%s, %s)", c.Name, r.ID, r.State), ErrExists}
	}
	r := &Record{
		Version: recordVersion, ID: id, State: Creating, CreatedAt: m.now(), Config: c,
		Cgroup: path.Join(m.o.CgroupParent, id), Hooks: hooks,
	}
	if r.Holds(namespace.User) {
		if r.IDs, err = m.freeIDs(); err != nil {
			return nil, false, err
		}
	}
	b = newBox(m.ctx, r)
	b.op <- struct{}{} // nobody else knows it yet
	m.enter(b)
	return b, true, nil
}

// freeIDs returns a range of ids that no sandbox has, and no user of the host as
// subordinate ids. Preconditions: m.mu is held.
func (m *Manager) freeIDs() (*idrange.Range, error) {
	var used []idrange.Range
	for _, b := range m.boxes {
		if ids := b.rec.Load().IDs; ids != nil {
			used = append(used, *ids)
		}
	}
	var subids []io.Reader
	for _, name := range []string{"/etc/subuid", "/etc/subgid"} {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		subids = append(subids, f)
	}
	ids, err := idrange.Free(used, subids...)
	if err != nil {
		return nil, statef("user namespace: %v", err)
	}
	return &ids, nil
}

// create makes what b's record says. Preconditions: b.op is held.
func (m *Manager) create(ctx context.Context, b *box) error {
	err := m.createSteps(ctx, b)
	r := b.rec.Load()
	if err == nil {
		m.o.Log.Info("Sandbox ready", "sandbox", r.ID, "name", r.Config.Name, "pid", r.Pause.PID)
		return nil
	}
	undo := m.takeDown(ctx, b, "create-undo")
	return opError("create", r.Config.Name, err, undo)
}

func (m *Manager) createSteps(ctx context.Context, b *box) error {
	plan, err := m.planNetwork(ctx, b)
	if err != nil {
		return err
	}
	// Namespaces take as long to make as all the rest, and need neither.
	recorded := begin(func() error {
		err := m.run("create", "record", func() error {
			if err := m.root.Mkdir(b.dir(), 0o700); err != nil {
				return err
			}
			if err := m.root.Mkdir(b.dir()+"/"+membersDir, 0o700); err != nil {
				return err
			}
			if err := statefile.SyncDir(m.root, sandboxesDir); err != nil {
				return err
			}
			return m.write(b, func(*Record) {})
		})
		if err != nil {
			return err
		}
		return m.run("create", "cgroup", func() error { return m.node.MakeCgroup(ctx, b.rec.Load()) })
	})
	defer recorded() // what is taken down must not be in the making
	var facts PauseFacts
	err = m.run("create", "pause", func() (err error) {
		facts, err = m.node.StartPause(ctx, b.rec.Load(), recorded)
		return err
	})
	if rerr := recorded(); rerr != nil {
		return rerr
	}
	if err != nil {
		return err
	}
	hooks := (subject{b: b}).pending(request.Postcreate)
	if hooks || made(b.rec.Load().Config.Network) {
		// What is taken down without it is found by its mark; a network wants to know it.
		err = m.run("create", "pause record", func() error {
			return m.write(b, func(r *Record) { r.Pause, r.Inodes = facts.Pause, facts.Inodes })
		})
		if err != nil {
			return err
		}
	}
	networks, err := m.attachNetwork(ctx, b, plan)
	if err != nil {
		return err
	}
	if hooks {
		// They, and predelete hooks if one of them fails, are told the addresses.
		err = m.run("create", "network record", func() error {
			return m.write(b, func(r *Record) { r.Networks = networks })
		})
		if err != nil {
			return err
		}
	}
	err = m.run("create", "watch", func() error { return m.watchPause(b) })
	if err != nil {
		return err
	}
	if err := m.runHooks(ctx, subject{b: b}, request.Postcreate, procid.ID{}); err != nil {
		return err
	}
	return m.run("create", "ready", func() error {
		return m.write(b, func(r *Record) {
			r.State, r.Complete, r.Networks = Ready, true, networks
			r.Pause, r.Inodes = facts.Pause, facts.Inodes
		})
	})
}

// Add makes a member and returns when it is [MemberCreated]: its init has done
// everything but its execve. Failures are undone as those of Create.
func (m *Manager) Add(ctx context.Context, sandboxRef string, c MemberConfig) (MemberInfo, error) {
	b, mb, err := m.addMember(ctx, sandboxRef, c, MemberCreated)
	if err != nil {
		return MemberInfo{}, err
	}
	defer mb.op.release()
	return m.memberInfo(b, mb), nil
}

// Run is Add and Start in one. If the start fails, the member is removed again, since
// whoever asked for it wants its name back; but not if its command has run all the same,
// as with a poststart hook that failed: then there is something to look at.
func (m *Manager) Run(ctx context.Context, sandboxRef string, c MemberConfig) (MemberInfo, error) {
	b, mb, err := m.addMember(ctx, sandboxRef, c, MemberRunning)
	if err != nil {
		return MemberInfo{}, err
	}
	defer mb.op.release()
	if mb.rec.Load().State == MemberRunning {
		m.o.Log.Info("Member started", "sandbox", b.id(), "member", mb.id(), "name", mb.name())
		return m.memberInfo(b, mb), nil
	}
	ref := sandboxRef + "/" + mb.name()
	err = func() (err error) {
		defer m.operation("start", &err)()
		return m.startMember(ctx, b, mb)
	}()
	if err == nil {
		return m.memberInfo(b, mb), nil
	}
	r := mb.rec.Load()
	if ran := (r.State == MemberRunning || r.State.over()) && r.StartError == ""; !ran {
		if rerr := m.removeMember(context.WithoutCancel(ctx), b, mb, ref); rerr != nil {
			err = errors.Join(err, rerr)
		}
	}
	return MemberInfo{}, err
}

// addMember is Add. The member that it returns has its op lock held, and is in
// the state that is asked for, [MemberCreated] or [MemberRunning]. In place of the
// latter it may be [MemberStarting], if there is something to do between the two.
func (m *Manager) addMember(ctx context.Context, sandboxRef string, c MemberConfig, state MemberState) (_ *box, _ *memb, err error) {
	defer m.operation("add", &err)()
	id := m.o.NewID()
	c, err = completeMember(c, id)
	if err != nil {
		return nil, nil, &OpError{Op: "add", Err: err}
	}
	b, err := m.box(sandboxRef)
	if err != nil {
		return nil, nil, &OpError{Op: "add", Err: err}
	}
	ref := b.name()
	if c.Name != id { // else nobody knows the name yet
		ref += "/" + c.Name
	}
	mb, err := m.claimMember(b, id, c)
	if err != nil {
		return nil, nil, &OpError{Op: "add", Ref: ref, Err: err}
	}
	defer func() {
		if err != nil {
			mb.op.release()
		}
	}()
	siblings := b.records(id)
	// Ahead of time, for the member's own to be made in. It is the sandbox's, and stays.
	above := begin(func() error {
		return m.run("add", "sandbox cgroup", func() error { return m.node.MakeMembersCgroup(ctx, b.rec.Load()) })
	})
	var hooks []request.Hook
	spec, sel, err := m.node.ResolveMember(ctx, b.rec.Load(), mb.rec.Load(), siblings)
	if err == nil {
		hooks, err = m.node.MemberHooks(b.rec.Load(), mb.rec.Load(), spec)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		above()
		m.forgetMember(b, mb) // nothing of it has been made yet
		return nil, nil, &OpError{Op: "add", Ref: ref, Err: err}
	}
	if state == MemberRunning && len(hooks)+len(c.Collect) > 0 {
		state = MemberStarting // one record for it and for Created
	}
	if err := m.add(ctx, b, mb, siblings, spec, sel, hooks, above, state); err != nil {
		undo := m.takeDownMember(ctx, b, mb, "add-undo")
		return nil, nil, opError("add", ref, err, undo)
	}
	m.o.Log.Info("Member created", "sandbox", b.id(), "member", id, "name", c.Name, "pid", mb.rec.Load().Init.PID)
	return b, mb, nil
}

// claimMember enters a new member under its name, with its op lock held.
func (m *Manager) claimMember(b *box, id string, c MemberConfig) (*memb, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.open(); err != nil {
		return nil, err
	}
	for _, other := range b.members {
		if r := other.rec.Load(); r.Config.Name == c.Name {
			return nil, &kindError{fmt.Sprintf("member %q already exists (%s, %s)", c.Name, r.ID, r.State), ErrExists}
		}
	}
	r := &MemberRecord{
		Version: recordVersion, ID: id, Sandbox: b.id(), State: MemberCreating, CreatedAt: m.now(), Config: c,
		Cgroup: path.Join(b.rec.Load().Cgroup, id), LogPath: c.LogPath,
	}
	if r.LogPath == "" {
		r.LogPath = path.Join(m.o.LogDir, r.Sandbox, id, "log")
	}
	mb := newMemb(b.name(), r)
	mb.op <- struct{}{}
	b.members[id] = mb
	return mb, nil
}

// open says why no member can be added or started now, if so.
// Preconditions: b.mu is held.
func (b *box) open() error {
	r := b.rec.Load()
	switch {
	case r.State != Ready && r.Reason != "":
		return statef("the sandbox is %s: %s", r.State, r.Reason)
	case r.State != Ready:
		return statef("the sandbox is %s", r.State)
	case b.closing:
		return statef("the sandbox is being stopped or removed")
	}
	return nil
}

// add makes what mb's record says. It waits for above, which makes what the
// member's cgroups are in. Preconditions: mb.op is held.
func (m *Manager) add(ctx context.Context, b *box, mb *memb, siblings []*MemberRecord, spec *specs.Spec, sel namespace.Selection, hooks []request.Hook, above func() error, state MemberState) error {
	defer above()
	err := m.run("add", "record", func() error {
		if err := m.root.Mkdir(mb.dir(), 0o700); err != nil {
			return err
		}
		if err := statefile.SyncDir(m.root, path.Dir(mb.dir())); err != nil {
			return err
		}
		if err := statefile.Write(m.root, mb.dir()+"/"+specFile, spec); err != nil {
			return err
		}
		return m.writeMember(mb, func(r *MemberRecord) {
			r.Namespaces, r.Hooks = sel, hooks
			if spec.Process != nil {
				r.Config.Args, r.Config.TTY = slices.Clone(spec.Process.Args), spec.Process.Terminal
			}
		})
	})
	if err != nil {
		return err
	}
	err = m.run("add", "cgroup", func() error { return m.node.MakeMemberCgroup(ctx, mb.rec.Load()) })
	if err != nil {
		return err
	}
	// These take as long as the preparation of the monitor, which needs neither.
	limited := begin(func() error {
		if err := above(); err != nil {
			return err
		}
		return m.run("add", "limits", func() error { return m.node.LimitMember(ctx, mb.rec.Load(), spec) })
	})
	defer limited() // what is taken down must not be in the making
	err = m.run("add", "data", func() error { return m.node.MakeMemberData(ctx, mb.rec.Load()) })
	if err != nil {
		return err
	}
	var mon Monitor
	err = m.run("add", "monitor", func() (err error) {
		mon, err = m.node.StartMonitor(ctx, b.rec.Load(), mb.rec.Load(), siblings, spec, m.memberPath(mb), limited, m.madeHooks(ctx, b, mb), state == MemberRunning)
		return err
	})
	if err != nil {
		if lerr := limited(); lerr != nil {
			return lerr
		}
		return err
	}
	mb.setMonitor(mon)
	f := mon.Facts()
	if s := (subject{b, mb}); s.pending(request.Postcreate) {
		// They are told the pids, and may ask for more.
		err := m.writeMember(mb, func(r *MemberRecord) { r.Monitor, r.Init, r.Inodes = f.Monitor, f.Init, f.Inodes })
		if err == nil {
			err = m.runHooks(ctx, s, request.Postcreate, procid.ID{})
		}
		if err != nil {
			return err
		}
	}
	return m.run("add", "created", func() error {
		err := m.writeMember(mb, func(r *MemberRecord) {
			r.State, r.Monitor, r.Init, r.Inodes, r.Complete = state, f.Monitor, f.Init, f.Inodes, true
		})
		if err != nil {
			return err
		}
		m.watch(b, mb)
		return nil
	})
}

// begin runs fn in a goroutine. The function that it returns waits for fn and
// returns its error, as often as it is called.
func begin(fn func() error) func() error {
	done := make(chan struct{})
	var err error
	go func() {
		defer close(done)
		err = fn()
	}()
	return func() error {
		<-done
		return err
	}
}

// ociCreate are the stages of runtime-spec's create, in its order.
var ociCreate = []request.Stage{request.OCIPrestart, request.CreateRuntime, request.CreateContainer}

// madeHooks returns what runs the hooks of a member's runtime environment, in
// the order of runtime-spec, or nil if there are none. Preconditions: mb.op is
// held until the function has returned.
func (m *Manager) madeHooks(ctx context.Context, b *box, mb *memb) func(procid.ID) error {
	s := subject{b, mb}
	if !slices.ContainsFunc(ociCreate, s.pending) {
		return nil
	}
	return func(init procid.ID) error {
		for _, stage := range ociCreate {
			if err := m.runHooks(ctx, s, stage, init); err != nil {
				return &StepError{Err: err}
			}
		}
		return nil
	}
}

// removeDir removes what is at name and makes that durable.
func (m *Manager) removeDir(name string) error {
	if err := m.root.RemoveAll(name); err != nil {
		return err
	}
	err := statefile.SyncDir(m.root, path.Dir(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // its parent is gone too
	}
	return err
}

// setAside moves what is at name to the quarantine, under a name that is free.
func (m *Manager) setAside(name string) error {
	base := quarantineDir + "/" + strings.ReplaceAll(strings.TrimPrefix(name, sandboxesDir+"/"), "/", ".")
	to := base
	for n := 2; ; n++ {
		_, err := m.root.Lstat(to)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
		to = fmt.Sprintf("%s.%d", base, n)
	}
	if err := m.root.Rename(name, to); err == nil {
		m.o.Log.Warn("Set aside: look at it, and remove it", "was", name, "dir", m.root.Name()+"/"+to)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := statefile.SyncDir(m.root, quarantineDir); err != nil {
		return err
	}
	return statefile.SyncDir(m.root, path.Dir(name))
}
