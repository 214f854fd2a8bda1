//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
)

// soakFor is how long TestSoak lasts, without its end. `make soak` sets it.
func soakFor(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("SANDBOXD_SOAK")
	if text == "" {
		return 15 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("SANDBOXD_SOAK: %v", err)
	}
	return d
}

const (
	soakWorkers = 3 // each with a sandbox of its own
	// A third of the time nobody is killed, so that the daemon lives long enough for
	// what grows in it to be seen.
	soakCalm = 3
)

// TestSoak does what users do, at random and at the same time, while somebody
// kills daemons, pauses and monitors; and keeps a model of what must be true:
//
//   - a member that was created is there until it is removed, and has its exit
//     record when it has ended: with the code of its command, or 137 if it was
//     killed, or unknown if its monitor was;
//   - what was declared to happen after the exit has happened;
//   - no two sandboxes have one address;
//   - events have numbers without gaps, and tell each sandbox's and member's life
//     without gaps: every state follows the one before;
//   - at the end nothing is left;
//   - descriptors, goroutines and memory of the daemon do not grow.
//
// SANDBOXD_SOAK_SEED repeats the choices of a run, though not its timing.
func TestSoak(t *testing.T) {
	t.Parallel()
	r := newNetRig(t).rig
	r.d.flags = append(r.d.flags, "--metrics-address", "unix://"+r.d.state+"/metrics", "--gc-interval", "2s")
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("SANDBOXD_SOAK_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SANDBOXD_SOAK_SEED=%d", seed)
	s := newSoak(r, seed)
	r.mustServe()

	total := soakFor(t)
	s.run(total-total/soakCalm, true)
	// One daemon: first it opens what it keeps, then it must not grow.
	s.run(total/soakCalm/3, false)
	s.removeAll()
	before := s.atRest(nil)
	s.run(total/soakCalm*2/3, false)
	s.removeAll()
	if list := r.list(); len(list) != 0 {
		t.Errorf("%d sandboxes are left: %v", len(list), list)
	}
	s.checkFlat(before)
	s.checkEvents()
	s.checkHooks()
	t.Logf("%d operations, %d refused; %d members, %d exits were looked at; killed: %d daemons, %d pauses, %d monitors",
		s.ops.Load(), s.refused.Load(), s.started.Load(), s.waited.Load(), s.daemons, s.pauses, s.monitors)
	if s.waited.Load() == 0 || s.daemons == 0 || s.pauses+s.monitors == 0 {
		t.Error("that was no soak")
	}
}

type soak struct {
	*rig
	seed      uint64
	hookLog   string
	hook      string
	sandboxes []string

	ops, refused, started, waited atomic.Int64
	daemons, pauses, monitors     int

	mu        sync.Mutex
	hooked    map[string]bool   // ids of members with a hook whose exit was seen; guarded by mu
	addresses map[string]string // sandboxes by address; guarded by mu
	failed    atomic.Bool
}

// soakSample is what the daemon uses while it has nothing.
type soakSample struct{ fds, goroutines, memory float64 }

func newSoak(r *rig, seed uint64) *soak {
	r.Helper()
	dir := r.TempDir()
	s := &soak{rig: r, seed: seed, hookLog: filepath.Join(dir, "hooked"), hook: filepath.Join(dir, "hook"), hooked: map[string]bool{}, addresses: map[string]string{}}
	// One write a line, so that lines of several hooks do not mix.
	script := "#!/bin/sh\nprintf '%s\\n' \"$(tr -d '\\n')\" >>" + s.hookLog + "\n"
	if err := os.WriteFile(s.hook, []byte(script), 0o700); err != nil {
		r.Fatal(err)
	}
	for i := range soakWorkers {
		s.sandboxes = append(s.sandboxes, fmt.Sprint("soak", i))
	}
	return s
}

// run lets workers work for that long, and with chaos somebody kill.
func (s *soak) run(d time.Duration, chaos bool) {
	end := time.Now().Add(d)
	over := func() bool { return time.Now().After(end) || s.failed.Load() }
	var wg sync.WaitGroup
	for i, name := range s.sandboxes {
		random := rand.New(rand.NewPCG(s.seed, uint64(i)))
		wg.Go(func() {
			w := &worker{soak: s, box: name, random: random, chaos: chaos, members: map[string]*soakMember{}}
			for !over() {
				w.round()
			}
		})
	}
	if chaos {
		s.kill(rand.New(rand.NewPCG(s.seed, 77)), over)
	}
	wg.Wait()
	if chaos && !s.running() {
		s.mustServe()
	}
}

// kill kills daemons, pauses and monitors until it is over.
func (s *soak) kill(random *rand.Rand, over func() bool) {
	for !over() {
		time.Sleep(time.Duration(100+random.IntN(500)) * time.Millisecond)
		switch random.IntN(5) {
		case 0, 1:
			s.rig.kill()
			s.daemons++
			time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
			s.mustServe()
		case 2:
			if pid := s.pid(random, "pause"); pid != 0 && unix.Kill(pid, unix.SIGKILL) == nil {
				s.pauses++
			}
		default:
			if pid := s.pid(random, "monitor"); pid != 0 && unix.Kill(pid, unix.SIGKILL) == nil {
				s.monitors++
			}
		}
	}
}

// pid is that of a pause or monitor of one of the sandboxes, or 0.
func (s *soak) pid(random *rand.Rand, what string) int {
	var pids []int
	for _, box := range s.list() { // from the state directory, if there is no daemon
		if what == "pause" && box.PausePID > 0 {
			pids = append(pids, box.PausePID)
		}
		for _, m := range box.Members {
			if what == "monitor" && m.MonitorPID > 0 {
				pids = append(pids, m.MonitorPID)
			}
		}
	}
	if len(pids) == 0 {
		return 0
	}
	pid := pids[random.IntN(len(pids))]
	// It may have ended since, and the pid be somebody else's.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.HasPrefix(b, []byte("sandboxd-"+what+"\x00")) {
		return 0
	}
	return pid
}

func (s *soak) errorf(format string, args ...any) {
	s.Errorf(format, args...)
	s.failed.Store(true)
}

// What an operation may be answered with while everything is killed around it.
var soakRefusals = regexp.MustCompile(strings.Join([]string{
	`no daemon answers`, `connection (error|reset|refused)`, `error reading from server`, `\bEOF\b`, `shutting down`, `the daemon`,
	`is (NotReady|Stopped|Deleting|Creating|Exited|Collected|Created|Running)`, `already exists`, `no (sandbox|member) `, `was removed`,
	`being stopped or removed`, `has exited`, `are not held`, `port \d+`, `is not held`, `is gone`, `pid namespace`, `monitor`, `was killed`,
}, "|"))

// do runs a client, again and again while no daemon answers, and returns how it
// ended. It fails the test if that is not what may happen.
func (s *soak) do(random *rand.Rand, want int, args ...string) result {
	s.ops.Add(1)
	for deadline := time.Now().Add(ready); ; {
		res := s.client(args...)
		lost := res.code == 125 && regexp.MustCompile(`no daemon answers|connection|error reading|EOF|shutting down`).MatchString(res.err)
		if !lost || time.Now().After(deadline) {
			if res.code != want && !(res.code == 125 && soakRefusals.MatchString(res.err)) && want >= 0 {
				s.errorf("%v", res)
			}
			if res.code == 125 {
				s.refused.Add(1)
			}
			return res
		}
		time.Sleep(time.Duration(10+random.IntN(20)) * time.Millisecond)
	}
}

// client is cli for many goroutines, and without a clean-up of its own.
func (s *soak) client(args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	c := s.d.command(args...)
	cmd := exec.CommandContext(ctx, c.Path, args...)
	cmd.Env = c.Env
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		s.errorf("sandboxd %s: %v", strings.Join(args, " "), err)
		return result{args: args, code: -1}
	}
	if ctx.Err() != nil {
		s.errorf("sandboxd %s hangs", strings.Join(args, " "))
	}
	return result{args, o.String(), e.String(), cmd.ProcessState.ExitCode()}
}

// worker does things to one sandbox, which nobody else does anything to, the
// killer apart.
type worker struct {
	*soak
	box      string
	random   *rand.Rand
	chaos    bool
	sharePID bool // with a pid namespace, which dies with its pause
	members  map[string]*soakMember
	n        int
}

// soakMember is what is known of a member.
type soakMember struct {
	id     string
	code   int  // of its command; -1 if it does not end by itself
	killed bool // somebody was told to end it
	lines  int  // of its output
	hooked bool
	exited bool
}

// round makes a sandbox, does things in it, and removes it.
func (w *worker) round() {
	args := []string{"create", w.box}
	if w.random.IntN(2) == 0 {
		args = append(args, "--net", "none")
	} else if w.random.IntN(2) == 0 {
		args = append(args, "--publish", fmt.Sprintf("127.0.0.1:%d:80", 8000+w.random.IntN(10)))
	}
	if w.sharePID = w.random.IntN(4) == 0; w.sharePID {
		args = append(args, "--share", "net,ipc,uts,pid")
	}
	w.do(w.random, 0, args...)
	w.claim()
	for range 3 + w.random.IntN(8) {
		if w.failed.Load() {
			return
		}
		w.step()
	}
	for name := range w.members {
		w.check(name)
	}
	if w.random.IntN(2) == 0 {
		w.do(w.random, 0, "stop", "--time", "100ms", w.box)
	}
	w.unclaim() // it may be given to another before the answer is here
	res := w.do(w.random, 0, "rm", "-f", w.box)
	if res.code != 0 && !strings.Contains(res.err, "no sandbox") {
		w.errorf("%v", res)
	}
	clear(w.members)
}

// claim notes the sandbox's addresses as its own.
func (w *worker) claim() {
	var box struct {
		Network struct {
			Networks []struct{ Addresses []string }
		}
	}
	if res := w.do(w.random, -1, "inspect", w.box); res.code != 0 || json.Unmarshal([]byte(res.out), &box) != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range box.Network.Networks {
		for _, a := range n.Addresses {
			if other, ok := w.addresses[a]; ok {
				w.errorf("%s and %s both have %s", w.box, other, a)
			}
			w.addresses[a] = w.box
		}
	}
}

func (w *worker) unclaim() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for a, box := range w.addresses {
		if box == w.box {
			delete(w.addresses, a)
		}
	}
}

// step does one thing.
func (w *worker) step() {
	names := make([]string, 0, len(w.members))
	for name := range w.members {
		names = append(names, name)
	}
	slices.Sort(names)
	if len(names) == 0 || len(names) < 4 && w.random.IntN(2) == 0 {
		w.add()
		return
	}
	name := names[w.random.IntN(len(names))]
	m, ref := w.members[name], w.box+"/"+name
	switch w.random.IntN(6) {
	case 0:
		w.do(w.random, -1, "exec", ref, "--", "true") // it may end while it is asked
	case 1:
		m.killed = true
		w.do(w.random, 0, "stop", "--time", "200ms", ref)
	case 2:
		m.killed = true
		w.do(w.random, 0, "kill", ref, "KILL")
	case 3:
		w.check(name)
	case 4:
		w.do(w.random, 0, "inspect", ref)
	case 5:
		w.check(name)
		if !m.exited {
			m.killed = true
		}
		w.do(w.random, 0, "rm", "-f", ref)
		delete(w.members, name)
	}
}

// add starts a member, in one step or in two.
func (w *worker) add() {
	w.n++
	name := fmt.Sprintf("m%d", w.n)
	m := &soakMember{code: w.random.IntN(3)}
	script := fmt.Sprintf("exit %d", m.code)
	switch w.random.IntN(4) {
	case 0:
		script, m.code = "sleep 1000", -1
	case 1:
		// The first process of a pid namespace cannot kill itself.
		if script, m.code = "kill -9 $$; exit 9", 9; w.sharePID {
			m.code = 137
		}
	case 2:
		m.lines = 1 + w.random.IntN(200)
		script = fmt.Sprintf("echo kept >/scratch/file; i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); done; exit %d", m.lines, m.code)
	}
	args := []string{w.box, "--name", name, "--rootfs", w.rootfs, "--tmpfs", "/scratch"}
	if m.hooked = w.random.IntN(3) == 0; m.hooked {
		args = append(args, "--hook", "poststop="+w.hook)
	}
	if w.random.IntN(3) == 0 {
		args = append(args, "--collect", "/scratch")
	}
	args = append(args, "--", "sh", "-c", script)
	ref := w.box + "/" + name
	var res result
	if w.random.IntN(2) == 0 {
		res = w.do(w.random, 0, append([]string{"run", "-d"}, args...)...)
	} else if res = w.do(w.random, 0, append([]string{"add"}, args...)...); res.code == 0 {
		// The answer to a start may be lost, and the member have ended since.
		if start := w.do(w.random, 0, "start", ref); start.code != 0 && !strings.Contains(start.err, "Exited") && !strings.Contains(start.err, "Collected") {
			m.killed = true // it was never started, or its sandbox has died
		}
	}
	if res.code != 0 {
		// Of one whose answer was lost nothing is known; it may be there.
		w.do(w.random, -1, "rm", "-f", ref)
		return
	}
	m.id = strings.TrimSpace(res.out)
	w.members[name] = m
	w.started.Add(1)
}

// check looks at a member that must be there, and at its end if it has one.
func (w *worker) check(name string) {
	m, ref := w.members[name], w.box+"/"+name
	if m.code < 0 && !m.killed {
		if w.random.IntN(2) == 0 {
			return
		}
		m.killed = true
		w.do(w.random, 0, "kill", ref, "KILL")
	}
	if m.killed && m.code < 0 || m.code >= 0 {
		res := w.do(w.random, -1, "wait", "-o", "json", ref)
		var e exit.Record
		if err := json.Unmarshal([]byte(res.out), &e); err != nil {
			w.errorf("%s must have an exit record: %v", ref, res)
			return
		}
		w.waited.Add(1)
		m.exited = true
		lost := w.chaos && (!e.Known || w.sharePID && e.Code == 137) // its monitor, or its pid namespace, was killed
		switch {
		case e.Code == m.code, lost:
		case m.killed && (e.Code == 137 || e.Code == 143):
		default:
			w.errorf("%s (killed: %t) has ended with %+v, want code %d", ref, m.killed, e, m.code)
		}
		if m.hooked {
			w.mu.Lock()
			w.hooked[m.id] = true
			w.mu.Unlock()
		}
		if m.lines > 0 && e.Known && e.Code == m.code && !w.chaos {
			log := w.do(w.random, 0, "logs", ref)
			if n := strings.Count(log.out, "\n"); n != m.lines {
				w.errorf("%s has written %d lines, and its log has %d", ref, m.lines, n)
			}
			dst := filepath.Join(filepath.Dir(w.hookLog), w.box+"-copy")
			if res := w.do(w.random, 0, "cp", ref+":/scratch/file", dst); res.code == 0 {
				if b, err := os.ReadFile(dst); err != nil || string(b) != "kept\n" {
					w.errorf("what %s has left is %q, %v", ref, b, err)
				}
			}
		}
	}
}

func (s *soak) removeAll() {
	for _, name := range s.sandboxes {
		s.do(rand.New(rand.NewPCG(s.seed, 99)), 0, "rm", "-f", name)
	}
}

// atRest is what the daemon uses when it has nothing and does nothing: it waits
// until that is no more than what it was, or for the first time until it does not change.
func (s *soak) atRest(was *soakSample) soakSample {
	s.Helper()
	var last soakSample
	for deadline := time.Now().Add(ready); time.Now().Before(deadline); time.Sleep(300 * time.Millisecond) {
		now := soakSample{metric(s.rig, "process_open_fds"), metric(s.rig, "go_goroutines"), metric(s.rig, "process_resident_memory_bytes")}
		same := now.fds == last.fds && now.goroutines == last.goroutines
		last = now
		if was == nil && same || was != nil && !grown(*was, now) {
			break
		}
	}
	return last
}

// grown reports whether more is in use than what may differ from one moment to the
// next: a connection, a timer.
func grown(was, now soakSample) bool {
	return now.fds > was.fds+4 || now.goroutines > was.goroutines+4
}

// checkFlat compares what the daemon uses now, with nothing left, with before.
func (s *soak) checkFlat(before soakSample) {
	s.Helper()
	now := s.atRest(&before)
	// The runtime gives memory back when it likes to.
	if grown(before, now) || now.memory > 1.5*before.memory+8<<20 {
		s.Errorf("the daemon has grown")
	}
	s.Logf("at rest: descriptors %.0f, then %.0f; goroutines %.0f, %.0f; resident %.1f MiB, %.1f MiB",
		before.fds, now.fds, before.goroutines, now.goroutines, before.memory/(1<<20), now.memory/(1<<20))
}

// checkEvents reads the journal as a whole.
func (s *soak) checkEvents() {
	s.Helper()
	s.Logf("%d events", len(s.wholeEvents()))
}

// checkHooks reads what hooks have written.
func (s *soak) checkHooks() {
	s.Helper()
	text, err := os.ReadFile(s.hookLog)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.Fatal(err)
	}
	ran := map[string]map[int]bool{}
	for line := range strings.Lines(string(text)) {
		var in struct {
			Sandboxd struct {
				Attempt int
				Member  struct{ ID string }
			}
		}
		if err := json.Unmarshal([]byte(line), &in); err != nil {
			s.Errorf("%v in %q", err, line)
			continue
		}
		id := in.Sandboxd.Member.ID
		if ran[id] == nil {
			ran[id] = map[int]bool{}
		}
		if ran[id][in.Sandboxd.Attempt] {
			s.Errorf("the hook of %s was run twice as attempt %d", id, in.Sandboxd.Attempt)
		}
		ran[id][in.Sandboxd.Attempt] = true
	}
	for id := range s.hooked {
		if ran[id] == nil {
			s.Errorf("the hook of %s was not run", id)
		}
	}
	s.Logf("%d members with hooks", len(s.hooked))
}
