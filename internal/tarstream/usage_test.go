package tarstream

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// TestUsage: it says what du does, leaves out what is mounted, and follows nothing.
func TestUsage(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("t", dir, "tmpfs", 0, "size=8m"))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	file := func(name string, n int) {
		must(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), make([]byte, n), 0o644))
	}
	file("a", 100_000)
	file("d/e/f", 4096)
	must(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "d/again")))
	must(t, os.Symlink("/usr", filepath.Join(dir, "away")))
	must(t, os.Mkdir(filepath.Join(dir, "mnt"), 0o755))
	must(t, unix.Mount("/usr", filepath.Join(dir, "mnt"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH) })
	want := int64(0)
	for _, name := range []string{".", "a", "d", "d/e", "d/e/f"} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(dir, name), &st))
		want += st.Blocks * 512
	}
	top := openRoot(t, dir)
	if got, err := Usage(t.Context(), top); err != nil || got != want || want < 100_000 {
		t.Errorf("%d, %v; want %d", got, err, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Usage(ctx, top); !errors.Is(err, context.Canceled) {
		t.Errorf("cut off: %v", err)
	}
}
