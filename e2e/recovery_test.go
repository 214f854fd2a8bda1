//go:build e2e

package e2e

import (
	"bytes"
	encoding "encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

// TestStateDirectoryByAnotherPath starts the next daemon on a link to the state
// directory, as /var/run is one to /run: what is there is still its own.
func TestStateDirectoryByAnotherPath(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "web")
	r.ok(long(r, "run", "web", "m")...)
	before, m := r.sandbox("web"), r.member("web/m")
	r.kill()
	state := r.d.state
	r.d.state = filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(state), r.d.state); err != nil {
		t.Fatal(err)
	}
	r.d.state += "/" + filepath.Base(state)
	r.mustServe()
	after := r.sandbox("web")
	if after.PausePID != before.PausePID {
		r.Errorf("the pause is %d, it was %d", after.PausePID, before.PausePID)
	}
	if now := r.member("web/m"); now.MonitorPID != m.MonitorPID || now.State != "Running" {
		r.Errorf("the member is %+v, it was %+v", now, m)
	}
	if log := r.d.log.String(); strings.Contains(log, "level=WARN") {
		r.Errorf("the daemon says:\n%s", log)
	}
	r.ok("rm", "-f", "web")
	r.kill()
	r.d.state = state
	r.mustServe()
}

// TestUnreadableRecord starts a daemon on records that are not what they were.
// What they named is collected, the record is kept for somebody to look at, and
// everything else is as it was.
func TestUnreadableRecord(t *testing.T) {
	t.Parallel()
	spoil := map[string]func(path string) error{
		"garbage":       func(path string) error { return os.WriteFile(path, []byte("\x00\xff}{"), 0o600) },
		"empty":         func(path string) error { return os.Truncate(path, 0) },
		"truncated":     func(path string) error { return os.Truncate(path, 100) },
		"other version": func(path string) error { return edit(path, `"version":1`, `"version":2`) },
		"other id":      func(path string) error { return edit(path, `"id":"`, `"id":"f`) },
		"directory": func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Mkdir(path, 0o700)
		},
	}
	for how, spoil := range spoil {
		for _, of := range []string{"sandbox", "member"} {
			t.Run(how+" for a "+of, func(t *testing.T) {
				t.Parallel()
				r := newRig(t)
				r.mustServe()
				r.ok("create", "good")
				r.ok(long(r, "run", "good", "m")...)
				r.ok("create", "bad")
				r.ok(long(r, "run", "bad", "m")...)
				r.ok(long(r, "add", "bad", "created")...)
				bad := r.sandbox("bad")
				dir := filepath.Join(r.d.state, "sandboxes", bad.ID)
				m := r.member("bad/m")
				r.kill()
				var err error
				if of == "sandbox" {
					err = spoil(filepath.Join(dir, "sandbox.json"))
				} else {
					err = spoil(filepath.Join(dir, "m", m.ID, "member.json"))
				}
				if err != nil {
					t.Fatal(err)
				}
				r.cli("ls") // without the daemon it must not stumble over it
				r.mustServe()
				if i := r.sandbox("good"); i.State != "Ready" || i.Members[0].State != "Running" {
					r.Errorf("the other sandbox is %+v", i)
				}
				for _, pid := range []int{m.PID, m.MonitorPID} {
					if pidRuns(pid) {
						r.Errorf("process %d still runs", pid)
					}
				}
				aside := bad.ID
				if of == "member" {
					aside = bad.ID + ".m." + m.ID
					if i := r.sandbox("bad"); i.State != "Ready" || len(i.Members) != 1 || i.Members[0].State != "Created" {
						r.Errorf("the sandbox of the member is %+v", i)
					}
					r.run("bad", "m", "exit 7") // the name is free
					r.known("bad/m", 7, 0, false)
					r.ok("rm", "-f", "bad")
				} else if pidRuns(bad.PausePID) {
					r.Errorf("pause %d still runs", bad.PausePID)
				}
				left, err := os.ReadDir(r.d.state + "/quarantine")
				if err != nil || len(left) != 1 || left[0].Name() != aside {
					r.Errorf("in the quarantine are %v (%v), want %s", left, err, aside)
				}
				r.ok("create", "bad")
				r.ok("rm", "bad")
				r.ok("rm", "-f", "good")
				if err := os.RemoveAll(filepath.Join(r.d.state, "quarantine", aside)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// edit replaces a text in a file, which must be there.
func edit(path, from, to string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !bytes.Contains(b, []byte(from)) {
		return fmt.Errorf("%s is not in %s", from, path)
	}
	return os.WriteFile(path, bytes.Replace(b, []byte(from), []byte(to), 1), 0o600)
}

// TestLock: one daemon per state directory, and a dead one's lock is no lock.
func TestLock(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	// Of a process that runs, but has not locked it.
	if err := os.WriteFile(r.d.state+"/lock", fmt.Appendf(nil, "%d\n", os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	r.mustServe()
	r.ok("create", "box")
	pid := r.d.cmd.Process.Pid
	res := r.cli(r.d.serveArgs()...)
	if res.code != 125 || !strings.Contains(res.err, r.d.state) || !strings.Contains(res.err, fmt.Sprintf("pid %d\n", pid)) {
		r.Errorf("%v; want 125 and a line with %s and pid %d", res, r.d.state, pid)
	}
	// The second has not taken the socket from the first.
	if i := r.sandbox("box"); i.State != "Ready" {
		r.Errorf("the sandbox is %s", i.State)
	}
	r.ok("rm", "box")
}

// Whoever reads the daemon's log may go away.
func TestLogWithoutReader(t *testing.T) {
	r := newRig(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.d.stderr = write
	r.d.start(t)
	read.Close()
	write.Close()
	r.ok("create", "web")
	// What it starts has the signal's default action.
	if got := r.ok("run", "web", "--rm", "--rootfs", r.rootfs, "--", "grep", "SigIgn", "/proc/self/status"); !strings.Contains(got, "0000000000000000") {
		t.Errorf("a member ignores signals: %s", got)
	}
	r.ok("rm", "web")
	r.d.stop(t)
}

// TestRecoverMany tells in its log how long it takes to recover many sandboxes.
func TestRecoverMany(t *testing.T) {
	const n = 200
	r := newRig(t)
	r.mustServe()
	for i := range n {
		r.ok("create", fmt.Sprintf("box%d", i))
	}
	r.kill()
	start := time.Now()
	r.mustServe()
	t.Logf("%d sandboxes were recovered in %v", n, time.Since(start))
	boxes := r.list()
	if len(boxes) != n {
		r.Errorf("%d sandboxes, want %d", len(boxes), n)
	}
	args := []string{"rm"}
	for _, b := range boxes {
		if b.State != "Ready" || !pidRuns(b.PausePID) {
			r.Errorf("%s is %s with pause %d", b.Name, b.State, b.PausePID)
		}
		args = append(args, b.Name)
	}
	r.ok(args...)
}

// TestWithoutDaemon asks the state directory for all that is said to work
// without a daemon, of running and exited members.
func TestWithoutDaemon(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box", "--hostname", "inside")
	r.run("box", "running", "echo one; echo two >/tmp/scratch/file; while :; do sleep 1000; done", "--tmpfs", "/tmp/scratch")
	r.run("box", "exited", "echo gone; echo three >/tmp/scratch/file; exit 3", "--tmpfs", "/tmp/scratch")
	r.known("box/exited", 3, 0, false)
	r.eventually("the running one has written its file", func() bool {
		return r.cli("exec", "box/running", "--", "cat", "/tmp/scratch/file").out == "two\n"
	})
	alive := r.ok("inspect", "box")
	r.kill()

	if dead := r.ok("inspect", "box"); dead != alive {
		r.Errorf("inspect shows\n%s\nand with the daemon\n%s", dead, alive)
	}
	if l := r.list(); len(l) != 1 || l[0].State != "Ready" {
		r.Errorf("ls: %+v", l)
	}
	if ps := r.ok("ps", "box"); !strings.Contains(ps, "Running") || !strings.Contains(ps, "Exited") {
		r.Errorf("ps:\n%s", ps)
	}
	dest := t.TempDir()
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"one", []string{"logs", "box/running"}},
		{"gone", []string{"logs", "box/exited"}},
		{"two", []string{"exec", "box/running", "--", "cat", "/tmp/scratch/file"}},
		{"inside", []string{"exec", "box/running", "--", "hostname"}},
		{"inside", []string{"join", "box", "--", "hostname"}},
		{"three", []string{"join", "box/exited", "--", "cat", "/tmp/scratch/file"}},
		{"two", []string{"join", "box/running", "--", "cat", "/tmp/scratch/file"}},
		{"", []string{"cp", "box/running:/tmp/scratch/file", dest + "/running"}},
		{"", []string{"cp", "box/exited:/tmp/scratch/file", dest + "/exited"}},
	} {
		if got := r.ok(tt.args...); got != tt.want {
			r.Errorf("%q printed %q, want %q", tt.args, got, tt.want)
		}
	}
	for name, want := range map[string]string{"running": "two\n", "exited": "three\n"} {
		if b, err := os.ReadFile(filepath.Join(dest, name)); err != nil || string(b) != want {
			r.Errorf("copied of %s: %q, %v", name, b, err)
		}
	}
	if res := r.cli("exec", "box/running", "--", "sh", "-c", "exit 42"); res.code != 42 {
		r.Error(res)
	}
	// What needs the daemon says so.
	r.fails(125, "daemon", "create", "other")
	r.fails(125, "daemon", "rm", "-f", "box")
	r.mustServe()
	r.ok("rm", "-f", "box")
}

// TestRecordNamesAnother damages records and a status page so that they name a
// process that is not the sandbox's. It is not adopted, signalled or killed, and
// what is the sandbox's goes.
func TestRecordNamesAnother(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"pause", "monitor", "init", "status monitor", "status init"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.mustServe()
			r.ok("create", "s")
			r.ok(long(r, "run", "s", "m")...)
			box, m := r.sandbox("s"), r.member("s/m")
			dir := filepath.Join(r.d.state, "sandboxes", box.ID)
			file := filepath.Join(dir, "m", m.ID, "member.json")
			r.kill()

			victim := exec.Command("sleep", "1000")
			if err := victim.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				victim.Process.Kill()
				victim.Wait()
			})
			id, err := procid.Of(victim.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			switch what {
			case "pause":
				err = rename(filepath.Join(dir, "sandbox.json"), "pause", id)
			case "monitor", "init":
				err = rename(file, what, id)
			case "status monitor":
				err = overwrite(filepath.Join(dir, "m", m.ID, "status"), 16, uint32(id.PID))
			case "status init":
				err = overwrite(filepath.Join(dir, "m", m.ID, "status"), 20, struct {
					PID   uint32
					Start uint64
				}{uint32(id.PID), id.Start})
			}
			if err != nil {
				t.Fatal(err)
			}
			r.mustServe()
			r.cli("kill", "s/m", "TERM")
			r.ok("rm", "-f", "s")
			var ws unix.WaitStatus
			if pid, err := unix.Wait4(id.PID, &ws, unix.WNOHANG, nil); pid != 0 || err != nil {
				r.Errorf("the other process has ended: status %#x, %v", ws, err)
			}
			for _, pid := range []int{m.PID, m.MonitorPID, box.PausePID} {
				r.gone(pid)
			}
		})
	}
}

// TestRecordNamesAnotherCgroup: what is in the sandbox's cgroup goes, although the
// record names one that is not there.
func TestRecordNamesAnotherCgroup(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "s")
	r.ok(long(r, "run", "s", "m")...)
	box, m := r.sandbox("s"), r.member("s/m")
	r.kill()
	file := filepath.Join(r.d.state, "sandboxes", box.ID, "sandbox.json")
	if err := edit(file, `"cgroup":"/`, `"cgroup":"/x`); err != nil {
		t.Fatal(err)
	}
	r.mustServe()
	r.ok("rm", "-f", "s") // the rig looks for what is left
	for _, pid := range []int{m.PID, m.MonitorPID, box.PausePID} {
		r.gone(pid)
	}
}

// rename makes key of the record in file name the process id.
func rename(file, key string, id procid.ID) error {
	var r map[string]any
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return err
	}
	r[key] = id
	if b, err = json.Marshal(r); err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

// overwrite puts v, little endian, into file at the offset.
func overwrite(file string, at int64, v any) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := encoding.Append(nil, encoding.LittleEndian, v)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, at)
	return err
}

// TestDaemonStopped has a daemon that is there and does nothing: what looks goes on
// without it, what changes something waits, until somebody interrupts it.
func TestDaemonStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "web", "--net", "none")
	r.run("web", "app", "echo one; exec sleep 1000")
	// What follows ends with its reader, though nothing more is written.
	for _, args := range [][]string{{"logs", "-f", "web/app"}, {"events", "-f", "--since", "1"}} {
		read, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := r.command(args...)
		cmd.Stdout = w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := read.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		read.Close()
		begin := time.Now()
		if err := cmd.Wait(); time.Since(begin) > 20*time.Second {
			t.Errorf("%v ended %s after its reader: %v", args, time.Since(begin), err)
		}
	}
	r.run("web", "ends", "sleep 3; exit 4")
	r.sig(r.d.cmd.Process.Pid, unix.SIGSTOP)
	if res := r.cli("wait", "web/ends"); res.code != 4 || !strings.Contains(res.err, "has not answered for 2s") || strings.Count(res.err, "\n") != 1 {
		t.Error(res)
	}
	for _, args := range [][]string{{"ls"}, {"ps"}, {"inspect", "web"}, {"inspect", "web/app"}, {"events"}} {
		res := r.cli(args...)
		if res.code != 0 || !strings.Contains(res.out, "web") || !strings.Contains(res.err, "has not answered for 2s") || strings.Count(res.err, "\n") != 1 {
			t.Error(res)
		}
	}
	for _, args := range [][]string{{"logs", "--reopen", "web/app"}, {"stop", "web"}, {"run", "web", "--rootfs", r.rootfs, "--", "true"}} {
		cmd := r.command(args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		select {
		case <-ended:
			t.Errorf("%v did not wait: %v", args, cmd.ProcessState)
		case <-time.After(3 * time.Second):
		}
		r.sig(cmd.Process.Pid, unix.SIGINT)
		select {
		case <-ended:
		case <-time.After(15 * time.Second):
			t.Errorf("%v cannot be interrupted", args)
		}
	}
	r.sig(r.d.cmd.Process.Pid, unix.SIGCONT)
	r.ok("rm", "-f", "web")
}

// A member whose terminal went with its monitor, and with the daemon that had it too,
// gets a monitor all the same, and what it writes is lost. That is said once.
func TestTerminalIsLost(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	r.run("box", "m", `trap "" HUP; trap "exit 3" TERM; while :; do sleep 0.05; done`, "-t")
	m := r.member("box/m")
	r.catches(m.PID, unix.SIGTERM)
	r.kill()
	r.sig(m.MonitorPID, unix.SIGKILL)
	r.gone(m.MonitorPID)
	r.mustServe()
	for range 2 { // and again, with a daemon
		old := m.MonitorPID
		r.eventually("it has another monitor", func() bool {
			m = r.member("box/m")
			return m.MonitorPID != old && pidRuns(m.MonitorPID)
		})
		if m.State != "Running" {
			t.Fatalf("it is %s", m.State)
		}
		r.sig(m.MonitorPID, unix.SIGKILL)
	}
	r.sig(m.PID, unix.SIGTERM)
	r.exited("box/m")
	log := r.d.log.String()
	if n := strings.Count(log, "Terminal is lost"); n != 1 {
		t.Errorf("it is said %d times that the terminal is lost", n)
	}
	if strings.Contains(log, "without a monitor") {
		t.Error("it was without a monitor")
	}
	r.ok("rm", "-f", "box")
	r.sound()
}
