package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// TestRemoveAllIsDeep: a member can nest directories deeper than a process may have
// descriptors.
func TestRemoveAllIsDeep(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	if err := os.MkdirAll(filepath.Join(top, "raised-1"), 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(top)
	if err != nil {
		t.Fatal(err)
	}
	for range 5000 {
		if err := unix.Mkdirat(int(dir.Fd()), "d", 0o700); err != nil {
			t.Fatal(err)
		}
		sub, err := openInside(dir, "d")
		dir.Close()
		if err != nil {
			t.Fatal(err)
		}
		dir = sub
	}
	dir.Close()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1000, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	for range 2 { // what is not there is removed
		if err := removeAll(top); err != nil {
			t.Fatalf("%.200s", err)
		}
	}
	if _, err := os.Lstat(top); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
}

// TestRemoveDataTouchesNoMount: what somebody has mounted in a member's directory is
// not removed with it, whether it answers or not.
func TestRemoveDataTouchesNoMount(t *testing.T) {
	testenv.Root(t)
	theirs := filepath.Join(t.TempDir(), "theirs")
	file := filepath.Join(theirs, "file")
	dir := filepath.Join(t.TempDir(), "member")
	for _, d := range []string{theirs, filepath.Join(dir, "rw/a/b"), filepath.Join(dir, "rw/c")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{file, filepath.Join(dir, "file")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bind := func(source, target string) {
		t.Helper()
		if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	bind(theirs, filepath.Join(dir, "rw/a"))
	bind(theirs, filepath.Join(dir, "rw/a")) // twice
	bind(file, filepath.Join(dir, "file"))
	hangingMount(t, filepath.Join(dir, "rw/c"))
	if err := removeAll(dir); err == nil {
		t.Error("removed with what is mounted in it")
	}
	done := make(chan error, 1)
	go func() { done <- removeData(dir) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it waits for a file system that does not answer")
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
	if _, err := os.Lstat(file); err != nil {
		t.Errorf("what was mounted is gone: %v", err)
	}
}

// hangingMount mounts a file system at dir whose server does not answer (FUSE).
func hangingMount(t *testing.T, dir string) {
	t.Helper()
	testenv.Kernel(t, testenv.FUSE)
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() }) // ends the connection, and whoever waits
	if err := testenv.MountFUSE(dev, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

func TestTops(t *testing.T) {
	got := tops([]string{"/d/a", "/d/a", "/d/a/b", "/d/ab", "/d/c/e"})
	if want := []string{"/d/a", "/d/a", "/d/ab", "/d/c/e"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
