//go:build e2e

package e2e

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStoryStdin(t *testing.T) {
	s := newStory(t)
	blob := strings.Repeat("0123456789abcdef\n", 200_000) // more than a pipe holds
	sum := md5.Sum([]byte(blob))
	out, _, code := s.do(blob, append([]string{"run", "web", "--rm", "-i", "--rootfs", s.rootfs}, sh("md5sum; echo err >&2; exit 4")...)...)
	if !strings.HasPrefix(out, hex.EncodeToString(sum[:])) || code != 4 {
		t.Errorf("run -i: %q, exit code %d", out, code)
	}
	s.startMember("up", "sleep 1000")
	for _, verb := range []string{"exec", "join"} {
		if out, _, _ := s.do(blob, verb, "-i", "web/up", "--", "md5sum"); !strings.HasPrefix(out, hex.EncodeToString(sum[:])) {
			t.Errorf("%s -i: %q", verb, out)
		}
		if out, _, _ := s.do(blob, verb, "web/up", "--", "md5sum"); !strings.HasPrefix(out, "d41d8cd98f00b204e9800998ecf8427e") {
			t.Errorf("%s without -i has read something: %q", verb, out)
		}
		out, stderr, _ := s.do("", append([]string{verb, "web/up"}, sh("echo out; echo err >&2")...)...)
		if out != "out\n" || stderr != "err\n" {
			t.Errorf("%s: stdout %q, stderr %q", verb, out, stderr)
		}
	}
	// Nobody is attached, and the monitor is killed: stdin goes on.
	s.startMember("reader", "read x; echo got $x; cat; echo eof", "-i")
	old := s.inspect("reader").MonitorPID
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.eventually("another monitor", func() bool {
		v := s.inspect("reader")
		return v.MonitorPID != old && v.MonitorPID != 0 || v.Exit != nil
	})
	if v := s.inspect("reader"); v.Exit != nil {
		t.Fatalf("it has ended with its monitor: %+v", v.Exit)
	}
	out, stderr, code := s.do("word\nmore\n", "attach", "web/reader")
	if !strings.Contains(out, "got word\nmore\neof\n") || code != 0 {
		t.Errorf("attach: %q, %q, exit code %d", out, stderr, code)
	}
}

// console is a terminal with a client at its other end.
type console struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd
	out    lockedBuffer
	done   chan struct{}
}

func (s *story) console(rows, cols uint16, args ...string) *console {
	t := s.t
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.SetNonblock(int(master.Fd()), true) // Fd has made it blocking
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	c := &console{t: t, master: master, cmd: s.command(args...), done: make(chan struct{})}
	c.resize(rows, cols)
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = slave, slave, slave
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		io.Copy(&c.out, master)
		close(c.done)
	}()
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		c.cmd.Wait()
		master.Close()
		<-c.done
	})
	return c
}

func (c *console) resize(rows, cols uint16) {
	c.t.Helper()
	raw, err := c.master.SyscallConn()
	if err != nil {
		c.t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *console) write(text string) {
	c.t.Helper()
	if _, err := c.master.WriteString(text); err != nil {
		c.t.Fatal(err)
	}
}

// wait waits until the screen shows text.
func (c *console) wait(text string) {
	c.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(c.out.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("the terminal does not show %q: %q", text, c.out.String())
		}
	}
}

// exit waits until the client has ended and returns its exit code.
func (c *console) exit() int {
	c.t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { c.cmd.Process.Kill() })
	defer timer.Stop()
	c.cmd.Wait()
	return c.cmd.ProcessState.ExitCode()
}

func TestStoryTerminal(t *testing.T) {
	s := newStory(t)
	const script = `stty size; trap 'echo winch $(stty size)' WINCH; trap 'echo int' INT; echo started; while :; do read -r l || continue; echo "<$l>"; [ "$l" = quit ] && exit 5; done`
	c := s.console(33, 77, append([]string{"run", "web", "-i", "-t", "--name", "tty", "--rootfs", s.rootfs}, sh(script)...)...)
	c.wait("started")
	c.wait("33 77")
	c.write("hello\r")
	c.wait("<hello>")
	c.write("\x03") // ctrl-c is a signal in the member, not for the client
	c.wait("int")
	c.resize(44, 88)
	c.write("\r")
	c.wait("winch 44 88")
	c.write("\x10\x11") // ctrl-p ctrl-q
	if code := c.exit(); code != 0 {
		t.Errorf("detached with exit code %d: %q", code, c.out.String())
	}
	if v := s.inspect("tty"); v.State != "Running" {
		t.Errorf("after detaching it is %s", v.State)
	}
	c = s.console(20, 60, "attach", "web/tty")
	c.write("again\r")
	c.wait("<again>")
	c.write("quit\r")
	if code := c.exit(); code != 5 {
		t.Errorf("attach: exit code %d: %q", code, c.out.String())
	}
	s.contains("its log", s.ok("logs", "web/tty"), "started", "<hello>", "<again>")

	s.startMember("up", "sleep 1000")
	for _, verb := range []string{"exec", "join"} {
		c := s.console(11, 22, append([]string{verb, "-i", "-t", "web/up"}, sh("stty size; tty; read l; echo got $l; exit 6")...)...)
		c.wait("11 22")
		c.write("line\r")
		c.wait("got line")
		if code := c.exit(); code != 6 {
			t.Errorf("%s -t: exit code %d", verb, code)
		}
		c.wait("/dev/pts/")
	}
}

// Whoever only looks at a member does not end it by leaving.
func TestStoryAttachSignals(t *testing.T) {
	s := newStory(t)
	s.startMember("up", `trap 'echo got term; exit 3' TERM; while :; do echo tick; sleep 0.05; done`)
	for _, tt := range []struct {
		flag string
		sig  syscall.Signal
	}{{"--no-stdin", syscall.SIGTERM}, {"--no-stdin", syscall.SIGINT}, {"--sig-proxy=false", syscall.SIGTERM}, {"", syscall.SIGTERM}} {
		cmd := s.command("attach", "web/up")
		if tt.flag != "" {
			cmd = s.command("attach", tt.flag, "web/up")
		}
		var out lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		s.eventually("attached", func() bool { return strings.Contains(out.String(), "tick") })
		cmd.Process.Signal(tt.sig)
		cmd.Wait()
		timer.Stop()
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if tt.flag != "" && (ws.Signal() != tt.sig || s.inspect("up").State != "Running") {
			t.Fatalf("attach %s, %s: %v; the member is %s", tt.flag, tt.sig, cmd.ProcessState, s.inspect("up").State)
		}
		if tt.flag == "" && (ws.ExitStatus() != 3 || !strings.Contains(out.String(), "got term")) {
			t.Errorf("attach, %s: %v, %q", tt.sig, cmd.ProcessState, out.String())
		}
	}
}

// In a sandbox with a user namespace a terminal is the member's own as it is in
// others: it can be opened by its name, and changed, by root there.
func TestStoryTerminalInUserNamespace(t *testing.T) {
	s := newStory(t, "--share", "net,ipc,uts,user")
	const script = `stat -c "tty %u %g %a" "$(tty)"; stat -c "console %u" /dev/console; echo opened >/dev/tty && echo by name >"$(tty)"
		chown 1 "$(tty)" && stat -c "now %u" "$(tty)"; chown 0 "$(tty)"; stty size; stty -echo; echo ready; read l; echo "got $l"; stty size; kill -INT $$; exit 5`
	c := s.console(33, 44, append([]string{"run", "-i", "-t", "web", "--rm", "--name", "m", "--rootfs", s.rootfs}, sh(script)...)...)
	c.wait("ready")
	c.resize(11, 22)
	c.write("line\r")
	c.wait("got line")
	if code := c.exit(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	for _, want := range []string{"tty 0 5 620", "console 0", "opened", "by name", "now 1", "33 44", "11 22"} {
		c.wait(want)
	}
	// The same for exec, and attached again.
	s.ok(append([]string{"run", "web", "-d", "-i", "-t", "--name", "up", "--rootfs", s.rootfs}, sh("stty -echo; while read l; do echo =$l; done; exit 6")...)...)
	e := s.console(5, 6, append([]string{"exec", "-i", "-t", "web/up"}, sh(`stat -c "tty %u" "$(tty)"; stty size; echo to >/dev/tty; exit 7`)...)...)
	for _, want := range []string{"tty 0", "5 6", "to"} {
		e.wait(want)
	}
	if code := e.exit(); code != 7 {
		t.Errorf("exec: exit code %d, want 7", code)
	}
	a := s.console(5, 6, "attach", "web/up")
	a.write("x\r")
	a.wait("=x")
	a.write("\x04")
	if code := a.exit(); code != 6 {
		t.Errorf("attach: exit code %d, want 6", code)
	}
}

// What a member writes faster than run can read it comes all the same, byte for
// byte, although its log is removed with it.
func TestStoryMuchOutput(t *testing.T) {
	s := newStory(t)
	const script = `head -c 2000000 /dev/zero; echo; seq 1 1000 >&2; yes 0123456789 | head -n 100000; printf end; exit 7`
	want := strings.Repeat("\x00", 2_000_000) + "\n" + strings.Repeat("0123456789\n", 100_000) + "end"
	for range 3 {
		out, stderr, code := s.do("", append([]string{"run", "web", "--rm", "--rootfs", s.rootfs}, sh(script)...)...)
		if out != want || code != 7 {
			t.Errorf("stdout has %d bytes, want %d; exit code %d", len(out), len(want), code)
		}
		if lines := strings.Split(stderr, "\n"); len(lines) != 1001 || lines[999] != "1000" {
			t.Errorf("stderr has %d lines: %.200q", len(lines), stderr)
		}
	}
}

// An attach that is cut off because it does not read goes on with what is in the
// log, from the very byte, though it began in the middle of a line.
func TestStoryAttachCatchesUp(t *testing.T) {
	s := newStory(t)
	const script = `echo first; printf before; read l; printf ' ready'; until test -e /go; do sleep 0.01; done
		yes 0123456789 | head -n 200000; seq 1 1000 >&2; printf end; exit 7`
	s.must(t, append([]string{"run", "web", "-d", "-i", "--name", "m", "--rootfs", s.rootfs}, sh(script)...)...)
	for deadline := time.Now().Add(ready); !strings.Contains(s.must(t, "logs", "web/m"), "first"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the member has not written")
		}
	}
	cmd := s.command("attach", "web/m")
	var out, stderr lockedBuffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("go\n"), &out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	for deadline := time.Now().Add(ready); !strings.Contains(out.String(), "ready"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("attach shows %q", out.String())
		}
	}
	if err := cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.must(t, "exec", "web/m", "--", "touch", "/go")
	if _, _, code := s.run(t, "wait", "web/m"); code != 0 && code != 7 {
		t.Errorf("wait: exit code %d", code)
	}
	if err := cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	want := strings.Repeat("0123456789\n", 200_000) + "end"
	got, ok := strings.CutPrefix(out.String(), " ready")
	if code := cmd.ProcessState.ExitCode(); !ok || got != want || code != 7 {
		t.Errorf("exit code %d; stdout begins with %.20q and has %d bytes, want %q and %d", code, out.String(), len(got), " ready", len(want))
	}
	if lines := strings.Split(stderr.String(), "\n"); len(lines) != 1001 || lines[999] != "1000" {
		t.Errorf("stderr has %d lines: %.200q", len(lines), stderr.String())
	}
}

func TestStoryLogs(t *testing.T) {
	s := newStory(t)
	long := strings.Repeat("x", 40000)
	s.startMember("m", `echo one; echo err >&2; i=0; while [ $i -lt 40000 ]; do printf x; i=$((i+1)); done; echo; printf half; while [ ! -e /tmp/go ]; do sleep 0.02; done; echo " done"; while [ ! -e /tmp/end ]; do sleep 0.02; done; echo last`)
	s.logged("m", long)
	stdout, stderr, _ := s.do("", "logs", "web/m")
	if !strings.Contains(stdout, "one\n"+long+"\n") || !strings.Contains(stderr, "err\n") {
		t.Errorf("logs: %.100q, stderr %q", stdout, stderr)
	}
	stamp := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z one\n`)
	if out := s.ok("logs", "--timestamps", "web/m"); !stamp.MatchString(out) {
		t.Errorf("logs --timestamps: %.100q", out)
	}
	// Following across a rotation.
	follow := s.command("logs", "-f", "web/m")
	var out lockedBuffer
	follow.Stdout = &out
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { follow.Process.Kill(); follow.Wait() }()
	s.eventually("it follows", func() bool { return strings.Contains(out.String(), "xxx\n") })
	path := s.inspect("m").LogPath
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	s.ok("logs", "--reopen", "web/m")
	s.ok("exec", "web/m", "--", "touch", "/tmp/go")
	s.eventually("it follows on", func() bool { return strings.Contains(out.String(), "half done\n") })
	s.ok("exec", "web/m", "--", "touch", "/tmp/end")
	s.eventually("it shows the last line", func() bool { return strings.Contains(out.String(), "last\n") })
	ended := make(chan error, 1)
	go func() { ended <- follow.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("logs -f goes on after the member's end")
	}
	s.expect("the last line", s.ok("logs", "--tail", "1", "web/m"), "last\n")
	// As other container tools have them.
	s.expect("short flags", s.ok("logs", "-t", "-n", "1", "web/m"), s.ok("logs", "--timestamps", "--tail", "1", "web/m"))
	if err := os.Remove(path + ".1"); err != nil {
		t.Fatal(err)
	}
}

func TestStoryLogMaxSize(t *testing.T) {
	s := newStory(t)
	s.startMember("m", `yes 0123456789abcdef | head -n 1000; exit 4`, "--log-max-size", "4k")
	v := s.exited("m")
	st, err := os.Stat(v.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > 4096 || st.Size() < 4000 || v.Exit.Code != 4 {
		t.Errorf("a log of %d bytes, exit %+v; want less than 4 KiB and 4", st.Size(), v.Exit)
	}
	text, stderr, _ := s.do("", "logs", "web/m")
	logged := strings.Count(text, "\n")
	if !strings.Contains(stderr, fmt.Sprintf("web/m: %d lines are missing", 1000-logged)) || strings.Count(stderr, "\n") != 1 {
		t.Errorf("logs does not say that %d lines are missing: %q", 1000-logged, stderr)
	}
	if v = s.inspect("m"); int(v.LogLinesDropped)+logged != 1000 {
		t.Errorf("inspect says that %d lines are missing, and %d are there, of 1000", v.LogLinesDropped, logged)
	}
	if text := s.ok("postmortem", "web/m"); !strings.Contains(text, fmt.Sprintf("%d lines are missing", 1000-logged)) {
		t.Errorf("postmortem does not say that %d lines are missing:\n%s", 1000-logged, text)
	}
}

func TestStoryLogsWithStoppedDaemon(t *testing.T) {
	s := newStory(t)
	s.startMember("m", `while [ ! -e /tmp/go ]; do sleep 0.02; done; yes 0123456789abcdef | head -n 300000; echo end; exit 3`)
	v, sandbox := s.inspect("m"), s.sandboxID()
	if err := s.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.write(filepath.Join(v.Root, "tmp/go"), "")
	path := v.LogPath
	s.eventually("all is logged while the daemon is stopped", func() bool {
		b, err := os.ReadFile(path)
		return err == nil && bytes.HasSuffix(b, []byte(" stdout F end\n"))
	})
	record := filepath.Join(s.state, "sandboxes", sandbox, "m", v.ID, "exit.json")
	s.eventually("its exit is recorded", func() bool { _, err := os.Stat(record); return err == nil })
	if err := s.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, _, code := s.do("", "wait", "web/m"); code != 3 {
		t.Errorf("exit code %d", code)
	}
	if n := strings.Count(s.ok("logs", "web/m"), "0123456789abcdef\n"); n != 300000 {
		t.Errorf("%d lines are logged", n)
	}
}

// Files of the caller that are not pipes stay the caller's: a process in the member that
// had one as a descriptor could open it anew, and write to what was opened to be read.
func TestStoryCallersFiles(t *testing.T) {
	s := newStory(t)
	s.startMember("m", "sleep 1000")
	dir := t.TempDir()
	for _, args := range [][]string{{"exec", "-i", "web/m", "--"}, {"join", "-i", "web/m", "--"}} {
		in, out := filepath.Join(dir, args[0]+".in"), filepath.Join(dir, args[0]+".out")
		for _, name := range []string{in, out} {
			if err := os.WriteFile(name, []byte("before\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cmd := s.command(append(args, "sh", "-c", "cat; echo after; for n in 0 1 2; do echo mine >/proc/self/fd/$n; done; ls -l /proc/self/fd/ >&2; exit 3")...)
		var err error
		if cmd.Stdin, err = os.Open(in); err != nil {
			t.Fatal(err)
		}
		o, err := os.OpenFile(out, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = o, &stderr
		cmd.Run()
		o.Close()
		if code := cmd.ProcessState.ExitCode(); code != 3 {
			t.Errorf("%v: exit code %d, %s", args, code, &stderr)
		}
		if b, _ := os.ReadFile(in); string(b) != "before\n" {
			t.Errorf("%v: what it read from is %q now", args, b)
		}
		if b, _ := os.ReadFile(out); !strings.HasPrefix(string(b), "before\nbefore\nafter\n") {
			t.Errorf("%v: what it wrote to is %q now", args, b)
		}
		if strings.Contains(stderr.String(), dir) {
			t.Errorf("%v: it had a file of the caller's: %s", args, &stderr)
		}
	}
}
