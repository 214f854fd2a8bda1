package leak

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// The first thread stays with the main goroutine: what it is in is what /proc
// shows of the whole process, so no test may take it elsewhere.
func init() { runtime.LockOSThread() }

// TestMain is also the program of the processes that tests plant: called by one
// of our names, it waits for the end of its standard input.
func TestMain(m *testing.M) {
	if strings.HasPrefix(os.Args[0], "sandboxd-") {
		io.Copy(io.Discard, os.Stdin)
		return
	}
	os.Exit(m.Run())
}

// start runs a process until the returned function is called, or the test ends.
// Its command line is argv, or "sandboxd-planted".
func start(t *testing.T, attr *syscall.SysProcAttr, argv ...string) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append(argv, "sandboxd-planted")[:max(1, len(argv))]
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	t.Cleanup(end)
	return cmd.Process.Pid, end
}

// cgroup makes a cgroup in some hierarchy, and returns its path below that and
// as a file.
func cgroup(t *testing.T) (path, dir string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range parseMounts(string(b)) {
		if m.fstype == "cgroup2" {
			path = fmt.Sprintf("/sandboxd-leaktest-%d", os.Getpid())
			dir = filepath.Join(m.point, path)
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Remove(dir) })
			return path, dir
		}
	}
	t.Fatal("no cgroup v2 hierarchy is mounted")
	return "", ""
}

// Each kind of thing is planted, must be found with its kind and what a person
// needs to find it, and must be gone when it has been taken away.
func TestEachKind(t *testing.T) {
	testenv.Root(t)
	parent, parentDir := cgroup(t)
	dir := t.TempDir()
	tests := []struct {
		name  string
		kind  Kind
		o     Options
		plant func(t *testing.T) (undo func())
		want  string // part of the finding
	}{
		{"a child", Process, Options{}, func(t *testing.T) func() {
			_, end := start(t, nil)
			return end
		}, "(sandboxd-planted)"},
		{"a zombie", Process, Options{}, func(t *testing.T) func() {
			pid, end := start(t, nil)
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			// Seen, not reaped.
			var info unix.Siginfo
			if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
			return end
		}, "zombie, child of"},
		{"a process with our mark", Process, Options{Ancestor: -1, Marks: []string{"0123456789abcdef"}}, func(t *testing.T) func() {
			_, end := start(t, nil, "sandboxd-monitor", "0123456789abcdef.aa/bb")
			return end
		}, "sandboxd-monitor 0123456789abcdef.aa/bb"},
		{"a process in our cgroup", Process, Options{Ancestor: -1, CgroupParent: parent}, func(t *testing.T) func() {
			pid, end := start(t, nil)
			if err := os.WriteFile(filepath.Join(parentDir, "cgroup.procs"), fmt.Append(nil, pid), 0); err != nil {
				t.Fatal(err)
			}
			return end
		}, "(sandboxd-planted)"},
		{"a process with a file of ours", Process, Options{Ancestor: -1, Dirs: []string{dir}}, func(t *testing.T) func() {
			if err := os.Chdir(dir); err != nil {
				t.Fatal(err)
			}
			_, end := start(t, nil)
			if err := os.Chdir("/"); err != nil {
				t.Fatal(err)
			}
			return end
		}, "(sandboxd-planted)"},
		{"a thread that went elsewhere", Thread, Options{}, func(t *testing.T) func() {
			return strayThread(t)
		}, "is in uts:["},
		{"a namespace of a child", Namespace, Options{}, func(t *testing.T) func() {
			_, end := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
			return end
		}, "net:["},
		{"a namespace of a thread", Namespace, Options{}, func(t *testing.T) func() {
			return strayThread(t)
		}, "thread "},
		{"a namespace behind a descriptor", Namespace, Options{}, func(t *testing.T) func() {
			pid, end := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS})
			f, err := os.Open(fmt.Sprintf("/proc/%d/ns/uts", pid))
			if err != nil {
				t.Fatal(err)
			}
			end()
			return func() { f.Close() }
		}, "fd "},
		{"a namespace behind a bind mount", Namespace, Options{Dirs: []string{dir}}, func(t *testing.T) func() {
			return boundNamespace(t, dir)
		}, "bind mount on " + dir},
		{"a mount", Mount, Options{Dirs: []string{dir}}, func(t *testing.T) func() {
			return tmpfs(t, dir)
		}, dir + ": tmpfs of leaktest"},
		{"a second mount on the same place", Mount, Options{Dirs: []string{dir}}, func(t *testing.T) func() {
			a, b := tmpfs(t, dir), tmpfs(t, dir)
			return func() {
				b()
				a()
			}
		}, "(number 2 there)"},
		{"a mount that shows our files elsewhere", Mount, Options{Dirs: []string{dir}}, func(t *testing.T) func() {
			return overlay(t, dir)
		}, "overlay of"},
		{"a cgroup", Cgroup, Options{CgroupParent: parent}, func(t *testing.T) func() {
			child := filepath.Join(parentDir, "child")
			if err := os.Mkdir(child, 0o755); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(child) }
		}, "/child: 0 processes"},
		{"a file", File, Options{Dirs: []string{dir}}, func(t *testing.T) func() {
			fifo := filepath.Join(dir, "fifo")
			if err := unix.Mkfifo(fifo, 0o600); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(fifo) }
		}, "/fifo: p"},
		{"a descriptor", FD, Options{PID: os.Getpid()}, func(t *testing.T) func() {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			return func() {
				r.Close()
				w.Close()
			}
		}, "pipe, number "},
		{"a memfd", Memfd, Options{}, func(t *testing.T) func() {
			fd, err := unix.MemfdCreate("leaktest", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			return func() { unix.Close(fd) }
		}, "leaktest inode"},
		{"shared memory", Shm, Options{}, func(t *testing.T) func() {
			name := fmt.Sprintf("/dev/shm/sandboxd-leaktest-%d", os.Getpid())
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				t.Skipf("no POSIX shared memory here: %v", err)
			}
			return func() { os.Remove(name) }
		}, "/dev/shm/sandboxd-leaktest-"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := take(t, tt.o)
			undo := tt.plant(t)
			// A process that was cloned may not have got to its execve yet.
			if !eventually(func() bool { return found(Diff(before, take(t, tt.o)), tt.kind, tt.want) }) {
				t.Errorf("no %s with %q among: %s", tt.kind, tt.want, Report(Diff(before, take(t, tt.o))))
			}
			undo()
			fs, err := before.Wait(grace)
			if err != nil || len(fs) > 0 {
				t.Errorf("after it was taken away: %s, %v", Report(fs), err)
			}
		})
	}
}

func take(t *testing.T, o Options) *Snapshot {
	t.Helper()
	s, err := Take(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func found(fs []Finding, kind Kind, want string) bool {
	return slices.ContainsFunc(fs, func(f Finding) bool { return f.Kind == kind && strings.Contains(f.String(), want) })
}

func eventually(ok func() bool) bool {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if ok() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// strayThread makes a thread of this process that is in a uts namespace of its
// own, and ends it with the returned function.
func strayThread(t *testing.T) func() {
	t.Helper()
	ready, stop, done := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and not unlocked: the thread ends with the goroutine
		ready <- unix.Unshare(unix.CLONE_NEWUTS)
		<-stop
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	return func() {
		close(stop)
		<-done
	}
}

func boundNamespace(t *testing.T, dir string) func() {
	t.Helper()
	pid, end := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
	file := filepath.Join(dir, "ns")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/net", pid), file, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	end()
	return func() {
		if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		os.Remove(file)
	}
}

func tmpfs(t *testing.T, dir string) func() {
	t.Helper()
	if err := unix.Mount("leaktest", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
}

// overlay mounts layers in dir on a place outside it.
func overlay(t *testing.T, dir string) func() {
	t.Helper()
	layer, target := filepath.Join(dir, "layer"), t.TempDir()
	if err := os.MkdirAll(filepath.Join(layer, "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(layer, "b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", target, "overlay", 0, "lowerdir="+layer+"/a:"+layer+"/b"); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Unmount(target, 0); err != nil {
			t.Error(err)
		}
		os.RemoveAll(layer)
	}
}

// What is of others is not ours, though it is new and of the same kinds.
func TestOthers(t *testing.T) {
	testenv.Root(t)
	o := Options{Ancestor: -1, Dirs: []string{t.TempDir()}, CgroupParent: "/sandboxd-leaktest-none", Marks: []string{"0123456789abcdef"}}
	before := take(t, o)
	start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWNS})
	start(t, nil, "sandboxd-pause")
	_, dir := cgroup(t)
	if err := os.Mkdir(filepath.Join(dir, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(dir, "x")) })
	t.Cleanup(tmpfs(t, t.TempDir()))
	if fs := Diff(before, take(t, o)); len(fs) > 0 {
		t.Error(Report(fs))
	}
}

// The directories of others are not entered: an oracle that looks for what has a
// file below one of them open would find this one.
func TestOthersDirectories(t *testing.T) {
	testenv.Root(t)
	dir, err := os.MkdirTemp("/dev/shm", "leaktest-")
	if err != nil {
		t.Skipf("no POSIX shared memory here: %v", err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	take(t, Options{})
	if n, err := unix.Read(fd, make([]byte, 4096)); err != unix.EAGAIN {
		t.Errorf("%s was opened: %d bytes of events, %v", dir, n, err)
	}
}

// A mount namespace that was left is one finding, without its mounts.
func TestMountNamespaceIsOneFinding(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	t.Cleanup(tmpfs(t, dir))
	o := Options{Dirs: []string{dir}}
	before := take(t, o)
	start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS})
	if len(before.Things[Mount]) != 1 {
		t.Fatalf("mounts seen: %q", before.Things[Mount])
	}
	fs := Diff(before, take(t, o))
	if !found(fs, Namespace, "mnt:[") {
		t.Errorf("no mount namespace among: %s", Report(fs))
	}
	for _, f := range fs {
		if f.Kind == Mount {
			t.Errorf("reported on its own: %s", f)
		}
	}
}

// With Global it does not matter whose it is. Other tests run meanwhile, so only
// what was planted is looked for.
func TestGlobal(t *testing.T) {
	testenv.Root(t)
	o := Options{Ancestor: -1, Global: true}
	before := take(t, o)
	pid, _ := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS})
	dir := t.TempDir()
	t.Cleanup(tmpfs(t, dir))
	_, cg := cgroup(t)
	holder := fmt.Sprintf("pid %d (", pid)
	for kind, want := range map[Kind]string{Process: holder, Namespace: holder, Mount: dir, Cgroup: cg} {
		if fs := Diff(before, take(t, o)); !found(fs, kind, want) {
			t.Errorf("no %s with %q among: %s", kind, want, Report(fs))
		}
	}
}

// A thread more may be, a lot more may not.
func TestThreads(t *testing.T) {
	testenv.Root(t)
	o := Options{Ancestor: -1, PID: os.Getpid(), Threads: 20}
	before := take(t, o)
	block := func(n int) (unblock func()) {
		var wg sync.WaitGroup
		ready, stop := make(chan struct{}), make(chan struct{})
		for range n {
			wg.Go(func() {
				runtime.LockOSThread() // and not unlocked: the thread ends with the goroutine
				ready <- struct{}{}
				<-stop
			})
		}
		for range n {
			<-ready
		}
		return func() {
			close(stop)
			wg.Wait()
		}
	}
	unblock := block(5)
	if fs := Diff(before, take(t, o)); len(fs) > 0 {
		t.Errorf("with 5 more: %s", Report(fs))
	}
	unblock()
	unblock = block(50)
	if fs := Diff(before, take(t, o)); len(fs) != 1 || !found(fs, Thread, "20 more are no finding") {
		t.Errorf("with 50 more: %s", Report(fs))
	}
	unblock()
	if fs, err := before.Wait(grace); err != nil || len(fs) > 0 {
		t.Errorf("after they have ended: %s, %v", Report(fs), err)
	}
}

// A link is planted in a network namespace of its own: Take reads that of the
// thread it runs on.
func TestLink(t *testing.T) {
	testenv.Root(t)
	runtime.LockOSThread() // and not unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	if fs := Diff(&Snapshot{}, take(t, Options{Ancestor: -1, Links: true})); !found(fs, Link, "lo") {
		t.Errorf("no lo among: %s", Report(fs))
	}
}

// recorder is a test that is told of its failure.
type recorder struct {
	testing.TB
	cleanups []func()
	errors   []string
}

func (r *recorder) Helper()                   {}
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Errorf(f string, a ...any) { r.errors = append(r.errors, fmt.Sprintf(f, a...)) }
func (r *recorder) end() {
	for _, f := range slices.Backward(r.cleanups) {
		f()
	}
}

func TestCheck(t *testing.T) {
	testenv.Root(t)
	for _, leaks := range []bool{false, true} {
		dir := t.TempDir()
		r := &recorder{TB: t}
		Check(r, dir)
		file := filepath.Join(dir, "left")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if !leaks {
			r.Cleanup(func() { os.Remove(file) })
		}
		r.end()
		switch {
		case !leaks && len(r.errors) > 0:
			t.Errorf("nothing was left, and the test failed: %q", r.errors)
		case leaks && (len(r.errors) != 1 || !strings.Contains(r.errors[0], "1 left behind:\n  file "+file)):
			t.Errorf("a file was left, and the test said %q", r.errors)
		}
	}
}

func TestSnapshotAsJSON(t *testing.T) {
	before := take(t, Options{Dirs: []string{t.TempDir()}})
	b, err := json.Marshal(before)
	if err != nil {
		t.Fatal(err)
	}
	var read Snapshot
	if err := json.Unmarshal(b, &read); err != nil {
		t.Fatal(err)
	}
	if fs, err := read.Wait(0); err != nil || len(fs) > 0 {
		t.Errorf("%s, %v", Report(fs), err)
	}
	read.Things[Namespace] = nil
	if fs, err := read.Wait(0); err != nil || !found(fs, Namespace, "net:[") {
		t.Errorf("a snapshot without namespaces finds %s, %v", Report(fs), err)
	}
}

func TestParseMounts(t *testing.T) {
	got := parseMounts("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\nnonsense\n")
	want := []mount{{"/mnt1", "/mnt 2", "ext3", "/dev/root", "rw,errors=continue"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestBelow(t *testing.T) {
	for _, tt := range []struct {
		path, dir string
		want      bool
	}{
		{"/a/b", "/a/b", true},
		{"/a/b/c", "/a/b", true},
		{"/a/bc", "/a/b", false},
		{"/a", "/a/b", false},
		{"/a", "/", true},
	} {
		if got := below(tt.path, tt.dir); got != tt.want {
			t.Errorf("below(%q, %q) = %t", tt.path, tt.dir, got)
		}
	}
}
