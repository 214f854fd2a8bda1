package pause

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/idrange"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/memexec"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/proctree"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var defaultKinds = []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS}

func openPauser(t testing.TB) *Pauser {
	t.Helper()
	p, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// start starts a pause that is gone at the end of the test.
func start(t testing.TB, p *Pauser, s *Spec) *Pause {
	t.Helper()
	s.Mark = "0123456789abcdef.test"
	pause, err := p.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kill(t, pause)
		if err := pause.Close(); err != nil {
			t.Error(err)
		}
	})
	return pause
}

func kill(t testing.TB, p *Pause) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.Kill(ctx); err != nil {
		t.Error(err)
	}
}

// eventually waits until ok says so.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

func status(t testing.TB, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		m[k] = strings.Join(strings.Fields(v), " ")
	}
	return m
}

func TestPauseGivesUpEverything(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	p := openPauser(t)
	for _, kinds := range [][]namespace.Kind{nil, defaultKinds, append([]namespace.Kind{namespace.PID}, defaultKinds...)} {
		t.Run(fmt.Sprint(kinds), func(t *testing.T) {
			pause := start(t, p, &Spec{Kinds: kinds, ShmSize: 1 << 20})
			pid := pause.ID().PID
			proc := fmt.Sprintf("/proc/%d/", pid)
			// It becomes idle a moment after it has said that it is ready.
			eventually(t, "descriptors closed", func() bool {
				fds, err := os.ReadDir(proc + "fd")
				return err == nil && len(fds) == 0
			})
			st := status(t, pid)
			for k, want := range map[string]string{
				"Name": "sandboxd-pause", "NoNewPrivs": "1", "Groups": "", "Threads": "1",
				"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534",
				"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
				"CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
				"SigIgn": "fffffffffffbfeff", // all but SIGKILL and SIGSTOP
			} {
				if st[k] != want {
					t.Errorf("%s is %q, want %q", k, st[k], want)
				}
			}
			if b, _ := os.ReadFile(proc + "cmdline"); !bytes.HasPrefix(b, []byte("sandboxd-pause\x000123456789abcdef.test\x00")) {
				t.Errorf("command line is %q", b)
			}
			// A non-dumpable process's files belong to root of the host.
			var own unix.Stat_t
			if err := unix.Stat(proc+"fd", &own); err != nil || own.Uid != 0 {
				t.Errorf("/proc/PID/fd belongs to %d (%v): the process is dumpable", own.Uid, err)
			}
			mounts, err := os.ReadFile(proc + "mountinfo")
			if err != nil || bytes.Count(mounts, []byte("\n")) != 1 || !bytes.Contains(mounts, []byte(" / / rw,nosuid,nodev,noexec")) {
				t.Errorf("mounts are %q (%v), want /dev/shm alone", mounts, err)
			}
			var fs unix.Statfs_t
			if err := unix.Statfs(proc+"root", &fs); err != nil || fs.Blocks*uint64(fs.Bsize) != 1<<20 {
				t.Errorf("size of /dev/shm is %d (%v)", fs.Blocks*uint64(fs.Bsize), err)
			}
			for _, k := range namespace.Kinds() {
				host, herr := os.Readlink("/proc/self/ns/" + string(k))
				its, ierr := os.Readlink(proc + "ns/" + string(k))
				_, holds := pause.Namespaces()[k]
				if herr != nil || ierr != nil || holds != (host != its) {
					t.Errorf("%s: host %s %v, pause %s %v, held %v", k, host, herr, its, ierr, holds)
				}
				if ino, ok := pause.Inodes()[k]; ok && its != fmt.Sprintf("%s:[%d]", k, ino) {
					t.Errorf("%s: inode %d, want that of %s", k, ino, its)
				}
			}
		})
	}
}

func TestResidentMemory(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	pause := start(t, p, &Spec{Kinds: defaultKinds})
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pause.ID().PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "Rss:" {
			if kib, err := strconv.Atoi(f[1]); err != nil || kib > 16 {
				t.Errorf("resident are %s KiB, want at most 16", f[1])
			}
			return
		}
	}
	t.Errorf("no Rss in %q", b)
}

func TestSignalsDoNotEndIt(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	for _, kinds := range [][]namespace.Kind{nil, {namespace.PID}} {
		t.Run(fmt.Sprint(kinds), func(t *testing.T) {
			pause := start(t, p, &Spec{Kinds: kinds})
			pid := strconv.Itoa(pause.ID().PID)
			script := "for s in TERM INT HUP QUIT ABRT SEGV USR1 ALRM 34 64; do kill -$s " + pid + " || exit 1; done"
			cmd := exec.Command("sh", "-c", script)
			if kinds != nil { // a member's view: as root in the pid namespace
				cmd = exec.Command("nsenter", "-t", pid, "-p", "sh", "-c", strings.ReplaceAll(script, pid, "1")+"; kill -KILL 1")
			}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if !pause.ID().Alive() {
				t.Error("pause died")
			}
			if got := status(t, pause.ID().PID)["SigQ"]; !strings.HasPrefix(got, "0/") {
				t.Errorf("signals are queued: %s", got)
			}
		})
	}
}

func TestReapsOrphans(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	pause := start(t, p, &Spec{Kinds: []namespace.Kind{namespace.PID}})
	pid := strconv.Itoa(pause.ID().PID)
	// The grandchild outlives its parent, so pid 1 inherits it.
	if out, err := exec.Command("nsenter", "-t", pid, "-p", "sh", "-c", "for i in 1 2 3; do (sh -c 'read x' </dev/null & ) ; done").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, "no child left", func() bool {
		b, err := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
		return err == nil && len(b) == 0
	})
	st, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	if !pause.ID().Alive() {
		t.Errorf("pause died: %s", st)
	}
}

func TestDoneAndReap(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	p := openPauser(t)
	pause := start(t, p, &Spec{Kinds: defaultKinds})
	other := exec.Command("true")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-pause.Done():
		t.Fatal("done before the death")
	default:
	}
	died := make(chan string, 4)
	pause.OnDeath(func() { died <- "first" })
	pause.OnDeath(func() { died <- "last" })
	if err := unix.Kill(pause.ID().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-pause.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("death was not noticed")
	}
	pause.OnDeath(func() { died <- "late" })
	if told := []string{<-died, <-died}; !slices.Contains(told, "last") || !slices.Contains(told, "late") {
		t.Errorf("called: %q", told)
	}
	if _, err := procid.Of(pause.ID().PID); !errors.Is(err, procid.ErrGone) {
		t.Errorf("not reaped: %v", err)
	}
	if err := other.Wait(); err != nil {
		t.Errorf("another child's status: %v", err)
	}
	kill(t, pause) // again
}

func TestSetUp(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	ids := idrange.Range{Start: 1 << 20, Size: idrange.Size}
	for name, s := range map[string]*Spec{
		"host's users":   {Kinds: defaultKinds},
		"user namespace": {Kinds: append([]namespace.Kind{namespace.User, namespace.PID}, defaultKinds...), IDs: &ids},
	} {
		t.Run(name, func(t *testing.T) {
			s.Hostname, s.Domainname, s.Loopback = "web", "example.org", true
			s.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shmmni": "77", "net/ipv4/conf/lo/forwarding": "1", "fs.mqueue.msg_max": "11"}
			hostname, _ := os.Hostname()
			pause := start(t, p, s)
			ns := pause.Namespaces()
			files := map[namespace.Kind]*os.File{}
			for _, k := range defaultKinds {
				files[k] = ns[k]
			}
			err := nsthread.Do(files, func() error {
				for file, want := range map[string]string{
					"kernel/hostname": "web", "kernel/domainname": "example.org", "kernel/shmmni": "77",
					"net/ipv4/ip_unprivileged_port_start": "81", "net/ipv4/conf/lo/forwarding": "1", "fs/mqueue/msg_max": "11",
				} {
					b, err := os.ReadFile("/proc/sys/" + file)
					if got := strings.TrimSpace(string(b)); err != nil || got != want {
						t.Errorf("%s is %q (%v), want %q", file, got, err, want)
					}
				}
				b, err := os.ReadFile("/proc/thread-self/net/dev_snmp6/lo")
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%v %s", err, b)
				}
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
					t.Errorf("lo is not up: %v", err)
				}
				if uid := unix.Geteuid(); uid != 0 {
					t.Errorf("thread's user is %d", uid)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := os.Hostname(); got != hostname {
				t.Errorf("the host's name became %q", got)
			}
		})
	}
}

func TestUserNamespace(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	ids := idrange.Range{Start: 1 << 20, Size: idrange.Size}
	pause := start(t, p, &Spec{Kinds: []namespace.Kind{namespace.User, namespace.Net, namespace.IPC, namespace.UTS, namespace.PID, namespace.Cgroup}, IDs: &ids})
	if got, want := status(t, pause.ID().PID)["Uid"], "1114110 1114110 1114110 1114110"; got != want {
		t.Errorf("user ids on the host are %s, want %s", got, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/root/", pause.ID().PID), &st); err != nil || st.Uid != ids.Start || st.Mode&0o7777 != 0o1777 {
		t.Errorf("root of /dev/shm: uid %d, mode %o (%v), want uid %d, mode 1777", st.Uid, st.Mode&0o7777, err, ids.Start)
	}
}

func TestTimeNamespace(t *testing.T) {
	testenv.Root(t)
	pause := start(t, openPauser(t), &Spec{Kinds: []namespace.Kind{namespace.Time}})
	host, err := os.Readlink("/proc/self/ns/time")
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("time:[%d]", pause.Inodes()[namespace.Time]); got == host {
		t.Errorf("time namespace is the host's: %s", got)
	}
}

// leaveFile puts a file into the sandbox's /dev/shm, as root of the sandbox: who
// is nobody in a user namespace can make no file in a tmpfs of it.
func leaveFile(t *testing.T, p *Pause, ids *idrange.Range) {
	t.Helper()
	dir, err := os.Open(fmt.Sprintf("/proc/%d/root/", p.ID().PID))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	id := uint32(0)
	if ids != nil {
		id = ids.Start
	}
	err = nsthread.Do(nil, func() error {
		unix.Setfsgid(int(id))
		unix.Setfsuid(int(id))
		defer unix.Setfsgid(0)
		defer unix.Setfsuid(0)
		fd, err := unix.Openat(int(dir.Fd()), "kept", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("content"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A pause is killed; what it held goes on in another.
func TestReanchor(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	p := openPauser(t)
	ids := idrange.Range{Start: 1 << 20, Size: idrange.Size}
	for name, s := range map[string]*Spec{
		"default": {Kinds: defaultKinds},
		"all":     {Kinds: []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS, namespace.User, namespace.Cgroup, namespace.Time}, IDs: &ids},
	} {
		t.Run(name, func(t *testing.T) {
			s.Hostname = "web"
			old := start(t, p, s)
			leaveFile(t, old, s.IDs)
			kill(t, old)
			again := *s
			again.From = old.Namespaces()
			pause := start(t, p, &again)
			for k, ino := range old.Inodes() {
				if got := pause.Inodes()[k]; got != ino {
					t.Errorf("%s: inode %d, want %d", k, got, ino)
				}
			}
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/kept", pause.ID().PID)); string(b) != "content" {
				t.Errorf("/dev/shm: %q, %v", b, err)
			}
			st, was := status(t, pause.ID().PID), "65534 65534 65534 65534"
			if s.IDs != nil {
				was = "1114110 1114110 1114110 1114110"
			}
			if st["Uid"] != was || st["CapBnd"] != "0000000000000000" || st["NoNewPrivs"] != "1" {
				t.Errorf("it has kept something: %v", st)
			}
			eventually(t, "descriptors closed", func() bool {
				fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pause.ID().PID))
				return err == nil && len(fds) == 0
			})
			select {
			case <-pause.Done():
				t.Error("it is dead")
			default:
			}
		})
	}
}

// The mount namespace died with the pause: what can be had again is had, and
// /dev/shm is a new one.
func TestReanchorWithoutMountNamespace(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	p := openPauser(t)
	ids := idrange.Range{Start: 1 << 20, Size: idrange.Size}
	for name, s := range map[string]*Spec{
		"default": {Kinds: defaultKinds, ShmSize: 1 << 20},
		"user":    {Kinds: append([]namespace.Kind{namespace.User}, defaultKinds...), IDs: &ids, ShmSize: 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			old := start(t, p, s)
			leaveFile(t, old, s.IDs)
			kill(t, old)
			again := *s
			again.From = old.Namespaces()
			delete(again.From, namespace.Mnt)
			pause := start(t, p, &again)
			for k, ino := range old.Inodes() {
				if got := pause.Inodes()[k]; got != ino {
					t.Errorf("%s: inode %d, want %d", k, got, ino)
				}
			}
			root := fmt.Sprintf("/proc/%d/root", pause.ID().PID)
			if ents, err := os.ReadDir(root); err != nil || len(ents) != 0 {
				t.Errorf("/dev/shm has %v, %v; want an empty one", ents, err)
			}
			var st unix.Statfs_t
			if err := unix.Statfs(root, &st); err != nil || st.Type != unix.TMPFS_MAGIC || int64(st.Blocks)*st.Bsize != s.ShmSize {
				t.Errorf("/dev/shm: type %#x with %d bytes, %v", st.Type, int64(st.Blocks)*st.Bsize, err)
			}
		})
	}
}

func TestAdopt(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	p := openPauser(t)
	first := start(t, p, &Spec{Kinds: defaultKinds})
	second, err := p.Adopt(t.Context(), first.ID(), defaultKinds)
	if err != nil {
		t.Fatal(err)
	}
	for k, ino := range first.Inodes() {
		if got := second.Inodes()[k]; got != ino {
			t.Errorf("%s: inode %d, want %d", k, got, ino)
		}
	}
	kill(t, second)
	if err := errors.Join(second.Close(), second.Close()); err != nil {
		t.Errorf("Close = %v", err)
	}
	<-first.Done()
	if _, err := p.Adopt(t.Context(), first.ID(), defaultKinds); !errors.Is(err, procid.ErrGone) {
		t.Errorf("Adopt of a dead one = %v, want ErrGone", err)
	}
}

func TestCgroup(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/sandboxd-test-pause-%d", os.Getpid())
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := h.Remove(ctx, path); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(h.MakeSandbox(path), h.MakeLeaf(path+"/pause")); err != nil {
		t.Fatal(err)
	}
	dir, err := h.TrackingDir(path + "/pause")
	if err != nil {
		t.Fatal(err)
	}
	s := &Spec{Kinds: defaultKinds, CgroupDir: dir}
	if dir != nil {
		defer dir.Close()
	} else {
		s.CgroupProcs = []string{h.LeafProcs(path + "/pause")}
	}
	inside := func(pause *Pause) {
		t.Helper()
		b, err := os.ReadFile(h.LeafProcs(path + "/pause"))
		if err != nil || !slices.Contains(strings.Fields(string(b)), strconv.Itoa(pause.ID().PID)) {
			t.Errorf("in the cgroup are %q (%v), want %v", b, err, pause.ID())
		}
	}
	first := start(t, p, s)
	inside(first)
	again := *s
	again.From = first.Namespaces()
	second := start(t, p, &again)
	inside(second)
	kill(t, first)
	kill(t, second)
}

// Whoever makes a member has the namespaces also when the pause is replaced meanwhile,
// and never what else has got the numbers of its files by then.
func TestDuplicates(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	first := start(t, p, &Spec{Kinds: defaultKinds})
	second, err := p.Adopt(t.Context(), first.ID(), defaultKinds)
	if err != nil {
		t.Fatal(err)
	}
	files, err := second.Duplicates()
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	for k, ino := range first.Inodes() {
		var st unix.Stat_t
		if err := unix.Fstat(int(files[k].Fd()), &st); err != nil || st.Ino != ino {
			t.Errorf("%s after Close: inode %d, want %d, %v", k, st.Ino, ino, err)
		}
	}
	for _, f := range files {
		f.Close()
	}
	if files, err := second.Duplicates(); !errors.Is(err, os.ErrClosed) || len(files) > 0 {
		t.Errorf("Duplicates after Close = %v, %v", files, err)
	}
}

func TestCloseLeavesItRunning(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	first := start(t, p, &Spec{Kinds: defaultKinds})
	second, err := p.Adopt(t.Context(), first.ID(), defaultKinds)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-second.Done():
		t.Error("Close closed Done")
	default:
	}
	if !first.ID().Alive() {
		t.Error("Close ended it")
	}
}

func TestStartFails(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	p := openPauser(t)
	for name, tt := range map[string]struct {
		spec Spec
		want string
	}{
		"sysctl of the host": {Spec{Kinds: defaultKinds, Sysctls: map[string]string{"kernel.panic": "1"}}, "kernel.panic"},
		"sysctl of another":  {Spec{Kinds: []namespace.Kind{namespace.UTS}, Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}}, "net.ipv4.ip_forward"},
		"no such sysctl":     {Spec{Kinds: defaultKinds, Sysctls: map[string]string{"net.nowhere": "1"}}, "net.nowhere"},
		"way out":            {Spec{Kinds: defaultKinds, Sysctls: map[string]string{"net./.kernel.panic": "1"}}, "sysctl"},
		"host's name":        {Spec{Hostname: "x"}, "uts"},
		"host's lo":          {Spec{Loopback: true}, "net namespace"},
		"cgroup":             {Spec{CgroupProcs: []string{"/nowhere/cgroup.procs"}}, "/nowhere/cgroup.procs"},
		"no ids":             {Spec{Kinds: []namespace.Kind{namespace.User}}, "65535"},
		"unknown kind":       {Spec{Kinds: []namespace.Kind{"air"}}, "air"},
		"no namespace":       {Spec{Kinds: defaultKinds, From: map[namespace.Kind]*os.File{}}, "no net namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.spec.Mark = "0123456789abcdef.fails"
			pause, err := p.Start(t.Context(), &tt.spec)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Start = %v, %v, want an error with %q", pause, err, tt.want)
			}
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
				t.Errorf("a child is left: %d %v", pid, err)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := p.Start(ctx, &Spec{Mark: "m", Kinds: defaultKinds}); !errors.Is(err, context.Canceled) {
			t.Errorf("Start = %v, want context.Canceled", err)
		}
	})
}

func TestReadReady(t *testing.T) {
	report := func(n ...uint32) []byte {
		var b []byte
		for _, v := range n {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		return b
	}
	for _, tt := range []struct {
		in   []byte
		want string
	}{
		{[]byte{0}, "<nil>"},
		{nil, "pause: ended before it was ready"},
		{report(2, uint32(unix.EPERM)), "pause: mount tmpfs for /dev/shm: operation not permitted"},
		{report(99, uint32(unix.EPERM)), "pause: step 99: operation not permitted"},
		{report(launch.ReportFailed, 7, uint32(unix.ENOEXEC)), "execute sandboxd-pause: exec format error"},
		{[]byte{1, 2, 3}, "pause: said 3 bytes at its start"},
	} {
		if got := fmt.Sprint(readReady(bytes.NewReader(tt.in))); got != tt.want {
			t.Errorf("readReady(%x) = %s, want %s", tt.in, got, tt.want)
		}
	}
}

func TestSysctlKind(t *testing.T) {
	for name, want := range map[string]namespace.Kind{
		"net.ipv4.ip_forward": namespace.Net, "net/core/somaxconn": namespace.Net,
		"kernel.shmmax": namespace.IPC, "kernel/sem": namespace.IPC, "fs.mqueue.queues_max": namespace.IPC,
		"kernel.domainname": namespace.UTS,
		"kernel.hostname":   "", "kernel.shmmax2": "", "network.x": "", "vm.swappiness": "", "": "", "kernel.net.x": "",
	} {
		if got, ok := SysctlKind(name); got != want || ok != (want != "") {
			t.Errorf("SysctlKind(%q) = %q, %v, want %q", name, got, ok, want)
		}
	}
}

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.conf.eth0/100.forwarding": "net/ipv4/conf/eth0.100/forwarding",
		"net/ipv4/conf/eth0.100/forwarding": "net/ipv4/conf/eth0.100/forwarding",
		"kernel.sem":                        "kernel/sem",
	} {
		if got := sysctlPath(name); got != want {
			t.Errorf("sysctlPath(%q) = %q, want %q", name, got, want)
		}
	}
}

// The program of the other architecture is run as far as user-mode emulation
// goes: to the first step, which needs a namespace that is not there.
func TestOtherArchitecture(t *testing.T) {
	testenv.Root(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("the other one is emulated on amd64")
	}
	qemu := testenv.Program(t, "qemu-aarch64-static")
	prog, err := filepath.Abs("pause_arm64.elf")
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command(qemu, "-0", Name, prog, "mark", "")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	if err := readReady(r); err != nil {
		t.Error(err)
	}
	if st := status(t, cmd.Process.Pid); st["Uid"] != "65534 65534 65534 65534" || st["NoNewPrivs"] != "1" {
		t.Errorf("it has kept something: %v", st)
	}
}

// BenchmarkStart compares, turn by turn, Start with its floor: the same program
// in the same namespaces, without a word of Go around it, until its exec has succeeded.
func BenchmarkStart(b *testing.B) {
	testenv.Root(b)
	p := openPauser(b)
	s := &Spec{Mark: "0123456789abcdef.bench", Kinds: defaultKinds, Hostname: "bench", Loopback: true}
	sys := &syscall.SysProcAttr{}
	for _, k := range withMnt(defaultKinds) {
		sys.Cloneflags |= k.Flag()
	}
	var starts, clones []time.Duration
	for b.Loop() {
		t := time.Now()
		pause, err := p.Start(context.Background(), s)
		starts = append(starts, time.Since(t))
		if err != nil {
			b.Fatal(err)
		}
		if err := errors.Join(pause.Kill(context.Background()), pause.Close()); err != nil {
			b.Fatal(err)
		}
		t = time.Now()
		pid, err := p.exe.Start([]string{Name, s.Mark, "mode=1777"}, nil, memexec.Files{}, &syscall.ProcAttr{Sys: sys})
		clones = append(clones, time.Since(t))
		if err != nil {
			b.Fatal(err)
		}
		unix.Kill(pid, unix.SIGKILL)
		unix.Wait4(pid, nil, 0, nil)
	}
	slices.Sort(starts)
	slices.Sort(clones)
	start, clone := starts[len(starts)/2], clones[len(clones)/2]
	b.ReportMetric(float64(start.Microseconds()), "start-us")
	b.ReportMetric(float64(clone.Microseconds()), "clone-us")
	b.ReportMetric(float64(start)/float64(clone), "start/clone")
}

// A signal that is pending makes poll(2) fail: it must not be taken for the end
// of a pause.
func TestSignalsAreNotTheEnd(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	pauses := make([]*Pause, 20)
	for i := range pauses {
		pause, err := p.Start(t.Context(), &Spec{Mark: "m", Kinds: []namespace.Kind{namespace.UTS}})
		if err != nil {
			t.Fatal(err)
		}
		pauses[i] = pause
		defer func() {
			if err := errors.Join(pause.Kill(context.Background()), pause.Close()); err != nil {
				t.Error(err)
			}
		}()
	}
	stop := make(chan struct{})
	var senders sync.WaitGroup
	for range 4 {
		senders.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					unix.Kill(os.Getpid(), unix.SIGURG) // which the runtime takes for a request to preempt
				}
			}
		})
	}
	defer senders.Wait()
	defer close(stop)
	for i := range 200 { // watching anew polls at once
		again, err := p.Adopt(t.Context(), pauses[i%len(pauses)].ID(), []namespace.Kind{namespace.UTS})
		if err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
		select {
		case <-again.Done():
			t.Fatalf("pause %v is said to be dead", again.ID())
		default:
		}
		again.Close()
	}
}

// There may be thousands.
func TestPausesTakeNoGoroutines(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	start(t, p, &Spec{Kinds: defaultKinds}) // whatever the first one begins
	before := runtime.NumGoroutine()
	for range 5 {
		start(t, p, &Spec{Kinds: defaultKinds})
	}
	eventually(t, "no goroutine that waits for a pause", func() bool { return runtime.NumGoroutine() <= before })
}

// Until the caller is ready there is no process, and if it never is, nothing is left.
func TestNothingIsStartedBeforeReady(t *testing.T) {
	testenv.Root(t)
	p := openPauser(t)
	for _, kinds := range [][]namespace.Kind{defaultKinds, append([]namespace.Kind{namespace.User}, defaultKinds...)} {
		mark := fmt.Sprintf("0123456789abcdef.%016x", len(kinds))
		boom := errors.New("boom")
		called := 0
		s := &Spec{Mark: mark, Kinds: kinds, IDs: &idrange.Range{Start: 100000, Size: 65536}, Hostname: "box", Loopback: true, Ready: func() error {
			called++
			found, err := proctree.Find(mark)
			if err != nil || len(found) > 0 {
				t.Errorf("before the caller is ready there are %v, %v", found, err)
			}
			return boom
		}}
		if _, err := p.Start(t.Context(), s); !errors.Is(err, boom) || called != 1 {
			t.Errorf("Start = %v, having called Ready %d times", err, called)
		}
		if found, err := proctree.Find(mark); err != nil || len(found) > 0 {
			t.Errorf("there are %v, %v", found, err)
		}
	}
}
