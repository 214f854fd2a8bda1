package sandbox

import (
	"context"
	"errors"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
)

// collectTries is how often a collection is tried that fails.
const collectTries = 3

// poststop does what is to be done after a member's exit, while everything of it
// is there: its collectors, then its poststop hooks. How far it has come is on
// record, so that it is done once, by this daemon or the next. It does nothing if
// the member has not exited or all is done.
//
// What fails is recorded and does not fail poststop; an error means that ctx has
// ended and there is more to do. Preconditions: mb.op is held.
func (m *Manager) poststop(ctx context.Context, b *box, mb *memb) error {
	if !m.unsettled(mb) {
		return nil
	}
	defer m.custodyChanged()
	if m.uncollected(mb) {
		if err := m.collect(ctx, b, mb); err != nil {
			return err
		}
	}
	s := subject{b, mb}
	m.runHooks(ctx, s, request.Poststop, procid.ID{}) // failures are in the results
	if err := ctx.Err(); err != nil {
		return err
	}
	if !declares(mb.rec.Load()) {
		m.releaseUnwanted(ctx, mb)
		return nil // what is done unasked leaves it Exited
	}
	m.run("poststop", "record", func() error {
		m.noteMember(mb, func(r *MemberRecord) { r.State = MemberCollected })
		return nil
	})
	r := mb.rec.Load()
	m.releaseUnwanted(ctx, mb)
	m.o.Log.Info("Member collected", "sandbox", r.Sandbox, "member", r.ID, "name", r.Config.Name)
	return nil
}

// declares reports whether somebody has asked for anything to be done after the
// member's exit.
func declares(r *MemberRecord) bool {
	if len(r.Config.Collect) > 0 {
		return true
	}
	for _, h := range r.Hooks {
		if h.Stage == request.Poststop {
			return true
		}
	}
	return false
}

// unsettled reports whether something is still to be done after the member's exit.
func (m *Manager) unsettled(mb *memb) bool {
	r := mb.rec.Load()
	return r.State == MemberExited && (declares(r) || m.uncollected(mb))
}

// uncollected reports whether the member's collection is still to be made. One that
// was killed by its removal has not failed: it has only what was declared.
func (m *Manager) uncollected(mb *memb) bool {
	r := mb.rec.Load()
	if mb.dismissed.Load() && len(r.Config.Collect) == 0 {
		return false
	}
	return !r.CollectDone && m.node.Collects(r)
}

// collect makes the member's collection and records that. One that cannot be made
// is given up after some tries; why is in the record.
func (m *Manager) collect(ctx context.Context, b *box, mb *memb) error {
	patience, cancel := m.untilForced(ctx, mb)
	defer cancel()
	if len(mb.rec.Load().Config.Collect) > 0 {
		switch err := b.collecting.acquire(patience); {
		case err == nil:
			defer b.collecting.release()
		case ctx.Err() != nil:
			return err
		}
	}
	delay := m.o.hookRetryMin
	for try := 1; ; try++ {
		begin := time.Now()
		var name string
		err := m.run("poststop", "collect", func() (err error) {
			name, err = m.node.Collect(patience, b.rec.Load(), mb.rec.Load(), m.memberPath(mb))
			return err
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		m.o.Observer.Collection(time.Since(begin), err)
		if err != nil && try < collectTries {
			m.o.Log.Warn("Collection failed", "sandbox", b.id(), "member", mb.id(), "try", try, "err", err)
			if !sleep(patience, delay) && ctx.Err() != nil {
				return ctx.Err()
			}
			delay *= 2
			continue
		}
		crash.Point("poststop collect record before")
		m.noteMember(mb, func(r *MemberRecord) {
			r.CollectDone, r.Collection = true, name
			if err != nil {
				r.CollectError = err.Error()
			}
		})
		if err != nil {
			m.o.Log.Warn("Collection given up", "sandbox", b.id(), "member", mb.id(), "err", err)
		}
		return nil
	}
}

// errForced is why a collection has no files.
var errForced = errors.New("cut off by the removal of the member with force")

// untilForced returns a context that also ends, because of errForced, some time after
// a removal by force was asked for: files that do not answer must not hold that up
// for as long as a collection may take. The caller calls the function.
func (m *Manager) untilForced(ctx context.Context, mb *memb) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-mb.forced:
			if sleep(ctx, m.o.collectGrace) {
				cancel(errForced)
			}
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// later does in the background, under the member's lock, what is still to be done
// for a member that an earlier daemon has left.
func (m *Manager) later(b *box, mb *memb) {
	m.wg.Go(func() {
		if err := mb.op.acquire(m.ctx); err != nil {
			return
		}
		defer mb.op.release()
		switch s := mb.rec.Load().State; {
		case mb.gone:
		case s.alive():
			m.poststart(m.ctx, b, mb)
		case s.over():
			m.afterExit(b, mb)
		default:
			m.takeDownMember(m.ctx, b, mb, "recover")
		}
	})
}

// afterExit does what follows a member's exit: it removes one that is to remove
// itself. What goes wrong is on record, and logged. Preconditions: mb.op is held.
func (m *Manager) afterExit(b *box, mb *memb) {
	if !mb.rec.Load().Config.AutoRemove {
		m.poststop(m.ctx, b, mb) // the next daemon goes on where it was cut off
		return
	}
	done := m.o.Observer.Operation("auto_remove")
	done(m.removeMember(m.ctx, b, mb, b.name()+"/"+mb.name()))
}

// stopped does what is to be done once all members of a sandbox have exited:
// what their own exits ask for, then the sandbox's poststop hooks. The error is as
// that of poststop. Preconditions: b.op is held.
func (m *Manager) stopped(ctx context.Context, b *box) error {
	if err := b.each(ctx, func(mb *memb) error { return m.poststop(ctx, b, mb) }); err != nil {
		return err
	}
	m.runHooks(ctx, subject{b: b}, request.Poststop, procid.ID{}) // failures are in the results
	return ctx.Err()
}

// farewell is the last that is done for a sandbox before anything of it goes: what
// follows its stop, if nobody has asked for one, then the predelete hooks of its
// members and its own. A creation that failed has those that its hooks need. The
// error is as that of poststop. Preconditions: b.op is held.
func (m *Manager) farewell(ctx context.Context, b *box) error {
	ctx, cancel := m.patient(ctx)
	defer cancel()
	if b.rec.Load().Complete {
		if err := m.stopped(ctx, b); err != nil {
			return err
		}
	}
	if err := b.each(ctx, func(mb *memb) error { return m.predelete(ctx, b, mb) }); err != nil {
		return err
	}
	return m.predelete(ctx, b, nil)
}

// predelete runs the predelete hooks of a member, or with nil of the sandbox.
// Preconditions: the op lock is held.
func (m *Manager) predelete(ctx context.Context, b *box, mb *memb) error {
	s := subject{b, mb}
	complete := b.rec.Load().Complete
	if mb != nil {
		complete = mb.rec.Load().Complete
	}
	if complete || s.begun(request.Postcreate) {
		m.runHooks(ctx, s, request.Predelete, procid.ID{}) // failures are logged
	}
	return ctx.Err()
}

// lastWork reports whether taking b down means to run programs, which can take
// long.
func (b *box) lastWork() bool {
	if len(b.rec.Load().Hooks) > 0 {
		return true
	}
	for _, mb := range b.list() {
		if len(mb.rec.Load().Hooks) > 0 {
			return true
		}
	}
	return false
}
