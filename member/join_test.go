package member

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/tarstream"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

func process(args ...string) *specs.Process {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	return &specs.Process{
		Args: args, Cwd: "/", Env: []string{"PATH=/bin:/usr/bin"},
		Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
	}
}

// joinSteps are the steps of a program up to those of every process.
func joinSteps(t *testing.T, s *JoinSpec) []string {
	t.Helper()
	p, err := CompileJoin(s)
	if err != nil {
		t.Fatal(err)
	}
	var steps []string
	for i := range p.Len() {
		if p.Step(i) == "make a session keyring" {
			return steps
		}
		if n := len(steps); n == 0 || steps[n-1] != p.Step(i) {
			steps = append(steps, p.Step(i))
		}
	}
	t.Fatal("the program does not set up a process")
	return nil
}

func TestCompileJoinOrder(t *testing.T) {
	f := func() *os.File { return new(os.File) } // only told apart, never used
	adj := 100
	tty := process("/bin/true")
	tty.Terminal = true
	tty.OOMScoreAdj = &adj
	tests := []struct {
		name string
		spec JoinSpec
		want []string
	}{
		{"a member with a user namespace", JoinSpec{
			Namespaces: map[namespace.Kind]*os.File{
				namespace.User: f(), namespace.Mnt: f(), namespace.PID: f(), namespace.Net: f(), namespace.Cgroup: f(),
			},
			Root: f(), CgroupTasks: []string{"/c/tasks"}, Process: tty,
			UIDs: []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}},
		}, []string{
			"join the cgroup /c", "set oom_score_adj to 100", "open a terminal",
			"join the net namespace", "join the cgroup namespace", "join the pid namespace", "join the mnt namespace",
			"change to the root", "change the root",
			"open a terminal in /dev/pts", "unlock the terminal", "open the terminal's other end", "make the terminal stdio",
			"own the terminal", "close descriptors", "be not dumpable", "enter the pid namespace", "make a session", "take the terminal",
			"join the user namespace", "become root of the user namespace", "close descriptor 5", "close descriptors",
		}},
		{"a dead member", JoinSpec{
			Namespaces: map[namespace.Kind]*os.File{namespace.Mnt: f()}, Root: f(),
			Proc:    &ProcMount{Masked: []string{"/proc/keys", "/sys/firmware"}, ReadOnly: []string{"/proc/sys"}},
			Private: []namespace.Kind{namespace.UTS, namespace.PID}, Process: process("/bin/true"),
		}, []string{
			"join the mnt namespace", "change to the root", "change the root", "make the private namespaces", "make mounts private",
			"close descriptors", "be not dumpable", "enter the pid namespace", "make a session", "open /proc", "make a null device", "close", "make a null device", "mount proc on /proc", "close", "mount proc on /proc",
			"open the root", "make /proc/sys read-only", "close", "mask /proc/keys", "close", "mask /proc/keys", "close", "mask /proc/keys", "close", "mask /proc/keys", "close",
			"make the private namespaces", "close descriptors",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, joinSteps(t, &tt.spec)); diff != "" {
				t.Errorf("steps (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCompileJoinRefuses(t *testing.T) {
	f := new(os.File)
	tests := []struct {
		spec JoinSpec
		want string
	}{
		{JoinSpec{}, "no process"},
		{JoinSpec{Process: process("x"), Private: []namespace.Kind{namespace.User}}, "private user namespace"},
		{JoinSpec{Process: process("x"), Private: []namespace.Kind{"moon"}}, `"moon"`},
		{JoinSpec{Process: process("x"), Namespaces: map[namespace.Kind]*os.File{"moon": f}}, `"moon"`},
		{JoinSpec{Process: process("x"), Namespaces: map[namespace.Kind]*os.File{namespace.Net: nil}}, "no net namespace"},
		{JoinSpec{Process: process("x"), Namespaces: map[namespace.Kind]*os.File{namespace.Net: f}, Private: []namespace.Kind{namespace.Net}}, "joined and private"},
		{JoinSpec{Process: process("x"), Namespaces: map[namespace.Kind]*os.File{namespace.Mnt: f}, RootDir: "/x"}, "/x"},
		{JoinSpec{Process: process("x"), RootDir: "x"}, "absolute"},
		{JoinSpec{Process: process("x"), Proc: &ProcMount{Options: []string{"tmpcopyup"}}}, "tmpcopyup"},
	}
	for _, tt := range tests {
		if _, err := CompileJoin(&tt.spec); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("CompileJoin(%+v) = %v, want an error with %q", tt.spec, err, tt.want)
		}
	}
}

// target is a process with namespaces of its own, in a root with busybox, a
// tmpfs on /tmp that holds "kept", /proc and /dev/pts.
type target struct {
	id   procid.ID
	root *os.File
	ns   map[namespace.Kind]*os.File
	kill func()
}

func startTarget(t *testing.T) *target { return startTargetWith(t, 0) }

// startTargetWith also gives the target a user namespace, whose ids begin at
// firstID on the host, if that is not 0.
func startTargetWith(t *testing.T, firstID int) *target {
	t.Helper()
	rootfs := testenv.Busybox(t)
	for _, d := range []string{"proc", "tmp", "dev", "old"} {
		if err := os.MkdirAll(rootfs+"/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for dir := rootfs; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) { // the user namespace's root is nobody here
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := `set -e
r=$1
mount --make-rprivate /
mount --bind $r $r
mount -t proc proc $r/proc
mount -t tmpfs tmpfs $r/tmp
mount -t tmpfs tmpfs $r/dev
mkdir $r/dev/pts
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts $r/dev/pts
echo content >$r/tmp/kept
hostname target
cd $r
pivot_root . old
umount -l /old
/bin/busybox mount --make-rshared /
echo ready
exec /bin/busybox sleep 1000`
	cmd := exec.Command("/bin/sh", "-c", script, "sh", rootfs)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
	}
	if firstID != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: firstID, Size: 65536}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		cmd.SysProcAttr.Credential = &syscall.Credential{}
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var once bool
	tg := &target{kill: func() {
		if !once {
			once = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}}
	t.Cleanup(tg.kill)
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		tg.kill()
		t.Fatalf("target: %v: %s", err, stderr.String())
	}
	if tg.id, err = procid.Of(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	kinds := []namespace.Kind{namespace.Mnt, namespace.PID, namespace.UTS, namespace.Net, namespace.IPC}
	if firstID != 0 {
		kinds = append(kinds, namespace.User)
	}
	tg.ns = make(map[namespace.Kind]*os.File)
	for _, k := range kinds {
		if tg.ns[k], err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", tg.id.PID, k)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tg.ns[k].Close() })
	}
	if tg.root, err = os.OpenFile(fmt.Sprintf("/proc/%d/root", tg.id.PID), unix.O_PATH, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tg.root.Close() })
	return tg
}

func runJoin(t *testing.T, s *JoinSpec, stdin io.Reader) (stdout string, code int, err error) {
	t.Helper()
	p, err := CompileJoin(s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out, errOut bytes.Buffer
	c := Command{Program: p, Stdin: stdin, Stdout: &out, Stderr: &errOut, TTY: s.Process.Terminal}
	code, err = c.Run(ctx)
	if errOut.Len() > 0 {
		t.Logf("stderr: %s", errOut.String())
	}
	return out.String(), code, err
}

func TestExecIntoTheLiving(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	tg := startTarget(t)
	run := func(stdin io.Reader, args ...string) (string, int, error) {
		return runJoin(t, &JoinSpec{Namespaces: tg.ns, Root: tg.root, Process: process(args...)}, stdin)
	}
	out, code, err := run(strings.NewReader("in\n"), "sh", "-c", "cat; hostname; cat /tmp/kept; cat /proc/1/comm; ls /proc/self/fd | wc -l; exit 7")
	// The fourth descriptor is that of ls for the directory.
	if want := "in\ntarget\ncontent\nbusybox\n4\n"; out != want && out != strings.Replace(want, "busybox", "sleep", 1) || code != 7 || err != nil {
		t.Errorf("exec = %q, %d, %v, want %q, 7", out, code, err, want)
	}
	for k, f := range tg.ns {
		want, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		if out, _, err := run(nil, "readlink", "/proc/self/ns/"+string(k)); strings.TrimSpace(out) != want || err != nil {
			t.Errorf("%s namespace is %q, %v, want %q", k, out, err, want)
		}
	}
	if _, code, err := run(nil, "sh", "-c", "kill -TERM $$"); code != 128+15 || err != nil {
		t.Errorf("a killed command: %d, %v, want 143", code, err)
	}
	if _, code, err := run(nil, "nowhere"); code != ExitNotFound || !errors.Is(err, unix.ENOENT) {
		t.Errorf("a missing command: %d, %v, want 127", code, err)
	}
	if _, code, err := run(nil, "/tmp/kept"); code != ExitNotExecutable || !errors.Is(err, unix.EACCES) {
		t.Errorf("a file that is not executable: %d, %v, want 126", code, err)
	}
}

// A program is made for every probe of every member.
func TestCompileJoinMakesLittleGarbage(t *testing.T) {
	s := &JoinSpec{Namespaces: map[namespace.Kind]*os.File{namespace.Mnt: os.Stdin, namespace.PID: os.Stdin}, Root: os.Stdout, Process: process("true")}
	n := testing.AllocsPerRun(10, func() {
		if _, err := CompileJoin(s); err != nil {
			t.Fatal(err)
		}
	})
	if n > 80 {
		t.Errorf("CompileJoin allocates %v times", n)
	}
}

// One call joins all namespaces of a process that lives, by its pidfd.
func TestExecByPidfd(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	for name, tt := range map[string]struct{ users, calls int }{
		"user namespace of the host":   {0, 1},
		"user namespace of the target": {700000, 2}, // that one comes last
	} {
		t.Run(name, func(t *testing.T) {
			tg := startTargetWith(t, tt.users)
			pidfd, inodes, err := OpenNamespaces(tg.id)
			if err != nil {
				t.Fatal(err)
			}
			defer pidfd.Close()
			s := &JoinSpec{Namespaces: map[namespace.Kind]*os.File{}, Root: tg.root}
			for k, f := range tg.ns {
				s.Namespaces[k] = pidfd
				if got, err := os.Readlink(f.Name()); got != fmt.Sprintf("%s:[%d]", k, inodes[k]) || err != nil {
					t.Errorf("inode of the %s namespace is %d, the link says %q, %v", k, inodes[k], got, err)
				}
			}
			s.Process = process("sh", "-c", "for k; do readlink /proc/self/ns/$k; done; ls /proc/self/fd | wc -l", "sh", "mnt", "pid", "uts", "net", "ipc", "user")
			p, err := CompileJoin(s)
			if err != nil {
				t.Fatal(err)
			}
			var dump strings.Builder
			if err := p.Dump(&dump); err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(dump.String(), " setns("); n != tt.calls {
				t.Errorf("%d calls of setns, want %d:\n%s", n, tt.calls, dump.String())
			}
			var want string
			for _, k := range []namespace.Kind{namespace.Mnt, namespace.PID, namespace.UTS, namespace.Net, namespace.IPC, namespace.User} {
				want += fmt.Sprintf("%s:[%d]\n", k, inodes[k])
			}
			if out, code, err := runJoin(t, s, nil); out != want+"4\n" || code != 0 || err != nil {
				t.Errorf("exec = %q, %d, %v, want %q", out, code, err, want)
			}
			tg.kill()
			if _, code, err := runJoin(t, s, nil); code != ExitFailed || !errors.Is(err, procid.ErrGone) {
				t.Errorf("exec when the target has gone = %d, %v, want ErrGone", code, err)
			}
		})
	}
}

func TestJoinWithPrivateNetworkHasLo(t *testing.T) {
	testenv.Root(t)
	for name, users := range map[string]int{"user namespace of the host": 0, "user namespace of the target": 700000} {
		t.Run(name, func(t *testing.T) {
			tg := startTargetWith(t, users)
			delete(tg.ns, namespace.Net)
			proc := process("sh", "-c", "ip -o link show lo; ls /proc/self/fd | wc -l")
			out, code, err := runJoin(t, &JoinSpec{Namespaces: tg.ns, Root: tg.root, Private: []namespace.Kind{namespace.Net}, Process: proc}, nil)
			if !strings.Contains(out, "<LOOPBACK,UP,") || !strings.HasSuffix(out, "\n4\n") || code != 0 || err != nil {
				t.Errorf("lo is %q, %d, %v", out, code, err)
			}
		})
	}
}

func TestExecInUserNamespace(t *testing.T) {
	testenv.Root(t)
	const first = 700000
	tg := startTargetWith(t, first)
	proc := process("sh", "-c", "id -u; grep CapEff /proc/self/status; cat /proc/self/uid_map; touch /tmp/mine; tty")
	proc.Terminal = true
	proc.User.UID = 12
	out, code, err := runJoin(t, &JoinSpec{Namespaces: tg.ns, Root: tg.root, Process: proc}, nil)
	fields := strings.Fields(out)
	if want := []string{"12", "CapEff:", "0000000000000000", "0", "700000", "65536", "/dev/pts/0"}; !slices.Equal(fields, want) || code != 0 || err != nil {
		t.Errorf("exec = %q, %d, %v, want %q", fields, code, err, want)
	}
	var b bytes.Buffer
	if err := CopyOut(t.Context(), tg.root, "tmp/mine", &b, CopyOptions{IDs: &tarstream.IDs{Start: first, Size: 65536}}); err != nil {
		t.Fatal(err)
	}
	if h, err := tar.NewReader(&b).Next(); err != nil || h.Uid != 12 {
		t.Errorf("a file of the target's user 12 is copied as %+v, %v", h, err)
	}

	tg.kill()
	dead := map[namespace.Kind]*os.File{namespace.Mnt: tg.ns[namespace.Mnt], namespace.User: tg.ns[namespace.User]}
	out, code, err = runJoin(t, &JoinSpec{Namespaces: dead, Root: tg.root, Private: newPID, Proc: &ProcMount{}, Process: process("sh", "-c", "cat /tmp/kept; echo $$; ls -d /proc/1")}, nil)
	if want := "content\n1\n/proc/1\n"; out != want || code != 0 || err != nil {
		t.Errorf("join of the dead = %q, %d, %v, want %q", out, code, err, want)
	}
}

func TestExecWithTerminal(t *testing.T) {
	testenv.Root(t)
	tg := startTarget(t)
	for _, tt := range []struct {
		name string
		spec JoinSpec
		want string
	}{
		{"the target's", JoinSpec{Namespaces: tg.ns, Root: tg.root}, "/dev/pts/0\r\n"},
		{"the caller's", JoinSpec{}, "/dev/pts/"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.spec
			s.Process = process("sh", "-c", "tty; stty size; read x; echo got $x; exit 3")
			s.Process.Terminal = true
			p, err := CompileJoin(&s)
			if err != nil {
				t.Fatal(err)
			}
			sizes := make(chan unix.Winsize, 1)
			sizes <- unix.Winsize{Row: 33, Col: 77}
			var out bytes.Buffer
			c := Command{Program: p, Stdin: strings.NewReader("word\n"), Stdout: &out, TTY: true, Sizes: sizes}
			code, err := c.Run(t.Context())
			if got := out.String(); !strings.Contains(got, tt.want) || !strings.Contains(got, "33 77\r\n") || !strings.Contains(got, "got word\r\n") || code != 3 || err != nil {
				t.Errorf("Run = %q, %d, %v", got, code, err)
			}
		})
	}
}

// newPID is a pid namespace of the process's own.
var newPID = []namespace.Kind{namespace.PID}

func TestJoinShowsItsPIDNamespace(t *testing.T) {
	testenv.Root(t)
	tg := startTarget(t)
	// With the caller's mounts, and with a directory as the root.
	dir := testenv.Busybox(t)
	for _, d := range []string{"proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	ns := map[namespace.Kind]*os.File{namespace.PID: tg.ns[namespace.PID], namespace.Net: tg.ns[namespace.Net]}
	for name, s := range map[string]JoinSpec{
		"with the caller's root": {Namespaces: ns, Proc: &ProcMount{}},
		"with a directory":       {Namespaces: ns, Proc: &ProcMount{}, RootDir: dir},
	} {
		t.Run(name, func(t *testing.T) {
			s.Process = process("sh", "-c", "cat /proc/1/root/tmp/kept; test -d /proc/self/fd && : </dev/null && echo ok")
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_SYS_PTRACE")
			s.Process.Capabilities.Effective, s.Process.Capabilities.Permitted = s.Process.Capabilities.Bounding, s.Process.Capabilities.Bounding
			if out, code, err := runJoin(t, &s, nil); out != "content\nok\n" || code != 0 || err != nil {
				t.Errorf("join = %q, %d, %v", out, code, err)
			}
		})
	}
	out, _, err := runJoin(t, &JoinSpec{Namespaces: ns, RootDir: dir, Process: process("sh", "-c", "ls /; ls /sys/class/net; : >/made; cat /proc/self/mountinfo | wc -l")}, nil)
	if !strings.Contains(out, "proc\n") || strings.Contains(out, "boot") || !strings.Contains(out, "\nlo\n") || strings.Contains(out, "eth") || err != nil {
		t.Errorf("in the directory: %q, %v", out, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); err != nil {
		t.Errorf("the directory itself is the root: %v", err)
	}
	if after, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the caller's mounts have changed: %v\n%s", err, after)
	}
}

func TestJoinTheDead(t *testing.T) {
	testenv.Root(t)
	tg := startTarget(t)
	tg.kill()
	_, code, err := runJoin(t, &JoinSpec{Namespaces: tg.ns, Root: tg.root, Process: process("true")}, nil)
	if !errors.Is(err, ErrDeadPID) || code != ExitFailed {
		t.Errorf("join of a dead pid namespace = %d, %v, want ErrDeadPID", code, err)
	}

	ns := map[namespace.Kind]*os.File{namespace.Mnt: tg.ns[namespace.Mnt]}
	// The first joiner stays while the second looks at the mounts.
	proc := &ProcMount{Masked: []string{"/proc/keys", "/proc/bus"}, ReadOnly: []string{"/proc/sys"}}
	const look = "cat /tmp/kept; grep -c ' /proc ' /proc/self/mountinfo; echo $$; grep -c MemTotal /proc/meminfo; wc -c </proc/keys; ls /proc/bus; echo h >/proc/sys/kernel/domainname || echo no"
	hold, err := CompileJoin(&JoinSpec{Namespaces: ns, Root: tg.root, Private: newPID, Proc: proc, Process: process("sleep", "1000")})
	if err != nil {
		t.Fatal(err)
	}
	held, err := launch.Start(hold, launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Wait()
	defer held.Signal(unix.SIGKILL)
	for range 2 {
		// Three mounts on /proc: the dead member's, that of the masks' device,
		// and its own; not the other's.
		out, _, err := runJoin(t, &JoinSpec{Namespaces: ns, Root: tg.root, Private: newPID, Proc: proc, Process: process("sh", "-c", look)}, nil)
		if want := "content\n3\n1\n1\n0\nno\n"; out != want || err != nil {
			t.Errorf("join = %q, %v, want %q", out, err, want)
		}
	}
	// Without a /proc of its own it sees the dead one's, which is unchanged.
	out, _, err := runJoin(t, &JoinSpec{Namespaces: ns, Root: tg.root, Process: process("sh", "-c", "cat /tmp/kept; ls /proc/1 2>&1 | wc -l; ls -d /proc/sys")}, nil)
	if want := "content\n1\n/proc/sys\n"; out != want || err != nil {
		t.Errorf("join without a new /proc = %q, %v, want %q", out, err, want)
	}
	if _, _, err := OpenNamespaces(tg.id); !errors.Is(err, procid.ErrGone) {
		t.Errorf("OpenNamespaces of the dead = %v, want ErrGone", err)
	}
}

// A process that nobody has reaped yet is in no namespace any more: whoever
// joins it must be told, and not stay where it was.
func TestOpenNamespacesOfZombie(t *testing.T) {
	testenv.Root(t)
	tg := startTarget(t)
	if err := tg.id.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); tg.id.Alive(); {
		if time.Now().After(deadline) {
			t.Fatal("the target survives SIGKILL")
		}
		time.Sleep(time.Millisecond)
	}
	if _, _, err := OpenNamespaces(tg.id); !errors.Is(err, procid.ErrGone) {
		t.Errorf("OpenNamespaces of a zombie = %v, want %v", err, procid.ErrGone)
	}
}

func TestRunEndsWithItsContextAndForwardsSignals(t *testing.T) {
	testenv.Root(t)
	p, err := CompileJoin(&JoinSpec{Process: process("sh", "-c", "trap 'exit 9' USR1; echo ready; while :; do sleep 1; done")})
	if err != nil {
		t.Fatal(err)
	}
	ready, w := io.Pipe()
	signals := make(chan unix.Signal)
	go func() {
		io.ReadFull(ready, make([]byte, 6))
		go io.Copy(io.Discard, ready)
		signals <- unix.SIGUSR1
	}()
	c := Command{Program: p, Stdout: w, Signals: signals}
	if code, err := c.Run(t.Context()); code != 9 || err != nil {
		t.Errorf("Run = %d, %v, want 9", code, err)
	}
	p, err = CompileJoin(&JoinSpec{Process: process("sleep", "1000")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	c = Command{Program: p}
	if code, err := c.Run(ctx); code != ExitFailed || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run = %d, %v, want the context's error", code, err)
	}
}
