package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

func open(t testing.TB, dir string, o Options) *Journal {
	t.Helper()
	if o.Boot == "" {
		o.Boot = "boot"
	}
	j, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

func put(t testing.TB, j *Journal, es ...Event) {
	t.Helper()
	_, release := j.Hold()
	defer release()
	if err := j.Append(es...); err != nil {
		t.Fatal(err)
	}
}

// read returns the numbers of what q yields, and the error at its end.
func read(dir string, q Query) (seqs []uint64, err error) {
	for e, rerr := range Read(context.Background(), dir, q, nil) {
		if rerr != nil {
			return seqs, rerr
		}
		seqs = append(seqs, e.Seq)
	}
	return seqs, nil
}

func after(n uint64) Query { return Query{After: &n} }

func check(t *testing.T, what string, q Query, dir string, want ...uint64) {
	t.Helper()
	if got, err := read(dir, q); err != nil || !slices.Equal(got, want) {
		t.Errorf("%s: events %v, %v; want %v", what, got, err, want)
	}
}

func TestEventsComeBackAsTheyWere(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "events")
	j := open(t, dir, Options{})
	want := Event{
		Time: time.Unix(1, 2).UTC(), Type: Exit, Sandbox: "aa", SandboxName: "web", Member: "bb", MemberName: "app",
		Rev: 7, From: "Running", To: "Exited", Reason: "a\nb\x00\xff",
		Exit: &exit.Record{Known: true, Code: 3, FinishedAt: time.Unix(5, 0).UTC()}, Attrs: map[string]string{"k": "v"},
	}
	put(t, j, want)
	want.Seq, want.Reason = 1, "a\nb\x00�"
	for e, err := range Read(t.Context(), dir, Query{}, nil) {
		if diff := cmp.Diff(want, e); err != nil || diff != "" {
			t.Errorf("read %v (-want +got):\n%s", err, diff)
		}
	}
	if j.Last() != 1 {
		t.Errorf("last is %d", j.Last())
	}
}

// Whoever asks for what has just happened does not read all that is kept.
func TestSinceReadsNoOldSegments(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{segment: 200})
	now := time.Now().UTC()
	for i := range 4 {
		put(t, j, Event{Type: State, To: strings.Repeat("x", 300), Time: now.Add(time.Duration(i-4) * time.Hour)})
	}
	firsts, err := segments(j.dir)
	if err != nil || len(firsts) != 4 {
		t.Fatalf("segments %v, %v; want four", firsts, err)
	}
	for i, first := range firsts {
		name := filepath.Join(dir, segmentName(first))
		if i == 0 { // one that cannot be read
			if err := errors.Join(os.Remove(name), os.Symlink(name, name)); err != nil {
				t.Fatal(err)
			}
		}
		at := unix.NsecToTimespec(now.Add(time.Duration(i-4) * time.Hour).UnixNano())
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
	check(t, "since two hours and a half", Query{Since: now.Add(-150 * time.Minute)}, dir, 3, 4)
	check(t, "since now", Query{Since: now}, dir)
	if _, err := read(dir, Query{Since: now.Add(-5 * time.Hour)}); err == nil {
		t.Error("a segment that is wanted and cannot be read is passed over")
	}
}

func TestQueries(t *testing.T) {
	dir := t.TempDir()
	check(t, "of an empty journal", Query{}, dir)
	j := open(t, dir, Options{})
	at := func(s int64) time.Time { return time.Unix(s, 0).UTC() }
	put(t, j, Event{Type: State, Sandbox: "a1", SandboxName: "web", To: "Ready", Time: at(1)})
	put(t, j, Event{Type: Exit, Sandbox: "a1", SandboxName: "web", Member: "b1", MemberName: "app", To: "Exited", Time: at(2)},
		Event{Type: Garbage, Attrs: map[string]string{"kind": "link"}, Time: at(3)})
	put(t, j, Event{Type: State, Sandbox: "a2", SandboxName: "other", To: "Ready", Time: at(4)})
	check(t, "all", Query{}, dir, 1, 2, 3, 4)
	check(t, "after 2", after(2), dir, 3, 4)
	check(t, "after 0", after(0), dir, 1, 2, 3, 4)
	check(t, "after the last", after(4), dir)
	check(t, "since", Query{Since: at(3)}, dir, 3, 4)
	for _, tt := range []struct {
		filter []string
		want   []uint64
	}{
		{[]string{"type=state"}, []uint64{1, 4}},
		{[]string{"type=state", "type=exit"}, []uint64{1, 2, 4}},
		{[]string{"type=state", "sandbox=web"}, []uint64{1}},
		{[]string{"sandbox=a1"}, []uint64{1, 2}},
		{[]string{"sandbox=a"}, []uint64{1, 2, 4}},
		{[]string{"sandbox="}, nil},
		{[]string{"member=app"}, []uint64{2}},
		{[]string{"member=web/app"}, []uint64{2}},
		{[]string{"member=other/app"}, nil},
		{[]string{"member=a1/b"}, []uint64{2}},
		{[]string{"to=Exited"}, []uint64{2}},
		{[]string{"from="}, []uint64{1, 2, 3, 4}},
		{[]string{"attr.kind=link"}, []uint64{3}},
		{[]string{"attr.kind="}, nil},
	} {
		f, err := ParseFilter(tt.filter)
		if err != nil {
			t.Errorf("filter %v: %v", tt.filter, err)
		}
		check(t, fmt.Sprint(tt.filter), Query{Filter: f}, dir, tt.want...)
	}
	for _, bad := range []string{"type", "kind=x", "attr.=x", "type=nothing", "=x", ""} {
		if _, err := ParseFilter([]string{bad}); err == nil {
			t.Errorf("filter %q is accepted", bad)
		}
	}
	if _, err := read(dir, after(5)); !errors.Is(err, ErrGap) || !strings.Contains(err.Error(), "the last one is 4") {
		t.Errorf("after a number that nobody has: %v", err)
	}
}

func TestNumbersGoOn(t *testing.T) {
	dir := t.TempDir()
	for want := uint64(1); want <= 5; want++ {
		j := open(t, dir, Options{})
		put(t, j, Event{Type: State})
		if j.Last() != want {
			t.Fatalf("number %d, want %d", j.Last(), want)
		}
		// What is left by a process that is killed in the middle of a write.
		tear(t, dir, `{"seq":99,"type":"st`)
		j.Close()
	}
	check(t, "of torn lines nothing", Query{}, dir, 1, 2, 3, 4, 5)
}

// tear appends text to the last segment.
func tear(t *testing.T, dir, text string) {
	t.Helper()
	names, err := filepath.Glob(dir + "/*.jsonl")
	if err != nil || len(names) == 0 {
		t.Fatal(err, names)
	}
	f, err := os.OpenFile(names[len(names)-1], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

func TestDamage(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func([]byte) []byte
		want   []uint64
		next   uint64
	}{
		{"nothing", func(b []byte) []byte { return b }, []uint64{1, 2, 3, 4}, 4},
		{"zeros at the end", func(b []byte) []byte { return append(b, make([]byte, 5000)...) }, []uint64{1, 2, 3, 4}, 4},
		{"zeros and a line feed", func(b []byte) []byte { return append(append(b, make([]byte, 5000)...), '\n') }, []uint64{1, 2, 3, 1_000_004}, 1_000_004},
		{"the last line but its end", func(b []byte) []byte { return bytes.Replace(b, []byte(`"seq":3`), []byte(`"seq"x3`), 1) }, []uint64{1, 2, 1_000_003}, 1_000_003},
		{"a line", func(b []byte) []byte { return bytes.Replace(b, []byte(`"seq":2`), []byte(`"seq"x2`), 1) }, []uint64{1, 3, 4}, 4},
		{"the header", func(b []byte) []byte { b[0] = 'x'; return b }, []uint64{1, 2, 3, 1_000_004}, 1_000_004},
		{"the last line", func(b []byte) []byte { return b[:len(b)-3] }, []uint64{1, 2, 3}, 3},
		{"everything", func([]byte) []byte { return []byte("nonsense\nnonsense\n") }, []uint64{1_000_001}, 1_000_001},
		{"all but zeros", func(b []byte) []byte { return make([]byte, len(b)) }, []uint64{1_000_001}, 1_000_001},
		{"it is empty", func([]byte) []byte { return nil }, []uint64{1_000_001}, 1_000_001},
	} {
		dir := t.TempDir()
		j := open(t, dir, Options{})
		put(t, j, Event{Type: State}, Event{Type: State}, Event{Type: State})
		j.Close()
		name := filepath.Join(dir, segmentName(1))
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, tt.damage(b), 0o600); err != nil {
			t.Fatal(err)
		}
		j = open(t, dir, Options{})
		put(t, j, Event{Type: State})
		if j.Last() != tt.next {
			t.Errorf("%s: the next number is %d, want %d", tt.name, j.Last(), tt.next)
		}
		check(t, tt.name, Query{}, dir, tt.want...)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), []byte("{\"journal\":2,\"first\":1}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("a journal of a later version: %v", err)
	}
	dir = t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, segmentName(1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a FIFO: %v", err)
	}
}

// TestNumbersThatARecordKnows: what was cut off a journal, or removed with it, does not
// give its numbers to other events.
func TestNumbersThatARecordKnows(t *testing.T) {
	for name, damage := range map[string]func(string) error{
		"cut":     func(file string) error { return os.Truncate(file, 100) },
		"removed": os.Remove,
	} {
		dir := t.TempDir()
		j := open(t, dir, Options{})
		put(t, j, Event{Type: State}, Event{Type: State}, Event{Type: State})
		known := j.Last()
		put(t, j, Event{Type: State, Sandbox: "a", Rev: 1})
		j.Close()
		if err := damage(filepath.Join(dir, segmentName(1))); err != nil {
			t.Fatal(err)
		}
		j = open(t, dir, Options{})
		if j.Written("a", 1, known) {
			t.Errorf("%s: what is lost is said to be written", name)
		}
		put(t, j, Event{Type: State, Sandbox: "a", Rev: 1}, Event{Type: State})
		check(t, name, after(known), dir, known+bootGap+1, known+bootGap+2)
		if all, err := read(dir, Query{}); err != nil || len(all) < 2 {
			t.Errorf("%s: what is there: %v, %v", name, all, err)
		}
		if _, err := read(dir, after(1)); !errors.Is(err, ErrGap) {
			t.Errorf("%s: what is lost is not missed: %v", name, err)
		}
	}
}

func TestAnotherBootJumpsAhead(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{Boot: "one"})
	put(t, j, Event{Type: State}, Event{Type: State})
	j.Close()
	j = open(t, dir, Options{Boot: "two"})
	check(t, "nothing has happened since the boot", after(2), dir)
	put(t, j, Event{Type: State})
	const jumped = 2 + bootGap + 1
	check(t, "all", Query{}, dir, 1, 2, jumped)
	check(t, "after the last before the boot", after(2), dir, jumped)
	// A number that a power cut has taken back.
	check(t, "after one that is lost", after(17), dir, jumped)
	j.Close()
	j = open(t, dir, Options{Boot: "two"})
	put(t, j, Event{Type: State})
	check(t, "no boot, no jump", after(2), dir, jumped, jumped+1)
}

// TestTailsAfterABoot has sandboxes of which only an old segment tells.
func TestTailsAfterABoot(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{Boot: "one", segment: 500})
	put(t, j, Event{Type: State, Sandbox: "old", Rev: 1, To: "Ready"})
	for range 20 {
		put(t, j, Event{Type: State})
	}
	put(t, j, Event{Type: State, Sandbox: "new", Rev: 1, To: "Ready"})
	j.Close()
	seen := func(boot string) int {
		j = open(t, dir, Options{Boot: boot, segment: 500})
		defer j.Close()
		return len(j.Tails())
	}
	if n := seen("one"); n != 1 {
		t.Errorf("without a boot %d tails, want those of the last segment", n)
	}
	if n := seen("two"); n != 2 {
		t.Errorf("after a boot %d tails, want 2", n)
	}
	// Killed before it has told everything.
	j = open(t, dir, Options{Boot: "two", segment: 500})
	put(t, j, Event{Type: Removed, Sandbox: "new", Rev: 2})
	j.Close()
	if n := seen("two"); n != 2 {
		t.Errorf("before a daemon has begun %d tails, want 2", n)
	}
	j = open(t, dir, Options{Boot: "two", segment: 500})
	put(t, j, Event{Type: Daemon})
	j.Close()
	if n := seen("two"); n != 1 {
		t.Errorf("after a daemon has begun %d tails, want 1", n)
	}
}

func TestOldEventsAreDropped(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{segment: 500, Max: 3000})
	slow := &reader{dir: j.dir}
	defer slow.close()
	put(t, j, Event{Type: State})
	if err := slow.seek(Query{}); err != nil {
		t.Fatal(err)
	}
	if e, err := slow.next(); err != nil || e.Seq != 1 {
		t.Fatal(e, err)
	}
	for range 200 {
		put(t, j, Event{Type: State, Reason: strings.Repeat("x", 50)})
	}
	total := int64(0)
	ents, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ents {
		fi, _ := e.Info()
		total += fi.Size()
	}
	if total > 3500 || len(ents) < 4 {
		t.Errorf("%d segments with %d bytes", len(ents), total)
	}
	seqs, err := read(dir, Query{})
	if err != nil || seqs[len(seqs)-1] != 201 || uint64(len(seqs)) != 201-seqs[0]+1 {
		t.Fatalf("%v, %v", seqs, err)
	}
	var gap *GapError
	if _, err := read(dir, after(1)); !errors.As(err, &gap) || gap.First != seqs[0] || gap.Last != 201 {
		t.Errorf("after 1: %v, want a gap up to %d", err, seqs[0])
	}
	check(t, "after what the error says", after(seqs[0]-1), dir, seqs...)
	// The slow one reads to the end of what it has open, and is told then.
	for err = error(nil); err == nil; {
		_, err = slow.next()
	}
	if !errors.As(err, &gap) || gap.First != seqs[0] {
		t.Errorf("the slow reader gets %v", err)
	}
}

func TestWhatAnEarlierProcessHasWritten(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{segment: 600})
	tied := func(id string, rev uint64, typ Type, to string) (held uint64) {
		held, release := j.Hold()
		defer release()
		if err := j.Append(Event{Type: typ, Sandbox: id, Rev: rev, To: to}); err != nil {
			t.Fatal(err)
		}
		return held
	}
	old := tied("old", 1, State, "Creating")
	for range 20 {
		tied("other", 1, State, "Ready")
	}
	recent := tied("recent", 4, Exit, "Exited")
	tied("gone", 2, Removed, "")
	tied("recent", 5, OOM, "")
	last, release := j.Hold() // and is killed before it appends
	release()
	j.Close()
	j = open(t, dir, Options{segment: 600})
	for _, tt := range []struct {
		id         string
		rev, after uint64
		want       bool
	}{
		{"old", 1, old, true},
		{"recent", 4, recent, true},
		{"recent", 5, recent, true},
		{"recent", 6, last, false},
		{"old", 2, last, false},
		{"new", 1, last, false},
		{"new", 1, 10_000, false}, // of a journal that was removed
	} {
		if got := j.Written(tt.id, tt.rev, tt.after); got != tt.want {
			t.Errorf("Written(%s, %d, %d) = %v", tt.id, tt.rev, tt.after, got)
		}
	}
	if tail, ok := j.Tail("recent"); !ok || tail != (Tail{Sandbox: "recent", Rev: 5, State: "Exited"}) {
		t.Errorf("tail of recent is %+v, %v", tail, ok)
	}
	if tail, ok := j.Tail("gone"); !ok || !tail.Removed {
		t.Errorf("tail of gone is %+v, %v", tail, ok)
	}
}

// TestManyAtOnce has writers that fill segments while readers follow them.
func TestManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{segment: 2000, Max: 64 << 20})
	const writers, each, readers = 8, 200, 4
	var wg sync.WaitGroup
	for r := range readers {
		wg.Go(func() {
			wait := j.Wait
			if r%2 == 1 {
				w, err := Watch(dir)
				if err != nil {
					t.Error(err)
					return
				}
				defer w.Close()
				wait = w.Wait
			}
			want := uint64(1)
			for e, err := range Read(t.Context(), dir, Query{Follow: true}, wait) {
				if err != nil || e.Seq != want {
					t.Errorf("read %d, %v; want %d", e.Seq, err, want)
					return
				}
				if want++; want > writers*each {
					return
				}
			}
		})
	}
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				held, release := j.Hold()
				if err := j.Append(Event{Type: State, Sandbox: fmt.Sprint(w), Rev: uint64(i + 1)}); err != nil {
					t.Error(err)
				}
				if j.Last() <= held {
					t.Errorf("number %d after %d", j.Last(), held)
				}
				release()
			}
		})
	}
	wg.Wait()
	next := map[string]uint64{}
	for e, err := range Read(t.Context(), dir, Query{}, nil) {
		if next[e.Sandbox]++; err != nil || e.Rev != next[e.Sandbox] {
			t.Fatalf("event %+v, %v; want rev %d", e, err, next[e.Sandbox])
		}
	}
}

func TestFollowNew(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{})
	put(t, j, Event{Type: State})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waiting := make(chan struct{}, 1)
	got := make(chan Event)
	go func() {
		defer close(got)
		for e, err := range Read(ctx, dir, Query{New: true, Follow: true}, func(ctx context.Context, after uint64) error {
			select {
			case waiting <- struct{}{}:
			default:
			}
			return j.Wait(ctx, after)
		}) {
			if err != nil {
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				return
			}
			got <- e
		}
	}()
	<-waiting
	put(t, j, Event{Type: State})
	if e := <-got; e.Seq != 2 {
		t.Errorf("got %+v, want 2", e)
	}
	cancel()
	if e, ok := <-got; ok {
		t.Errorf("after the end: %+v", e)
	}
}

// TestFullDisk has a disk with room for a few events.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("journal-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	events := filepath.Join(dir, "events")
	j := open(t, events, Options{segment: 8 << 10, Max: 1 << 20})
	for range 400 { // more than there is room for: the oldest go
		put(t, j, Event{Type: State, Reason: strings.Repeat("x", 300)})
	}
	seqs, err := read(events, Query{})
	if err != nil || len(seqs) == 0 || seqs[len(seqs)-1] != 400 || seqs[0] == 1 {
		t.Fatalf("%v, %v", seqs, err)
	}
	// Now somebody else takes all of it.
	for _, name := range []string{"1", "2", "3"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		f.Close()
	}
	var failed error
	for i := 0; failed == nil && i < 400; i++ {
		_, release := j.Hold()
		failed = j.Append(Event{Type: State, Reason: strings.Repeat("y", 300)})
		release()
		for _, name := range []string{"4", "5"} { // what was given up is taken too
			if f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
				for err == nil {
					_, err = f.Write(make([]byte, 4096))
				}
				f.Close()
			}
		}
	}
	if !errors.Is(failed, unix.ENOSPC) || !j.Behind() {
		t.Fatalf("append on a full disk: %v, behind %v", failed, j.Behind())
	}
	had := j.Last()
	check(t, "nothing torn", after(had), events)
	_, release := j.Hold()
	j.Append(Event{Type: State, Sandbox: "second"})
	release()
	for _, name := range []string{"1", "2", "3", "4", "5"} {
		os.Remove(filepath.Join(dir, name))
	}
	put(t, j, Event{Type: State, Sandbox: "third"})
	check(t, "what waited comes first", after(had), events, had+1, had+2, had+3)
	if j.Behind() {
		t.Error("still behind")
	}
}

// A disk that is full when the host starts is no different.
func TestFullDiskAtTheStart(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("journal-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	events := filepath.Join(dir, "events")
	j := open(t, events, Options{segment: 8 << 10})
	for range 80 {
		put(t, j, Event{Type: State, Reason: strings.Repeat("x", 300)})
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "1"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	j = open(t, events, Options{segment: 8 << 10, Boot: "another"})
	had := j.Last()
	if had != 80 {
		t.Fatalf("the last event is %d, not 80", had)
	}
	put(t, j, Event{Type: State})
	seqs, err := read(events, Query{})
	if err != nil || seqs[0] == 1 || !slices.Contains(seqs, 80) || seqs[len(seqs)-1] != 80+bootGap+1 {
		t.Errorf("%v, %v", seqs, err)
	}
}

// TestWhatCannotBeWrittenIsTriedAgain leaves that to the journal itself.
func TestWhatCannotBeWrittenIsTriedAgain(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{})
	put(t, j, Event{Type: State})
	good := j.f
	bad, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	j.mu.Lock()
	j.f = bad
	j.mu.Unlock()
	_, release := j.Hold()
	if err := j.Append(Event{Type: State}); err == nil {
		t.Error("written to a file that is open for reading")
	}
	release()
	j.mu.Lock()
	j.f = good
	j.retry.Reset(0)
	j.mu.Unlock()
	if err := j.Wait(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	check(t, "all", Query{}, dir, 1, 2)
}

func TestLongLines(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir, Options{})
	put(t, j, Event{Type: Hook, Reason: strings.Repeat("r", 1<<20), Attrs: map[string]string{"output": strings.Repeat("o", 1<<20)}})
	for e, err := range Read(t.Context(), dir, Query{}, nil) {
		if err != nil || len(e.Reason) != 1024 || e.Attrs["truncated"] != "true" {
			t.Errorf("%d bytes of reason, %v, %v", len(e.Reason), e.Attrs, err)
		}
	}
}

func TestNilJournal(t *testing.T) {
	var j *Journal
	_, release := j.Hold()
	defer release()
	if err := j.Append(Event{}); err != nil || j.Behind() || !j.Written("x", 1, 0) || j.Last() != 0 || j.Close() != nil {
		t.Error("a nil journal does something")
	}
	j.Recovered()
}

func FuzzScan(f *testing.F) {
	f.Add([]byte("{\"journal\":1,\"first\":1,\"prev\":0,\"boot\":\"b\"}\n{\"seq\":1,\"time\":\"2026-01-01T00:00:00Z\",\"type\":\"state\"}\n"))
	f.Add([]byte("\n\n{\"seq\":3}\n{\"seq\":2}\n{\"seq\":18446744073709551615}\n"))
	f.Add([]byte("{\"seq\":5"))
	f.Fuzz(func(t *testing.T, b []byte) {
		seen := uint64(0)
		s, err := scan(bytes.NewReader(b), 1, func(e *Event) {
			if e.Seq <= seen {
				t.Errorf("%d after %d", e.Seq, seen)
			}
			seen = e.Seq
		})
		if err != nil {
			return
		}
		if s.end > int64(len(b)) || seen > 0 && s.last != seen {
			t.Errorf("%+v of %d bytes, last seen %d", s, len(b), seen)
		}
		// What is kept is the same when it is read again.
		again, err := scan(bytes.NewReader(b[:s.end]), 1, nil)
		if s.end > 0 && (err != nil || again.last != s.last || again.end != s.end) {
			t.Errorf("again %+v, %v; first %+v", again, err, s)
		}
	})
}

// BenchmarkAppend is what an event costs an operation.
func BenchmarkAppend(b *testing.B) {
	j := open(b, b.TempDir(), Options{})
	e := Event{Time: time.Now(), Type: State, Sandbox: "a5e2f18065b00463", SandboxName: "web", Rev: 3, From: "Creating", To: "Ready"}
	for b.Loop() {
		put(b, j, e)
	}
}
