package nsthread

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestFilesAs(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	owner := func(name string) [2]uint32 {
		t.Helper()
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return [2]uint32{st.Uid, st.Gid}
	}
	// In a directory that the new owner may not enter: capabilities are kept.
	if err := FilesAs(70001, 70002, func() error {
		if got := owner("theirs"); got != [2]uint32{70001, 70002} {
			t.Errorf("a file made by the thread belongs to %v", got)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for range 50 { // on whatever threads there are
		done := make(chan [2]uint32)
		go func() { done <- owner("ours") }()
		if got := <-done; got != [2]uint32{} {
			t.Fatalf("afterwards a file belongs to %v", got)
		}
	}
}
