package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// hooksFile is beside a sandbox's or member's record. What hooks have printed
// is much, and records are written often.
const hooksFile = "hooks.json"

// HookState says how far a hook has come.
type HookState string

// The states of a hook.
const (
	HookRunning   HookState = "running" // or it was cut off, and is about to be run again
	HookSucceeded HookState = "succeeded"
	HookFailed    HookState = "failed" // for good, retries included
	HookRetrying  HookState = "retrying"
)

// HookRun is what became of one hook of a sandbox or member: its latest attempt.
type HookRun struct {
	Stage     request.Stage `json:"stage"`
	Path      string        `json:"path"`
	State     HookState     `json:"state"`
	Attempt   int           `json:"attempt"`  // from 1; attempts that were cut off count
	Failures  int           `json:"failures"` // of these attempts
	StartedAt time.Time     `json:"startedAt"`
	Duration  time.Duration `json:"duration"` // nanoseconds; 0 while it runs
	Code      int           `json:"code"`     // exit code, or 128+signal; -1 if it could not be run or did not end in time
	Output    string        `json:"output"`   // the end of what it wrote to stdout and stderr
	Truncated bool          `json:"truncated,omitempty"`
	Error     string        `json:"error,omitempty"`
}

// hookFile is what is on disk.
type hookFile struct {
	Version int       `json:"version"`
	Runs    []HookRun `json:"runs"` // by the hook's index; a State of "" stands for one that has not been run
}

// HookCall is one attempt to run a hook.
type HookCall struct {
	Hook    request.Hook
	Attempt int
	Sandbox *Record
	Member  *MemberRecord // nil if the hook is the sandbox's
	Dir     string        // the member's directory, or the sandbox's
	// Init is the member's first process; while the member is being made, the
	// record does not know it yet.
	Init procid.ID
}

// HookOutcome is how that ended.
type HookOutcome struct {
	Code      int // as in [HookRun]
	Output    []byte
	Truncated bool
	Took      time.Duration
	Err       error // nil if it exited with 0
}

// subject is whose hooks are run: a sandbox, or one of its members. Its op lock
// is held.
type subject struct {
	b  *box
	mb *memb // nil: the sandbox
}

func (s subject) hooks() []request.Hook {
	if s.mb != nil {
		return s.mb.rec.Load().Hooks
	}
	return s.b.rec.Load().Hooks
}

func (s subject) dir() string {
	if s.mb != nil {
		return s.mb.dir()
	}
	return s.b.dir()
}

// runs returns what is known of the hooks, one for each; it is the caller's.
func (s subject) runs() []HookRun {
	p := s.b.hooks.Load()
	if s.mb != nil {
		p = s.mb.hooks.Load()
	}
	var runs []HookRun
	if p != nil {
		runs = slices.Clone(*p)
	}
	if n := len(s.hooks()); len(runs) != n {
		runs = append(runs, make([]HookRun, max(0, n-len(runs)))...)[:n]
	}
	return runs
}

func (s subject) store(runs []HookRun) {
	if s.mb != nil {
		s.mb.hooks.Store(&runs)
	} else {
		s.b.hooks.Store(&runs)
	}
}

// hookRuns drops those that have not been run from what is shown.
func hookRuns(runs []HookRun) []HookRun {
	return slices.DeleteFunc(slices.Clone(runs), func(r HookRun) bool { return r.State == "" })
}

// readHooks reads what an earlier daemon has noted in dir. What cannot be read is
// as if it had not been run.
func readHooks(root *os.Root, dir string) ([]HookRun, error) {
	var f hookFile
	err := statefile.Read(root, dir+"/"+hooksFile, &f)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && f.Version != recordVersion {
		err = fmt.Errorf("%w %d", errVersion, f.Version)
	}
	return f.Runs, err
}

// loadHooks is readHooks at the start of a daemon.
func (m *Manager) loadHooks(s subject) {
	m.removeTemp(s.dir() + "/" + hooksFile)
	if len(s.hooks()) == 0 {
		return
	}
	runs, err := readHooks(m.root, s.dir())
	if err != nil {
		m.o.Log.Warn("Hook results cannot be read", "path", s.dir(), "err", err)
	}
	s.store(runs)
}

// noteHook records how far a hook has come.
func (m *Manager) noteHook(s subject, i int, run HookRun) error {
	runs := s.runs()
	runs[i] = run
	err := statefile.Write(m.root, s.dir()+"/"+hooksFile, &hookFile{recordVersion, runs})
	if err != nil {
		return fmt.Errorf("write hook results: %w", err)
	}
	s.store(runs)
	return nil
}

// stops reports whether the failure of one hook of the stage is the end of the
// operation, so that those after it are not run.
func stops(stage request.Stage) bool {
	switch stage {
	case request.Prestop, request.Poststop, request.Predelete, request.OCIPoststop:
		return false
	}
	return true
}

// pending reports whether s has hooks of the stage that are still to be run.
func (s subject) pending(stage request.Stage) bool {
	runs := s.runs()
	for i, h := range s.hooks() {
		if h.Stage == stage && runs[i].State != HookSucceeded && runs[i].State != HookFailed {
			return true
		}
	}
	return false
}

// begun reports whether a hook of one of the stages has ever been run for s.
func (s subject) begun(stages ...request.Stage) bool {
	return slices.ContainsFunc(s.runs(), func(r HookRun) bool { return r.State != "" && slices.Contains(stages, r.Stage) })
}

// anew makes the hooks of the stages be run again: their operation is.
func (m *Manager) anew(s subject, stages ...request.Stage) error {
	if !s.begun(stages...) {
		return nil
	}
	runs := s.runs()
	for i, r := range runs {
		if slices.Contains(stages, r.Stage) {
			runs[i] = HookRun{}
		}
	}
	if err := statefile.Write(m.root, s.dir()+"/"+hooksFile, &hookFile{recordVersion, runs}); err != nil {
		return fmt.Errorf("write hook results: %w", err)
	}
	s.store(runs)
	return nil
}

// runHooks runs the hooks of a stage one after the other. One that has succeeded
// is not run again; one that was cut off is. init is as in [HookCall].
//
// If ctx ends, so does the hook that runs, nothing is recorded of that, and the
// error is ctx's. Else the error is that of the first hook that failed, in
// stages that end with it, or of all that did.
func (m *Manager) runHooks(ctx context.Context, s subject, stage request.Stage, init procid.ID) error {
	var errs []error
	for i, h := range s.hooks() {
		if h.Stage != stage {
			continue
		}
		err := m.runHook(ctx, s, i, h, init)
		if ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if err != nil {
			errs = append(errs, err)
			if stops(stage) {
				break
			}
		}
	}
	return errors.Join(errs...)
}

// runHook runs one hook, again if it is to be retried.
func (m *Manager) runHook(ctx context.Context, s subject, i int, h request.Hook, init procid.ID) error {
	run := s.runs()[i]
	delay := m.o.hookRetryMin
	for {
		switch run.State {
		case HookSucceeded:
			return nil
		case HookFailed:
			return hookError(run)
		case HookRetrying:
			if !sleep(ctx, delay) {
				return ctx.Err()
			}
			delay = min(2*delay, m.o.retryMax)
		}
		var err error
		if run, err = m.attempt(ctx, s, i, h, run, init); err != nil {
			return err
		}
	}
}

// attempt runs a hook once and returns what is on record then.
func (m *Manager) attempt(ctx context.Context, s subject, i int, h request.Hook, run HookRun, init procid.ID) (HookRun, error) {
	if err := ctx.Err(); err != nil {
		return run, err
	}
	run = HookRun{
		Stage: h.Stage, Path: h.Path, State: HookRunning, Attempt: run.Attempt + 1, Failures: run.Failures, StartedAt: m.now(),
	}
	op := "hook " + string(h.Stage)
	crash.Point(op + " record before")
	if err := m.noteHook(s, i, run); err != nil {
		return run, err
	}
	call := &HookCall{Hook: h, Attempt: run.Attempt, Sandbox: s.b.rec.Load(), Dir: m.path + "/" + s.dir(), Init: init}
	if s.mb != nil {
		if call.Member = s.mb.rec.Load(); init.IsZero() {
			call.Init = call.Member.Init
		}
	}
	var out HookOutcome
	m.run("hook", string(h.Stage), func() error {
		out = m.node.RunHook(ctx, call)
		return out.Err
	})
	if ctx.Err() != nil {
		return run, ctx.Err()
	}
	crash.Point(op + " result before")
	run.Duration, run.Code, run.Output, run.Truncated = out.Took, out.Code, strings.ToValidUTF8(string(out.Output), "\uFFFD"), out.Truncated
	run.State = HookSucceeded
	if out.Err != nil {
		run.Error = out.Err.Error()
		run.Failures++
		run.State = HookFailed
		if run.Failures <= h.Retries {
			run.State = HookRetrying
		}
	}
	m.o.Observer.Hook(string(h.Stage), out.Took, out.Err)
	if err := m.noteHook(s, i, run); err != nil {
		// It has run, whether or not that can be written down; the next daemon
		// takes it for one that was cut off.
		runs := s.runs()
		runs[i] = run
		s.store(runs)
		m.o.Log.Warn("Hook result not written", "path", s.dir(), "err", err)
	}
	crash.Point(op + " result after")
	m.hookDone(s, run)
	return run, nil
}

// hookDone tells of a hook that has ended.
func (m *Manager) hookDone(s subject, run HookRun) {
	attrs := []any{"sandbox", s.b.id(), "stage", run.Stage, "hook", run.Path, "attempt", run.Attempt, "took", run.Duration}
	if s.mb != nil {
		attrs = append(attrs, "member", s.mb.id())
	}
	if run.Error != "" {
		m.o.Log.Warn("Hook failed", append(attrs, "err", hookError(run), "state", run.State)...)
		return
	}
	m.o.Log.Info("Hook run", attrs...)
}

// hookError makes an error of a hook that failed, with the last line that it wrote.
func hookError(run HookRun) error {
	text := fmt.Sprintf("%s hook %s: %s", run.Stage, quotePath(run.Path), run.Error)
	lines := strings.Split(strings.TrimSpace(run.Output), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		text += ": " + quoteLine(last)
	}
	return &kindError{text, ErrState}
}

// quotePath quotes a path only if it needs it.
func quotePath(path string) string {
	if printable(path) && len(path) <= maxRef {
		return path
	}
	return quote(path)
}

// maxLine is how much of a hook's last line is in an error.
const maxLine = 300

// quoteLine makes foreign text fit into an error of one line.
func quoteLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
	if r := []rune(s); len(r) > maxLine {
		return string(r[:maxLine]) + "…"
	}
	return s
}

// patient returns a context that a client's patience does not end, but the end
// of the Manager does. The caller calls the function.
func (m *Manager) patient(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(m.ctx, func() { cancel(errClosed) })
	return ctx, func() { stop(); cancel(nil) }
}
