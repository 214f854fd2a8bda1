package collect

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// TestTmpfsWaitsForNobody: a member, or somebody else, has mounted over its tmpfs a file
// system that does not answer.
func TestTmpfsWaitsForNobody(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, testenv.FUSE)
	top := t.TempDir()
	mount := func(target, options string) {
		t.Helper()
		dir := filepath.Join(top, target)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("t", dir, "tmpfs", 0, options); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mount("a/b", "size=1m")
	mount("c", "size=1m")
	for _, f := range []string{"a/b/x", "c/x"} {
		if err := os.WriteFile(filepath.Join(top, f), make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Open(top)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	targets := []string{"/a/b", "/c", "/c/below", "/a"}
	if got := Tmpfs(root, targets); got != 2*8192 {
		t.Errorf("%d bytes, want %d", got, 2*8192)
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close() // whoever waits, waits no longer
	if err := testenv.MountFUSE(dev, filepath.Join(top, "c")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(top, "c"), unix.MNT_DETACH)
	got := make(chan int64, 1)
	go func() { got <- Tmpfs(root, targets) }()
	select {
	case n := <-got:
		if n != 8192 {
			t.Errorf("%d bytes, want 8192", n)
		}
	case <-time.After(5 * time.Second):
		t.Error("it waits for a file system that does not answer")
	}
}

// TestOpenStepwise: it finds what is mounted, and does not go through what may not answer.
func TestOpenStepwise(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, testenv.FUSE)
	top := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mount := func(dir string) {
		t.Helper()
		dir = filepath.Join(top, dir)
		must(os.MkdirAll(dir, 0o755))
		must(unix.Mount("t", dir, "tmpfs", 0, "size=1m"))
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mount("home/tmp")
	mount("home/tmp/in")
	must(os.Symlink("home", filepath.Join(top, "link")))
	slow := filepath.Join(top, "slow")
	must(os.Mkdir(slow, 0o755))
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(err)
	defer dev.Close() // whoever waits, waits no longer
	must(testenv.MountFUSE(dev, slow))
	defer unix.Unmount(slow, unix.MNT_DETACH)
	root, err := os.OpenFile(top, unix.O_PATH|unix.O_DIRECTORY, 0)
	must(err)
	defer root.Close()
	for target, want := range map[string]bool{
		"/home/tmp": true, "/home/tmp/in/": true, "/home": false, "/link/tmp": false, "/none": false, "/slow": false, "/slow/t": false, "/home/../../x": false,
	} {
		done := make(chan bool, 1)
		go func() {
			fd, err := openStepwise(int(root.Fd()), target)
			done <- err == nil && isTmpfs(fd)
			if err == nil {
				unix.Close(fd)
			}
		}()
		select {
		case got := <-done:
			if got != want {
				t.Errorf("%s: %t, want %t", target, got, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: it waits for a file system that does not answer", target)
		}
	}
}
