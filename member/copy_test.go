package member

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestCopyOutOfTheDead(t *testing.T) {
	testenv.Root(t)
	tg := startTarget(t)
	tg.kill()
	var notes []string
	var b bytes.Buffer
	o := CopyOptions{Note: func(path, what string) { notes = append(notes, path+": "+what) }}
	if err := CopyOut(t.Context(), tg.root, "/", &b, o); err != nil {
		t.Fatal(err)
	}
	if want := "./proc: a proc, sysfs or cgroup file system, its content is left out"; len(notes) != 1 || notes[0] != want {
		t.Errorf("notes %q, want %q", notes, want)
	}
	dir := t.TempDir()
	if err := ExtractTo(t.Context(), filepath.Join(dir, "all"), &b, nil); err != nil {
		t.Fatal(err)
	}
	// It was in a tmpfs of a mount namespace without a process.
	if got, err := os.ReadFile(filepath.Join(dir, "all/tmp/kept")); string(got) != "content\n" || err != nil {
		t.Errorf("tmp/kept holds %q, %v", got, err)
	}
}

func TestCopyIntoTheDead(t *testing.T) {
	testenv.Root(t)
	tg := startTarget(t)
	tg.kill()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("from the host"), 0o640); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	copyBoth := func(src string, extract func(io.Reader) error) {
		t.Helper()
		var b bytes.Buffer
		if err := TarFrom(t.Context(), src, &b, nil); err != nil {
			t.Fatal(err)
		}
		if err := extract(&b); err != nil {
			t.Fatal(err)
		}
	}
	copyBoth("file", func(r io.Reader) error { return CopyInAs(t.Context(), tg.root, "/tmp/renamed", r, CopyOptions{}) })
	copyBoth("./.", func(r io.Reader) error { return CopyIn(t.Context(), tg.root, "tmp", r, CopyOptions{}) })
	for _, name := range []string{"renamed", "file"} {
		var b bytes.Buffer
		if err := CopyOut(t.Context(), tg.root, "tmp/"+name, &b, CopyOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := ExtractTo(t.Context(), "./back", &b, nil); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile("back"); string(got) != "from the host" || err != nil {
			t.Errorf("%s came back as %q, %v", name, got, err)
		}
		if err := os.Remove("back"); err != nil {
			t.Fatal(err)
		}
	}
}
