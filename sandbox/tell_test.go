package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// rank orders the states that are only ever left for a later one.
var rank = map[string]int{"": 0, "Creating": 1, "Created": 2, "Running": 3, "Exited": 4, "Collected": 5, "Deleting": 6}

// legal reports whether a sandbox or member can go from one state to another.
func legal(member bool, from, to string) bool {
	switch {
	case from == to:
		return false
	case to == "Unclean": // also if not even the record of its beginning could be written
		return true
	case to == "":
		return from != ""
	case from == "Unclean":
		return to == "Deleting"
	case member:
		return rank[to] > rank[from] && (to != "Collected" || from == "Exited")
	}
	return slices.Contains(map[string][]string{
		"": {"Creating"}, "Creating": {"Ready", "Deleting"}, "Ready": {"NotReady", "Stopped", "Deleting"},
		"NotReady": {"Ready", "Stopped", "Deleting"}, "Stopped": {"Deleting"},
	}[from], to)
}

// checkEvents reads a journal and says what is wrong with it: of every sandbox
// and member that ever was it must tell the whole life, each change of state once and in order, and
// end where infos say that it is.
func checkEvents(dir string, infos []Info) error {
	type life struct {
		rev   uint64
		state string
		gone  bool
		exits int
		held  int
	}
	lives := map[string]*life{}
	seq := uint64(0)
	for e, err := range journal.Read(context.Background(), dir, journal.Query{}, nil) {
		if err != nil {
			return fmt.Errorf("journal: %w", err)
		}
		if e.Seq != seq+1 {
			return fmt.Errorf("event %d comes after %d", e.Seq, seq)
		}
		seq = e.Seq
		if e.Rev == 0 {
			continue
		}
		l := lives[e.Object()]
		if l == nil {
			l = new(life)
			lives[e.Object()] = l
		}
		if e.Rev != l.rev+1 || l.gone {
			return fmt.Errorf("event %+v comes after %+v", e, *l)
		}
		l.rev = e.Rev
		switch e.Type {
		case journal.State, journal.Exit, journal.Removed:
			if e.From != l.state || !legal(e.Member != "", e.From, e.To) || (e.To == "") != (e.Type == journal.Removed) {
				return fmt.Errorf("event %+v comes after %+v", e, *l)
			}
			if e.SandboxName == "" || e.Member != "" && e.MemberName == "" {
				return fmt.Errorf("event %+v lacks a name", e)
			}
			l.state, l.gone = e.To, e.Type == journal.Removed
		}
		if e.Exit != nil {
			l.exits++
		}
		if l.exits > 1 || (e.Type == journal.Exit) != (e.To == "Exited") {
			return fmt.Errorf("event %+v with %d exits", e, l.exits)
		}
		if e.Type == journal.Custody {
			l.held += map[string]int{"taken": 1, "released": -1}[e.Attrs["action"]]
			if l.held < 0 || l.held > 1 {
				return fmt.Errorf("event %+v: custody is held %d times", e, l.held)
			}
		}
		if l.gone && l.held != 0 {
			return fmt.Errorf("event %+v: nobody told that custody ended", e)
		}
	}
	now := map[string]string{}
	for _, i := range infos {
		now[i.ID] = i.State
		for _, mi := range i.Members {
			now[mi.ID] = mi.State
		}
	}
	for id, l := range lives {
		if l.state != now[id] {
			return fmt.Errorf("the journal says %s of %s, which is %s", quote(l.state), id, quote(now[id]))
		}
		delete(now, id)
	}
	for id, state := range now {
		return fmt.Errorf("the journal says nothing of %s, which is %s", id, state)
	}
	return nil
}

// takeBack removes the last event from the journal of a daemon that is dead, if
// it can have died before it wrote it: if the event is in an outbox.
func takeBack(state, dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil || len(names) == 0 {
		return err
	}
	name := names[len(names)-1]
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	lines := bytes.SplitAfter(b, []byte("\n"))
	var e Event
	if len(lines) < 2 || json.Unmarshal(lines[len(lines)-2], &e) != nil || e.Rev == 0 {
		return nil
	}
	waits := false
	err = filepath.WalkDir(filepath.Join(state, sandboxesDir), func(p string, d fs.DirEntry, err error) error {
		var r struct {
			ID     string  `json:"id"`
			Outbox *Outbox `json:"outbox"`
		}
		if err != nil || d.Name() != sandboxFile && d.Name() != memberFile {
			return err
		}
		b, err := os.ReadFile(p)
		if err == nil && json.Unmarshal(b, &r) == nil && r.ID == e.Object() && r.Outbox != nil {
			for _, o := range r.Outbox.Events {
				waits = waits || o.Rev == e.Rev
			}
		}
		return err
	})
	if err != nil || !waits {
		return err
	}
	return os.WriteFile(name, bytes.Join(lines[:len(lines)-2], nil), 0o600)
}

// openWithJournal opens a Manager and its journal, which are closed with the test.
func openWithJournal(t *testing.T, state string, n *fakeNode) *Manager {
	t.Helper()
	n.state = state
	j := must[*journal.Journal](t)(journal.Open(state+"/events", journal.Options{}))
	o := testOptions(n)
	o.Journal = j
	m := must[*Manager](t)(Open(t.Context(), state, n, o))
	t.Cleanup(func() { m.Close(); j.Close() })
	return m
}

// TestEventsSurviveACrash lets a daemon be killed before and after it writes an
// event, at each of the points between a record and its end.
func TestEventsSurviveACrash(t *testing.T) {
	for _, written := range []bool{false, true} {
		state := t.TempDir()
		n := newFakeNode()
		m := openWithJournal(t, state, n)
		ctx := t.Context()
		must[Info](t)(m.Create(ctx, Config{Name: "web"}))
		must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
		must[MemberInfo](t)(m.Start(ctx, "web/app"))
		check(t, m.StopMember(ctx, "web/app", 0))
		infos := m.List()
		check(t, m.Close())
		check(t, m.o.Journal.Close())
		if !written {
			check(t, takeBack(state, state+"/events")) // custody
			check(t, takeBack(state, state+"/events")) // exit
		}
		for range 3 { // and is killed again in its recovery
			m = openWithJournal(t, state, n)
			if err := checkEvents(state+"/events", infos); err != nil {
				t.Errorf("written %v: %v", written, err)
			}
			check(t, m.Close())
			check(t, m.o.Journal.Close())
		}
	}
}

// Events that are in the journal are kept nowhere else: most sandboxes do not change
// for hours.
func TestToldEventsAreLetGo(t *testing.T) {
	m := openWithJournal(t, t.TempDir(), newFakeNode())
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	must[MemberInfo](t)(m.Add(t.Context(), "web", member("app")))
	for _, b := range m.all() {
		if b.told.outbox != nil {
			t.Errorf("%d events of a sandbox are kept", len(b.told.outbox.Events))
		}
		for _, mb := range b.list() {
			if mb.told.outbox != nil {
				t.Errorf("%d events of a member are kept", len(mb.told.outbox.Events))
			}
		}
	}
}

func TestRemovalIsToldOfOnce(t *testing.T) {
	for _, written := range []bool{false, true} {
		state := t.TempDir()
		n := newFakeNode()
		m := openWithJournal(t, state, n)
		ctx := t.Context()
		i := must[Info](t)(m.Create(ctx, Config{Name: "web"}))
		mi := must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
		check(t, m.StopMember(ctx, "web/app", 0))
		// The records as they are when the removal is about to become a fact.
		copyOnce(state, state+".copy")
		check(t, m.Remove(ctx, "web", true))
		after := m.o.Journal.Last() - 3 // custody released, two removals
		check(t, m.Close())
		check(t, m.o.Journal.Close())
		removed := filepath.Join(state, removedDir)
		check(t, os.Rename(state+".copy/sandboxes/"+i.ID+"/m/"+mi.ID, fmt.Sprintf("%s/%d.4.Exited.%s.%s", removed, after, i.ID, mi.ID)))
		box := fmt.Sprintf("%s/%d.3.Deleting.%s", removed, after+2, i.ID)
		check(t, os.Rename(state+".copy/sandboxes/"+i.ID, box))
		if !written {
			cut(t, state+"/events", 3)
		}
		for range 2 {
			m = openWithJournal(t, state, n)
			if err := checkEvents(state+"/events", nil); err != nil {
				t.Errorf("written %v: %v", written, err)
			}
			if left := must[[]os.DirEntry](t)(os.ReadDir(removed)); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			check(t, m.Close())
			check(t, m.o.Journal.Close())
		}
	}
}

// cut removes the last n events of a journal.
func cut(t *testing.T, dir string, n int) {
	t.Helper()
	names := must[[]string](t)(filepath.Glob(filepath.Join(dir, "*.jsonl")))
	name := names[len(names)-1]
	lines := bytes.SplitAfter(must[[]byte](t)(os.ReadFile(name)), []byte("\n"))
	check(t, os.WriteFile(name, bytes.Join(lines[:len(lines)-1-n], nil), 0o600))
}

func TestEventsOfAnUnreadableRecord(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := openWithJournal(t, state, n)
	ctx := t.Context()
	i := must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	check(t, m.Close())
	check(t, m.o.Journal.Close())
	check(t, os.WriteFile(filepath.Join(state, sandboxesDir, i.ID, sandboxFile), []byte("{"), 0o600))
	openWithJournal(t, state, n)
	var got []string
	for e, err := range journal.Read(ctx, state+"/events", journal.Query{Filter: journal.Filter{"type": {"removed"}}}, nil) {
		check(t, err)
		got = append(got, e.MemberName+":"+e.From)
	}
	if want := []string{"app:Exited", ":Ready"}; !slices.Equal(got, want) {
		t.Errorf("removals %q, want %q", got, want)
	}
}

// TestEventsOfWhatCouldNotBeRecorded has events of what could not be recorded.
func TestEventsOfWhatCouldNotBeRecorded(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := openWithJournal(t, state, n)
	ctx := t.Context()
	i := must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	mi := must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	// Its record cannot be replaced by a file.
	file := filepath.Join(state, sandboxesDir, i.ID, membersDir, mi.ID, memberFile)
	b := must[[]byte](t)(os.ReadFile(file))
	check(t, os.Remove(file))
	check(t, os.Mkdir(file, 0o700))
	n.with(func() { n.exitInit(i.ID+"/"+mi.ID, Exit{Known: true, Code: 1}) })
	must[Exit](t)(m.Wait(ctx, "web/app"))
	soon(t, func() error { return checkEvents(state+"/events", m.List()) })
	check(t, m.Close())
	check(t, m.o.Journal.Close())
	// The next daemon finds the old record, and the same exit.
	check(t, os.Remove(file))
	check(t, os.WriteFile(file, b, 0o600))
	m = openWithJournal(t, state, n)
	soon(t, func() error { return checkEvents(state+"/events", m.List()) })
}

func TestGarbageIsToldOf(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := openWithJournal(t, state, n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	n.with(func() { n.cgroups["0123456789abcdef"] = true })
	if found, err := m.GC(ctx, true); err != nil || len(found) != 1 {
		t.Fatalf("dry run: %v, %v", found, err)
	}
	if found, err := m.GC(ctx, false); err != nil || len(found) != 1 {
		t.Fatalf("gc: %v, %v", found, err)
	}
	if found, err := m.GC(ctx, false); err != nil || len(found) != 0 {
		t.Fatalf("again: %v, %v", found, err)
	}
	var got []string
	for e, err := range m.Events(ctx, EventQuery{Filter: EventFilter{"type": {"garbage"}}}) {
		check(t, err)
		got = append(got, e.Attrs["name"])
	}
	if !slices.Equal(got, []string{"0123456789abcdef"}) {
		t.Errorf("events of %v", got)
	}
}

// What could not be recorded, and not be taken down either, is recorded then: there
// must be something to write into that it is being removed, and to find after a restart.
func TestUncleanWithoutRecord(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := openWithJournal(t, state, n)
	ctx := t.Context()
	n.with(func() { n.faults["PlanNetwork"], n.faults["RemoveSandboxData"] = fails, fails })
	if _, err := m.Create(ctx, Config{Name: "web", Network: "builtin"}); err == nil {
		t.Fatal("created with a fault")
	}
	if i := must[Info](t)(m.Inspect("web")); i.State != Unclean.String() {
		t.Fatalf("state %s", i.State)
	}
	n.with(func() { clear(n.faults) })
	check(t, m.Remove(ctx, "web", false))
	if err := n.empty(); err != nil {
		t.Error(err)
	}
	if err := checkEvents(state+"/events", m.List()); err != nil {
		t.Error(err)
	}
}

func TestGCTakesDownWhatIsUnclean(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := openWithJournal(t, state, n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	must[Info](t)(m.Create(ctx, Config{Name: "other"}))
	must[MemberInfo](t)(m.Add(ctx, "other", member("app")))
	n.with(func() { n.faults["RemoveCgroup"], n.faults["RemoveMemberCgroup"] = fails, fails })
	if m.Remove(ctx, "web", true) == nil || m.RemoveMember(ctx, "other/app", true) == nil {
		t.Fatal("removed with a fault")
	}
	var found []garbage.Finding
	var err error
	soon(t, func() error { // what is being looked at is left alone
		if found, err = m.GC(ctx, false); err != nil || len(found) != 2 || found[0].Err == "" || found[0].Action != "kept" {
			return fmt.Errorf("with a fault: %+v, %v", found, err)
		}
		return nil
	})
	n.with(func() { clear(n.faults) })
	if found, err = m.GC(ctx, true); err != nil || len(found) != 2 || found[0].Action != "would remove" {
		t.Fatalf("dry run: %+v, %v", found, err)
	}
	if found, err = m.GC(ctx, false); err != nil || len(found) != 2 || found[0].Action != "removed" {
		t.Fatalf("without: %+v, %v", found, err)
	}
	if _, err := m.Inspect("web"); !errors.Is(err, ErrNotFound) {
		t.Errorf("web: %v", err)
	}
	if err := checkEvents(state+"/events", m.List()); err != nil {
		t.Error(err)
	}
	// Young temporary files may be somebody's.
	tmp := filepath.Join(state, sandboxesDir, m.List()[0].ID, sandboxFile+statefile.TempSuffix)
	check(t, os.WriteFile(tmp, nil, 0o600))
	if found, err = m.GC(ctx, false); err != nil || len(found) != 0 {
		t.Errorf("a file that was just made: %+v, %v", found, err)
	}
}

// BenchmarkChange writes records with and without a journal.
func BenchmarkChange(b *testing.B) {
	for _, kept := range []string{"nowhere", "journal"} {
		b.Run(kept, func(b *testing.B) {
			n := newFakeNode()
			n.state = b.TempDir()
			o := testOptions(n)
			if kept == "journal" {
				j, err := journal.Open(b.TempDir(), journal.Options{})
				if err != nil {
					b.Fatal(err)
				}
				defer j.Close()
				o.Journal = j
			}
			m, err := Open(b.Context(), n.state, n, o)
			if err != nil {
				b.Fatal(err)
			}
			defer m.Close()
			if _, err := m.Create(b.Context(), Config{Name: "web"}); err != nil {
				b.Fatal(err)
			}
			box := m.all()[0]
			states := []State{NotReady, Ready}
			for i := 0; b.Loop(); i++ {
				if err := m.write(box, func(r *Record) { r.State = states[i%2] }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
