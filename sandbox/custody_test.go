package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/request"
)

// clock is a time that stands still until it is moved.
type clock struct{ atomic.Int64 }

func (c *clock) now() time.Time { return time.Unix(1_000_000+c.Load(), 0) }

// custodyManager is a Manager of a host n with a clock and bounds.
func custodyManager(t *testing.T, state string, n *fakeNode, c *clock, change func(*Options)) *Manager {
	t.Helper()
	n.state = state
	o := testOptions(n)
	o.Now = c.now
	change(&o)
	m, err := Open(t.Context(), state, n, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// dies adds a member that exits at once, and waits until all that follows has
// been done.
func dies(t *testing.T, m *Manager, n *fakeNode, c MemberConfig) {
	t.Helper()
	i := must[MemberInfo](t)(m.Add(t.Context(), "web", c))
	must[MemberInfo](t)(m.Start(t.Context(), "web/"+c.Name))
	n.with(func() { n.exitInit(i.Sandbox+"/"+i.ID, Exit{Known: true, Code: 1, Reason: "Error"}) })
	must[Exit](t)(m.Wait(t.Context(), "web/"+c.Name))
	soon(t, func() error {
		if _, mb, err := m.member("web/" + c.Name); err != nil || m.unsettled(mb) {
			return fmt.Errorf("%s is not settled, %v", c.Name, err)
		}
		return nil
	})
}

// heldNames returns who is in custody.
func heldNames(m *Manager) string {
	var names []string
	for _, i := range m.List() {
		for _, mi := range i.Members {
			if mi.Custody.Held {
				names = append(names, mi.Name)
			}
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func eventuallyHeld(t *testing.T, m *Manager, want string) {
	t.Helper()
	soon(t, func() error {
		m.custodyChanged()
		if got := heldNames(m); got != want {
			return fmt.Errorf("held: %q; want %q", got, want)
		}
		return nil
	})
}

func TestCustodyHasAnEnd(t *testing.T) {
	n, c, state := newFakeNode(), new(clock), t.TempDir()
	m := custodyManager(t, state, n, c, func(*Options) {})
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	short, long := member("short"), member("long")
	short.CustodyTTL, long.CustodyTTL = time.Minute, time.Hour
	dies(t, m, n, short)
	dies(t, m, n, long)
	dies(t, m, n, member("forever"))
	if i := must[MemberInfo](t)(m.InspectMember("web/short")); !i.Custody.Until.Equal(c.now().Add(time.Minute)) || !i.Custody.Held {
		t.Errorf("custody %+v", i.Custody)
	}
	c.Store(59)
	eventuallyHeld(t, m, "forever long short")
	c.Store(60)
	eventuallyHeld(t, m, "forever long")
	var i MemberInfo
	soon(t, func() error { // the monitor goes after the record says so
		if i = must[MemberInfo](t)(m.InspectMember("web/short")); i.MonitorPID != 0 {
			return fmt.Errorf("what is left: %+v", i)
		}
		return nil
	})
	if r := i.Custody.Released; r == nil || r.Reason != "ttl: 1m0s are over" || !r.At.Equal(c.now()) {
		t.Errorf("released %+v", r)
	}
	if i.State != "Exited" || i.Exit.Code != 1 {
		t.Errorf("what is left: %+v", i)
	}
	// A daemon that comes later counts from the record.
	check(t, m.Close())
	c.Store(3600)
	m = custodyManager(t, state, n, c, func(*Options) {})
	eventuallyHeld(t, m, "forever")
	check(t, m.Remove(t.Context(), "web", false))
	check(t, n.empty())
}

// Who kills the monitor of an exited member ends custody, and that is told of.
func TestCustodyEndsWithTheMonitor(t *testing.T) {
	n := newFakeNode()
	m := openWithJournal(t, t.TempDir(), n)
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	dies(t, m, n, member("kept"))
	dies(t, m, n, member("killed"))
	i := must[MemberInfo](t)(m.InspectMember("web/killed"))
	n.with(func() { n.killMonitor(i.Sandbox + "/" + i.ID) })
	soon(t, func() error {
		m.custodyChanged()
		i := must[MemberInfo](t)(m.InspectMember("web/killed"))
		if r := i.Custody.Released; r == nil || r.Reason != "monitor: it was killed" || i.Custody.Held {
			return fmt.Errorf("custody %+v, released %+v", i.Custody, r)
		}
		return nil
	})
	eventuallyHeld(t, m, "kept")
	check(t, m.Remove(t.Context(), "web", false))
	check(t, n.empty())
	var told []string
	for e, err := range m.Events(t.Context(), EventQuery{}) {
		check(t, err)
		if e.Type == journal.Custody && e.Attrs["action"] == "released" {
			told = append(told, e.MemberName+" "+e.Reason)
		}
	}
	if got := strings.Join(told, ", "); got != "killed monitor: it was killed, kept removed" {
		t.Errorf("told of: %s", got)
	}
}

func TestCustodyIsBounded(t *testing.T) {
	for _, tt := range []struct {
		name   string
		bounds func(*Options)
		want   string
		reason string
	}{
		{"members", func(o *Options) { o.CustodyMax = 2 }, "c d", "max: more than 2 members were held"},
		{"memory", func(o *Options) { o.CustodyMaxTmpfs = 250 }, "b c d", "tmpfs: members held more than 250 bytes in memory"},
		{"both", func(o *Options) { o.CustodyMax, o.CustodyMaxTmpfs = 3, 150 }, "b d", "tmpfs: members held more than 150 bytes in memory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, c := newFakeNode(), new(clock)
			n.tmpfs = map[string]int64{}
			m := custodyManager(t, t.TempDir(), n, c, tt.bounds)
			must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
			for i, name := range []string{"a", "b", "c", "d"} {
				c.Store(int64(i))
				mi := must[MemberInfo](t)(m.Add(t.Context(), "web", member(name)))
				if name != "b" { // of which nothing is in memory
					n.with(func() { n.tmpfs[mi.Sandbox+"/"+mi.ID] = 100 })
				}
				must[MemberInfo](t)(m.Start(t.Context(), "web/"+name))
				n.with(func() { n.exitInit(mi.Sandbox+"/"+mi.ID, Exit{Known: true, Code: 1, Reason: "Error"}) })
				must[Exit](t)(m.Wait(t.Context(), "web/"+name))
			}
			eventuallyHeld(t, m, tt.want)
			if r := must[MemberInfo](t)(m.InspectMember("web/a")).Custody.Released; r == nil || r.Reason != tt.reason {
				t.Errorf("released %+v; want %q", r, tt.reason)
			}
			check(t, m.Remove(t.Context(), "web", false))
			check(t, n.empty())
		})
	}
}

// A daemon that is killed between the record and the end of the monitor.
func TestCustodyEndsAfterACrash(t *testing.T) {
	n, c, state := newFakeNode(), new(clock), t.TempDir()
	m := custodyManager(t, state, n, c, func(*Options) {})
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	dies(t, m, n, member("app"))
	n.with(func() { n.faults["KillMonitor"] = fails })
	_, mb, err := m.lockMember(t.Context(), "web/app")
	check(t, err)
	if err := m.release(t.Context(), mb, releasedTTL, "over"); err == nil {
		t.Error("a release that failed says nothing")
	}
	mb.op.release()
	if i := must[MemberInfo](t)(m.InspectMember("web/app")); i.Custody.Held || i.MonitorPID == 0 {
		t.Errorf("in between: %+v", i)
	}
	check(t, m.Close())
	n.with(func() { n.faults["KillMonitor"] = works })
	m = custodyManager(t, state, n, c, func(*Options) {})
	if i := must[MemberInfo](t)(m.InspectMember("web/app")); i.Custody.Held || i.MonitorPID != 0 || i.Custody.Released.Reason != "ttl: over" {
		t.Errorf("afterwards: %+v", i)
	}
}

// What is declared needs the root although the policy does not; what is not
// declared does without.
func TestCustodyWaitsForTheCollection(t *testing.T) {
	for _, policy := range policies {
		n, c := newFakeNode(), new(clock)
		m := custodyManager(t, t.TempDir(), n, c, func(o *Options) { o.CustodyMax = 1 })
		must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
		cfg := member("app")
		cfg.Custody, cfg.Collect = policy, []request.Collect{{Path: "/tmp/*"}}
		dies(t, m, n, cfg)
		i := must[MemberInfo](t)(m.InspectMember("web/app"))
		if i.State != "Collected" || i.Collection != "app-1" {
			t.Errorf("%s: %s, collection %q", policy, i.State, i.Collection)
		}
		if !n.collectedHeld {
			t.Errorf("%s: the root was gone when it was collected", policy)
		}
		want := "app"
		if policy == request.CustodyNever {
			want = ""
		}
		eventuallyHeld(t, m, want)
	}
}

// Files of one sandbox are taken one after the other; a collection that takes long
// holds up neither other sandboxes' nor one without files.
func TestOneCollectionWithFilesAtATime(t *testing.T) {
	n, c := newFakeNode(), new(clock)
	n.collectsAll = true
	arrived, goOn := make(chan struct{}, 10), make(chan struct{})
	n.onCollect = func() { arrived <- struct{}{}; <-goOn }
	m := custodyManager(t, t.TempDir(), n, c, func(*Options) {})
	exits := func(box, name string, collectors ...request.Collect) {
		t.Helper()
		cfg := member(name)
		cfg.Collect = collectors
		i := must[MemberInfo](t)(m.Add(t.Context(), box, cfg))
		must[MemberInfo](t)(m.Start(t.Context(), box+"/"+name))
		n.with(func() { n.exitInit(i.Sandbox+"/"+i.ID, Exit{Known: true, Code: 1, Reason: "Error"}) })
		must[Exit](t)(m.Wait(t.Context(), box+"/"+name))
	}
	arrives := func(want bool, what string) {
		t.Helper()
		wait := 5 * time.Second
		if !want {
			wait = 50 * time.Millisecond
		}
		select {
		case <-arrived:
			if !want {
				t.Errorf("%s is collected at the same time", what)
			}
		case <-time.After(wait):
			if want {
				t.Fatalf("%s is not collected", what)
			}
		}
	}
	files := request.Collect{Path: "/f"}
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	must[Info](t)(m.Create(t.Context(), Config{Name: "other"}))
	exits("web", "a", files)
	arrives(true, "the first")
	exits("web", "b", files)
	arrives(false, "the second")
	exits("web", "c")
	arrives(true, "one without files")
	exits("other", "a", files)
	arrives(true, "another sandbox's")
	close(goOn)
	arrives(true, "the second")
	for _, ref := range []string{"web/a", "web/b", "web/c", "other/a"} {
		soon(t, func() error {
			if _, mb, err := m.member(ref); err != nil || m.unsettled(mb) {
				return fmt.Errorf("%s is not settled, %v", ref, err)
			}
			return nil
		})
	}
}

// A removal by force does not wait for a collection as long as that may take.
func TestForcedRemovalCutsCollectionsOff(t *testing.T) {
	for _, what := range []string{"web/app", "web"} {
		n, c := newFakeNode(), new(clock)
		arrived := make(chan struct{}, 10)
		n.onCollect = func() { arrived <- struct{}{} }
		n.hangCollect = true
		m := custodyManager(t, t.TempDir(), n, c, func(o *Options) { o.collectGrace = 10 * time.Millisecond })
		must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
		cfg := member("app")
		cfg.Collect = []request.Collect{{Path: "/f"}}
		i := must[MemberInfo](t)(m.Add(t.Context(), "web", cfg))
		must[MemberInfo](t)(m.Start(t.Context(), "web/app"))
		n.with(func() { n.exitInit(i.Sandbox+"/"+i.ID, Exit{Known: true, Code: 1, Reason: "Error"}) })
		<-arrived
		done := make(chan error, 1)
		go func() {
			if what == "web" {
				done <- m.Remove(context.Background(), "web", true)
			} else {
				done <- m.RemoveMember(context.Background(), "web/app", true)
			}
		}()
		select {
		case err := <-done:
			if err != nil || !errors.Is(n.collectCut, errForced) {
				t.Errorf("%s: %v, and the collection ended with %v", what, err, n.collectCut)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("the removal of %s waits for the collection", what)
		}
	}
}

func TestCollectorsAreChecked(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	for _, bad := range []request.Collect{
		{}, {Path: "tmp"}, {Path: "/a/../b"}, {Path: "/["}, {Path: "/a\nb"}, {Path: "/a\x00"}, {Path: "/" + strings.Repeat("x", 5000)},
		{Path: "/a", On: "never"}, {Path: "/a", Max: -1},
	} {
		c := member("app")
		c.Collect = []request.Collect{bad}
		if _, err := m.Add(t.Context(), "web", c); err == nil || !strings.Contains(err.Error(), "collect") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.40q is taken: %v", bad.Path, err)
		}
	}
	c := member("app")
	c.Collect = make([]request.Collect, maxCollectors+1)
	if _, err := m.Add(t.Context(), "web", c); err == nil {
		t.Error("any number of collectors is taken")
	}
	c.Collect = []request.Collect{{Path: "/tmp//core*/"}}
	c.CustodyTTL = -1
	if _, err := m.Add(t.Context(), "web", c); err == nil {
		t.Error("a negative ttl is taken")
	}
	c.CustodyTTL = 0
	must[MemberInfo](t)(m.Add(t.Context(), "web", c))
	_, mb, err := m.member("web/app")
	check(t, err)
	want := request.Collect{Path: "/tmp/core*", On: request.OnAlways, Max: request.DefaultCollectMax}
	if got := mb.rec.Load().Config.Collect[0]; got != want {
		t.Errorf("on record: %+v; want %+v", got, want)
	}
}

// Who is killed by a removal has not failed: only what was declared is done.
func TestRemovalIsNoFailure(t *testing.T) {
	for _, declared := range []bool{false, true} {
		n := newFakeNode()
		n.collectsAll = true
		m := open(t, t.TempDir(), n)
		must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
		c := member("app")
		if declared {
			c.Collect = []request.Collect{{Path: "/x"}}
		}
		must[MemberInfo](t)(m.Add(t.Context(), "web", c))
		must[MemberInfo](t)(m.Start(t.Context(), "web/app"))
		check(t, m.RemoveMember(t.Context(), "web/app", true))
		dies(t, m, n, member("failed"))
		check(t, m.Remove(t.Context(), "web", true))
		want := 1
		if declared {
			want = 2
		}
		if got := len(n.collected); got != want {
			t.Errorf("declared %v: %d members were collected, want %d", declared, got, want)
		}
	}
}
