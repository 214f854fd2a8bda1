package poller_test

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/poller"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T) *poller.Poller {
	t.Helper()
	p, err := poller.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// pipe returns the ends of a pipe that the runtime's poller does not wait for.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r, w = os.NewFile(uintptr(fds[0]), "r"), os.NewFile(uintptr(fds[1]), "w")
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// wait fails the test if ok does not become true.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

func TestWatch(t *testing.T) {
	testenv.NoFDLeak(t)
	p := open(t)
	r, w := pipe(t)
	got := make(chan string, 10)
	watch, err := p.Watch(r, func() bool {
		b := make([]byte, 1) // each message is called for, though more is there
		n, err := r.Read(b)
		got <- fmt.Sprint(string(b[:n]), err)
		return err == nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"ab", "c"} {
		if _, err := w.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	for _, want := range []string{"a<nil>", "b<nil>", "c<nil>", "EOF"} {
		select {
		case s := <-got:
			if s != want {
				t.Errorf("called with %q, want %q", s, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not called for %q", want)
		}
	}
	if watch.Stop() {
		t.Error("the watch goes on after its function has returned false")
	}
}

// What is ready at the same time may be stopped by whoever is called first, and the
// number of its descriptor be another's by then.
func TestStop(t *testing.T) {
	p := open(t)
	for range 200 {
		r, w := pipe(t)
		var calls atomic.Int32
		watch, err := p.Watch(r, func() bool { calls.Add(1); return true })
		if err != nil {
			t.Fatal(err)
		}
		go w.WriteString("x")
		runtime.Gosched()
		if !watch.Stop() {
			t.Fatal("the watch had ended before it was stopped")
		}
		n := calls.Load()
		if watch.Stop() {
			t.Fatal("the watch was stopped twice")
		}
		r2, w2 := pipe(t)
		defer w2.Close()
		second, err := p.Watch(r2, func() bool { calls.Add(1000); return true })
		if err != nil {
			t.Fatal(err)
		}
		second.Stop()
		if now := calls.Load(); now != n {
			t.Fatalf("called %d times after Stop", now-n)
		}
		r.Close()
	}
}

// The kernel goes on waiting for a descriptor that is closed here, if it has been
// duplicated.
func TestStopBeforeClose(t *testing.T) {
	p := open(t)
	r, w := pipe(t)
	dup, err := unix.FcntlInt(r.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	watch, err := p.Watch(r, func() bool { t.Error("called for what is not watched"); return true })
	if err != nil {
		t.Fatal(err)
	}
	watch.Stop()
	r.Close()
	w.WriteString("x")

	r2, w2 := pipe(t)
	var called atomic.Bool
	if _, err := p.Watch(r2, func() bool { called.Store(true); return false }); err != nil {
		t.Fatal(err)
	}
	w2.WriteString("x")
	wait(t, "call", called.Load)
}

func TestMany(t *testing.T) {
	p := open(t)
	before := runtime.NumGoroutine()
	var calls atomic.Int32
	var ends []*os.File
	for range 300 {
		r, w := pipe(t)
		ends = append(ends, w)
		if _, err := p.Watch(r, func() bool { calls.Add(1); return false }); err != nil {
			t.Fatal(err)
		}
	}
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines, %d before", n, before)
	}
	for _, w := range ends {
		w.Close()
	}
	wait(t, "all ends", func() bool { return calls.Load() == 300 })
}

func TestCannotBeWatched(t *testing.T) {
	p := open(t)
	f, err := os.Open("/proc/self/status") // a file of a kind that is always ready
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := p.Watch(f, func() bool { return false }); !errors.Is(err, unix.EPERM) {
		t.Errorf("Watch = %v, want EPERM", err)
	}
	r, _ := pipe(t)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Watch(r, func() bool { return false }); err == nil {
		t.Error("Watch after Close succeeded")
	}
}
