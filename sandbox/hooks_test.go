package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/request"
)

// fakeHook is what became of one hook of one sandbox or member.
type fakeHook struct {
	attempts  []int // as it was told
	succeeded int
	told      int    // the daemon that was told so
	recorded  bool   // that it is on record, as a daemon found it
	at        string // what it saw of the world when it last succeeded
}

// EndHook ends nothing: a fake hook takes no time.
func (n *fakeNode) EndHook(ctx context.Context, c *HookCall) error {
	return n.call(ctx, "EndHook", func() error { return nil })
}

// RunHook runs a hook that fails if the test says so, by the stage's name.
func (n *fakeNode) RunHook(ctx context.Context, c *HookCall) HookOutcome {
	k := c.Sandbox.ID
	if c.Member != nil {
		k = key(c.Member)
	}
	err := n.call(ctx, "RunHook", func() error {
		h := n.hooks[k+" "+c.Hook.Path]
		if h == nil {
			h = &fakeHook{}
			n.hooks[k+" "+c.Hook.Path] = h
		}
		again := c.Hook.Stage == request.Prestart || c.Hook.Stage == request.StartContainer // by another start
		switch last := len(h.attempts) - 1; {
		case again:
		case h.told == n.daemon, h.recorded:
			n.wrong = fmt.Sprintf("hook %s of %s was run again after it had succeeded", c.Hook.Path, k)
		case last >= 0 && h.attempts[last] >= c.Attempt:
			n.wrong = fmt.Sprintf("attempt %d of hook %s of %s comes after %v", c.Attempt, c.Hook.Path, k, h.attempts)
		}
		h.attempts = append(h.attempts, c.Attempt)
		if n.faults["hook "+string(c.Hook.Stage)] != works {
			return errInjected
		}
		h.succeeded++
		mon := n.monitors[k]
		h.at = fmt.Sprintf("pause %t cgroup %t", n.procs[n.pauses[c.Sandbox.ID]], n.cgroups[k])
		if c.Member == nil {
			h.at += fmt.Sprintf(" networks %d", len(c.Sandbox.Networks))
		}
		if c.Member != nil {
			h.at += fmt.Sprintf(" monitor %t init %t started %t data %t", mon != nil && n.procs[mon.proc], mon != nil && n.procs[mon.init], n.started[k], n.data[k])
		}
		return nil
	})
	if errors.Is(err, errInjected) {
		// It could not be run, which is an attempt all the same.
		n.with(func() {
			if n.hooks[k+" "+c.Hook.Path] == nil {
				n.hooks[k+" "+c.Hook.Path] = &fakeHook{}
			}
		})
	}
	if err == nil {
		n.with(func() { n.hooks[k+" "+c.Hook.Path].told = n.daemon })
	}
	out := HookOutcome{Output: []byte("said\n"), Took: time.Millisecond, Err: err}
	if err != nil {
		out.Code = 1
	}
	return out
}

// begin tells of a new daemon, which finds what is in state.
func (n *fakeNode) begin(state string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.daemon++
	note := func(k string, runs []HookRun) {
		for _, r := range runs {
			if h := n.hooks[k+" "+r.Path]; h != nil && r.State == HookSucceeded {
				h.recorded = true
			}
		}
	}
	root, err := os.OpenRoot(state)
	if err != nil {
		return // none has been there
	}
	defer root.Close()
	for _, b := range sandboxes(root, "") {
		note(b.id(), b.rec.HookRuns)
		(&Dir{path: state}).readMembers(root, &b)
		for _, m := range b.members {
			note(key(m.rec), m.rec.HookRuns)
		}
	}
}

func (n *fakeNode) SandboxHooks(c *Config) ([]request.Hook, error) { return c.Hooks, nil }

func (n *fakeNode) MemberHooks(_ *Record, m *MemberRecord, _ *specs.Spec) ([]request.Hook, error) {
	n.with(func() { n.declared[key(m)] = m.Config })
	return m.Config.Hooks, nil
}

func (n *fakeNode) Collects(m *MemberRecord) bool { return n.collectsAll || len(m.Config.Collect) > 0 }

func (n *fakeNode) Collect(ctx context.Context, r *Record, m *MemberRecord, _ string) (string, error) {
	if n.onCollect != nil {
		n.onCollect()
	}
	if n.hangCollect {
		<-ctx.Done()
		n.collectCut = context.Cause(ctx)
		ctx = context.WithoutCancel(ctx) // what there is, is kept
	}
	return m.Config.Name + "-1", n.call(ctx, "Collect", func() error {
		n.collects[key(m)]++
		n.collectedHeld = n.procs[m.Monitor]
		n.collected[key(m)] = true
		return nil
	})
}

// allHooks has one hook for each stage; its path is the stage's name.
func allHooks(stages []request.Stage) []request.Hook {
	var hs []request.Hook
	for _, s := range stages {
		hs = append(hs, request.Hook{Stage: s, Path: "/" + string(s)})
	}
	return hs
}

// What each hook sees when it is run, and that each is run once.
func TestHooksOfALife(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	i := must[Info](t)(m.Create(ctx, Config{Name: "web", Network: request.NetworkCNI, Hooks: allHooks(request.SandboxStages())}))
	c := member("app")
	c.Hooks = allHooks(request.MemberStages())
	mi := must[MemberInfo](t)(m.Add(ctx, "web", c))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	check(t, m.StopMember(ctx, "web/app", time.Minute))
	soon(t, func() error {
		if mi := must[MemberInfo](t)(m.InspectMember("web/app")); mi.State != "Collected" || len(mi.Hooks) != len(c.Hooks)-2 {
			return fmt.Errorf("after the exit: %s, %d hooks", mi.State, len(mi.Hooks))
		}
		return nil
	})
	check(t, m.RemoveMember(ctx, "web/app", false))
	check(t, m.Stop(ctx, "web", time.Minute))
	if i := must[Info](t)(m.Inspect("web")); len(i.Hooks) != 3 || i.Hooks[0].Output != "said\n" {
		t.Errorf("hooks of a stopped sandbox: %+v", i.Hooks)
	}
	if l := m.List(); l[0].Hooks[0].Output != "" {
		t.Errorf("a list shows what hooks have printed: %+v", l[0].Hooks)
	}
	check(t, m.Remove(ctx, "web", false))
	check(t, n.empty())
	const made = "pause true cgroup true monitor true init true started false data true"
	k := i.ID + "/" + mi.ID
	for hook, want := range map[string]string{
		i.ID + " /postcreate": "pause true cgroup true networks 1",
		i.ID + " /prestop":    "pause true cgroup true networks 1",
		i.ID + " /poststop":   "pause true cgroup true networks 1",
		i.ID + " /predelete":  "pause true cgroup true networks 1",
		k + " /oci-prestart":  made, k + " /createRuntime": made, k + " /createContainer": made, k + " /postcreate": made,
		k + " /prestart": made, k + " /startContainer": made,
		k + " /poststart":    "pause true cgroup true monitor true init true started true data true",
		k + " /prestop":      "pause true cgroup true monitor true init true started true data true",
		k + " /poststop":     "pause true cgroup true monitor true init false started true data true",
		k + " /predelete":    "pause true cgroup true monitor true init false started true data true",
		k + " /oci-poststop": "pause true cgroup false monitor false init false started true data false",
	} {
		h := n.hooks[hook]
		if h == nil || h.succeeded != 1 || h.at != want || !slices.Equal(h.attempts, []int{1}) {
			t.Errorf("%s: %+v, want once with %q", hook, h, want)
		}
	}
	if len(n.hooks) != 15 {
		t.Errorf("%d hooks were run", len(n.hooks))
	}
}

// A hook during which daemons end is given up, so that it does not end them all.
func TestHookEndsDaemons(t *testing.T) {
	for cutOff, want := range map[int]HookState{hookCutOffs - 1: HookSucceeded, hookCutOffs: HookFailed} {
		n := newFakeNode()
		m := open(t, t.TempDir(), n)
		ctx := t.Context()
		must[Info](t)(m.Create(ctx, Config{Name: "web"}))
		c := member("app")
		c.Hooks = []request.Hook{{Stage: request.Poststop, Path: "/hook", Retries: 3}}
		must[MemberInfo](t)(m.Add(ctx, "web", c))
		must[MemberInfo](t)(m.Start(ctx, "web/app"))
		b, mb, err := m.member("web/app")
		check(t, err)
		check(t, m.noteRun(subject{b, mb}, 0, HookRun{Stage: request.Poststop, Path: "/hook", State: HookRunning, Attempt: cutOff}, false))
		check(t, m.StopMember(ctx, "web/app", time.Minute))
		soon(t, func() error {
			if mi := must[MemberInfo](t)(m.InspectMember("web/app")); mi.State != "Collected" || mi.Hooks[0].State != want {
				return fmt.Errorf("cut off %d times: %s, %+v", cutOff, mi.State, mi.Hooks)
			}
			return nil
		})
		if ran := len(n.hooks) > 0; ran != (want == HookSucceeded) {
			t.Errorf("cut off %d times, it was run again: %t", cutOff, ran)
		}
		check(t, m.Remove(ctx, "web", true))
		check(t, n.empty())
	}
}

// One that is run is gone if a hook fails before its command has run, and is there if it has.
func TestHookOfARunFails(t *testing.T) {
	for stage, kept := range map[request.Stage]bool{request.Prestart: false, request.StartContainer: false, request.Poststart: true} {
		n := newFakeNode()
		m := open(t, t.TempDir(), n)
		ctx := t.Context()
		n.faults["hook "+string(stage)] = fails
		must[Info](t)(m.Create(ctx, Config{Name: "web"}))
		c := member("app")
		c.Hooks = []request.Hook{{Stage: stage, Path: "/hook"}}
		if _, err := m.Run(ctx, "web", c); err == nil {
			t.Errorf("%s: it runs", stage)
		}
		i, err := m.InspectMember("web/app")
		if kept && (err != nil || i.State != MemberExited.String()) || !kept && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %s, %v", stage, i.State, err)
		}
	}
}

// A poststart hook that was cut off with the daemon has failed once the member has
// exited, whether that was found by the next daemon or was on record already.
func TestPoststartOfExited(t *testing.T) {
	for _, recorded := range []bool{false, true} {
		for _, state := range []HookState{HookRunning, HookRetrying} {
			n := newFakeNode()
			dir := t.TempDir()
			m := open(t, dir, n)
			ctx := t.Context()
			must[Info](t)(m.Create(ctx, Config{Name: "web"}))
			c := member("app")
			c.Hooks = []request.Hook{{Stage: request.Poststart, Path: "/hook", Retries: 3}}
			must[MemberInfo](t)(m.Add(ctx, "web", c))
			must[MemberInfo](t)(m.Start(ctx, "web/app"))
			b, mb, err := m.member("web/app")
			check(t, err)
			if recorded {
				check(t, m.StopMember(ctx, "web/app", time.Minute))
			}
			check(t, m.noteRun(subject{b, mb}, 0, HookRun{Stage: request.Poststart, Path: "/hook", State: state, Attempt: 1}, false))
			m.Close()
			if !recorded {
				n.with(func() { n.exitInit(key(mb.rec.Load()), Exit{Code: 3}) })
			}
			m = open(t, dir, n)
			soon(t, func() error {
				mi := must[MemberInfo](t)(m.InspectMember("web/app"))
				if mi.State != "Exited" || mi.Hooks[0].State != HookFailed || mi.Hooks[0].Error != "the member had exited" || mi.Hooks[0].Attempt != 1 {
					return fmt.Errorf("%s, recorded %t: %s, %+v", state, recorded, mi.State, mi.Hooks)
				}
				return nil
			})
			check(t, m.Remove(ctx, "web", true))
			check(t, n.empty())
		}
	}
}

// What it means that a hook of a stage fails.
func TestHookFails(t *testing.T) {
	for _, tt := range []struct {
		stage   request.Stage
		sandbox bool
		at      string // the operation that fails
		state   string // the member's, or the sandbox's, after it; "" if it is gone
	}{
		{request.Postcreate, true, "create", ""},
		{request.Prestop, true, "", "Stopped"},
		{request.Poststop, true, "", "Stopped"},
		{request.Predelete, true, "", "Stopped"},
		{request.OCIPrestart, false, "add", ""},
		{request.CreateRuntime, false, "add", ""},
		{request.CreateContainer, false, "add", ""},
		{request.Postcreate, false, "add", ""},
		{request.Prestart, false, "start", "Created"},
		{request.StartContainer, false, "start", "Exited"},
		{request.Poststart, false, "start", "Exited"},
		{request.Prestop, false, "", "Exited"},
		{request.Poststop, false, "", "Collected"},
		{request.Predelete, false, "", "Exited"},
		{request.OCIPoststop, false, "", "Exited"},
	} {
		t.Run(fmt.Sprintf("%s sandbox=%t", tt.stage, tt.sandbox), func(t *testing.T) {
			n := newFakeNode()
			m := open(t, t.TempDir(), n)
			ctx := t.Context()
			n.faults["hook "+string(tt.stage)] = fails
			h := request.Hook{Stage: tt.stage, Path: "/hook", Retries: 2}
			after := request.Hook{Stage: tt.stage, Path: "/after"}
			var c Config
			mc := member("app")
			if c.Name = "web"; tt.sandbox {
				c.Hooks = []request.Hook{h, after}
			} else {
				mc.Hooks = []request.Hook{h, after}
			}
			failed := ""
			do := func(op string, err error) {
				if err != nil && failed == "" {
					failed = op
					if op != tt.at || !errors.Is(err, ErrState) || !strings.Contains(err.Error(), string(tt.stage)+" hook /hook: injected: said") {
						t.Errorf("%s: %v", op, err)
					}
				}
			}
			_, err := m.Create(ctx, c)
			do("create", err)
			if failed == "" {
				_, err = m.Add(ctx, "web", mc)
				do("add", err)
			}
			if failed == "" {
				_, err = m.Start(ctx, "web/app")
				do("start", err)
			}
			if failed == "" {
				do("stop", m.StopMember(ctx, "web/app", time.Minute))
			}
			if failed == "" && tt.sandbox {
				do("stop", m.Stop(ctx, "web", time.Minute))
			}
			if failed != tt.at {
				t.Errorf("%q failed, want %q", failed, tt.at)
			}
			soon(t, func() error {
				state := ""
				if tt.sandbox {
					i, _ := m.Inspect("web")
					state = i.State
				} else {
					i, _ := m.InspectMember("web/app")
					state = i.State
					if tt.stage == request.StartContainer {
						if _, mb, err := m.member("web/app"); err != nil || mb.rec.Load().StartError == "" {
							t.Errorf("the record does not say why it never ran: %v", err)
						}
					}
				}
				if state != tt.state {
					return fmt.Errorf("state %q, want %q", state, tt.state)
				}
				return nil
			})
			if _, err := m.Inspect("web"); err == nil {
				check(t, m.Remove(ctx, "web", true))
			}
			check(t, n.empty())
			tried, next := 0, 0
			for k, h := range n.hooks {
				if strings.HasSuffix(k, "/hook") {
					tried = len(h.attempts)
				} else {
					next = len(h.attempts)
				}
			}
			if wantNext := 1; tried != 3 || next != map[bool]int{false: wantNext}[stops(tt.stage)] {
				t.Errorf("the hook was tried %d times, the one after it %d times", tried, next)
			}
		})
	}
}

// The daemon dies in any call that follows an exit, or before: the next one does
// what is left, and nothing that was done.
func TestExitIsFollowedUp(t *testing.T) {
	for call := 1; ; call++ {
		for _, late := range []bool{false, true} {
			n := newFakeNode()
			base := t.TempDir()
			m := open(t, base+"/0", n)
			ctx := t.Context()
			must[Info](t)(m.Create(ctx, Config{Name: "web"}))
			c := member("app")
			c.Hooks = allHooks(request.MemberStages())
			c.Collect = []request.Collect{{Path: "/x"}}
			mi := must[MemberInfo](t)(m.Add(ctx, "web", c))
			must[MemberInfo](t)(m.Start(ctx, "web/app"))
			k := mi.Sandbox + "/" + mi.ID
			n.with(func() {
				n.copy, n.countdown, n.crashLate = base+"/1", call, late
				n.exitInit(k, Exit{Known: true, Code: 3})
			})
			crashed := false
			soon(t, func() error {
				n.with(func() { crashed = n.crashed })
				if mi, err := m.InspectMember("web/app"); !crashed && (err != nil || mi.State != "Collected") {
					return fmt.Errorf("after the exit: %+v, %v", mi, err)
				}
				return nil
			})
			check(t, m.Close())
			if !crashed {
				if call < 4 {
					t.Fatalf("an exit is followed by %d calls", call-1)
				}
				return
			}
			n.with(func() { n.crashed, n.countdown = false, 0; clear(n.held); n.monitors[k].conns = nil })
			m = open(t, base+"/1", n)
			soon(t, func() error {
				if mi, err := m.InspectMember("web/app"); err != nil || mi.State != "Collected" || mi.Exit.Code != 3 {
					return fmt.Errorf("crash in call %d, late %t: %+v, %v", call, late, mi, err)
				}
				return nil
			})
			h := n.hooks[k+" /poststop"]
			if n.wrong != "" || h.succeeded < 1 || len(h.attempts) > 2 || !n.collected[k] || n.collects[k] > 2 {
				t.Errorf("crash in call %d, late %t: hook %+v, collected %d times; %s", call, late, h, n.collects[k], n.wrong)
			}
			check(t, m.Remove(ctx, "web", true))
			check(t, n.empty())
		}
	}
}
