package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// outputsFile is beside a sandbox's or member's record. What hooks have printed
// is much, and records are written often.
const outputsFile = "hooks.json"

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
// In a record there is one for each hook, and a State of "" stands for one that has
// not been run.
type HookRun struct {
	Stage     request.Stage `json:"stage"`
	Path      string        `json:"path"`
	State     HookState     `json:"state"`
	Attempt   int           `json:"attempt"`  // from 1; attempts that were cut off count
	Failures  int           `json:"failures"` // of these attempts
	StartedAt time.Time     `json:"startedAt"`
	Duration  time.Duration `json:"duration"`         // nanoseconds; 0 while it runs
	Code      int           `json:"code"`             // exit code, or 128+signal; -1 if it could not be run or did not end in time
	Output    string        `json:"output,omitempty"` // the end of what it wrote to stdout and stderr; not in records and lists
	Truncated bool          `json:"truncated,omitempty"`
	Error     string        `json:"error,omitempty"`
}

// hookOutputs is what is on disk of what hooks have printed.
type hookOutputs struct {
	Version int          `json:"version"`
	Outputs []hookOutput `json:"outputs"` // by the hook's index
}

// hookOutput is what one attempt has printed.
type hookOutput struct {
	Attempt int    `json:"attempt"`
	Text    string `json:"text"`
}

// HookCall is one attempt to run a hook.
type HookCall struct {
	Hook    request.Hook
	Index   int // of the hook among those of its sandbox or member
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
	runs := s.b.rec.Load().HookRuns
	if s.mb != nil {
		runs = s.mb.rec.Load().HookRuns
	}
	full := make([]HookRun, len(s.hooks()))
	copy(full, runs)
	return full
}

// shownRuns are those of a record that have been run.
func shownRuns(runs []HookRun) []HookRun {
	return slices.DeleteFunc(slices.Clone(runs), func(r HookRun) bool { return r.State == "" })
}

// withOutputs are shownRuns with what is in dir of their output.
func withOutputs(runs []HookRun, dir string) []HookRun {
	if len(runs) == 0 {
		return nil
	}
	runs = slices.Clone(runs)
	if root, err := os.OpenRoot(dir); err == nil {
		defer root.Close()
		for i, o := range readOutputs(root, ".", len(runs)) {
			if runs[i].Attempt == o.Attempt {
				runs[i].Output = o.Text
			}
		}
	}
	return shownRuns(runs)
}

// readOutputs reads what n hooks have printed. What cannot be read is not there.
func readOutputs(root *os.Root, dir string, n int) []hookOutput {
	var f hookOutputs
	out := make([]hookOutput, n)
	if statefile.Read(root, dir+"/"+outputsFile, &f) == nil && f.Version == recordVersion {
		copy(out, f.Outputs)
	}
	return out
}

// noteRun makes run what is on record of hook i. done says that an attempt is over,
// which is a fact, and told of.
func (m *Manager) noteRun(s subject, i int, run HookRun, done bool) error {
	runs := s.runs()
	runs[i] = run
	return m.noteRuns(s, runs, func(t *Telling) {
		if !done {
			return
		}
		attrs := map[string]string{
			"stage": string(run.Stage), "hook": run.Path, "state": string(run.State), "attempt": strconv.Itoa(run.Attempt),
			"code": strconv.Itoa(run.Code), "duration": run.Duration.String(),
		}
		t.Tell(journal.Hook, run.Error, attrs)
	}, done)
}

// noteRuns puts runs on record, with what tell makes of it.
func (m *Manager) noteRuns(s subject, runs []HookRun, tell func(*Telling), fact bool) error {
	if s.mb != nil {
		return m.changeMember(s.mb, fact, func(r *MemberRecord) { r.HookRuns = runs; tell(&r.Telling) })
	}
	return m.change(s.b, fact, func(r *Record) { r.HookRuns = runs; tell(&r.Telling) })
}

// keepOutput keeps what an attempt has printed, until the next one.
func (m *Manager) keepOutput(s subject, i, attempt int, text string) {
	outputs := readOutputs(m.root, s.dir(), len(s.hooks()))
	if text == "" && outputs[i].Text == "" {
		return
	}
	outputs[i] = hookOutput{attempt, text}
	if err := statefile.Write(m.root, s.dir()+"/"+outputsFile, &hookOutputs{recordVersion, outputs}); err != nil {
		m.o.Log.Warn("Output of a hook not kept", "path", s.dir(), "err", err)
	}
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
	return m.noteRuns(s, runs, func(*Telling) {}, false)
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

// hookCutOffs is how many attempts of a hook may end with the daemon. A hook
// that ends it, by mistake, must not do so at every start.
const hookCutOffs = 10

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
		case HookRunning:
			if n := run.Attempt - run.Failures; n >= hookCutOffs {
				run.State, run.Code = HookFailed, -1
				run.Error = fmt.Sprintf("the daemon ended %d times while it ran", n)
				if err := m.noteRun(s, i, run, true); err != nil {
					return err
				}
				m.hookDone(s, run)
				continue
			}
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
	if err := m.noteRun(s, i, run, false); err != nil {
		return run, err
	}
	call := &HookCall{Hook: h, Index: i, Attempt: run.Attempt, Sandbox: s.b.rec.Load(), Dir: m.path + "/" + s.dir(), Init: init}
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
	text := strings.ToValidUTF8(string(out.Output), "\uFFFD")
	run.Duration, run.Code, run.Truncated = out.Took, out.Code, out.Truncated
	run.State = HookSucceeded
	if out.Err != nil {
		run.Error = failure(out.Err.Error(), text)
		run.Failures++
		run.State = HookFailed
		if run.Failures <= h.Retries {
			run.State = HookRetrying
		}
	}
	m.o.Observer.Hook(string(h.Stage), out.Took, out.Err)
	m.keepOutput(s, i, run.Attempt, text)
	if err := m.noteRun(s, i, run, true); err != nil {
		// It has run all the same; the next daemon takes it for one that was cut off.
		m.o.Log.Warn("Hook result not written", "path", s.dir(), "err", err)
	}
	crash.Point("hook " + string(h.Stage) + " result after")
	m.hookDone(s, run)
	return run, nil
}

// endCutOff ends what an earlier daemon's hooks are still doing, before anything is
// done that they should not see: a creation that was cut off is undone, and its
// hooks are not run again.
func (m *Manager) endCutOff(ctx context.Context, s subject) {
	hooks := s.hooks()
	for i, run := range s.runs() {
		if run.State != HookRunning {
			continue
		}
		call := &HookCall{Hook: hooks[i], Index: i, Attempt: run.Attempt, Sandbox: s.b.rec.Load()}
		if s.mb != nil {
			call.Member = s.mb.rec.Load()
		}
		if err := m.node.EndHook(ctx, call); err != nil {
			m.o.Log.Warn("Hook that was cut off not ended", "path", s.dir(), "stage", run.Stage, "hook", run.Path, "err", err)
		}
	}
}

// settlePoststart records of a member that has exited that a poststart hook of it
// that was cut off has failed: nobody runs it again. Preconditions: mb.op is held.
func (m *Manager) settlePoststart(s subject) {
	for i, run := range s.runs() {
		if run.Stage != request.Poststart || run.State != HookRunning && run.State != HookRetrying {
			continue
		}
		run.State, run.Code, run.Error = HookFailed, -1, "the member had exited"
		if err := m.noteRun(s, i, run, true); err != nil {
			m.o.Log.Warn("Hook result not written", "path", s.dir(), "err", err)
		}
		m.hookDone(s, run)
	}
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

// hookError makes an error of a hook that failed.
func hookError(run HookRun) error {
	return &HookError{fmt.Errorf("%s hook %s: %s", run.Stage, quotePath(run.Path), run.Error)}
}

// failure is why a hook failed, with the last line that it wrote.
func failure(why, output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		why += ": " + quoteLine(last)
	}
	return why
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
