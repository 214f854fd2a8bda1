package statefile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

type record struct {
	ID    string `json:"id"`
	State int    `json:"state"`
}

func open(t testing.TB) (*os.Root, string) {
	t.Helper()
	dir := t.TempDir()
	r, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r, dir
}

func TestFailedWriteChangesNothing(t *testing.T) {
	tests := []struct {
		name string
		file string
		v    any
		prep func(t *testing.T, dir string)
	}{
		{name: "a value that is not JSON", file: "a", v: make(chan int)},
		{name: "a name outside the directory", file: "../a", v: record{"b", 2}},
		{name: "no such directory", file: "no/a", v: record{"b", 2}},
		{name: "a directory in its place", file: "sub", v: record{"b", 2}, prep: func(t *testing.T, dir string) {
			if err := os.MkdirAll(filepath.Join(dir, "sub", "full"), 0o700); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root, dir := open(t)
			want := record{"a", 1}
			if err := Write(root, "a", want); err != nil {
				t.Fatal(err)
			}
			if tt.prep != nil {
				tt.prep(t, dir)
			}
			if err := Write(root, tt.file, tt.v); err == nil {
				t.Error("Write succeeded")
			}
			var got record
			if err := Read(root, "a", &got); err != nil || got != want {
				t.Errorf("Read = %+v, %v; want %+v", got, err, want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*"+TempSuffix)); left != nil {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestWriteReplacesWhatACrashLeft(t *testing.T) {
	root, dir := open(t)
	if err := os.WriteFile(filepath.Join(dir, "a"+TempSuffix), []byte(strings.Repeat("x", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	want := record{"a", 1}
	if err := Write(root, "a", want); err != nil {
		t.Fatal(err)
	}
	var got record
	if err := Read(root, "a", &got); err != nil || got != want {
		t.Errorf("Read = %+v, %v; want %+v", got, err, want)
	}
	st, err := os.Stat(filepath.Join(dir, "a"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", st.Mode(), err)
	}
}

func TestRead(t *testing.T) {
	tests := []struct {
		in string
		ok bool
	}{
		{`{"id":"a","state":1}`, true},
		{"{}\n \n", true},
		{"", false},
		{"{", false},
		{`{"id":"a"}{}`, false},
		{`{"id":"a"}x`, false},
		{`{"new":1}`, false},
		{`{"state":"x"}`, false},
	}
	for _, tt := range tests {
		root, dir := open(t)
		if err := os.WriteFile(filepath.Join(dir, "a"), []byte(tt.in), 0o600); err != nil {
			t.Fatal(err)
		}
		var got record
		err := Read(root, "a", &got)
		if (err == nil) != tt.ok || err != nil && !strings.Contains(err.Error(), "decode a: ") {
			t.Errorf("Read of %q: %v, want ok %v", tt.in, err, tt.ok)
		}
	}
	root, _ := open(t)
	if err := Read(root, "none", new(record)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Read of nothing: %v", err)
	}
}

func TestReadPart(t *testing.T) {
	dir, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for content, want := range map[string]string{
		`{"A":1,"B":{"C":2}}`: "",
		`{"A":1,"B":}`:        "decode f: ",
		`{"A":1} {}`:          "decode f: data after the value",
	} {
		if err := dir.WriteFile("f", []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var v struct{ A int }
		switch err := ReadPart(dir, "f", &v); {
		case want == "" && (err != nil || v.A != 1):
			t.Errorf("ReadPart of %s = %v, %v", content, v, err)
		case want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)):
			t.Errorf("ReadPart of %s = %v, want %q", content, err, want)
		}
	}
}

func TestReadDoesNotWaitForAWriter(t *testing.T) {
	root, dir := open(t)
	if err := unix.Mkfifo(filepath.Join(dir, "a"), 0o600); err != nil {
		t.Fatal(err)
	}
	var r record
	if err := Read(root, "a", &r); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("Read of a FIFO: %v", err)
	}
}
