//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/testenv"
	"github.com/sandboxd/sandboxd/sandbox"
)

// atOnce bounds how many rigs are in use at the same time: what they need is
// mostly the processor.
var atOnce = make(chan struct{}, 4)

// clientTimeout ends a client that hangs.
const clientTimeout = 60 * time.Second

// rig is a test with a daemon of its own, which can be told where to die, is
// killed, and is started again. Tests with rigs may run in parallel.
type rig struct {
	*testing.T
	d       *daemon
	rootfs  string
	plugins string // directory of CNI plugins; empty if there are none
	dies    string // where the daemon of a scene is killed
}

// newRig makes a rig without a running daemon. When the test ends, whatever
// there is that an idle daemon does not leave fails it.
func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.Root(t)
	return newRigOn(t, testenv.Busybox(t))
}

// newRigOn is newRig with a root file system that other rigs use too.
func newRigOn(t *testing.T, rootfs string) *rig {
	t.Helper()
	return newRigWith(t, rootfs, nil)
}

// newRigWith is newRigOn for a daemon that edit, if not nil, changes before
// anything is counted.
func newRigWith(t *testing.T, rootfs string, edit func(*daemon)) *rig {
	t.Helper()
	bin, err := crashBinary()
	if err != nil {
		t.Fatal(err)
	}
	atOnce <- struct{}{}
	t.Cleanup(func() { <-atOnce })
	r := &rig{T: t, d: newDaemon(t), rootfs: rootfs}
	r.d.binary = bin
	if edit != nil {
		edit(r.d)
	}
	// What every daemon makes, and leaves.
	for _, dir := range []string{
		"/sandboxes", "/quarantine", "/removed",
	} {
		if err := os.Mkdir(r.d.state+dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{
		"/sandboxes", "/network", "/network/attachments", "/network/builtin", "/network/builtin/leases", "/network/cni", "/network/quarantine",
	} {
		if err := os.Mkdir(r.d.root+dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
	for _, file := range []string{r.d.state + "/lock", r.d.root + "/lock"} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"/root": r.d.root, "/collected": r.d.root + "/collected"} {
		if err := os.Symlink(to, r.d.state+link); err != nil {
			t.Fatal(err)
		}
	}
	r.d.checkLeaks(t)
	return r
}

// serve starts a daemon and reports whether it became ready; if it died before,
// it did not. env are variables such as SANDBOXD_CRASH_AT=….
func (r *rig) serve(env ...string) bool {
	r.Helper()
	r.d.env = env
	fmt.Fprintf(&r.d.log, "--- serve %v\n", env)
	if err := r.d.launch(); err != nil {
		r.Fatal(err)
	}
	return r.d.waitReady(r.T)
}

// mustServe starts a daemon that must become ready.
func (r *rig) mustServe(env ...string) {
	r.Helper()
	if !r.serve(env...) {
		r.Fatalf("the daemon did not start: %v", r.d.cmd.ProcessState)
	}
}

func (r *rig) running() bool {
	if r.d.cmd == nil {
		return false
	}
	select {
	case <-r.d.exited:
		return false
	default:
		return true
	}
}

// kill ends the daemon as an out-of-memory killer would.
func (r *rig) kill() { r.Helper(); r.d.kill(r.T) }

// result is how a client has ended.
type result struct {
	args     []string
	out, err string
	code     int
}

func (res result) String() string {
	return fmt.Sprintf("sandboxd %s: exit code %d, stdout %q, stderr %q", strings.Join(res.args, " "), res.code, res.out, res.err)
}

// command is a client of the rig's daemon, or of its state directory. It is
// killed if it takes too long.
func (r *rig) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	r.Cleanup(cancel)
	c := r.d.command(args...)
	cmd := exec.CommandContext(ctx, c.Path, args...)
	cmd.Env = c.Env
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
		return (m.State == "Exited" || m.State == "Collected") && m.Exit != nil
	})
	return *m.Exit
}

// eventually waits for what must come true.
func (r *rig) eventually(what string, ok func() bool) {
	r.Helper()
	for deadline := time.Now().Add(15 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.Fatalf("not within 15 s: %s", what)
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
