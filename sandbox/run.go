package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/signum"
	"github.com/sandboxd/sandboxd/internal/undo"
)

// Start lets a created member run its command and returns once the execve has
// succeeded. If it does not, the error wraps a [*StartError] and the member has
// exited. Starting one that runs already does nothing.
func (m *Manager) Start(ctx context.Context, ref string) (_ MemberInfo, err error) {
	defer m.operation("start", &err)()
	b, mb, err := m.lockMember(ctx, ref)
	if err != nil {
		return MemberInfo{}, opError("start", ref, err, nil)
	}
	defer mb.op.release()
	if err := m.startMember(ctx, b, mb); err != nil {
		return MemberInfo{}, err
	}
	return m.memberInfo(b, mb), nil
}

// startMember is Start. Preconditions: mb.op is held.
func (m *Manager) startMember(ctx context.Context, b *box, mb *memb) error {
	var err error
	switch s := mb.rec.Load().State; s {
	case MemberRunning:
		return nil
	case MemberCreated, MemberStarting:
		b.mu.Lock()
		err = b.open()
		b.mu.Unlock()
		if err == nil && s == MemberCreated {
			// Those of a start that failed; those of one that was cut off go on.
			err = m.anew(subject{b, mb}, request.Prestart, request.StartContainer)
		}
	default:
		err = statef("the member is %s", s)
	}
	if err == nil {
		err = m.start(ctx, b, mb)
	}
	if err != nil {
		return opError("start", b.name()+"/"+mb.name(), err, nil)
	}
	m.o.Log.Info("Member started", "sandbox", b.id(), "member", mb.id(), "name", mb.name())
	return nil
}

// start tells init to go on. Preconditions: mb.op is held.
func (m *Manager) start(ctx context.Context, b *box, mb *memb) error {
	if mb.rec.Load().State != MemberStarting {
		err := m.run("start", "record", func() error {
			return m.writeMember(mb, func(r *MemberRecord) { r.State = MemberStarting })
		})
		if err != nil {
			return err
		}
	}
	for _, stage := range []request.Stage{request.Prestart, request.StartContainer} {
		err := m.runHooks(ctx, subject{b, mb}, stage, procid.ID{})
		if err == nil {
			continue
		}
		if stage == request.StartContainer && ctx.Err() == nil {
			m.endMember(context.WithoutCancel(ctx), b, mb) // as runtime-spec demands (runtime.md, Lifecycle)
		}
		m.noteMember(mb, func(r *MemberRecord) {
			if r.State.over() {
				r.StartError = err.Error()
			} else {
				r.State = MemberCreated
			}
		})
		return err
	}
	// From here on the client's patience does not matter: init may have been
	// told already, and the outcome has to be learned.
	ctx = context.WithoutCancel(ctx)
	startCtx, cancel := context.WithTimeout(ctx, undo.StepTimeout)
	defer cancel()
	err := m.run("start", "execve", func() error {
		mon := mb.monitor()
		if mon == nil {
			return errors.New("the monitor cannot be reached")
		}
		return mon.Start(startCtx)
	})
	var se *StartError
	switch {
	case err == nil:
	case errors.As(err, &se):
		m.awaitExit(ctx, b, mb, time.After(m.o.killTimeout))
		return err
	default:
		// The monitor, or the connection to it, has failed. What became of
		// init is in the status file; one that does not run will not later.
		st, serr := m.node.MonitorStatus(mb.rec.Load(), m.memberPath(mb))
		if serr != nil || st.Phase != PhaseRunning {
			m.endMember(ctx, b, mb)
			return err
		}
	}
	m.run("start", "running", func() error {
		m.noteMember(mb, func(r *MemberRecord) { r.State = MemberRunning })
		return nil
	})
	return m.poststart(ctx, b, mb)
}

// poststart runs the poststart hooks of a member that runs, and stops it if one
// fails. Preconditions: mb.op is held.
func (m *Manager) poststart(ctx context.Context, b *box, mb *memb) error {
	s := subject{b, mb}
	if !s.pending(request.Poststart) || mb.rec.Load().State != MemberRunning {
		return nil
	}
	ctx, cancel := m.patient(ctx)
	defer cancel()
	err := m.runHooks(ctx, s, request.Poststart, procid.ID{})
	if err == nil || ctx.Err() != nil {
		return err
	}
	if serr := m.endGently(ctx, b, mb, DefaultStopTimeout); serr != nil {
		err = errors.Join(err, fmt.Errorf("and the member could not be stopped: %w", serr))
	}
	return err
}

// StopMember sends a member's stop signal to its init, and kills everything in
// the member's cgroup if init has not exited when timeout is over. It returns
// when the exit is recorded. A member that was never started is killed at once.
// If ctx ends first, StopMember returns, and what was signalled stays so.
func (m *Manager) StopMember(ctx context.Context, ref string, timeout time.Duration) (err error) {
	defer m.operation("stop_member", &err)()
	if _, mb, err := m.member(ref); err == nil && mb.rec.Load().State.over() {
		return nil // not to wait for what follows its exit
	}
	b, mb, err := m.lockMember(ctx, ref)
	if err != nil {
		return opError("stop", ref, err, nil)
	}
	defer mb.op.release()
	return opError("stop", ref, m.stopMember(ctx, b, mb, timeout), nil)
}

// over reports whether a member in state s has exited and is not being removed.
func (s MemberState) over() bool { return s == MemberExited || s == MemberCollected }

// stopMember is StopMember. Preconditions: mb.op is held.
func (m *Manager) stopMember(ctx context.Context, b *box, mb *memb, timeout time.Duration) error {
	r := mb.rec.Load()
	switch {
	case r.State.over():
		return nil
	case !r.State.alive():
		return statef("the member is %s; remove it", r.State)
	}
	if r.State == MemberRunning {
		m.runHooks(ctx, subject{b, mb}, request.Prestop, procid.ID{}) // failures are in the results
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return m.endGently(ctx, b, mb, timeout)
}

// endGently sends a member that is alive its stop signal, and kills it when
// timeout is over. Preconditions: mb.op is held.
func (m *Manager) endGently(ctx context.Context, b *box, mb *memb, timeout time.Duration) error {
	r := mb.rec.Load()
	if r.State == MemberRunning && timeout > 0 {
		sig, err := signum.Parse(r.Config.StopSignal)
		if err != nil {
			return err
		}
		var exited bool
		err = m.run("stop", "signal", func() error {
			// One that cannot be signalled is killed without more ado.
			if err := m.node.SignalInit(r, sig); err != nil {
				m.o.Log.Debug("Stop signal not sent", "sandbox", r.Sandbox, "member", r.ID, "err", err)
				return nil
			}
			var err error
			exited, err = m.awaitExit(ctx, b, mb, time.After(timeout))
			return err
		})
		if exited || err != nil {
			return err
		}
	}
	ctx = context.WithoutCancel(ctx)
	return m.run("stop", "kill", func() error {
		killCtx, cancel := context.WithTimeout(ctx, undo.StepTimeout)
		defer cancel()
		if err := m.node.KillMemberCgroup(killCtx, mb.rec.Load()); err != nil {
			return err
		}
		if exited, err := m.awaitExit(ctx, b, mb, time.After(m.o.killTimeout)); err != nil || !exited {
			return errors.Join(err, errors.New("the member was killed, but its exit has not been recorded"))
		}
		return nil
	})
}

// Stop stops all members of a sandbox at the same time, and then the sandbox:
// no member can be added any more. Its namespaces, and the custody of its
// members, are held until Remove.
func (m *Manager) Stop(ctx context.Context, ref string, timeout time.Duration) (err error) {
	defer m.operation("stop", &err)()
	b, err := m.lockBox(ctx, ref)
	if err != nil {
		return opError("stop", ref, err, nil)
	}
	defer b.op.release()
	switch s := b.rec.Load().State; s {
	case Stopped:
		return nil
	case Ready, NotReady:
	default:
		return &OpError{Op: "stop", Ref: ref, Err: statef("the sandbox is %s; remove it", s)}
	}
	if err := b.close(true); err != nil {
		return &OpError{Op: "stop", Ref: ref, Err: err}
	}
	defer b.reopen()
	m.runHooks(ctx, subject{b: b}, request.Prestop, procid.ID{}) // failures are in the results
	if err := ctx.Err(); err != nil {
		return opError("stop", ref, err, nil)
	}
	err = m.run("stop", "members", func() error { return m.stopMembers(ctx, b, timeout) })
	if err == nil {
		err = m.run("stop", "record", func() error {
			return m.write(b, func(r *Record) { r.State = Stopped })
		})
	}
	if err != nil {
		return opError("stop", ref, err, nil)
	}
	m.o.Log.Info("Sandbox stopped", "sandbox", b.id(), "name", b.name())
	ctx, cancel := m.patient(ctx)
	defer cancel()
	return opError("stop", ref, m.stopped(ctx, b), nil)
}

func (m *Manager) stopMembers(ctx context.Context, b *box, timeout time.Duration) error {
	members := b.list()
	errs := make([]error, len(members))
	var wg sync.WaitGroup
	for i, mb := range members {
		wg.Go(func() {
			err := mb.op.acquire(ctx)
			if err == nil {
				// One that is unclean has nothing that runs, or nothing that
				// a stop could do about it.
				if !mb.gone && mb.rec.Load().State.alive() {
					err = m.stopMember(ctx, b, mb, timeout)
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
