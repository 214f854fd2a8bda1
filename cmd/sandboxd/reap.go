package main

import (
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

// reaper waits for the children that nobody else waits for: the daemon is a
// subreaper, so whatever a killed monitor or member leaves behind becomes its
// child. Everybody who starts a process waits for it by its pidfd, at once when
// it ends; what is still a zombie a while later is the reaper's.
type reaper struct {
	stop chan struct{}
	done sync.WaitGroup

	mu       sync.Mutex
	expected map[int]procid.ID // inits, whose status matters; guarded by mu
}

// reapDelay is how long a zombie is left to whoever may be waiting for it.
const reapDelay = time.Second

func newReaper() *reaper {
	r := &reaper{stop: make(chan struct{}), expected: make(map[int]procid.ID)}
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	r.done.Go(func() {
		defer signal.Stop(chld)
		var before map[procid.ID]bool // zombies that were there a delay ago
		var again <-chan time.Time
		for {
			select {
			case <-r.stop:
				return
			case <-chld:
				// The first of many: until they are looked for, the next need
				// wake nobody.
				signal.Stop(chld)
				again = time.After(reapDelay)
			case <-again:
				again = nil
				signal.Notify(chld, unix.SIGCHLD) // before the look: none ends unseen
				if before = r.scan(before); len(before) > 0 {
					signal.Stop(chld)
					again = time.After(reapDelay)
				}
			}
		}
	})
	return r
}

func (r *reaper) close() {
	close(r.stop)
	r.done.Wait()
}

// expect leaves init to those who want its wait status, until forget.
func (r *reaper) expect(init procid.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expected[init.PID] = init
}

func (r *reaper) forget(init procid.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.expected[init.PID] == init {
		delete(r.expected, init.PID)
	}
}

// scan reaps the zombies of before and returns those that are new.
func (r *reaper) scan(before map[procid.ID]bool) map[procid.ID]bool {
	zombies := make(map[procid.ID]bool)
	if !anyZombie() {
		return zombies
	}
	for _, pid := range children() {
		id, err := procid.Of(pid)
		if err != nil || id.Alive() {
			continue
		}
		r.mu.Lock()
		_, expected := r.expected[pid]
		r.mu.Unlock()
		switch {
		case expected:
		case before[id]:
			unix.Wait4(pid, nil, unix.WNOHANG, nil) // it is our zombie: its pid is nobody else's
		default:
			zombies[id] = true
		}
	}
	return zombies
}

// anyZombie reports whether a child waits to be reaped. To ask each of them takes
// milliseconds if there are a thousand, of which nearly all live.
func anyZombie() bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil)
	return err != nil && !errors.Is(err, unix.ECHILD) || info.Signo != 0
}

// children lists the children of this process (proc_pid_children(5)).
func children() []int {
	var pids []int
	files, _ := filepath.Glob("/proc/self/task/*/children")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		for s := range strings.FieldsSeq(string(text)) {
			if pid, err := strconv.Atoi(s); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// waitPidfd waits for the end of a child and reaps it. It fails with ECHILD at
// once if the process is not a child of this one.
func waitPidfd(pidfd *os.File, st *unix.WaitStatus, ru *unix.Rusage) error {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PIDFD, int(pidfd.Fd()), &info, unix.WEXITED, ru)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	// struct siginfo of SIGCHLD, after three ints and padding to a pointer's
	// size: si_pid, si_uid, si_status (sigaction(2)).
	status := *(*int32)(unsafe.Add(unsafe.Pointer(&info), 16+8))
	const cldExited, cldDumped = 1, 3
	switch info.Code {
	case cldExited:
		*st = unix.WaitStatus(status << 8)
	case cldDumped:
		*st = unix.WaitStatus(status | 0x80)
	default:
		*st = unix.WaitStatus(status)
	}
	return nil
}
