package netsetup

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/network"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errPlugin = errors.New("the plugin says no")

// fakeDriver has its networks in a map. It does not end with a Store.
type fakeDriver struct {
	mu       sync.Mutex
	attached map[string]string // plans by id
	detach   error             // what Detach fails with
	hang     bool              // Detach with a namespace waits for its context
	stuck    chan struct{}     // not nil: Detach without one says that it is called, and waits for its context
	calls    []string          // of Detach: ID, and " ns" with a namespace
	live     []string          // ids that GC was shown
}

func (d *fakeDriver) Plan(_ context.Context, id string, req *network.Request) (json.RawMessage, error) {
	if req.Isolated {
		return nil, ErrInvalid
	}
	return json.RawMessage(`"plan of ` + id + `"`), nil
}

func (d *fakeDriver) Attach(_ context.Context, id string, plan json.RawMessage, _ *os.File) (*network.Result, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.attached[id] = string(plan)
	return &network.Result{Networks: []network.Attachment{{Name: "n"}}}, nil
}

func (d *fakeDriver) Detach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error {
	d.mu.Lock()
	call := id
	if ns != nil {
		call += " ns"
	}
	d.calls = append(d.calls, call)
	hang := d.hang && ns != nil
	if d.stuck != nil && ns == nil {
		hang = true
		d.stuck <- struct{}{}
	}
	d.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.detach != nil {
		return d.detach
	}
	if got, ok := d.attached[id]; ok && got != string(plan) {
		return errors.New("another plan: " + string(plan))
	}
	delete(d.attached, id)
	return nil
}

func (d *fakeDriver) Forget(_ context.Context, id string, _ json.RawMessage) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.attached, id)
	return nil
}
func (d *fakeDriver) Verify(context.Context, string, json.RawMessage, *os.File) error  { return nil }
func (d *fakeDriver) Restore(context.Context, string, json.RawMessage, *os.File) error { return nil }
func (d *fakeDriver) Status(context.Context) error                                     { return nil }
func (d *fakeDriver) Close() error                                                     { return nil }

func (d *fakeDriver) GC(_ context.Context, live func() map[string]json.RawMessage, _ bool) ([]garbage.Finding, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.live = nil
	for id := range live() {
		d.live = append(d.live, id)
	}
	slices.Sort(d.live)
	return []garbage.Finding{{Kind: garbage.Lease, Name: "10.0.0.9"}}, nil
}

func (d *fakeDriver) set(err error, hang bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.detach, d.hang = err, hang
}

func (d *fakeDriver) empty() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.attached) > 0 {
		return errors.New("networks are still there")
	}
	return nil
}

type fixture struct {
	*testing.T
	dir     string
	d       *fakeDriver
	s       *Store
	retries chan error
	back    atomic.Int64 // by how much the clock was set back
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{T: t, dir: t.TempDir(), d: &fakeDriver{attached: map[string]string{}}}
	f.open()
	t.Cleanup(func() { f.s.Close() })
	return f
}

// open opens the store, as a daemon does that was started again.
func (f *fixture) open() {
	f.Helper()
	f.retries = make(chan error, 1000)
	retries := f.retries
	s, err := Open(f.dir, map[network.Mode]Driver{network.ModeCNI: f.d}, Options{
		DetachTimeout: 10 * time.Millisecond, RetryMin: time.Millisecond, RetryMax: 4 * time.Millisecond,
		Tried: func(_ Tombstone, err error) { retries <- err },
		Now:   func() time.Time { return time.Now().Add(-time.Duration(f.back.Load())) },
	})
	if err != nil {
		f.Fatal(err)
	}
	f.s = s
}

func (f *fixture) reopen() {
	f.Helper()
	if err := f.s.Close(); err != nil {
		f.Fatal(err)
	}
	f.open()
}

func (f *fixture) attach(id string) {
	f.Helper()
	plan, err := f.s.Plan(f.Context(), id, network.ModeCNI, &network.Request{})
	if err == nil {
		_, err = f.s.Attach(f.Context(), id, "name-"+id, network.ModeCNI, plan, nil)
	}
	if err != nil {
		f.Fatal(err)
	}
}

// files are the records on disk.
func (f *fixture) files() string {
	f.Helper()
	ents, err := os.ReadDir(filepath.Join(f.dir, attachmentsDir))
	if err != nil {
		f.Fatal(err)
	}
	var names []string
	for _, e := range ents {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func (f *fixture) soon(ok func() error) {
	f.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			f.Fatal(err)
		}
	}
}

func (f *fixture) noTombstones() error {
	if ts := f.s.Tombstones(); len(ts) > 0 {
		return errors.New("tombstones are left")
	}
	return f.d.empty()
}

func TestAttachAndDetach(t *testing.T) {
	f := newFixture(t)
	if _, err := f.s.Plan(t.Context(), "a", network.ModeBuiltin, &network.Request{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a mode without a driver: %v", err)
	}
	f.attach("a")
	f.attach("b")
	if got := f.files(); got != "a.json b.json" {
		t.Errorf("on record: %s", got)
	}
	f.reopen() // what is needed for a detach has been kept
	ns := os.Stdin
	if tomb, err := f.s.Detach(t.Context(), "a", ns); tomb || err != nil {
		t.Errorf("detach: %v, %v", tomb, err)
	}
	if got := f.files(); got != "b.json" {
		t.Errorf("on record: %s", got)
	}
	if tomb, err := f.s.Detach(t.Context(), "a", nil); tomb || err != nil {
		t.Errorf("second detach: %v, %v", tomb, err)
	}
	if got := strings.Join(f.d.calls, ","); got != "a ns" {
		t.Errorf("the driver was called for %s", got)
	}
	if n, _ := f.s.Counts(); n[network.ModeCNI] != 1 {
		t.Errorf("counts %v", n)
	}
}

func TestTombstone(t *testing.T) {
	for _, tt := range []struct {
		name string
		hang bool
		want string
	}{
		{"fails", false, "the plugin says no"},
		{"hangs", true, "it took longer than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			f.attach("a")
			f.d.set(errPlugin, tt.hang)
			if tomb, err := f.s.Detach(t.Context(), "a", os.Stdin); !tomb || err != nil {
				t.Fatalf("detach: %v, %v", tomb, err)
			}
			if err := <-f.retries; err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("told of %v, want %q", err, tt.want)
			}
			ts := f.s.Tombstones()
			if len(ts) != 1 || ts[0].ID != "a" || ts[0].Name != "name-a" || ts[0].Attempts < 1 || ts[0].LastError == "" || ts[0].Since.IsZero() {
				t.Fatalf("tombstones: %+v", ts)
			}
			for range 3 { // it is tried again, without the namespace, which is gone
				if err := <-f.retries; !errors.Is(err, errPlugin) {
					t.Fatalf("told of %v", err)
				}
			}
			before := f.s.Tombstones()[0].Attempts
			f.reopen()
			if ts := f.s.Tombstones(); len(ts) != 1 || ts[0].Attempts < before {
				t.Fatalf("after a restart: %+v, and there were %d attempts before", ts, before)
			}
			if got := f.files(); got != "a.json" {
				t.Errorf("on record: %s", got)
			}
			f.s.Settle(func(string) bool { return true })
			<-f.retries
			f.d.set(nil, false)
			f.soon(f.noTombstones)
			if got := f.files(); got != "" {
				t.Errorf("on record: %s", got)
			}
			if f.d.calls[0] != "a ns" || slices.Contains(f.d.calls[1:], "a ns") {
				t.Errorf("the driver was called for %q", f.d.calls)
			}
		})
	}
}

// After a reboot there are no sandboxes, and the networks of all that there were
// are taken down.
// A tombstone is forgotten while it waits, and while it is being tried.
func TestForget(t *testing.T) {
	for _, tried := range []bool{false, true} {
		f := newFixture(t)
		const id = "0123456789abcdef"
		if _, err := f.s.Attach(t.Context(), id, "box", network.ModeCNI, json.RawMessage(`"p"`), nil); err != nil {
			t.Fatal(err)
		}
		if _, err := f.s.Forget(id); !errors.Is(err, ErrNoTombstone) {
			t.Errorf("a network that is in use is forgotten: %v", err)
		}
		f.d.set(errPlugin, false)
		if tried {
			f.d.stuck = make(chan struct{}, 1000)
			f.s.o.RetryMin = 20 * time.Millisecond
		}
		if tomb, err := f.s.Detach(t.Context(), id, os.Stdin); !tomb || err != nil {
			t.Fatal(tomb, err)
		}
		if tried {
			<-f.d.stuck
		}
		got, err := f.s.Forget(id)
		if err != nil || got.ID != id || got.Name != "box" || got.LastError != errPlugin.Error() {
			t.Errorf("forgotten %+v, %v", got, err)
		}
		if _, err := f.s.Forget(id); !errors.Is(err, ErrNoTombstone) {
			t.Errorf("forgotten twice: %v", err)
		}
		f.reopen() // waits for the attempt
		if ts := f.s.Tombstones(); len(ts) > 0 {
			t.Errorf("tombstones %+v", ts)
		}
		if err := f.d.empty(); err != nil {
			t.Error(err)
		}
	}
}

// With a clock that was set back, by a daemon that starts or while one runs, the next
// attempt is not as far away as the clock says.
func TestClockSetBack(t *testing.T) {
	for _, restart := range []bool{true, false} {
		f := newFixture(t)
		f.attach("a")
		f.d.set(errPlugin, false)
		if tomb, err := f.s.Detach(t.Context(), "a", os.Stdin); !tomb || err != nil {
			t.Fatal(tomb, err)
		}
		f.back.Store(int64(time.Hour))
		if restart {
			f.reopen()
			f.s.Settle(func(string) bool { return false })
		}
		f.d.set(nil, false)
		f.soon(f.d.empty)
	}
}

func TestSettle(t *testing.T) {
	f := newFixture(t)
	for _, id := range []string{"a", "b", "c"} {
		f.attach(id)
	}
	f.reopen()
	f.s.Settle(func(id string) bool { return id == "b" })
	f.soon(func() error {
		f.d.mu.Lock()
		defer f.d.mu.Unlock()
		if len(f.d.attached) != 1 || f.d.attached["b"] == "" {
			return errors.New("not what lives alone")
		}
		return nil
	})
	f.soon(func() error {
		if got := f.files(); got != "b.json" {
			return errors.New("on record: " + got)
		}
		return nil
	})
	if err := f.s.Verify(t.Context(), "b", nil); err != nil {
		t.Error(err)
	}
	if err := f.s.Verify(t.Context(), "a", nil); err == nil {
		t.Error("a network that is gone is as it was made")
	}
}

func TestRecordsThatCannotBeRead(t *testing.T) {
	f := newFixture(t)
	f.attach("good")
	good, err := os.ReadFile(filepath.Join(f.dir, "attachments/good.json"))
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string]string{
		"empty.json": "", "torn.json": string(good[:len(good)/2]), "other.json": string(good),
		"mode.json": `{"version":1,"id":"mode","mode":"x","state":"held"}`, "version.json": `{"version":2,"id":"version","mode":"cni","state":"held"}`,
		"state.json": `{"version":1,"id":"state","mode":"cni","state":"?"}`,
	}
	for name, text := range bad {
		if err := os.WriteFile(filepath.Join(f.dir, "attachments", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(f.dir, "attachments/good.json.tmp"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	if got := f.files(); got != "good.json" {
		t.Errorf("on record: %s", got)
	}
	aside, err := os.ReadDir(filepath.Join(f.dir, quarantineDir))
	if err != nil || len(aside) != len(bad) {
		t.Errorf("set aside: %v, %v", aside, err)
	}
}

func TestGC(t *testing.T) {
	f := newFixture(t)
	f.s.o.RetryMin, f.s.o.RetryMax = time.Hour, time.Hour
	f.attach("alive")
	f.attach("dead")
	f.d.set(errPlugin, false)
	if tomb, err := f.s.Detach(t.Context(), "dead", nil); !tomb || err != nil {
		t.Fatal(tomb, err)
	}
	const reason = "the sandbox name-dead is gone and its cni network could not be taken down yet"
	other := errors.New("the plugin says no again")
	for _, tt := range []struct {
		dry    bool
		detach error
		action string
		err    string
	}{
		{true, nil, garbage.WouldRetry, errPlugin.Error()},
		{false, other, garbage.Retried, other.Error()}, // of this attempt, not of the one before
		{false, nil, garbage.Removed, ""},
	} {
		f.d.set(tt.detach, false)
		found, err := f.s.GC(t.Context(), tt.dry)
		if err != nil || len(found) != 2 || found[0].Kind != garbage.Lease {
			t.Fatalf("found %+v, %v", found, err)
		}
		found[1].Since = time.Time{}
		if want := (garbage.Finding{Kind: garbage.Tombstone, Name: "dead", Reason: reason, Action: tt.action, Err: tt.err}); found[1] != want {
			t.Errorf("found %+v, want %+v", found[1], want)
		}
		// What waits to be taken down is not the driver's to collect.
		if got := strings.Join(f.d.live, ","); got != "alive,dead" {
			t.Errorf("live: %s", got)
		}
	}
	if left := f.s.Tombstones(); len(left) > 0 {
		t.Errorf("tombstones %+v", left)
	}
}

// Who collects garbage does not wait for a plugin that hangs.
func TestGCDoesNotWaitForLong(t *testing.T) {
	f := newFixture(t)
	f.s.o.RetryMin, f.s.o.RetryMax = time.Hour, time.Hour
	f.attach("dead")
	f.d.set(errPlugin, false)
	if tomb, err := f.s.Detach(t.Context(), "dead", nil); !tomb || err != nil {
		t.Fatal(tomb, err)
	}
	f.d.mu.Lock()
	f.d.stuck = make(chan struct{}, 1)
	f.d.mu.Unlock()
	begin := time.Now()
	found, err := f.s.GC(t.Context(), false)
	if err != nil || len(found) != 2 || found[1].Action != garbage.Retried || found[1].Err != "" || !strings.HasSuffix(found[1].Reason, "; it is being tried") {
		t.Errorf("found %+v, %v", found, err)
	}
	if took := time.Since(begin); took > retryTimeout/2 {
		t.Errorf("it took %s", took)
	}
}

// A pause doubles, and is bounded.
func TestDelay(t *testing.T) {
	s := &Store{o: Options{RetryMin: time.Second, RetryMax: 5 * time.Minute}}
	for n, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 5: 16 * time.Second, 9: 256 * time.Second, 10: 5 * time.Minute, 1000: 5 * time.Minute} {
		if got := s.delay(n); got != want {
			t.Errorf("after %d attempts: %s, want %s", n, got, want)
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"a","mode":"cni","state":"held","plan":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, attachmentsDir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, attachmentsDir, "a.json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir, map[network.Mode]Driver{network.ModeCNI: &fakeDriver{}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for id := range s.entries {
			if id != "a" {
				t.Errorf("%q is that of %q", data, id)
			}
		}
	})
}
