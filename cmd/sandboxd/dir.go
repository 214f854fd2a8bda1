package main

import (
	"errors"
	"os"

	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// statusReader reads what monitors leave in the state directory; it is what a
// [sandbox.Dir] needs to work without the daemon.
type statusReader struct{}

// MonitorStatus implements [sandbox.StatusReader]. A member whose monitor has
// not begun yet has no status page; that is the zero status.
func (statusReader) MonitorStatus(_ *sandbox.MemberRecord, dir string) (sandbox.MonitorStatus, error) {
	s, err := member.ReadStatus(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return sandbox.MonitorStatus{}, err
	}
	e, err := member.ReadExit(dir)
	if err != nil {
		return sandbox.MonitorStatus{}, err
	}
	out := sandbox.MonitorStatus{
		Phase: sandbox.MonitorPhase(s.Phase), Init: s.Init, Exit: e, LogErrors: s.LogErrors, Custody: s.Custody,
	}
	if !s.StartedAt.IsZero() {
		out.StartedAt = s.StartedAt.UnixNano()
	}
	if s.ExecFailed {
		out.StartErr = s.FailErrno.Error()
	}
	return out, nil
}

// target is a member as the state directory shows it.
type target struct {
	sandbox  *sandbox.Record
	member   *sandbox.MemberRecord // nil if the reference names a sandbox
	dir      string                // the member's, under the state directory
	siblings []*sandbox.MemberRecord
}

// target finds what ref names.
func (a *app) target(ref string) (*target, error) {
	d, err := a.dir()
	if err != nil {
		return nil, err
	}
	t := new(target)
	t.sandbox, t.member, t.dir, t.siblings, err = d.Records(ref)
	if err != nil {
		return nil, err
	}
	return t, nil
}
