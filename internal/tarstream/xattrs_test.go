package tarstream

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// A file can have half a GiB of attributes, which are in memory while it is copied,
// and attributes whose names a stream cannot have.
func TestUnrulyXattrs(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("xattrs", dir, "tmpfs", 0, "size=16m"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	for _, name := range []string{"few", "many", "odd"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644))
	}
	must(t, unix.Setxattr(filepath.Join(dir, "few"), "user.a", []byte("a"), 0))
	must(t, unix.Setxattr(filepath.Join(dir, "odd"), "user.a=b", []byte("c"), 0), unix.Setxattr(filepath.Join(dir, "odd"), "user.d", []byte("e"), 0))
	for i := range 100 {
		err := unix.Setxattr(filepath.Join(dir, "many"), fmt.Sprint("user.", i), make([]byte, 60<<10), 0)
		if err == unix.ENOTSUP || err == unix.ENOSPC {
			t.Skip("this tmpfs has no extended attributes for users: ", err)
		}
		must(t, err)
	}
	root := openRoot(t, dir)
	defer root.Close()
	var b bytes.Buffer
	var extra int64
	noted := map[string]string{}
	ar := NewArchive(&b)
	must(t, ar.Add(t.Context(), root, "/", Options{
		Note:  func(path, what string) { noted[path] = what },
		Admit: func(e Entry) error { extra = max(extra, e.Extra); return nil },
	}), ar.Close())
	if got := list(t, &b); len(got) != 4 || got["./few"] != "few" || got["./many"] != "many" || got["./odd"] != "odd" {
		t.Errorf("archive %.1000q", got)
	}
	if extra > 1000 {
		t.Errorf("an entry of %d bytes was asked for", extra)
	}
	for name, want := range map[string]string{"./few": "", "./many": "more than 524288 bytes", "./odd": `"user.a=b"`} {
		if what := noted[name]; !strings.Contains(what, want) || (want == "") != (what == "") {
			t.Errorf("%s: noted %q, want %q", name, what, want)
		}
	}
}
