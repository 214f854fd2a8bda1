package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// watch sees to what follows when a member's monitor reports init's exit, or
// dies. It takes no goroutine until then, or until the connection to the monitor
// is closed because somebody else has seen to it.
func (m *Manager) watch(b *box, mb *memb) { m.watchSlowly(b, mb, m.o.retryMin) }

// watchSlowly is watch with a pause of delay before the next one.
func (m *Manager) watchSlowly(b *box, mb *memb, delay time.Duration) {
	follow := func() {
		if !m.begin() {
			return
		}
		defer m.wg.Done()
		// A monitor that dies as often as it is replaced, or that cannot
		// be replaced, must not keep the daemon busy.
		if m.attend(b, mb) && sleep(m.ctx, delay) {
			m.watchSlowly(b, mb, min(2*delay, m.o.retryMax))
		}
	}
	if mon := mb.monitor(); mon != nil {
		mon.OnDone(follow)
		return
	}
	go follow()
}

// attend deals with the end of a member's monitor or init, unless an operation
// that waited for it has done so already. It reports whether there is anything
// left to watch.
func (m *Manager) attend(b *box, mb *memb) bool {
	if err := mb.op.acquire(m.ctx); err != nil {
		return false
	}
	defer mb.op.release()
	if mb.gone {
		return false
	}
	if mb.rec.Load().State.alive() {
		if err := m.settle(m.ctx, b, mb); err != nil {
			m.o.Log.Warn("Member is without a monitor", "sandbox", b.id(), "member", mb.id(), "err", err)
		}
	}
	if mb.rec.Load().State.over() {
		m.afterExit(b, mb)
	}
	return mb.rec.Load().State.alive()
}

// awaitExit waits until the member's exit is recorded, and sees to it that it
// is. It reports whether it has been. Preconditions: mb.op is held.
func (m *Manager) awaitExit(ctx context.Context, b *box, mb *memb, until <-chan time.Time) (bool, error) {
	delay := m.o.retryMin
	for {
		if mon := mb.monitor(); mon != nil {
			select {
			case <-mon.Done():
			case <-until:
				return false, nil
			case <-ctx.Done():
				return false, ctx.Err()
			}
		}
		err := m.settle(ctx, b, mb)
		if !mb.rec.Load().State.alive() {
			return true, nil
		}
		select {
		case <-time.After(delay):
			delay = min(2*delay, m.o.retryMax)
		case <-until:
			return false, err
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// settle finds out what became of a member whose monitor has told of an exit,
// or cannot be reached: it records the exit, or connects to the monitor again,
// or replaces it. On error nothing has changed and settle may be called again.
// Preconditions: mb.op is held; the member is alive as far as is recorded.
func (m *Manager) settle(ctx context.Context, b *box, mb *memb) error {
	dir := m.memberPath(mb)
	r := mb.rec.Load()
	st, err := m.node.MonitorStatus(r, dir)
	if err != nil {
		return err
	}
	if st.Exit != nil {
		m.findMonitor(ctx, mb, dir)
		m.finish(ctx, b, mb, st)
		return nil
	}
	mon, err := m.node.AdoptMonitor(ctx, r, dir)
	if errors.Is(err, procid.ErrGone) {
		mon, err = m.replaceMonitor(ctx, b, mb, dir)
	}
	if errors.Is(err, procid.ErrGone) {
		return m.finishLost(ctx, b, mb, dir)
	}
	if err != nil {
		return err
	}
	mb.setMonitor(mon)
	f := mon.Facts()
	m.noteMember(mb, func(r *MemberRecord) {
		r.Monitor, r.Init = f.Monitor, f.Init
		if f.Inodes != nil {
			r.Inodes = f.Inodes
		}
		if st.Phase == PhaseRunning {
			r.State = MemberRunning
		}
	})
	return nil
}

// findMonitor notes the monitor that holds custody of a member that has exited,
// if it is not the one on record: a daemon may have replaced that one, and been
// killed before it could record it. Preconditions: mb.op is held.
func (m *Manager) findMonitor(ctx context.Context, mb *memb, dir string) {
	r := mb.rec.Load()
	if m.o.alive(r.Monitor) {
		return
	}
	mon, err := m.node.AdoptMonitor(ctx, r, dir)
	if err != nil {
		return // nobody holds anything
	}
	f := mon.Facts()
	m.noteMember(mb, func(r *MemberRecord) {
		r.Monitor = f.Monitor
		if f.Inodes != nil {
			r.Inodes = f.Inodes
		}
	})
	mon.Close() // nothing is written on this connection that could be lost
}

// replaceMonitor gives an init whose monitor was killed a new one. It fails
// with [procid.ErrGone] if init is gone too.
func (m *Manager) replaceMonitor(ctx context.Context, b *box, mb *memb, dir string) (Monitor, error) {
	r := mb.rec.Load()
	m.node.Orphaned(r, dir)
	var spec specs.Spec
	if err := statefile.Read(m.root, mb.dir()+"/"+specFile, &spec); err != nil {
		return nil, err
	}
	crash.Point("monitor replace before")
	mon, err := m.node.ReplaceMonitor(ctx, b.rec.Load(), r, &spec, dir)
	if err != nil {
		return nil, err
	}
	crash.Point("monitor replace after")
	m.o.Observer.MonitorReplaced()
	m.o.Log.Warn("Monitor was killed and replaced", "sandbox", r.Sandbox, "member", r.ID, "pid", mon.Facts().Monitor.PID)
	return mon, nil
}

// finishLost records the exit of an init that has gone with its monitor. The
// node may have learned the status as init's new parent, or may do so in a
// moment; else it is unknown. Preconditions: mb.op is held.
func (m *Manager) finishLost(ctx context.Context, b *box, mb *memb, dir string) error {
	deadline := time.Now().Add(m.o.orphanWait)
	for {
		st, err := m.node.MonitorStatus(mb.rec.Load(), dir)
		switch {
		case err == nil && st.Exit != nil:
			m.finish(ctx, b, mb, st)
			return nil
		case time.Now().Before(deadline):
		case err != nil:
			return err // the exit record may be there and unreadable just now
		default:
			m.finish(ctx, b, mb, MonitorStatus{Exit: &Exit{Code: -1, Reason: "Unknown: monitor and init were killed while nobody else could learn the exit status"}})
			return nil
		}
		if !sleep(ctx, m.o.retryMin) {
			return ctx.Err()
		}
	}
}

// finish records the exit of init, which st has. Preconditions: mb.op is held.
func (m *Manager) finish(ctx context.Context, b *box, mb *memb, st MonitorStatus) {
	e := *st.Exit
	r := mb.rec.Load()
	crash.Point("exit kill before")
	// In a pid namespace that is shared, init's children outlive it.
	if err := m.node.KillMemberCgroup(context.WithoutCancel(ctx), r); err != nil {
		m.o.Log.Warn("Processes of an exited member not killed", "sandbox", r.Sandbox, "member", r.ID, "err", err)
	}
	crash.Point("exit record before")
	held := st.Custody && m.o.alive(r.Monitor)
	m.noteMember(mb, func(r *MemberRecord) {
		r.State, r.Exit, r.StartError = MemberExited, &e, st.StartErr
		if held {
			r.HeldSince = m.now()
		}
	})
	crash.Point("exit record after")
	m.settlePoststart(subject{b, mb})
	mb.setMonitor(nil)
	mb.setOver()
	m.custodyChanged()
	m.o.Observer.Exited(mb.rec.Load(), m.memberPath(mb))
	m.o.Log.Info("Member exited", "sandbox", r.Sandbox, "member", r.ID, "name", r.Config.Name, "code", e.Code, "reason", e.Reason)
}

// watchPause sees to it that b's pause is replaced should it die. It takes no
// goroutine until then. Preconditions: b.op is held.
func (m *Manager) watchPause(b *box) error {
	return m.node.WatchPause(b.rec.Load(), func() {
		if !m.begin() {
			return
		}
		defer m.wg.Done()
		if err := b.op.acquire(b.ctx); err != nil {
			return
		}
		defer b.op.release()
		if b.gone || !b.rec.Load().State.anchored() {
			return
		}
		m.reanchor(b.ctx, b)
	})
}

// begin adds a goroutine to those that Close waits for, and reports whether it
// may go on: after Close it may not.
func (m *Manager) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return false
	}
	m.wg.Add(1)
	return true
}

// anchored reports whether a sandbox in state s is meant to have a pause.
func (s State) anchored() bool { return s == Ready || s == NotReady || s == Stopped }

// reanchor replaces a pause that has died, or records that it could not be.
// Preconditions: b.op is held.
func (m *Manager) reanchor(ctx context.Context, b *box) {
	r := b.rec.Load()
	if r.Holds(namespace.PID) {
		m.lost(b, "pause was killed, and the pid namespace that it held died with it")
		return
	}
	crash.Point("reanchor before")
	facts, err := m.node.ReanchorPause(ctx, r, b.records(""))
	if err != nil {
		m.lost(b, fmt.Sprintf("pause was killed and could not be replaced: %v", err))
		return
	}
	crash.Point("reanchor after")
	m.note(b, func(r *Record) {
		r.Pause, r.Inodes, r.Reason = facts.Pause, facts.Inodes, ""
		if r.State == NotReady {
			r.State = Ready
		}
	})
	crash.Point("reanchor record after")
	if err := m.watchPause(b); err != nil {
		m.lost(b, fmt.Sprintf("pause cannot be watched: %v", err))
		return
	}
	m.o.Observer.Reanchored(nil)
	m.o.Log.Warn("Pause was killed and replaced", "sandbox", r.ID, "pid", facts.Pause.PID)
}

// lost records that a sandbox is without a pause. Preconditions: b.op is held.
func (m *Manager) lost(b *box, why string) {
	m.note(b, func(r *Record) {
		r.Reason = why
		if r.State == Ready {
			r.State = NotReady
		}
	})
	m.o.Observer.Reanchored(errors.New(why))
	m.o.Log.Warn("Sandbox is not ready", "sandbox", b.id(), "reason", why)
}

// sleep waits for d and reports whether ctx outlived it.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
