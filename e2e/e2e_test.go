//go:build e2e

// Package e2e drives the binary as a user would, and looks at the host afterwards.
package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/leak"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// ready is how long a daemon may take to be ready. It is far above what it
// takes, for machines that are slow or busy, and ends only a hung one.
const ready = 60 * time.Second

var (
	binary = os.Getenv("SANDBOXD_E2E_BINARY")
	// top is the cgroup above those of all daemons, the same in every hierarchy.
	top = fmt.Sprintf("/sandboxd-e2e-%d", os.Getpid())
	// scratch holds everything that tests make: it is TMPDIR too.
	scratch string
	// states holds the state directories. It is in memory, as /run is, and its
	// name is short: that of a Unix socket has 107 bytes at most.
	states string
)

// crashBinary returns the daemon with crash points, see package crash.
var crashBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("SANDBOXD_E2E_CRASH_BINARY"); path != "" {
		return path, nil
	}
	return buildBinary("sandboxd-crashpoints", "-tags=crashpoints")
})

func buildBinary(name string, flags ...string) (string, error) {
	path := filepath.Join(scratch, name)
	args := append(append([]string{"build", "-o", path}, flags...), "../cmd/sandboxd")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
}

func TestMain(m *testing.M) {
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// runAll runs all tests and then looks at what they left behind on the host.
func runAll(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return m.Run(), nil // they skip, or fail where root is required
	}
	if scratch, err = os.MkdirTemp("", "sandboxd-e2e-"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(scratch)
	// Not a name that the oracle of another test looks for.
	if states, err = os.MkdirTemp("/dev/shm", "e2e-"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(states)
	tmp := filepath.Join(scratch, "tmp")
	if err := os.Mkdir(tmp, 0o777|os.ModeSticky); err != nil {
		return 0, err
	}
	os.Setenv("TMPDIR", tmp)
	if binary == "" {
		if binary, err = buildBinary("sandboxd"); err != nil {
			return 0, err
		}
	}
	if err := makeCgroup(top); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, sweep()) }()

	before, err := leak.Take(leak.Options{CgroupParent: top, Dirs: []string{tmp, states}, Links: true})
	if err != nil {
		return 0, err
	}
	code = m.Run()
	left, err := before.Wait(10 * time.Second)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("the tests together: %s", leak.Report(left))
	}
	return code, err
}

// hierarchies returns the mount points of all cgroup hierarchies.
func hierarchies() ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var dirs []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// Field 5 is the mount point; the type follows " - ", proc_pid_mountinfo(5).
		left, right, _ := strings.Cut(lines.Text(), " - ")
		if l := strings.Fields(left); len(l) > 4 && strings.HasPrefix(right, "cgroup") {
			dirs = append(dirs, l[4])
		}
	}
	if len(dirs) == 0 && lines.Err() == nil {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return dirs, lines.Err()
}

// makeCgroup makes the cgroup path in every hierarchy.
func makeCgroup(path string) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		// One hierarchy may be mounted twice.
		if err := os.Mkdir(filepath.Join(dir, path), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// removeCgroup removes the cgroup path from every hierarchy. Nothing may be in it.
func removeCgroup(path string) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := unix.Rmdir(filepath.Join(dir, path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rmdir %s%s: %w", dir, path, err)
		}
	}
	return nil
}

// sweep kills what tests that failed left running, and removes all cgroups.
func sweep() error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		// Only the v2 hierarchy has it, and everything is in that too.
		err := os.WriteFile(filepath.Join(dir, top, "cgroup.kill"), []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var busy error
		for _, dir := range dirs {
			busy = errors.Join(busy, removeTree(filepath.Join(dir, top)))
		}
		if busy == nil || time.Now().After(deadline) {
			return busy
		}
	}
}

// removeTree removes cgroups from the deepest up, until one is busy.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, unix.Rmdir(dir))
}

// daemon is a sandboxd with directories and a cgroup of its own.
type daemon struct {
	state, root, parent string
	binary              string   // what start runs
	env                 []string // what start adds to the environment
	flags               []string // and to the command line of serve
	netns               *os.File // the daemon's network namespace; nil: the machine's
	stderr              *os.File // in place of log, if not nil
	cmd                 *exec.Cmd
	exited              chan struct{} // closed when cmd has ended and was waited for
	log                 lockedBuffer  // what it and its predecessors wrote to stderr
}

// lockedBuffer is a bytes.Buffer that may be read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var daemons atomic.Int32

// newDaemon returns a daemon that does not run yet. When the test ends it is
// stopped, and must have left nothing.
func newDaemon(t *testing.T) *daemon {
	t.Helper()
	testenv.Root(t)
	n := daemons.Add(1)
	d := &daemon{
		state:  filepath.Join(states, fmt.Sprint(n)),
		root:   t.TempDir(),
		parent: fmt.Sprintf("%s/%d", top, n),
		binary: binary,
	}
	if err := os.Mkdir(d.state, 0o700); err != nil {
		t.Fatal(err)
	}
	// The daemon makes the cgroup when first needed, and leaves it, since it is
	// not any sandbox's.
	if err := makeCgroup(d.parent); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop(t)
		if t.Failed() {
			t.Logf("the daemon said:\n%s", d.log.String())
		}
		if err := removeCgroup(d.parent); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(d.state); err != nil {
			t.Error(err)
		}
	})
	return d
}

// startDaemon returns a daemon that runs. When the test ends the oracle looks,
// last, for what sandboxes and members left.
func startDaemon(t *testing.T) *daemon {
	t.Helper()
	d := newDaemon(t)
	d.start(t)
	d.checkLeaks(t)
	return d
}

// keeps are what a daemon keeps on purpose when all else is gone.
func (d *daemon) keeps() []string {
	return []string{d.root + "/events", d.root + "/collected", d.root + "/states"}
}

// moreThreads is how many threads a daemon may have more at the end of a test than
// when it was warm. Go keeps as many as were in system calls at once, beside those
// that run. A thread that stays behind each operation is soon more than that.
var moreThreads = 4*runtime.NumCPU() + 16

// checkLeaks makes the test fail at its end if there is more of d on the host
// then than now.
func (d *daemon) checkLeaks(t *testing.T) {
	t.Helper()
	o := leak.Options{Ancestor: -1, CgroupParent: d.parent, Dirs: []string{d.root, d.state}, Keep: d.keeps()}
	if d.cmd != nil {
		o.PID, o.Threads = d.cmd.Process.Pid, moreThreads
	}
	if d.netns != nil {
		o.NetNS = fmt.Sprintf("/proc/self/fd/%d", d.netns.Fd())
	}
	before, err := leak.Take(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Another process than before is nothing to compare with: it is new.
		if d.cmd != nil && d.cmd.Process.Pid != o.PID {
			d.stop(t)
		}
		left, err := before.Wait(10 * time.Second)
		if err != nil {
			t.Error(err)
		}
		if len(left) > 0 {
			t.Error(leak.Report(left))
		}
		if half, _ := filepath.Glob(d.root + "/collected/.*-*"); len(half) > 0 {
			t.Errorf("unfinished collections: %v", half)
		}
	})
}

// start runs the daemon and waits until it is ready.
func (d *daemon) start(t *testing.T) {
	t.Helper()
	if err := d.launch(); err != nil {
		t.Fatal(err)
	}
	if !d.waitReady(t) {
		t.Fatalf("the daemon ended: %s\n%s", d.cmd.ProcessState, d.log.String())
	}
}

// launch runs the daemon and does not wait.
func (d *daemon) launch() error {
	// A socket that a killed daemon left must not be taken for this one's.
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.cmd = exec.Command(d.binary, d.serveArgs()...)
	d.cmd.Env = append(os.Environ(), d.env...)
	d.cmd.Stderr = &d.log
	if d.stderr != nil {
		d.cmd.Stderr = d.stderr
	}
	start := d.cmd.Start
	if d.netns != nil {
		start = func() error { return startIn(d.netns, d.cmd) }
	}
	if err := start(); err != nil {
		return err
	}
	d.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		cmd.Wait()
		close(exited)
	}(d.cmd, d.exited)
	return nil
}

// waitReady returns true when the daemon has its socket, and false when it has
// ended.
func (d *daemon) waitReady(t *testing.T) bool {
	t.Helper()
	for deadline := time.Now().Add(ready); ; {
		select {
		case <-d.exited:
			return false
		case <-time.After(5 * time.Millisecond):
		}
		// Not only whether it is there: nobody listens yet when it has just been
		// made.
		if c, err := net.Dial("unix", d.socket()); err == nil {
			c.Close()
			return true
		}
		if time.Now().After(deadline) {
			t.Fatalf("the daemon has no socket after %s:\n%s", ready, d.log.String())
		}
	}
}

// waitExit returns when the daemon has ended by itself, as at a crash point.
func (d *daemon) waitExit(t *testing.T) {
	t.Helper()
	select {
	case <-d.exited:
	case <-time.After(ready):
		t.Fatalf("the daemon has not ended after %s:\n%s", ready, d.log.String())
	}
}

// stop ends the daemon as a service manager does.
func (d *daemon) stop(t *testing.T) {
	t.Helper()
	d.end(t, unix.SIGTERM)
}

// kill ends the daemon by SIGKILL. start starts another.
func (d *daemon) kill(t *testing.T) {
	t.Helper()
	d.end(t, unix.SIGKILL)
}

func (d *daemon) end(t *testing.T, sig unix.Signal) {
	t.Helper()
	if d.cmd == nil {
		return
	}
	d.cmd.Process.Signal(sig) // it may have ended already
	d.waitExit(t)
}

func (d *daemon) serveArgs() []string {
	return append([]string{"serve", "--state", d.state, "--root", d.root, "--cgroup-parent", d.parent, "--address", d.address(),
		"--network-default", "none", // what is not about networks leaves the machine's alone
	}, d.flags...)
}

func (d *daemon) socket() string { return filepath.Join(d.state, "sandboxd.sock") }

func (d *daemon) address() string { return "unix://" + d.socket() }

// command is a client of d.
func (d *daemon) command(args ...string) *exec.Cmd {
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "SANDBOXD_ADDRESS="+d.address(), "SANDBOXD_STATE="+d.state)
	return cmd
}

// run runs a client of d to its end.
func (d *daemon) run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := d.command(args...)
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

func TestDaemonComesBackAfterKill(t *testing.T) {
	d := startDaemon(t)
	if _, stderr, code := d.run(t, "create", "web", "--net", "none"); code != 0 {
		t.Fatalf("create: exit code %d, %s", code, stderr)
	}
	d.kill(t)
	d.start(t)
	if stdout, stderr, code := d.run(t, "inspect", "web"); code != 0 || !strings.Contains(stdout, `"Ready"`) {
		t.Errorf("inspect: exit code %d, %s%s", code, stdout, stderr)
	}
	if _, stderr, code := d.run(t, "rm", "-f", "web"); code != 0 {
		t.Errorf("rm: exit code %d, %s", code, stderr)
	}
}
