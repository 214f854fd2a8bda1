package main

import (
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

func TestReaperScan(t *testing.T) {
	start := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	alive := start("sleep", "100")
	defer func() { alive.Process.Kill(); alive.Wait() }()
	r := &reaper{expected: map[int]procid.ID{}}
	if z := r.scan(nil); len(z) != 0 {
		t.Fatalf("zombies %v before anybody has ended", z)
	}
	if n := testing.AllocsPerRun(10, func() { r.scan(nil) }); n > 3 {
		t.Errorf("a look at children that live makes %v allocations, as if each were looked at", n)
	}
	ended := func() procid.ID {
		cmd := start("true")
		id, err := procid.Of(cmd.Process.Pid)
		for end := time.Now().Add(10 * time.Second); err == nil && id.Alive(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("true does not end")
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	init, other := ended(), ended()
	r.expect(init)
	before := r.scan(nil)
	if len(before) != 1 || !before[other] {
		t.Fatalf("new zombies: %v, want %v alone: %v is expected", before, other, init)
	}
	if again := r.scan(before); len(again) != 0 {
		t.Errorf("new zombies: %v, want none", again)
	}
	if _, err := procid.Of(other.PID); err == nil {
		t.Errorf("%v is not reaped", other)
	}
	var st syscall.WaitStatus
	if pid, err := syscall.Wait4(init.PID, &st, unix.WNOHANG, nil); pid != init.PID || err != nil {
		t.Errorf("the status of %v is gone: %v", init, err)
	}
}

// TestReaper has children that nobody waits for end one after the other, as the
// reaper is told of one for many.
func TestReaper(t *testing.T) {
	r := newReaper()
	defer r.close()
	for n := range 3 {
		cmd := exec.Command("true")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		id, err := procid.Of(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if now, err := procid.Of(id.PID); err != nil || now != id {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("child %d is not reaped", n)
			}
		}
	}
}
