package procid

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	const rest = " 1 3 3 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 1 0 987654321 8192 0 18446744073709551615"
	for _, tt := range []struct {
		name, text string
		want       stat
		ok         bool
	}{
		{"plain", "7 (sleep) S" + rest, stat{'S', 1, 987654321}, true},
		{"a name like a status", "7 (a) S 2 3) R" + rest, stat{'R', 1, 987654321}, true},
		{"zombie", "7 (x) Z" + rest, stat{'Z', 1, 987654321}, true},
		{"empty", "", stat{}, false},
		{"cut off", "7 (sleep) S 1 3 3", stat{}, false},
		{"no number", "7 (sleep) S x 3", stat{}, false},
		{"two letters", "7 (sleep) SS" + rest, stat{}, false},
	} {
		got, err := parseStat([]byte(tt.text))
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%s: parseStat = %v, %v, want %v", tt.name, got, err, tt.want)
		}
	}
}

func TestAlive(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := ID{id.PID, id.Start + 1}
	if !id.Alive() || other.Alive() {
		t.Errorf("alive: %t, and with another start time %t", id.Alive(), other.Alive())
	}
	if ppid, err := id.Parent(); err != nil || ppid != os.Getpid() {
		t.Errorf("Parent = %d, %v, want %d", ppid, err, os.Getpid())
	}
	cmd.Process.Kill()
	cmd.Wait()
	if id.Alive() {
		t.Error("alive after it was reaped")
	}
	if _, err := id.Parent(); !errors.Is(err, ErrGone) {
		t.Errorf("Parent = %v, want ErrGone", err)
	}
}

// The pid of a process that has been reaped may be a thread's of another one.
func TestPIDOfAThread(t *testing.T) {
	tids, done := make(chan int), make(chan struct{})
	defer close(done)
	for range 2 { // one of them may have the first thread, which is a process too
		go func() {
			runtime.LockOSThread()
			tids <- unix.Gettid()
			<-done
		}()
	}
	thread := <-tids
	if other := <-tids; thread == os.Getpid() {
		thread = other
	}
	if _, err := (ID{thread, 1}).Open(); !errors.Is(err, ErrGone) {
		t.Errorf("Open = %v, want ErrGone", err)
	}
	if _, err := Pidfd(thread); !errors.Is(err, ErrGone) {
		t.Errorf("Pidfd = %v, want ErrGone", err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (sleep) S 1 3 3 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 1 0 987654321 8192"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if st, err := parseStat(b); err != nil && st != (stat{}) {
			t.Errorf("parseStat(%q) = %v with an error", b, st)
		}
	})
}

func BenchmarkAlive(b *testing.B) {
	id, err := Of(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		id.Alive()
	}
}
