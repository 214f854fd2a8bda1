package member

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// monitored is a member directory whose monitor, and whose init, end with the test.
type monitored struct {
	t    *testing.T
	ms   *Monitors
	ctx  context.Context
	spec MonitorSpec
	mon  *Monitor
}

// newMonitored describes a member that runs a shell script; edit it, then call start.
func newMonitored(t *testing.T, script string) *monitored {
	t.Helper()
	testenv.Root(t)
	ms, err := OpenMonitors(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ms.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	m := &monitored{t: t, ms: ms, ctx: ctx}
	m.spec = MonitorSpec{
		Mark:    "test.monitor/x",
		Dir:     dir,
		LogPath: filepath.Join(dir, "log"),
		Program: shellProgram(script, nil),
	}
	return m
}

// shellProgram makes a program of some calls, then of sh with a script.
func shellProgram(script string, calls func(*launch.Program)) func(_, _, _ *os.File) (*launch.Program, error) {
	return func(in, out, err *os.File) (*launch.Program, error) {
		p := &launch.Program{}
		for i, f := range []*os.File{in, out, err} {
			if f != nil {
				p.Call("place standard stream", unix.SYS_DUP3, p.File(f), launch.Int(i), launch.Int(0))
			}
		}
		p.Call("begin a session", unix.SYS_SETSID)
		if calls != nil {
			calls(p)
		}
		p.Created()
		p.Exec([]string{"/bin/sh"}, []string{"sh", "-c", script}, []string{"PATH=/usr/bin:/bin"})
		return p, nil
	}
}

// create makes init.
func (m *monitored) create() *monitored {
	m.t.Helper()
	mon, err := m.ms.Start(m.ctx, m.spec)
	if err != nil {
		m.t.Fatal(err)
	}
	m.watch(mon)
	return m
}

func (m *monitored) watch(mon *Monitor) {
	m.mon = mon
	m.t.Cleanup(func() {
		mon.Init().Signal(unix.SIGKILL)
		mon.Process().Signal(unix.SIGKILL)
		select {
		case <-mon.Gone():
		case <-m.ctx.Done():
			m.t.Error("monitor does not end")
		}
	})
}

func (m *monitored) start() *monitored {
	m.t.Helper()
	m.create()
	if err := m.mon.Start(m.ctx); err != nil {
		m.t.Fatal(err)
	}
	return m
}

// exit waits for init's end.
func (m *monitored) exit() exit.Record {
	m.t.Helper()
	select {
	case <-m.mon.Done():
	case <-m.ctx.Done():
		m.t.Fatal("init does not end")
	}
	r, err := ReadExit(m.spec.Dir)
	if err != nil || r == nil {
		m.t.Fatalf("ReadExit = %v, %v", r, err)
	}
	return *r
}

var logLine = regexp.MustCompile(`^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) `)

// log returns the content of one stream, and how it was tagged. It checks the
// form of every line, and that its time is that of the test.
func (m *monitored) log(stream string) (content, tags string) {
	m.t.Helper()
	b, err := os.ReadFile(m.spec.LogPath)
	if err != nil {
		m.t.Fatal(err)
	}
	var c, g strings.Builder
	for line := range bytes.Lines(b) {
		h := logLine.FindSubmatch(line)
		if h == nil || line[len(line)-1] != '\n' {
			m.t.Fatalf("log line %.100q", line)
		}
		if at, err := time.Parse(time.RFC3339Nano, string(h[1])); err != nil || time.Since(at).Abs() > time.Minute {
			m.t.Errorf("log line's time %s: %v", h[1], err)
		}
		if string(h[2]) != stream {
			continue
		}
		g.Write(h[3])
		c.Write(line[len(h[0]) : len(line)-1])
		if h[3][0] == 'F' {
			c.WriteByte('\n')
		}
	}
	return c.String(), g.String()
}

// eventually waits until ok holds.
func (m *monitored) eventually(what string, ok func() bool) {
	m.t.Helper()
	for !ok() {
		if m.ctx.Err() != nil {
			m.t.Fatalf("%s: not in time", what)
		}
		runtime.Gosched()
		unix.Nanosleep(&unix.Timespec{Nsec: 2e6}, nil)
	}
}

func TestMonitorRecordsTheExit(t *testing.T) {
	tests := []struct {
		name, script string
		want         exit.Record
	}{
		{"code 0", "exit 0", exit.Record{Known: true, Reason: "Completed"}},
		{"code 3", "exit 3", exit.Record{Known: true, Code: 3, Reason: "Error"}},
		{"signal", "kill -TERM $$", exit.Record{Known: true, Code: 143, Signal: 15, Reason: "Signal"}},
		{"orphans", "(sleep 0.01 & sleep 0.01 &) ; exit 4", exit.Record{Known: true, Code: 4, Reason: "Error"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMonitored(t, tt.script).start()
			got := m.exit()
			if time.Since(got.FinishedAt) > time.Minute || got.Rusage.MaxRSSKiB == 0 {
				t.Errorf("exit = %+v, want the time and rusage", got)
			}
			got.FinishedAt, got.Rusage = time.Time{}, exit.Rusage{}
			if got != tt.want {
				t.Errorf("exit = %+v, want %+v", got, tt.want)
			}
			st, err := ReadStatus(m.spec.Dir)
			if err != nil || st.Phase != PhaseExited || !st.Custody || st.CreatedAt.After(st.StartedAt) || st.StartedAt.After(st.FinishedAt) {
				t.Errorf("status = %+v, %v", st, err)
			}
		})
	}
}

func TestMonitorWaitsForTheStart(t *testing.T) {
	m := newMonitored(t, "echo ran").create()
	st, err := ReadStatus(m.spec.Dir)
	if err != nil || st.Phase != PhaseCreated || st.Init != m.mon.Init() || !st.Init.Alive() || !st.Custody {
		t.Errorf("status = %+v, %v", st, err)
	}
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.mon.Start(m.ctx); err != nil && !errors.Is(err, procid.ErrGone) {
		t.Errorf("second Start = %v", err)
	}
	m.exit()
	if got, tags := m.log("stdout"); got != "ran\n" || tags != "F" {
		t.Errorf("log = %q %s", got, tags)
	}
}

func TestMonitorRunsAtOnce(t *testing.T) {
	m := newMonitored(t, "echo ran; sleep 100; true") // a shell executes its last command in its place
	m.spec.Run = true
	m.create()
	st, err := ReadStatus(m.spec.Dir)
	if err != nil || st.Phase != PhaseRunning || st.Init != m.mon.Init() || st.StartedAt.IsZero() || !st.Custody {
		t.Errorf("status = %+v, %v", st, err)
	}
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", st.Init.PID)); err != nil || !strings.HasPrefix(string(cmdline), "sh\x00") {
		t.Errorf("init is %q, %v", cmdline, err)
	}
	if err := m.mon.Init().Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := m.exit(); r.Signal != 9 {
		t.Errorf("exit = %+v", r)
	}
}

func TestMonitorCannotRunAtOnce(t *testing.T) {
	m := newMonitored(t, "")
	m.spec.Run = true
	m.spec.Program = func(_, _, _ *os.File) (*launch.Program, error) {
		p := &launch.Program{}
		p.Call("begin a session", unix.SYS_SETSID)
		p.Created()
		p.Exec([]string{"/nowhere/at/all"}, []string{"all"}, nil)
		return p, nil
	}
	mon, err := m.ms.Start(m.ctx, m.spec)
	if err == nil {
		m.watch(mon)
		t.Fatal("Start succeeded")
	}
	var se *launch.StepError
	if !errors.As(err, &se) || !se.Exec || !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "/nowhere/at/all") {
		t.Errorf("Start = %v", err)
	}
	st, err := ReadStatus(m.spec.Dir)
	if err != nil || st.Init.IsZero() || st.Init.Alive() {
		t.Errorf("status = %+v, %v, want a dead init", st, err)
	}
	if _, err := procid.Of(st.MonitorPID); !errors.Is(err, procid.ErrGone) {
		t.Errorf("monitor %d is left: %v", st.MonitorPID, err)
	}
}

func TestMonitorKilledBeforeTheStart(t *testing.T) {
	m := newMonitored(t, "").create()
	if err := m.mon.Init().Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := m.exit(); r.Signal != 9 {
		t.Errorf("exit = %+v", r)
	}
	if err := m.mon.Start(m.ctx); !errors.Is(err, procid.ErrGone) {
		t.Errorf("Start = %v, want ErrGone", err)
	}
	if st, err := ReadStatus(m.spec.Dir); err != nil || !st.StartedAt.IsZero() {
		t.Errorf("status = %+v, %v, want never started", st, err)
	}
}

func TestMonitorExecFails(t *testing.T) {
	m := newMonitored(t, "")
	m.spec.Program = func(_, _, _ *os.File) (*launch.Program, error) {
		p := &launch.Program{}
		p.Created()
		p.Exec([]string{"/nowhere/at/all"}, []string{"all"}, nil)
		return p, nil
	}
	m.create()
	err := m.mon.Start(m.ctx)
	var se *launch.StepError
	if !errors.As(err, &se) || !se.Exec || !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "/nowhere/at/all") {
		t.Errorf("Start = %v", err)
	}
	if r := m.exit(); r.Code != 127 || r.Reason != "StartError: no such file or directory" {
		t.Errorf("exit = %+v", r)
	}
}

// TestMonitorCreationFails wants the step that failed, and nothing left.
func TestMonitorCreationFails(t *testing.T) {
	fork := func(p *launch.Program) { p.Fork("fork", 0, nil) }
	tests := []struct {
		name string
		edit func(*MonitorSpec)
		want string
	}{
		{"a call", func(s *MonitorSpec) {
			s.Program = shellProgram("", func(p *launch.Program) {
				p.Call("open the moon", unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/moon"), launch.Int(0))
			})
		}, "open the moon: no such file or directory"},
		{"a call after a fork", func(s *MonitorSpec) {
			s.Program = shellProgram("", func(p *launch.Program) {
				fork(p)
				p.Call("open the moon", unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/moon"), launch.Int(0))
			})
		}, "open the moon: no such file or directory"},
		{"the log", func(s *MonitorSpec) { s.LogPath = "/nowhere/log" }, "open log /nowhere/log: no such file or directory"},
		{"the terminal", func(s *MonitorSpec) { s.TTY = true }, "take custody of init's root, namespaces and terminal: bad file descriptor"},
		{"killed", func(s *MonitorSpec) {
			s.Program = shellProgram("", func(p *launch.Program) {
				fork(p)
				pid := p.Call("getpid", unix.SYS_GETPID)
				p.Call("kill", unix.SYS_KILL, pid.Result(), launch.Int(9))
			})
		}, "launcher failed: init was killed by signal 9 before it could start"},
		{"it can neither go on nor exit", func(s *MonitorSpec) {
			s.Program = shellProgram("", func(p *launch.Program) {
				fork(p)
				addFilter(p, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0x50000 /* SECCOMP_RET_ERRNO */ | uint32(unix.ENOSYS)}}, 0)
			})
		}, "launcher failed: init was killed by signal 4 before it could start: does its seccomp filter allow what it takes to be executed, and to exit?"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMonitored(t, "")
			tt.edit(&m.spec)
			mon, err := m.ms.Start(m.ctx, m.spec)
			if err == nil {
				m.watch(mon)
				t.Fatal("Start succeeded")
			}
			if err.Error() != tt.want {
				t.Errorf("Start = %q, want %q", err, tt.want)
			}
			st, err := ReadStatus(m.spec.Dir)
			if err != nil || st.Phase != PhaseFailed || st.Init.Alive() {
				t.Errorf("status = %+v, %v", st, err)
			}
			if _, err := procid.Of(st.MonitorPID); !errors.Is(err, procid.ErrGone) {
				t.Errorf("monitor %d is left: %v", st.MonitorPID, err)
			}
		})
	}
}

func TestMonitorCreationIsCancelled(t *testing.T) {
	m := newMonitored(t, "")
	m.spec.Program = shellProgram("", func(p *launch.Program) {
		p.Fork("fork", 0, nil)
		p.Call("wait for ever", unix.SYS_PPOLL)
	})
	ctx, cancel := context.WithTimeout(m.ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := m.ms.Start(ctx, m.spec); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Start = %v", err)
	}
	st, err := ReadStatus(m.spec.Dir)
	if err != nil || st.Init.IsZero() || st.Init.Alive() {
		t.Errorf("status = %+v, %v, want a dead init", st, err)
	}
}

func TestMonitorLog(t *testing.T) {
	const k16 = 16 << 10
	long := strings.Repeat("x", 2*k16+5)
	tests := []struct{ name, script, out, tags string }{
		{"no newline at the end", "printf 'a\\nb'", "a\nb\n", "FF"},
		{"empty lines", "printf '\\n\\na\\n'", "\n\na\n", "FFF"},
		{"half lines", "printf a; sleep 0.05; printf 'b\\nc'; sleep 0.05; echo d", "ab\ncd\n", "FF"},
		{"long line", "head -c 32773 /dev/zero | tr '\\0' x; echo; echo y", long + "\ny\n", "PPFF"},
		{"as long as a part", "head -c 16384 /dev/zero | tr '\\0' x", long[:k16] + "\n", "PF"},
		{"binary", `printf '\001\377\000\033\n'`, "\x01\xff\x00\x1b\n", "F"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMonitored(t, tt.script+"; echo other >&2").start()
			m.exit()
			if got, tags := m.log("stdout"); got != tt.out || tags != tt.tags {
				t.Errorf("log has %d bytes %.80q tagged %s, want %d bytes %.80q tagged %s", len(got), got, tags, len(tt.out), tt.out, tt.tags)
			}
			if got, tags := m.log("stderr"); got != "other\n" || tags != "F" {
				t.Errorf("stderr = %q %s", got, tags)
			}
		})
	}
}

func TestMonitorLogsWithNobodyConnected(t *testing.T) {
	m := newMonitored(t, "yes 0123456789abcdefghi | head -n 262144").create() // 5 MiB
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.exit()
	got, _ := m.log("stdout")
	if want := strings.Repeat("0123456789abcdefghi\n", 262144); got != want {
		t.Errorf("log has %d bytes, want %d", len(got), len(want))
	}
	if st, err := ReadStatus(m.spec.Dir); err != nil || st.Stdout != 5<<20 || st.LogErrors != 0 {
		t.Errorf("status = %+v, %v", st, err)
	}
}

func TestMonitorIsSmall(t *testing.T) {
	m := newMonitored(t, "sleep 100").start()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", m.mon.Process().PID))
	if err != nil {
		t.Fatal(err)
	}
	var kib int
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "Rss:" {
			n, _ := strconv.Atoi(f[1])
			kib += n
		}
	}
	t.Logf("resident: %d KiB", kib)
	// The stack's begin is random, so that it has one to three pages.
	if kib == 0 || kib > 32 {
		t.Errorf("resident memory is %d KiB, want at most 32:\n%s", kib, b)
	}
	// What is in use of .bss is in the page of .data.
	if bss := regexp.MustCompile(`(?s) rw-p 00000000 00:00 0 \n.*?Rss: +(\d+) kB`).FindSubmatch(b); bss == nil || string(bss[1]) != "0" {
		t.Errorf("of .bss alone %q KiB are resident, want 0:\n%s", bss, b)
	}
}

func TestMonitorChildHasOnlyItsFiles(t *testing.T) {
	m := newMonitored(t, "ls /proc/$$/fd; umask").create()
	// A shell clears its mask, so init is looked at before its execve.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.mon.Init().PID))
	if err != nil || !bytes.Contains(b, []byte("\nSigBlk:\t0000000000000000\n")) {
		t.Errorf("init blocks signals: %s, %v", b, err)
	}
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.exit()
	got, _ := m.log("stdout")
	if want := "0\n1\n2\n0022\n"; got != want {
		t.Errorf("init has %q, want %q", got, want)
	}
}

// collect reads an attachment's output until ok accepts it.
func (m *monitored) collect(a *Attachment, ok func(out string, phase Phase) bool) string {
	m.t.Helper()
	var out strings.Builder
	phase := PhaseNone
	for !ok(out.String(), phase) {
		e, err := a.Next()
		if err != nil {
			m.t.Fatalf("Next after %.100q: %v", out.String(), err)
		}
		if e.Stream == 0 {
			phase = e.Phase
		}
		out.Write(e.Data)
	}
	return out.String()
}

func TestMonitorAttach(t *testing.T) {
	m := newMonitored(t, "printf half; read x; echo \" $x\"; echo e >&2; cat; exit 2")
	m.spec.Stdin = true
	m.create()
	a, err := Attach(m.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if e, err := a.Next(); err != nil || e.Phase != PhaseCreated {
		t.Fatalf("Next = %+v, %v, want phase created", e, err)
	}
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.collect(a, func(out string, _ Phase) bool { return out == "half" })
	in, err := OpenStdin(m.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.WriteString("line\nmore"); err != nil {
		t.Fatal(err)
	}
	m.collect(a, func(out string, _ Phase) bool { return strings.HasSuffix(out, "more") && strings.Contains(out, "e\n") })
	in.Close()
	if err := m.mon.CloseStdin(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.collect(a, func(_ string, p Phase) bool { return p == PhaseExited })
	if r := m.exit(); r.Code != 2 {
		t.Errorf("exit = %+v", r)
	}
}

func TestMonitorDropsASlowClient(t *testing.T) {
	m := newMonitored(t, "yes 0123456789 | head -c 4000000").create()
	a, err := Attach(m.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.Next(); err != nil { // it is attached; it reads no more
		t.Fatal(err)
	}
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.exit()
	if got, _ := m.log("stdout"); len(got) < 4000000 {
		t.Errorf("log has %d bytes, want 4000000", len(got))
	}
	if st, err := ReadStatus(m.spec.Dir); err != nil || st.ClientsDropped != 1 {
		t.Errorf("status = %+v, %v, want one client dropped", st, err)
	}
}

func TestMonitorBackgroundChildHoldsThePipe(t *testing.T) {
	m := newMonitored(t, "sleep 100 & echo $!; exit 5").start()
	begin := time.Now()
	if r := m.exit(); r.Code != 5 || time.Since(begin) > time.Second {
		t.Errorf("exit = %+v after %v", r, time.Since(begin))
	}
	out, _ := m.log("stdout")
	pid, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(pid, unix.SIGKILL)
	m.eventually("the subreaper reaps", func() bool { _, err := procid.Of(pid); return errors.Is(err, procid.ErrGone) })
}

func TestMonitorReopensTheLog(t *testing.T) {
	m := newMonitored(t, "echo one; read x; echo two")
	m.spec.Stdin = true
	m.start()
	m.eventually("one is logged", func() bool { b, _ := os.ReadFile(m.spec.LogPath); return bytes.HasSuffix(b, []byte("one\n")) })
	if err := os.Rename(m.spec.LogPath, m.spec.LogPath+".1"); err != nil {
		t.Fatal(err)
	}
	if err := m.mon.ReopenLog(m.ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.mon.CloseStdin(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.exit()
	if got, _ := m.log("stdout"); got != "two\n" {
		t.Errorf("log = %q, want two", got)
	}
}

// A member may have a volume where its log is, and put a link there.
func TestMonitorFollowsNoLink(t *testing.T) {
	m := newMonitored(t, "echo one; read x; echo two")
	m.spec.Stdin = true
	m.start()
	m.eventually("one is logged", func() bool { b, _ := os.ReadFile(m.spec.LogPath); return bytes.HasSuffix(b, []byte("one\n")) })
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(m.spec.LogPath, m.spec.LogPath+".1"), os.Symlink(victim, m.spec.LogPath)); err != nil {
		t.Fatal(err)
	}
	if err := m.mon.ReopenLog(m.ctx); !errors.Is(err, unix.ELOOP) {
		t.Errorf("ReopenLog = %v, want ELOOP", err)
	}
	if err := m.mon.CloseStdin(m.ctx); err != nil {
		t.Fatal(err)
	}
	m.exit()
	if b, err := os.ReadFile(victim); err != nil || len(b) > 0 {
		t.Errorf("what the link leads to holds %q, %v", b, err)
	}
	if b, _ := os.ReadFile(m.spec.LogPath + ".1"); !bytes.HasSuffix(b, []byte("two\n")) {
		t.Errorf("the old log ends in %q, want two", b)
	}
}

func TestMonitorLogIsFull(t *testing.T) {
	m := newMonitored(t, "yes 0123456789 | head -c 1000000; exit 6")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	m.spec.LogPath = filepath.Join(dir, "log")
	m.start()
	if r := m.exit(); r.Code != 6 {
		t.Errorf("exit = %+v", r)
	}
	if st, err := ReadStatus(m.spec.Dir); err != nil || st.LogErrors == 0 || st.Stdout != 1000000 {
		t.Errorf("status = %+v, %v, want errors counted", st, err)
	}
	m.log("stdout") // no half line in it
}

func TestMonitorLogLimit(t *testing.T) {
	m := newMonitored(t, "yes 0123456789 | head -n 1000")
	m.spec.LogMaxBytes = 10000
	m.start()
	m.exit()
	fi, err := os.Stat(m.spec.LogPath)
	if err != nil || fi.Size() > 10000 || fi.Size() < 9900 {
		t.Errorf("log has %d bytes, want just under 10000", fi.Size())
	}
	got, _ := m.log("stdout")
	if st, err := ReadStatus(m.spec.Dir); err != nil || int(st.LogErrors)+strings.Count(got, "\n") != 1000 {
		t.Errorf("status = %+v, %v; with %d lines logged", st, err, strings.Count(got, "\n"))
	}
}

func TestMonitorCustody(t *testing.T) {
	m := newMonitored(t, "echo kept > /mnt/file; exit 1")
	m.spec.Program = shellProgram("echo kept > /mnt/file; exit 1", func(p *launch.Program) {
		p.Call("unshare mnt", unix.SYS_UNSHARE, launch.Int(unix.CLONE_NEWNS))
		p.Call("make / private", unix.SYS_MOUNT, launch.Int(0), p.String("/"), launch.Int(0), launch.Int(unix.MS_REC|unix.MS_PRIVATE), launch.Int(0))
		p.Call("mount tmpfs", unix.SYS_MOUNT, p.String("t"), p.String("/mnt"), p.String("tmpfs"), launch.Int(0), launch.Int(0))
	})
	m.start()
	m.exit()
	b, err := os.ReadFile(RootPath(m.mon.Process().PID) + "/mnt/file")
	if err != nil || string(b) != "kept\n" {
		t.Errorf("file in the tmpfs of a dead member: %q, %v", b, err)
	}
	for _, k := range namespace.Kinds() {
		f, err := OpenNamespace(m.mon.Process(), k)
		if err != nil {
			t.Errorf("OpenNamespace(%s) = %v", k, err)
			continue
		}
		var held, own unix.Stat_t
		if err := errors.Join(unix.Fstat(int(f.Fd()), &held), unix.Stat("/proc/self/ns/"+string(k), &own)); err != nil {
			t.Error(err)
		}
		f.Close()
		if (held.Ino != own.Ino) != (k == namespace.Mnt) {
			t.Errorf("%s namespace: held %d, the test's %d", k, held.Ino, own.Ino)
		}
	}
	if f, err := OpenRoot(m.mon.Process()); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	m.mon.Process().Signal(unix.SIGKILL)
	<-m.mon.Gone()
	if _, err := OpenRoot(m.mon.Process()); !errors.Is(err, procid.ErrGone) {
		t.Errorf("OpenRoot of a dead monitor = %v, want ErrGone", err)
	}
	if _, err := m.ms.Connect(m.ctx, m.spec.Dir); !errors.Is(err, procid.ErrGone) {
		t.Errorf("Connect to a dead monitor = %v, want ErrGone", err)
	}
}

func TestMonitorCustodyPolicy(t *testing.T) {
	tests := []struct {
		custody request.Custody
		script  string
		held    bool
	}{
		{request.CustodyAlways, "exit 0", true},
		{request.CustodyFailure, "exit 0", false},
		{request.CustodyFailure, "exit 1", true},
		{request.CustodyNever, "exit 1", false},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.custody, tt.script), func(t *testing.T) {
			m := newMonitored(t, tt.script)
			m.spec.Custody = tt.custody
			m.start()
			m.exit()
			m.mon.Close()
			select {
			case <-m.mon.Gone():
			case <-m.ctx.Done():
				t.Fatal("monitor stays")
			}
			if _, err := procid.Of(m.mon.Process().PID); !tt.held && !errors.Is(err, procid.ErrGone) {
				t.Errorf("the monitor has not been reaped: %v", err)
			}
			st, err := ReadStatus(m.spec.Dir)
			if err != nil || st.Custody != tt.held || m.mon.Process().Alive() != tt.held {
				t.Errorf("status = %+v, %v; monitor lives: %v", st, err, m.mon.Process().Alive())
			}
		})
	}
}

// subreaper makes this process the one that orphans come to, for one test.
func subreaper(t *testing.T) {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
}

func TestMonitorIsReplaced(t *testing.T) {
	const reaps, leaves = true, false
	for name, mine := range map[string]bool{"init goes to this process": reaps, "init goes to another": leaves} {
		t.Run(name, func(t *testing.T) {
			if mine {
				subreaper(t)
			} else {
				testenv.Kernel(t, testenv.PIDFDInfo)
			}
			m := newMonitored(t, "echo one; read x; echo two; read y; exit 9")
			m.spec.Stdin = true
			m.start()
			m.eventually("one is logged", func() bool { b, _ := os.ReadFile(m.spec.LogPath); return bytes.Contains(b, []byte("one")) })
			in, err := OpenStdin(m.spec.Dir)
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			old := m.mon
			if err := old.Process().Signal(unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			<-old.Gone()
			before, err := ReadStatus(m.spec.Dir)
			if err != nil {
				t.Fatal(err)
			}
			in.WriteString("\n") // it writes while there is no monitor
			mon, err := m.ms.Adopt(m.ctx, AdoptSpec{MonitorSpec: m.spec, Init: old.Init()})
			if err != nil {
				t.Fatal(err)
			}
			m.watch(mon)
			m.eventually("two is logged", func() bool { b, _ := os.ReadFile(m.spec.LogPath); return bytes.Contains(b, []byte("two")) })
			in.WriteString("\n")
			if mine {
				var ws unix.WaitStatus
				var ru unix.Rusage
				if _, err := unix.Wait4(old.Init().PID, &ws, 0, &ru); err != nil {
					t.Fatal(err)
				}
				if err := WriteExit(m.spec.Dir, ws, 0, &ru); err != nil {
					t.Fatal(err)
				}
			}
			if r := m.exit(); !r.Known || r.Code != 9 {
				t.Errorf("exit = %+v, want 9", r)
			}
			st, err := ReadStatus(m.spec.Dir)
			if err != nil || st.Stdout != 8 || !st.StartedAt.Equal(before.StartedAt) || !st.Custody || st.MonitorPID != mon.Process().PID {
				t.Errorf("status = %+v, %v", st, err)
			}
			if _, err := os.Stat(RootPath(mon.Process().PID) + "/bin/sh"); err != nil {
				t.Errorf("root in custody: %v", err)
			}
		})
	}
}

// A program whose main thread ends with 3, before the process does with 9.
const mainEnds = "SANDBOXD_TEST_MAIN_ENDS"

func init() {
	if os.Getenv(mainEnds) == "" {
		return
	}
	go func() {
		os.Stdin.Read(make([]byte, 1))
		os.Exit(9)
	}()
	unix.Syscall(unix.SYS_EXIT, 3, 0, 0) // an init function is run by the main thread
}

// Whoever has become its parent need not reap it: the pid 1 of many a container
// does not.
func TestMonitorIsReplacedAndNobodyReaps(t *testing.T) {
	subreaper(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	scripts := map[string]string{
		"code": "read x; exit 9", "signal": "read x; kill -USR1 $$", "no error": "read x; exit 0",
		"code behind the main thread's": "exec env " + mainEnds + "=1 " + self,
	}
	for name, script := range scripts {
		for _, before := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, before it is replaced: %v", name, before), func(t *testing.T) {
				m := newMonitored(t, script)
				m.spec.Stdin = true
				m.start()
				init := m.mon.Init()
				if strings.Contains(script, mainEnds) {
					m.eventually("the main thread has ended", func() bool {
						b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/stat", init.PID))
						return err == nil && bytes.Contains(b, []byte(") Z "))
					})
				}
				in, err := OpenStdin(m.spec.Dir)
				if err != nil {
					t.Fatal(err)
				}
				defer in.Close()
				end := func() {
					in.WriteString("\n")
					m.eventually("init has ended", func() bool { return !init.Alive() })
				}
				old := m.mon
				old.Process().Signal(unix.SIGKILL)
				<-old.Gone()
				if before {
					end()
				}
				mon, err := m.ms.Adopt(m.ctx, AdoptSpec{MonitorSpec: m.spec, Init: init})
				if err == nil {
					m.watch(mon)
				} else if !before || !errors.Is(err, procid.ErrGone) { // it need not stay for the answer
					t.Fatal(err)
				}
				if !before {
					end()
				}
				var got *exit.Record
				m.eventually("the exit is recorded", func() bool { got, err = ReadExit(m.spec.Dir); return got != nil })
				if want := map[string]int{"signal": 138, "no error": 0, "code": 9, "code behind the main thread's": 9}[name]; err != nil || !got.Known || got.Code != want {
					t.Errorf("exit = %+v, %v, want %d", got, err, want)
				}
				if st, err := ReadStatus(m.spec.Dir); err != nil || st.Custody != (!before && !strings.Contains(script, mainEnds)) { // its root went with its main thread
					t.Errorf("custody = %v, %v", st.Custody, err)
				}
				if before && mon != nil {
					m.eventually("a monitor that holds nothing ends", func() bool { return !mon.Process().Alive() })
				}
				if _, err := unix.Wait4(init.PID, nil, 0, nil); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestMonitorKilledDoesNotEndStdin(t *testing.T) {
	testenv.Kernel(t, testenv.PIDFDInfo)
	m := newMonitored(t, "read x || exit 1; echo got $x; cat; exit 6")
	m.spec.Stdin = true
	m.start()
	held, err := m.mon.HoldStdin()
	if err != nil || held == nil {
		t.Fatalf("HoldStdin = %v, %v", held, err)
	}
	defer held.Close()
	m.replace()
	if _, err := held.WriteString("x\n"); err != nil { // init reads on
		t.Fatal(err)
	}
	m.eventually("x is logged", func() bool { b, _ := os.ReadFile(m.spec.LogPath); return bytes.Contains(b, []byte("got x")) })
	if err := m.mon.CloseStdin(m.ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.mon.StdinClosed():
	case <-m.ctx.Done():
		t.Fatal("the monitor does not tell that stdin is closed")
	}
	if f, err := m.mon.HoldStdin(); f != nil || err != nil {
		t.Errorf("HoldStdin after it was closed = %v, %v", f, err)
	}
	m.replace() // nor does the new one open it again
	held.Close()
	if r := m.exit(); r.Code != 6 {
		t.Errorf("exit = %+v, want code 6", r)
	}
}

// replace kills the monitor and starts another.
func (m *monitored) replace() {
	m.t.Helper()
	old := m.mon
	if err := old.Process().Signal(unix.SIGKILL); err != nil {
		m.t.Fatal(err)
	}
	<-old.Gone()
	mon, err := m.ms.Adopt(m.ctx, AdoptSpec{MonitorSpec: m.spec, Init: old.Init()})
	if err != nil {
		m.t.Fatal(err)
	}
	m.watch(mon)
}

func TestMonitorIsReplacedBeforeTheStart(t *testing.T) {
	testenv.Kernel(t, testenv.PIDFDInfo)
	m := newMonitored(t, "echo ran; exit 8").create()
	old := m.mon
	old.Process().Signal(unix.SIGKILL)
	<-old.Gone()
	mon, err := m.ms.Adopt(m.ctx, AdoptSpec{MonitorSpec: m.spec, Init: old.Init()})
	if err != nil {
		t.Fatal(err)
	}
	m.watch(mon)
	if err := mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	if r := m.exit(); r.Code != 8 {
		t.Errorf("exit = %+v, want 8", r)
	}
	if got, _ := m.log("stdout"); got != "ran\n" {
		t.Errorf("log = %q", got)
	}
}

func TestMonitorTerminal(t *testing.T) {
	m := newMonitored(t, "")
	m.spec.TTY = true
	m.spec.Program = shellProgram("test -t 0 && read x && echo \"got $x\"; exec 0<&- 1>&- 2>&-; sleep 0.3; echo again >/dev/tty; exit 3", func(p *launch.Program) {
		ptmx := p.Call("open ptmx", unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/dev/ptmx"), launch.Int(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC))
		p.Call("unlock", unix.SYS_IOCTL, ptmx.Result(), launch.Int(unix.TIOCSPTLCK), p.Bytes(make([]byte, 4)))
		pts := p.Call("open the other side", unix.SYS_IOCTL, ptmx.Result(), launch.Int(unix.TIOCGPTPEER), launch.Int(unix.O_RDWR))
		p.Call("make it the controlling terminal", unix.SYS_IOCTL, pts.Result(), launch.Int(unix.TIOCSCTTY), launch.Int(0))
		for i := range 3 {
			p.Call("place standard stream", unix.SYS_DUP3, pts.Result(), launch.Int(i), launch.Int(0))
		}
		p.Call("close it", unix.SYS_CLOSE, pts.Result())
		p.Call("keep the master", unix.SYS_DUP3, ptmx.Result(), launch.Int(launch.MasterFD), launch.Int(unix.O_CLOEXEC))
	})
	m.start()
	master, err := Master(m.mon.Process())
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if _, err := master.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	if r := m.exit(); r.Code != 3 {
		t.Errorf("exit = %+v", r)
	}
	if got, _ := m.log("stdout"); got != "hello\r\ngot hello\r\nagain\r\n" {
		t.Errorf("log = %q", got)
	}
}

func TestMonitorConnect(t *testing.T) {
	m := newMonitored(t, "sleep 100").create()
	second, err := m.ms.Connect(m.ctx, m.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if second.Process() != m.mon.Process() || second.Init() != m.mon.Init() {
		t.Errorf("Connect found %v and %v, want %v and %v", second.Process(), second.Init(), m.mon.Process(), m.mon.Init())
	}
	if err := second.Start(m.ctx); err != nil {
		t.Error(err)
	}
	if err := m.mon.Start(m.ctx); err != nil {
		t.Errorf("Start of what runs = %v", err)
	}
	third, err := m.ms.Connect(m.ctx, m.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan string, 4)
	m.mon.OnDone(func() { told <- "first" })
	third.OnDone(func() { told <- "third" })
	third.Close()
	if got := <-told; got != "third" {
		t.Errorf("%s is told when the third is closed", got)
	}
	m.mon.Init().Signal(unix.SIGTERM)
	select {
	case <-second.Done():
	case <-m.ctx.Done():
		t.Error("the second connection is not told")
	}
	if got := <-told; got != "first" {
		t.Errorf("%s is told when init ends", got)
	}
	second.OnDone(func() { told <- "late" })
	if got := <-told; got != "late" {
		t.Errorf("%s is told of what is over", got)
	}
}

func TestMonitorSocketHasALongPath(t *testing.T) {
	m := newMonitored(t, "exit 0")
	m.spec.Dir = filepath.Join(m.spec.Dir, strings.Repeat("d", 200))
	if err := os.Mkdir(m.spec.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m.start()
	m.exit()
	fi, err := os.Stat(filepath.Join(m.spec.Dir, socketName))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v, want mode 0600", fi, err)
	}
	if fi, err := os.Stat(filepath.Join(m.spec.Dir, stdoutName)); err != nil || fi.Mode().Perm() != fifoMode {
		t.Errorf("FIFO: %v, %v, want mode %o", fi, err, fifoMode)
	}
}

func TestMonitorIgnoresSignals(t *testing.T) {
	m := newMonitored(t, "exit 0").create()
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGPIPE} {
		if err := m.mon.Process().Signal(sig); err != nil {
			t.Error(err)
		}
	}
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	if r := m.exit(); r.Code != 0 || !slices.Contains([]string{"Completed"}, r.Reason) {
		t.Errorf("exit = %+v", r)
	}
}

// There may be thousands.
func TestMonitorTakesNoGoroutine(t *testing.T) {
	m := newMonitored(t, "sleep 100").create()
	if err := m.mon.Start(m.ctx); err != nil {
		t.Fatal(err)
	}
	before := runtime.NumGoroutine()
	for range 5 {
		again, err := m.ms.Connect(m.ctx, m.spec.Dir)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
	}
	m.eventually("no goroutine that waits for a monitor", func() bool { return runtime.NumGoroutine() <= before })
}
