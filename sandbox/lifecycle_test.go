package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/request"
)

// methods are those of fakeNode that fail on demand.
var methods = []string{
	"MakeCgroup", "RemoveCgroup", "StartPause", "ReanchorPause", "AdoptPause", "WatchPause", "KillPause",
	"RemoveSandboxData", "MakeMembersCgroup", "MakeMemberCgroup", "LimitMember", "KillMemberCgroup", "RemoveMemberCgroup", "MakeMemberData",
	"RemoveMemberData", "StartMonitor", "AdoptMonitor", "ReplaceMonitor", "KillMonitor", "MonitorStatus",
	"SignalInit", "Start", "execve",
	"RunHook", "Collect", "hook postcreate", "hook prestart", "hook poststart", "hook poststop", "hook predelete", "hook oci-poststop",
	"PlanNetwork", "AttachNetwork", "DetachNetwork", "RestoreNetwork", "VerifyNetwork", "plugin",
}

// world is a Manager on a host where everything goes wrong.
type world struct {
	m    *Manager
	j    *journal.Journal
	n    *fakeNode
	base string
	gen  int // of the state directory
	// exits are the exit records that somebody was shown, by SID/MID.
	exits map[string]Exit
}

func (w *world) state() string { return filepath.Join(w.base, fmt.Sprint(w.gen)) }

func (w *world) open(t *rapid.T) {
	w.n.with(func() {
		w.n.state, w.n.copy = w.state(), filepath.Join(w.base, fmt.Sprint(w.gen+1))
		clear(w.n.held) // descriptors end with the daemon
		for k := range w.n.watches {
			delete(w.n.watches, k)
		}
		for _, mon := range w.n.monitors {
			mon.conns = nil
			if mon.phase != PhaseExited {
				mon.orphaned = false
			}
		}
	})
	w.n.begin(w.state())
	j, err := journal.Open(w.journal(), journal.Options{Boot: "boot"})
	if err != nil {
		t.Fatalf("open journal: %v", err)
	}
	o := testOptions(w.n)
	o.Journal = j
	m, err := Open(context.Background(), w.state(), w.n, o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	w.m, w.j = m, j
}

// journal is in the state directory here, so that a crash finds both as they
// are at one moment.
func (w *world) journal() string { return filepath.Join(w.state(), "events") }

func (w *world) close() error { return errors.Join(w.m.Close(), w.j.Close()) }

// restart ends the daemon and starts another. If the first had died in a call,
// the second finds the state directory as it was at that moment.
func (w *world) restart(t *rapid.T) {
	if err := w.close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	crashed := false
	w.n.with(func() {
		if crashed = w.n.crashed; crashed {
			w.gen++
		}
		w.n.crashed, w.n.countdown = false, 0
	})
	if crashed && rapid.Bool().Draw(t, "before the event was written") {
		if err := takeBack(w.state(), w.journal()); err != nil {
			t.Fatalf("take back: %v", err)
		}
	}
	w.open(t)
}

func (w *world) faulty() bool {
	w.n.mu.Lock()
	defer w.n.mu.Unlock()
	return len(w.n.faults) > 0
}

// operation does something random and checks what it returned.
func (w *world) operation(t *rapid.T) {
	ctx := context.Background()
	if rapid.IntRange(0, 9).Draw(t, "cancelled") == 0 {
		c, cancel := context.WithCancel(ctx)
		cancel()
		ctx = c
	}
	name := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "sandbox")
	ref := name + "/" + rapid.SampledFrom([]string{"x", "y"}).Draw(t, "member")
	force := rapid.Bool().Draw(t, "force")
	timeout := time.Duration(rapid.IntRange(0, 1).Draw(t, "timeout")) * time.Millisecond
	_, had := w.m.Inspect(name)
	_, hadMember := w.m.InspectMember(ref)
	what := rapid.SampledFrom([]string{"create", "create", "add", "add", "add", "run", "start", "start", "start", "stop", "stop member", "remove", "remove member", "unfit"}).Draw(t, "operation")
	switch what {
	case "create":
		c := Config{Name: name}
		if rapid.Bool().Draw(t, "pid") {
			c.Share = []namespace.Kind{namespace.Net, namespace.PID}
		}
		if rapid.Bool().Draw(t, "network") {
			c.Network = network.ModeCNI
		}
		if rapid.Bool().Draw(t, "hooks") {
			c.Hooks = allHooks(request.SandboxStages())
		}
		_, err := w.m.Create(ctx, c)
		if had == nil && err == nil {
			t.Fatalf("a second sandbox %s", name)
		}
		if had == nil && ctx.Err() == nil && !errors.Is(err, ErrExists) {
			t.Fatalf("create of an existing sandbox: %v", err)
		}
	case "add":
		c := member(strings.TrimPrefix(ref, name+"/"))
		c.Custody = rapid.SampledFrom(policies).Draw(t, "custody")
		c.AutoRemove = rapid.IntRange(0, 5).Draw(t, "rm") == 0
		if rapid.Bool().Draw(t, "hooks") {
			c.Hooks = allHooks(request.MemberStages())
			c.Hooks[len(c.Hooks)-3].Retries = rapid.IntRange(0, 2).Draw(t, "retries")
		}
		if rapid.IntRange(0, 3).Draw(t, "collect") == 0 {
			c.Collect = []request.Collect{{Path: "/x"}}
		}
		_, err := w.m.Add(ctx, name, c)
		if hadMember == nil && err == nil {
			// It may have removed itself just before.
			if mi, err := w.m.InspectMember(ref); err == nil && mi.State != "Created" {
				t.Fatalf("a second member %s: %+v", ref, mi)
			}
		}
	case "run":
		mi, err := w.m.Run(ctx, name, member(strings.TrimPrefix(ref, name+"/")))
		if err == nil && mi.State == "Created" {
			t.Fatalf("%s has been run: %+v", ref, mi)
		}
	case "unfit":
		before := fmt.Sprint(w.m.List())
		if _, err := w.m.Add(ctx, name, MemberConfig{}); err == nil {
			t.Fatal("a member without a root was added")
		}
		if after := fmt.Sprint(w.m.List()); len(after) > len(before) && strings.Count(after, "Creating") > strings.Count(before, "Creating") {
			t.Fatalf("an invalid request left something: %s", after)
		}
	case "start":
		w.m.Start(ctx, ref)
	case "stop":
		if err := w.m.Stop(ctx, name, timeout); err == nil {
			if i, err := w.m.Inspect(name); err == nil && i.State != "Stopped" {
				t.Fatalf("after stop: %+v", i)
			}
		}
	case "stop member":
		w.m.StopMember(ctx, ref, timeout)
	case "remove":
		if err := w.m.Remove(ctx, name, force); err == nil {
			if _, err := w.m.Inspect(name); !errors.Is(err, ErrNotFound) {
				t.Fatalf("after remove: %v", err)
			}
		}
	case "remove member":
		if err := w.m.RemoveMember(ctx, ref, force); err == nil {
			if _, err := w.m.InspectMember(ref); !errors.Is(err, ErrNotFound) {
				t.Fatalf("after remove: %v", err)
			}
		}
	}
}

// invariants says what is wrong. What is on its way to being put right is wrong
// until it is: callers poll.
func (w *world) invariants() error {
	infos := w.m.List()
	faulty := w.faulty()
	w.n.mu.Lock()
	defer w.n.mu.Unlock()
	if w.n.wrong != "" {
		return errors.New(w.n.wrong)
	}
	if w.n.crashed {
		return nil // what a dead daemon thinks does not count
	}
	if err := checkEvents(w.journal(), infos); err != nil {
		return err
	}
	boxes := map[string]Info{}
	members := map[string]MemberInfo{}
	seen := map[string]bool{}
	for _, i := range infos {
		if seen[i.Name] {
			return fmt.Errorf("two sandboxes are called %s", i.Name)
		}
		seen[i.Name] = true
		boxes[i.ID] = i
		for _, mi := range i.Members {
			k := i.ID + "/" + mi.ID
			if seen[i.Name+"/"+mi.Name] {
				return fmt.Errorf("two members are called %s/%s", i.Name, mi.Name)
			}
			seen[i.Name+"/"+mi.Name] = true
			members[k] = mi
			if err := w.memberInvariants(k, mi, faulty); err != nil {
				return err
			}
		}
		if i.State == "Creating" || i.State == "Deleting" {
			return fmt.Errorf("%s is %s though nothing is going on", i.Name, i.State)
		}
		if i.State == "Ready" && !(w.n.cgroups[i.ID] && w.n.procs[w.n.pauses[i.ID]]) {
			return fmt.Errorf("%s is ready without its cgroup or pause", i.Name)
		}
		if i.State == "Ready" && i.PausePID != w.n.pauses[i.ID].PID {
			return fmt.Errorf("%s has another pause than is recorded", i.Name)
		}
		if has := len(i.Network.Networks) > 0; i.State == "Ready" && (has != w.n.networks[i.ID] || has != (i.Network.Mode == network.ModeCNI)) {
			return fmt.Errorf("%s has networks %v, and on the host %v", i.Name, i.Network, w.n.networks[i.ID])
		}
		if _, err := os.Stat(filepath.Join(w.state(), sandboxesDir, i.ID, sandboxFile)); err != nil && i.State != "Unclean" {
			return fmt.Errorf("%s is %s without a record", i.Name, i.State)
		}
	}
	for sid := range w.n.pauses {
		if _, ok := boxes[sid]; !ok {
			return fmt.Errorf("pause of %s belongs to nobody", sid)
		}
	}
	for sid := range w.n.networks {
		if _, ok := boxes[sid]; !ok {
			return fmt.Errorf("the network of %s belongs to nobody", sid)
		}
	}
	for k := range w.n.cgroups {
		_, box := boxes[k]
		_, mem := members[k]
		if !box && !mem {
			return fmt.Errorf("cgroup %s belongs to nobody", k)
		}
	}
	for k := range w.n.data {
		if _, ok := members[k]; !ok {
			return fmt.Errorf("data of %s belongs to nobody", k)
		}
	}
	for k, mon := range w.n.monitors {
		if _, ok := members[k]; !ok && (w.n.procs[mon.proc] || w.n.procs[mon.init]) {
			return fmt.Errorf("processes of %s belong to nobody", k)
		}
	}
	return nil
}

func (w *world) memberInvariants(k string, mi MemberInfo, faulty bool) error {
	mon := w.n.monitors[k]
	switch mi.State {
	case "Creating", "Deleting":
		return fmt.Errorf("%s is %s though nothing is going on", k, mi.State)
	case "Created", "Running":
		if mi.State == "Running" && !w.n.started[k] {
			return fmt.Errorf("%s runs, but was never started", k)
		}
		if faulty {
			break // it may take until the faults have gone to find out
		}
		if !w.n.procs[mon.init] || !w.n.procs[mon.proc] {
			return fmt.Errorf("%s is %s without its processes", k, mi.State)
		}
	case "Exited", "Collected":
		switch truth, known := w.n.truth[k]; {
		case mi.Exit == nil:
			return fmt.Errorf("%s lacks an exit record", k)
		case mi.Exit.Known && (!known || *mi.Exit != truth):
			return fmt.Errorf("exit record of %s is invented: %+v, not %+v", k, *mi.Exit, truth)
		case !mi.Exit.Known && known:
			return fmt.Errorf("exit record of %s is lost: %+v, not %+v", k, *mi.Exit, truth)
		case w.n.procs[mon.init]:
			return fmt.Errorf("%s has exited and runs", k)
		case w.n.leftover[k] && !faulty:
			return fmt.Errorf("%s has exited and left processes", k)
		}
		if old, ok := w.exits[k]; ok && old != *mi.Exit {
			return fmt.Errorf("exit record of %s changed from %+v to %+v", k, old, *mi.Exit)
		}
		w.exits[k] = *mi.Exit
		if h := w.n.hooks[k+" /poststop"]; mi.State == "Exited" && h != nil {
			return fmt.Errorf("%s has a poststop hook, was it run %v, and is not collected", k, h.attempts)
		}
		if mi.State == "Collected" && len(w.n.declared[k].Hooks) > 0 && w.n.hooks[k+" /poststop"] == nil {
			return fmt.Errorf("%s is collected without its poststop hook", k)
		}
		if mi.State == "Exited" && len(w.n.declared[k].Hooks)+len(w.n.declared[k].Collect) > 0 {
			return fmt.Errorf("%s is not collected", k)
		}
	}
	if mi.Exit == nil && mi.State != "Unclean" {
		if old, ok := w.exits[k]; ok {
			return fmt.Errorf("exit record %+v of %s is lost", old, k)
		}
	}
	return nil
}

// TestLifecycle drives a Manager with random requests, faults, deaths and
// crashes, and checks after each step what must always hold.
func TestLifecycle(t *testing.T) {
	base := t.TempDir()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		w := &world{n: newFakeNode(), base: filepath.Join(base, fmt.Sprint(run)), exits: map[string]Exit{}}
		defer os.RemoveAll(w.base)
		w.open(t)
		defer func() { w.close() }()
		anyMember := func(t *rapid.T) string {
			var k string
			w.n.with(func() {
				if ks := names(w.n.monitors); len(ks) > 0 {
					k = rapid.SampledFrom(ks).Draw(t, "member")
				}
			})
			return k
		}
		t.Repeat(map[string]func(*rapid.T){
			"fault": func(t *rapid.T) {
				m := rapid.SampledFrom(methods).Draw(t, "method")
				f := rapid.SampledFrom([]fault{fails, halves}).Draw(t, "fault")
				w.n.with(func() { w.n.faults[m] = f })
			},
			"no fault": func(*rapid.T) { w.n.with(func() { clear(w.n.faults) }) },
			"one":      w.operation,
			"another":  w.operation,
			"a third":  w.operation,
			"init exits": func(t *rapid.T) {
				k := anyMember(t)
				code := rapid.IntRange(0, 1).Draw(t, "code")
				left := rapid.Bool().Draw(t, "leftover")
				w.n.with(func() {
					if mon := w.n.monitors[k]; mon != nil && mon.phase == PhaseRunning && w.n.procs[mon.init] {
						if left && w.n.cgroups[k] {
							w.n.leftover[k] = true
						}
						w.n.exitInit(k, Exit{Known: true, Code: code, Reason: "Completed"})
					}
				})
			},
			"monitor dies": func(t *rapid.T) {
				k := anyMember(t)
				w.n.with(func() { w.n.killMonitor(k) })
			},
			"monitor and init die": func(t *rapid.T) {
				k := anyMember(t)
				w.n.with(func() {
					if mon := w.n.monitors[k]; mon != nil {
						delete(w.n.procs, mon.init)
						w.n.killMonitor(k)
					}
				})
			},
			"pause dies": func(t *rapid.T) {
				w.n.with(func() {
					if ks := names(w.n.pauses); len(ks) > 0 {
						w.n.killPause(rapid.SampledFrom(ks).Draw(t, "pause"))
					}
				})
			},
			"restart": w.restart,
			"deaths while the daemon is down": func(t *rapid.T) {
				w.close()
				k := anyMember(t)
				pause, monitor, init := rapid.Bool().Draw(t, "pause"), rapid.Bool().Draw(t, "monitor"), rapid.Bool().Draw(t, "init")
				w.n.with(func() {
					for _, sid := range names(w.n.pauses) {
						if pause {
							w.n.killPause(sid)
						}
					}
					mon := w.n.monitors[k]
					if mon == nil {
						return
					}
					if monitor {
						mon.orphaned = false // nobody is its parent now
						w.n.killMonitor(k)
					}
					if init && mon.phase == PhaseRunning {
						w.n.exitInit(k, Exit{Known: true, Code: 2, Reason: "Error"})
					}
				})
				w.open(t)
			},
			"crash": func(t *rapid.T) {
				w.n.with(func() {
					w.n.countdown = rapid.IntRange(1, 8).Draw(t, "call")
					w.n.crashLate = rapid.Bool().Draw(t, "late")
				})
				w.operation(t)
				w.restart(t)
			},
			"crash in recovery": func(t *rapid.T) {
				w.restart(t)
				w.close()
				w.n.with(func() {
					w.n.countdown = rapid.IntRange(1, 8).Draw(t, "call")
					w.n.crashLate = rapid.Bool().Draw(t, "late")
				})
				w.open(t)
				w.restart(t)
			},
			"garbage collection": func(t *rapid.T) {
				found, err := w.m.GC(context.Background(), rapid.Bool().Draw(t, "dry run"))
				if err != nil && !w.faulty() {
					t.Fatalf("gc: %v", err)
				}
				for _, f := range found {
					if f.Kind == garbage.Cgroup {
						t.Fatalf("found to belong to nobody: %+v", f)
					}
				}
			},
			"": func(t *rapid.T) { soon(t, w.invariants) },
		})

		// Once faults stop, everything can be removed, and nothing is left.
		w.n.with(func() { clear(w.n.faults); w.n.countdown = 0 })
		for _, i := range w.m.List() {
			if err := w.m.Remove(context.Background(), i.Name, true); err != nil && !errors.Is(err, ErrNotFound) { // it may have been on its way
				t.Fatalf("remove with no faults: %v", err)
			}
		}
		soon(t, w.n.empty)
		if err := checkEvents(w.journal(), nil); err != nil {
			t.Fatalf("at the end: %v", err)
		}
		w.n.with(func() {
			for k, c := range w.n.declared {
				if _, exited := w.exits[k]; exited && len(c.Hooks) > 0 {
					for _, stage := range []request.Stage{request.Poststop, request.Predelete, request.OCIPoststop} {
						if h := w.n.hooks[k+" /"+string(stage)]; h == nil {
							t.Fatalf("%s is removed without its %s hook", k, stage)
						}
					}
				}
			}
			if w.n.wrong != "" {
				t.Fatal(w.n.wrong)
			}
		})
		if left, err := os.ReadDir(filepath.Join(w.state(), sandboxesDir)); err != nil || len(left) > 0 {
			t.Fatalf("left in the state directory: %v, %v", left, err)
		}
		if left, err := os.ReadDir(filepath.Join(w.state(), quarantineDir)); err != nil || len(left) > 0 {
			t.Fatalf("records were set aside: %v, %v", left, err)
		}
	})
}
