package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/undo"
)

// undoMember takes down everything that a member's record stands for, whether
// its creation has failed, it is being removed, or a crash has left it behind.
// Ids suffice: the record may name no process yet.
func (m *Manager) undoMember(r *MemberRecord, op string) *undo.Stack {
	var s undo.Stack
	m.push(&s, op, "member data", func(ctx context.Context) error { return m.node.RemoveMemberData(ctx, r) })
	m.push(&s, op, "member cgroup", func(ctx context.Context) error { return m.node.RemoveMemberCgroup(ctx, r) })
	m.push(&s, op, "monitor", func(ctx context.Context) error { return m.node.KillMonitor(ctx, r) })
	return &s
}

// undoSandbox is undoMember for what a sandbox has besides its members.
func (m *Manager) undoSandbox(r *Record, op string) *undo.Stack {
	var s undo.Stack
	m.push(&s, op, "data", func(ctx context.Context) error { return m.node.RemoveSandboxData(ctx, r) })
	m.push(&s, op, "cgroup", func(ctx context.Context) error { return m.node.RemoveCgroup(ctx, r) })
	m.push(&s, op, "pause", func(ctx context.Context) error { return m.node.KillPause(ctx, r) })
	if mayHaveNetwork(r) {
		m.push(&s, op, "network", func(ctx context.Context) error { return m.node.DetachNetwork(ctx, r) })
	}
	return &s
}

// push adds a step with the points where a test may kill the daemon.
func (m *Manager) push(s *undo.Stack, op, step string, fn func(context.Context) error) {
	s.Push(step, func(ctx context.Context) error {
		crash.Point(op + " " + step + " before")
		done := m.o.Observer.Step(op, step)
		err := fn(ctx)
		done(err)
		if err != nil {
			return err
		}
		crash.Point(op + " " + step + " after")
		return nil
	})
}

// takeDownMember removes a member and everything of it. If something stays, so
// does the member, as [MemberUnclean]. Preconditions: mb.op is held.
func (m *Manager) takeDownMember(ctx context.Context, b *box, mb *memb, op string) error {
	r := mb.rec.Load()
	hookCtx, cancel := m.patient(ctx)
	defer cancel()
	if err := m.predelete(hookCtx, b, mb); err != nil {
		return err // the next daemon goes on
	}
	// The monitor's connection goes first: its end is no news now.
	mb.setMonitor(nil)
	err := m.undoMember(r, op).Unwind(ctx)
	if err == nil && (r.Complete || subject{b, mb}.begun(ociCreate...)) {
		m.runHooks(hookCtx, subject{b, mb}, request.OCIPoststop, procid.ID{}) // failures are logged
		if err := hookCtx.Err(); err != nil {
			return err // the next daemon goes on
		}
	}
	if err == nil {
		err = m.dropMember(b, mb, op)
	}
	if err != nil {
		m.root.MkdirAll(mb.dir(), 0o700) // it may have failed before it was recorded
		m.noteMember(mb, func(r *MemberRecord) { r.State, r.Reason = MemberUnclean, err.Error() })
		m.o.Log.Warn("Member left unclean", "sandbox", r.Sandbox, "member", r.ID, "err", err)
		return err
	}
	m.forgetMember(b, mb)
	return nil
}

// forgetMember drops the entry of a member of which nothing is left.
// Preconditions: mb.op is held.
func (m *Manager) forgetMember(b *box, mb *memb) {
	mb.gone = true
	r := mb.rec.Load()
	if r.Config.AutoRemove && r.Exit != nil {
		m.mu.Lock()
		m.past.add(r.Sandbox+"/"+r.ID, *r.Exit)
		m.mu.Unlock()
	}
	mb.setOver()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.members, mb.id())
}

// past is how members ended that have removed themselves, for those who ask a
// moment too late: whoever started one could not know when to ask. The zero
// value is ready.
type past struct {
	exits map[string]Exit // by SANDBOX/MEMBER, ids
	order []string        // the oldest first
}

// pastMax is how many are remembered: more than anybody starts between a start
// and the wait for it.
const pastMax = 1024

func (p *past) add(ref string, e Exit) {
	if p.exits == nil {
		p.exits = map[string]Exit{}
	}
	if len(p.order) == pastMax {
		delete(p.exits, p.order[0])
		p.order = p.order[1:]
	}
	p.exits[ref] = e
	p.order = append(p.order, ref)
}

// dropMember removes a member's directory, or sets it aside if its record could
// not be read. In a sandbox that will be set aside itself, it stays.
func (m *Manager) dropMember(b *box, mb *memb, op string) error {
	crash.Point(op + " member record before")
	var err error
	switch {
	case b.broken || mb.broken:
		m.tellLost(&mb.told, m.memberEventOf(mb.in, mb.rec.Load()))
		if !b.broken {
			err = m.setAside(mb.dir())
		}
	default:
		r, next := mb.rec.Load(), mb.told
		es := next.events(m.memberEventOf(mb.in, r), memberRemoval(&next, r))
		err = m.retire(mb.dir(), removedName{sandbox: r.Sandbox, member: r.ID}, &mb.told, es)
	}
	if err != nil {
		return fmt.Errorf("member record: %w", err)
	}
	crash.Point(op + " member record after")
	return nil
}

// takeDown removes a sandbox, its members and everything of them. If something
// stays, so does the sandbox, as [Unclean]. Preconditions: b.op is held.
func (m *Manager) takeDown(ctx context.Context, b *box, op string) error {
	ctx = context.WithoutCancel(ctx)
	b.cancel() // the end of the pause is no news now
	b.each(ctx, func(mb *memb) error { m.dismiss(ctx, b, mb); return nil })
	if err := m.farewell(ctx, b); err != nil {
		return err // the next daemon goes on
	}
	r := b.rec.Load()
	err := b.each(ctx, func(mb *memb) error { return m.takeDownMember(ctx, b, mb, op) })
	err = errors.Join(err, m.undoSandbox(r, op).Unwind(ctx))
	if err == nil {
		err = m.drop(b, op)
	}
	if err != nil {
		m.root.MkdirAll(b.dir()+"/"+membersDir, 0o700) // it may have failed before it was recorded
		m.note(b, func(r *Record) { r.State, r.Reason = Unclean, err.Error() })
		m.o.Log.Warn("Sandbox left unclean", "sandbox", r.ID, "err", err)
		return err
	}
	b.gone = true
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leave(b)
	return nil
}

// each calls fn for every member at the same time, with its op lock held, and
// returns the errors of all.
func (b *box) each(ctx context.Context, fn func(mb *memb) error) error {
	members := b.list()
	errs := make([]error, len(members))
	var wg sync.WaitGroup
	for i, mb := range members {
		wg.Go(func() {
			err := mb.op.acquire(ctx)
			if err == nil {
				if !mb.gone {
					err = fn(mb)
				}
				mb.op.release()
			}
			if err != nil {
				errs[i] = fmt.Errorf("member %s: %w", mb.name(), err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// drop removes a sandbox's directory, or sets it aside if its record could not
// be read.
func (m *Manager) drop(b *box, op string) error {
	crash.Point(op + " record before")
	var err error
	if b.broken {
		m.tellLost(&b.told, m.eventOf(b.rec.Load()))
		err = m.setAside(b.dir())
	} else {
		r, next := b.rec.Load(), b.told
		err = m.retire(b.dir(), removedName{sandbox: r.ID}, &b.told, next.events(m.eventOf(r), []Event{next.removal("")}))
	}
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	crash.Point(op + " record after")
	return nil
}

// endMember kills what runs of a member and waits for its exit record, so that
// those who wait for it learn it. What goes wrong here goes wrong again, and is
// reported, in the steps that follow. Preconditions: mb.op is held.
func (m *Manager) endMember(ctx context.Context, b *box, mb *memb) {
	if !mb.rec.Load().State.alive() {
		return
	}
	if err := m.node.KillMemberCgroup(ctx, mb.rec.Load()); err != nil {
		return
	}
	m.awaitExit(ctx, b, mb, time.After(m.o.killTimeout))
}

// dismiss is endMember for a member that is removed: that is no failure of its
// own. Preconditions: mb.op is held.
func (m *Manager) dismiss(ctx context.Context, b *box, mb *memb) {
	if mb.rec.Load().State.alive() {
		mb.dismissed.Store(true)
	}
	m.endMember(ctx, b, mb)
}

// alive reports whether init exists in state s.
func (s MemberState) alive() bool {
	return s == MemberCreated || s == MemberStarting || s == MemberRunning
}

// killNow ends members that somebody else may be waiting for, so that a forced
// removal does not have to wait as long as a stop with a long timeout, or as a
// collection of files that do not answer.
func (m *Manager) killNow(ctx context.Context, ms ...*memb) {
	for _, mb := range ms {
		mb.force()
		if r := mb.rec.Load(); r.State.alive() {
			mb.dismissed.Store(true)
			if err := m.node.KillMemberCgroup(ctx, r); err != nil {
				m.o.Log.Debug("Early kill did not work", "sandbox", r.Sandbox, "member", r.ID, "err", err)
			}
		}
	}
}

// Remove takes a sandbox apart. Unless force is set, it refuses while a member
// runs or is about to. What cannot be taken down makes the sandbox [Unclean];
// Remove then takes up where it failed.
func (m *Manager) Remove(ctx context.Context, ref string, force bool) (err error) {
	defer m.operation("remove", &err)()
	b, err := m.box(ref)
	if err != nil {
		return &OpError{Op: "remove", Err: err}
	}
	if err := ctx.Err(); err != nil {
		return &OpError{Op: "remove", Ref: ref, Err: err}
	}
	if force {
		m.killNow(ctx, b.list()...)
	}
	b, err = m.lockBox(ctx, ref)
	if err != nil {
		return opError("remove", ref, err, nil)
	}
	defer b.op.release()
	if err := b.close(force); err != nil {
		return &OpError{Op: "remove", Ref: ref, Err: err}
	}
	defer b.reopen()
	err = m.run("remove", "deleting", func() error {
		return orFull(m.write(b, func(r *Record) { r.State = Deleting }))
	})
	if err != nil {
		return opError("remove", ref, err, nil)
	}
	if err := m.takeDown(ctx, b, "remove"); err != nil {
		return &OpError{Op: "remove", Ref: ref, Err: err}
	}
	m.o.Log.Info("Sandbox removed", "sandbox", b.id(), "name", b.name())
	return nil
}

// close keeps members from being added and started. Unless force is set, it
// fails if one is there that a removal would kill.
func (b *box) close(force bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !force {
		var names []string
		for _, mb := range b.members {
			if r := mb.rec.Load(); r.State.alive() || r.State == MemberCreating {
				names = append(names, fmt.Sprintf("%s is %s", r.Config.Name, r.State))
			}
		}
		if names != nil {
			return statef("it has members (%s); stop them, or use -f", strings.Join(names, ", "))
		}
	}
	b.closing = true
	return nil
}

func (b *box) reopen() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closing = false
}

// orFull lets a removal go on when the record of its beginning does not fit on
// the disk: refusing would keep the space from ever being freed. If the daemon
// dies half-way, recovery then finds a sandbox whose parts are missing.
func orFull(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return nil
	}
	return err
}

// RemoveMember removes a member, its log included, and ends the custody of its
// root and namespaces. Unless force is set, it refuses if the member has not
// exited.
func (m *Manager) RemoveMember(ctx context.Context, ref string, force bool) (err error) {
	defer m.operation("remove_member", &err)()
	_, mb, err := m.member(ref)
	if err != nil {
		return &OpError{Op: "remove", Err: err}
	}
	if err := ctx.Err(); err != nil {
		return &OpError{Op: "remove", Ref: ref, Err: err}
	}
	if force {
		m.killNow(ctx, mb)
	}
	b, mb, err := m.lockMember(ctx, ref)
	if err != nil {
		return opError("remove", ref, err, nil)
	}
	defer mb.op.release()
	if s := mb.rec.Load().State; s.alive() && !force {
		return &OpError{Op: "remove", Ref: ref, Err: statef("the member is %s; stop it, or use -f", s)}
	}
	return m.removeMember(ctx, b, mb, ref)
}

// removeMember removes a member in whatever state. Preconditions: mb.op is held.
func (m *Manager) removeMember(ctx context.Context, b *box, mb *memb, ref string) error {
	m.dismiss(context.WithoutCancel(ctx), b, mb)
	hookCtx, cancel := m.patient(ctx)
	defer cancel()
	err := m.poststop(hookCtx, b, mb)
	if err == nil {
		err = m.run("remove", "member deleting", func() error {
			return orFull(m.writeMember(mb, func(r *MemberRecord) { r.State = MemberDeleting }))
		})
	}
	if err != nil {
		return opError("remove", ref, err, nil)
	}
	if err := m.takeDownMember(ctx, b, mb, "remove"); err != nil {
		return &OpError{Op: "remove", Ref: ref, Err: err}
	}
	m.o.Log.Info("Member removed", "sandbox", b.id(), "member", mb.id(), "name", mb.name())
	return nil
}
