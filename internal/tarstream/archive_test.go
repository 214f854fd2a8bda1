package tarstream

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// tree makes files: a name that ends in a slash is a directory, content that
// begins with an arrow is a link's.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		switch to, isLink := strings.CutPrefix(content, "-> "); {
		case strings.HasSuffix(name, "/"):
			must(t, os.MkdirAll(p, 0o755))
		case isLink:
			must(t, os.Symlink(to, p))
		default:
			must(t, os.WriteFile(p, []byte(content), 0o644))
		}
	}
	return dir
}

func TestGlob(t *testing.T) {
	outside := tree(t, map[string]string{"x.log": "the host's"})
	dir := tree(t, map[string]string{
		"var/log/a.log": "1", "var/log/b.log": "2", "var/log/c.txt": "3", "var/log/.hidden.log": "4", "var/log/sub/d.log": "5",
		"srv/one/log": "6", "srv/two/log": "7", "srv/three/": "", "with[bracket": "8",
		"away": "-> " + outside, "up": "-> ../../../../.." + outside, "in": "-> /var/log", "loop": "-> loop", "gone": "-> /nowhere",
	})
	root := openRoot(t, dir)
	for _, tt := range []struct {
		pattern string
		want    []string
	}{
		{"/var/log/*.log", []string{"/var/log/.hidden.log", "/var/log/a.log", "/var/log/b.log"}},
		{"/var/log/[ab].log", []string{"/var/log/a.log", "/var/log/b.log"}},
		{"/srv/*/log", []string{"/srv/one/log", "/srv/two/log"}},
		{"/*/log/a.*", []string{"/var/log/a.log"}},
		{"/in/?.log", []string{"/in/a.log", "/in/b.log"}},
		{"/away/*", nil},
		{"/up/*", nil},
		{"/loop/*", nil},
		{"/gone", []string{"/gone"}}, // the link itself
		{"/gone/*", nil},
		{"/none", nil},
		{"/var//log/./c.txt", []string{"/var/log/c.txt"}},
		{`/with\[bracket`, []string{"/with[bracket"}},
		{"/var/log/c.txt/*", nil},
		{"/", []string{"/"}},
	} {
		got, err := Glob(t.Context(), root, tt.pattern, 100)
		if err != nil || got.More || got.Unread != nil {
			t.Errorf("Glob(%q): %+v, %v", tt.pattern, got, err)
		}
		if d := cmp.Diff(strings.Join(tt.want, " "), strings.Join(got.Paths, " ")); d != "" {
			t.Errorf("Glob(%q) (-want +got):\n%s", tt.pattern, d)
		}
	}
	if got, err := Glob(t.Context(), root, "/var/log/*", 2); err != nil || !got.More || len(got.Paths) != 2 {
		t.Errorf("with a limit of 2: %+v, %v", got, err)
	}
	if _, err := Glob(t.Context(), root, "/var/[", 100); err == nil {
		t.Error("a pattern that is not complete matches")
	}
	proc := openRoot(t, "/")
	for _, pattern := range []string{"/proc/*/status", "/proc/*", "/pro[c]/*", "/proc/none/at/all", "/sys/k*"} {
		if got, err := Glob(t.Context(), proc, pattern, 100); !errors.Is(err, ErrPseudo) || len(got.Paths) != 0 {
			t.Errorf("Glob(%q): %+v, %v", pattern, got, err)
		}
	}
	if got, err := Glob(t.Context(), proc, "/*c/passwd", 100); err != nil || len(got.Paths) != 1 {
		t.Errorf("beside proc: %+v, %v", got, err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, pattern := range []string{"/var/none*", "/var"} {
		if _, err := Glob(over, root, pattern, 100); !errors.Is(err, context.Canceled) {
			t.Errorf("Glob(%q) that is cut off: %v", pattern, err)
		}
	}
}

// A directory that is there and cannot be read is no directory without matches.
func TestGlobUnread(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, testenv.FUSE)
	dir := tree(t, map[string]string{"gone/": "", "good/f": "1"})
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(t, err)
	must(t, testenv.MountFUSE(dev, filepath.Join(dir, "gone")))
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "gone"), unix.MNT_DETACH) })
	dev.Close()                                                          // its server has died
	for pattern, want := range map[string]int{"/gone/*": 0, "/*/f": 2} { // whether /gone/f is there, only who opens it could say
		got, err := Glob(t.Context(), openRoot(t, dir), pattern, 10)
		if err != nil || len(got.Paths) != want {
			t.Errorf("Glob(%q): %+v, %v", pattern, got, err)
		}
		if pattern == "/gone/*" && (!errors.Is(got.Unread, unix.ENOTCONN) || !strings.Contains(got.Unread.Error(), "/gone/")) {
			t.Errorf("Glob(%q): unread is %v", pattern, got.Unread)
		}
	}
	got, err := Glob(t.Context(), openRoot(t, dir), "/g*/?", 10)
	if err != nil || len(got.Paths) != 1 || !errors.Is(got.Unread, unix.ENOTCONN) {
		t.Errorf("beside one that can be read: %+v, %v", got, err)
	}
}

// list returns the names and contents in a stream.
func list(t *testing.T, b *bytes.Buffer) map[string]string {
	t.Helper()
	got := map[string]string{}
	for r := tar.NewReader(b); ; {
		h, err := r.Next()
		if err == io.EOF {
			return got
		}
		must(t, err)
		content, err := io.ReadAll(r)
		must(t, err)
		got[h.Name] = string(content) + h.Linkname
	}
}

func TestArchive(t *testing.T) {
	dir := tree(t, map[string]string{"a/b/x": "1", "a/y": "2", "a/no/z": "3", "c": "4", "l": "-> /c"})
	must(t, os.Link(filepath.Join(dir, "c"), filepath.Join(dir, "a/c2")))
	root := openRoot(t, dir)
	var b bytes.Buffer
	ar := NewArchive(&b)
	noted := map[string]bool{}
	o := Options{
		Note: func(path, _ string) { noted[path] = true },
		Admit: func(e Entry) error {
			if e.Name == "a/no" || e.Name == "c" {
				return errors.New("not wanted")
			}
			if e.Name == "a/y" && e.Size != 1 {
				t.Errorf("entry %+v", e)
			}
			return nil
		},
	}
	must(t, ar.Add(t.Context(), root, "/c", o), ar.Add(t.Context(), root, "/a", o), ar.Add(t.Context(), root, "/l", o))
	if err := ar.Add(t.Context(), root, "/none", o); !errors.Is(err, unix.ENOENT) {
		t.Errorf("what is not there: %v", err)
	}
	must(t, ar.Close())
	// c was refused under one name: its other name is no link to it.
	if d := cmp.Diff(map[string]string{"a/": "", "a/b/": "", "a/b/x": "1", "a/y": "2", "a/c2": "4", "l": "/c"}, list(t, &b)); d != "" {
		t.Errorf("archive (-want +got):\n%s", d)
	}
	if d := cmp.Diff(map[string]bool{"c": true, "a/no": true}, noted); d != "" {
		t.Errorf("noted (-want +got):\n%s", d)
	}
}

func TestArchiveHasEnough(t *testing.T) {
	root := openRoot(t, tree(t, map[string]string{"a/1": "1", "a/2": "2", "a/3": "3", "b": "4"}))
	var b bytes.Buffer
	ar := NewArchive(&b)
	n := 0
	o := Options{Admit: func(Entry) error {
		if n++; n > 2 {
			return ErrEnough
		}
		return nil
	}}
	if err := ar.Add(t.Context(), root, "/a", o); !errors.Is(err, ErrEnough) {
		t.Errorf("Add: %v", err)
	}
	must(t, ar.Add(t.Context(), root, "/b", Options{}), ar.Close())
	if got := list(t, &b); len(got) != 3 || got["b"] != "4" {
		t.Errorf("archive %q", got)
	}
}

// A writer that fails is no matter of the file that is being copied.
func TestArchiveOnAFullDisk(t *testing.T) {
	root := openRoot(t, tree(t, map[string]string{"d/1": "1", "d/2": "2"}))
	noted := 0
	o := Options{Note: func(string, string) { noted++ }}
	if err := NewArchive(failing{}).Add(t.Context(), root, "/d", o); !errors.Is(err, unix.ENOSPC) || noted > 0 {
		t.Errorf("on a full disk: %v, %d files are noted", err, noted)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// What does not answer any more, and cannot even be looked at, costs itself and nothing else.
func TestAddWhatCannotBeRead(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, testenv.FUSE)
	dir := tree(t, map[string]string{"gone/": "", "f": "1"})
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(t, err)
	must(t, testenv.MountFUSE(dev, filepath.Join(dir, "gone")))
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "gone"), unix.MNT_DETACH) })
	dev.Close() // its server has died
	root := openRoot(t, dir)
	var b bytes.Buffer
	a := NewArchive(&b)
	var notes []string
	o := Options{Note: func(name, what string) { notes = append(notes, name+": "+what) }}
	for _, pattern := range []string{"/gone", "/gone/below", "/f"} {
		got, err := Glob(t.Context(), root, pattern, 10)
		if err != nil || len(got.Paths) != 1 {
			t.Errorf("Glob(%q): %+v, %v", pattern, got, err)
		}
		if err := a.Add(t.Context(), root, pattern, o); err != nil {
			t.Errorf("Add(%q): %v", pattern, err)
		}
	}
	must(t, a.Close())
	if d := cmp.Diff(map[string]string{"f": "1"}, list(t, &b)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if len(notes) != 2 || !strings.HasPrefix(notes[0], "gone: left out: ") || !strings.HasPrefix(notes[1], "gone/below: left out: ") {
		t.Errorf("notes %q", notes)
	}
}
