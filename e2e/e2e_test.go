//go:build e2e

// Package e2e drives the binary as a user would, and looks at the host afterwards.
package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/leak"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

var binary = os.Getenv("SANDBOXD_E2E_BINARY")

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "sandboxd-e2e-")
	if err == nil && binary == "" {
		binary = filepath.Join(dir, "sandboxd")
		var out []byte
		if out, err = exec.Command("go", "build", "-o", binary, "../cmd/sandboxd").CombinedOutput(); err != nil {
			err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// daemon is a sandboxd with directories and a cgroup of its own.
type daemon struct {
	state, root, parent string
	cmd                 *exec.Cmd
}

func startDaemon(t *testing.T) *daemon {
	t.Helper()
	testenv.Root(t)
	d := &daemon{state: t.TempDir(), root: t.TempDir(), parent: fmt.Sprintf("/sandboxd-e2e-%d", os.Getpid())}
	makeParent(t, d.parent)
	d.cmd = exec.Command(binary, d.serveArgs()...)
	var log bytes.Buffer
	d.cmd.Stderr = &log
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.cmd.Process.Signal(unix.SIGTERM)
		d.cmd.Wait()
		if t.Failed() {
			t.Logf("the daemon said:\n%s", log.String())
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(d.state, "sandboxd.sock")); err == nil {
			// The oracle looks last, when the test has taken its sandboxes down.
			leak.CheckWith(t, leak.Options{Ancestor: -1, CgroupParent: d.parent, Dirs: []string{d.root}, PID: d.cmd.Process.Pid})
			return d
		}
		if time.Now().After(deadline) {
			t.Fatal("the daemon has no socket after 10 s")
		}
	}
}

// makeParent makes the cgroup parent in every hierarchy: the daemon makes it when
// first needed, and leaves it, since it is not any sandbox's.
func makeParent(t *testing.T, parent string) {
	t.Helper()
	roots, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	for _, procs := range append(roots, "/sys/fs/cgroup/cgroup.procs") {
		if _, err := os.Stat(procs); err != nil {
			continue
		}
		dir := filepath.Join(filepath.Dir(procs), parent)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(dir) })
	}
}

func (d *daemon) serveArgs() []string {
	return []string{"serve", "--state", d.state, "--root", d.root, "--cgroup-parent", d.parent, "--address", d.address()}
}

func (d *daemon) address() string { return "unix://" + filepath.Join(d.state, "sandboxd.sock") }

// run runs a client of d to its end.
func (d *daemon) run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "SANDBOXD_ADDRESS="+d.address(), "SANDBOXD_STATE="+d.state)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

func TestSecondDaemonIsRefused(t *testing.T) {
	d := startDaemon(t)
	if _, stderr, code := d.run(t, d.serveArgs()...); code == 0 || !strings.Contains(stderr, d.state) {
		t.Errorf("exit code %d, %q; want a failure that names %s", code, stderr, d.state)
	}
}

func TestCreateAndRemove(t *testing.T) {
	d := startDaemon(t)
	if _, stderr, code := d.run(t, "create", "web", "--net", "none"); code != 0 {
		t.Fatalf("create: exit code %d, %s", code, stderr)
	}
	if stdout, stderr, code := d.run(t, "inspect", "web"); code != 0 || !strings.Contains(stdout, `"Ready"`) {
		t.Errorf("inspect: exit code %d, %s%s", code, stdout, stderr)
	}
	if _, stderr, code := d.run(t, "rm", "-f", "web"); code != 0 {
		t.Errorf("rm: exit code %d, %s", code, stderr)
	}
}
