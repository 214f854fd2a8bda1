//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/leak"
	"github.com/sandboxd/sandboxd/internal/proctree"
	"github.com/sandboxd/sandboxd/internal/testenv"
	"github.com/sandboxd/sandboxd/sandbox"
)

// crashBinary is a daemon that can be told where to die. SANDBOXD_E2E_CRASH_BINARY
// names one where there is no Go to build it.
var crashBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("SANDBOXD_E2E_CRASH_BINARY"); path != "" {
		return path, nil
	}
	path := filepath.Join(scratch, "sandboxd-crashpoints")
	out, err := exec.Command("go", "build", "-tags", "crashpoints", "-o", path, "../cmd/sandboxd").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// atOnce bounds how many rigs run at the same time: what they wait for is mostly
// the processor.
var atOnce = make(chan struct{}, 4)

var rigs atomic.Int32

const clientTimeout = 60 * time.Second

// rig is a daemon that is killed and started again, with directories and
// cgroups of its own. Its tests may run in parallel.
type rig struct {
	*testing.T
	bin, rootfs         string
	dir                 string // state, root and other files
	state, root, parent string
	mark                string

	before *leak.Snapshot
	log    *os.File
	cmd    *exec.Cmd
	died   chan struct{} // closed when cmd has ended
}

// newRig makes a rig without a daemon. At the end of the test, everything that
// is left of it, beside what an idle daemon leaves, fails the test.
func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.Root(t)
	return newRigOn(t, testenv.Busybox(t))
}

// newRigOn is newRig with a root file system that other rigs use too.
func newRigOn(t *testing.T, rootfs string) *rig {
	t.Helper()
	bin, err := crashBinary()
	if err != nil {
		t.Fatal(err)
	}
	atOnce <- struct{}{}
	t.Cleanup(func() { <-atOnce })
	// In memory, as a state directory is, and the tests sync a lot.
	shm := "/dev/shm"
	if st, err := os.Stat(shm); err != nil || !st.IsDir() {
		shm = ""
	}
	dir, err := os.MkdirTemp(shm, "e2e-crash-")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{
		T: t, bin: bin, rootfs: rootfs, dir: dir, state: filepath.Join(dir, "state"), root: filepath.Join(dir, "root"),
		parent: fmt.Sprintf("/sandboxd-e2e-%d-r%d", os.Getpid(), rigs.Add(1)),
	}
	sum := sha256.Sum256([]byte(r.state))
	r.mark = hex.EncodeToString(sum[:8])
	if r.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	r.before, err = leak.Take(leak.Options{Dirs: []string{r.state, r.root}, CgroupParent: r.parent, Marks: []string{r.mark}, Ancestor: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.end)
	return r
}

// end looks for what was left behind, and does not leave it.
func (r *rig) end() {
	if r.running() {
		r.cmd.Process.Signal(unix.SIGTERM)
		r.awaitDeath()
	}
	r.checkLeaks()
	if r.Failed() {
		r.log.Seek(0, 0)
		text := new(bytes.Buffer)
		text.ReadFrom(r.log)
		r.Logf("the daemons said:\n%s", text)
		r.killAll()
	}
	r.log.Close()
	for _, mount := range []string{r.state, r.root} {
		unix.Unmount(mount, unix.MNT_DETACH) // of the tests of full and read-only ones; there is none mostly
	}
	if err := os.RemoveAll(r.dir); err != nil {
		r.Error(err)
	}
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for _, procs := range append(hierarchies, "/sys/fs/cgroup/cgroup.procs") {
		os.Remove(filepath.Join(filepath.Dir(procs), r.parent))
	}
}

// idle is what a daemon that has nothing to do leaves.
func (r *rig) idle(f leak.Finding) bool {
	switch f.Kind {
	case leak.File:
		switch f.What {
		case r.state + "/lock", r.state + "/sandboxes", r.state + "/quarantine", r.root + "/sandboxes":
			return true
		}
	case leak.Cgroup:
		return strings.HasSuffix(f.What, r.parent)
	}
	return false
}

func (r *rig) checkLeaks() {
	var left []leak.Finding
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		now, err := leak.Take(r.before.Options)
		if err != nil {
			r.Errorf("leak: %v", err)
			return
		}
		left = nil
		for _, f := range leak.Diff(r.before, now) {
			if !r.idle(f) {
				left = append(left, f)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			r.Errorf("leak: %s", leak.Report(left))
			return
		}
	}
}

// killAll ends what a failed test has left running.
func (r *rig) killAll() {
	found, _ := proctree.Find(r.mark)
	for _, f := range found {
		f.ID.Signal(unix.SIGKILL)
	}
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*" + r.parent)
	for _, top := range append(hierarchies, "/sys/fs/cgroup"+r.parent) {
		for range 50 { // until the processes are gone
			var dirs []string
			filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append([]string{path}, dirs...)
				}
				return nil
			})
			for _, dir := range dirs {
				procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
				for pid := range strings.FieldsSeq(string(procs)) {
					exec.Command("kill", "-9", pid).Run()
				}
				os.Remove(dir)
			}
			if len(dirs) == 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// serve starts a daemon and reports whether it became ready; if it died before,
// it did not. env are variables such as SANDBOXD_CRASH_AT=….
func (r *rig) serve(env ...string) bool {
	r.Helper()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(r.dir, "notify"), Net: "unixgram"})
	if err != nil {
		r.Fatal(err)
	}
	defer os.Remove(filepath.Join(r.dir, "notify"))
	defer notify.Close()
	r.cmd = exec.Command(r.bin, "serve", "--state", r.state, "--address", r.address(), "--root", r.root, "--cgroup-parent", r.parent, "--log-level", "debug")
	r.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(r.dir, "notify"))
	r.cmd.Env = append(r.cmd.Env, env...)
	r.cmd.Stderr = r.log
	fmt.Fprintf(r.log, "--- serve %v\n", env)
	if err := r.cmd.Start(); err != nil {
		r.Fatal(err)
	}
	died := make(chan struct{})
	r.died = died
	cmd := r.cmd
	go func() {
		cmd.Wait() // how it ended is asked of cmd.ProcessState
		close(died)
	}()
	ready := make(chan error, 1)
	notify.SetReadDeadline(time.Now().Add(60 * time.Second))
	go func() {
		_, err := notify.Read(make([]byte, 64))
		ready <- err
	}()
	select {
	case err := <-ready:
		if err != nil {
			r.Fatalf("the daemon is not ready: %v", err)
		}
		return true
	case <-died:
		return false
	}
}

// mustServe starts a daemon that must become ready.
func (r *rig) mustServe(env ...string) {
	r.Helper()
	if !r.serve(env...) {
		r.Fatalf("the daemon did not start: %v", r.cmd.ProcessState)
	}
}

func (r *rig) running() bool {
	if r.died == nil {
		return false
	}
	select {
	case <-r.died:
		return false
	default:
		return true
	}
}

func (r *rig) awaitDeath() {
	r.Helper()
	select {
	case <-r.died:
	case <-time.After(60 * time.Second):
		r.cmd.Process.Kill()
		<-r.died
		r.Fatal("the daemon did not end within 60 s")
	}
}

// kill ends the daemon as an out-of-memory killer would.
func (r *rig) kill() {
	r.Helper()
	r.cmd.Process.Kill()
	r.awaitDeath()
}

// result is how a client has ended.
type result struct {
	args     []string
	out, err string
	code     int
}

func (res result) String() string {
	return fmt.Sprintf("sandboxd %s: exit code %d, stdout %q, stderr %q", strings.Join(res.args, " "), res.code, res.out, res.err)
}

func (r *rig) address() string { return "unix://" + filepath.Join(r.dir, "socket") }

// command is a client of the rig's daemon, or of its state directory. It is
// killed if the test takes too long.
func (r *rig) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(r.Context(), clientTimeout)
	r.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, r.bin, args...)
	cmd.Env = append(os.Environ(), "SANDBOXD_STATE="+r.state, "SANDBOXD_ADDRESS="+r.address())
	return cmd
}

// cli runs a client to its end.
func (r *rig) cli(args ...string) result {
	r.Helper()
	cmd := r.command(args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	// What a client leaves running must not keep this from returning.
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		r.Fatalf("sandboxd %s: %v", strings.Join(args, " "), err)
	}
	return result{args, o.String(), e.String(), cmd.ProcessState.ExitCode()}
}

// ok runs a client that must succeed and returns what it printed, trimmed.
func (r *rig) ok(args ...string) string {
	r.Helper()
	res := r.cli(args...)
	if res.code != 0 {
		r.Fatal(res)
	}
	return strings.TrimSpace(res.out)
}

// fails runs a client that must fail with code and a text in its one line of
// error.
func (r *rig) fails(code int, text string, args ...string) {
	r.Helper()
	res := r.cli(args...)
	if res.code != code || !strings.Contains(res.err, text) || strings.Count(res.err, "\n") != 1 {
		r.Errorf("%v; want %d and one line with %q", res, code, text)
	}
}

func decode[T any](r *rig, args ...string) T {
	r.Helper()
	var v T
	if err := json.Unmarshal([]byte(r.ok(args...)), &v); err != nil {
		r.Fatalf("sandboxd %s: %v", strings.Join(args, " "), err)
	}
	return v
}

func (r *rig) list() []sandbox.Info { r.Helper(); return decode[[]sandbox.Info](r, "ls", "-o", "json") }

func (r *rig) sandbox(ref string) sandbox.Info {
	r.Helper()
	return decode[sandbox.Info](r, "inspect", ref)
}

func (r *rig) member(ref string) sandbox.MemberInfo {
	r.Helper()
	return decode[sandbox.MemberInfo](r, "inspect", ref)
}

// exited waits until a member's exit is recorded and returns the record.
func (r *rig) exited(ref string) exit.Record {
	r.Helper()
	var m sandbox.MemberInfo
	r.eventually(ref+" has exited", func() bool {
		m = r.member(ref)
		return m.State == "Exited" && m.Exit != nil
	})
	return *m.Exit
}

// eventually waits for what must come true.
func (r *rig) eventually(what string, ok func() bool) {
	r.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.Fatalf("not within 20 s: %s", what)
		}
	}
}

// run starts a busybox member in the background.
func (r *rig) run(sandbox, name, script string, flags ...string) {
	r.Helper()
	r.ok(append(append([]string{"run", sandbox, "--rootfs", r.rootfs, "--name", name, "-d"}, flags...), "--", "sh", "-c", script)...)
}

// logOf is what a member has written.
func (r *rig) logOf(ref string) string { r.Helper(); return r.ok("logs", ref) }

// sig sends a signal to a process of the rig by its pid.
func (r *rig) sig(pid int, s unix.Signal) {
	r.Helper()
	if pid <= 1 {
		r.Fatalf("signal to pid %d", pid)
	}
	if err := unix.Kill(pid, s); err != nil {
		r.Fatalf("kill %d: %v", pid, err)
	}
}

// gone waits until a process has ended, reaped or not.
func (r *rig) gone(pid int) {
	r.Helper()
	r.eventually(fmt.Sprintf("process %d is gone", pid), func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return true
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		return f[0] == "Z" || f[0] == "X"
	})
}
