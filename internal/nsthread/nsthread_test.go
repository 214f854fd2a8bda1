package nsthread_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

var kinds = []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS}

// tookFirst says that a call made on the process's first thread has run on it.
var tookFirst bool

func init() { runtime.LockOSThread() } // TestMain begins there

func TestMain(m *testing.M) {
	runtime.UnlockOSThread()
	nsthread.Do(nil, func() error { tookFirst = unix.Gettid() == unix.Getpid(); return nil })
	os.Exit(m.Run())
}

func TestDoLeavesFirstThreadAlone(t *testing.T) {
	if tookFirst {
		t.Error("Do has run on the first thread, whose state /proc/self shows")
	}
}

func TestDo(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	files := newNamespaces(t)
	boom := errors.New("boom")
	if err := nsthread.Do(files, func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Do = %v, want boom", err)
	}
	err := nsthread.Do(files, func() error {
		for _, k := range kinds {
			var want unix.Stat_t
			if err := unix.Fstat(int(files[k].Fd()), &want); err != nil {
				return err
			}
			if got, want := link(t, "thread-self", k), fmt.Sprintf("%s:[%d]", k, want.Ino); got != want {
				t.Errorf("inside, %s is %s, want %s", k, got, want)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := nsthread.Do(files, func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do of what leaves its goroutine = nil")
	}
	if err := nsthread.Do(map[namespace.Kind]*os.File{namespace.Mnt: files[namespace.Net]}, func() error { return nil }); err == nil {
		t.Error("Do with a mount namespace = nil")
	}
	wrong := map[namespace.Kind]*os.File{namespace.Net: files[namespace.Net], namespace.UTS: files[namespace.IPC]}
	if err := nsthread.Do(wrong, func() error { t.Error("it ran"); return nil }); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Do with a namespace of another kind = %v, want EINVAL", err)
	}
	noThreadLeft(t)
}

// TestDoLeavesNoThreadBehind looks at every thread of the process: the bug it
// guards against shows up minutes later in unrelated code.
func TestMake(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	links := func(of string) (ls []string) {
		for _, k := range kinds {
			ls = append(ls, link(t, of, k))
		}
		return ls
	}
	home := links("self")
	var child *exec.Cmd
	err := nsthread.Make(kinds, func() error {
		inside := links("thread-self")
		for i := range kinds {
			if inside[i] == home[i] {
				t.Errorf("inside, %s is still %s", kinds[i], home[i])
			}
		}
		child = exec.Command("sleep", "60")
		if err := child.Start(); err != nil {
			return err
		}
		if got := links(fmt.Sprint(child.Process.Pid)); !slices.Equal(got, inside) {
			t.Errorf("a child is in %v, want %v", got, inside)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	child.Process.Kill()
	child.Wait()
	for range 20 { // on whatever threads there are
		done := make(chan []string)
		go func() { done <- links("thread-self") }()
		if got := <-done; !slices.Equal(got, home) {
			t.Fatalf("afterwards a thread is in %v, want %v", got, home)
		}
	}
	if err := nsthread.Make([]namespace.Kind{namespace.Mnt}, func() error { t.Error("it ran"); return nil }); err == nil {
		t.Error("Make of a mount namespace = nil")
	}
}

func TestDoLeavesNoThreadBehind(t *testing.T) {
	testenv.Root(t)
	files := newNamespaces(t)
	home := link(t, "self", namespace.Net)
	var inside, done sync.WaitGroup
	leave := make(chan struct{})
	for range 64 {
		inside.Add(1)
		done.Go(func() {
			if err := nsthread.Do(files, func() error { inside.Done(); <-leave; return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	inside.Wait()
	if got := link(t, "self", namespace.Net); got != home {
		t.Errorf("while inside, the process appears to be in %s, want %s", got, home)
	}
	close(leave)
	done.Wait()
	noThreadLeft(t)
}

func noThreadLeft(t *testing.T) {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		for _, k := range kinds {
			got, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/" + string(k))
			if errors.Is(err, os.ErrNotExist) {
				continue // ended meanwhile
			}
			if want := link(t, "self", k); got != want {
				t.Errorf("thread %s is in %s, want %s (%v)", task.Name(), got, want, err)
			}
		}
	}
}

func link(t *testing.T, proc string, k namespace.Kind) string {
	t.Helper()
	s, err := os.Readlink("/proc/" + proc + "/ns/" + string(k))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newNamespaces returns namespaces made by a child, so that this process never
// leaves its own.
func newNamespaces(t *testing.T) map[namespace.Kind]*os.File {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	for _, k := range kinds {
		cmd.SysProcAttr.Cloneflags |= k.Flag()
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	files := make(map[namespace.Kind]*os.File)
	for _, k := range kinds {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, k))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files[k] = f
	}
	return files
}
