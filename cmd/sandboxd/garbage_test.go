package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/sandbox"
)

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]string{
		"0": "after 0", "4711": "after 4711", "10m": "since 11:50:00", "0s": "since 12:00:00",
		"2026-07-01T11:00:00Z": "since 11:00:00", "2026-07-01T13:00:00.5+02:00": "since 11:00:00",
		"": "", "-1": "", "-5m": "", "yesterday": "", "2026-07-01": "", "99999999999999999999": "",
	} {
		got := ""
		switch q, err := parseSince(text, now); {
		case err != nil:
		case q.After != nil:
			got = "after " + map[uint64]string{0: "0", 4711: "4711"}[*q.After]
		default:
			got = "since " + q.Since.UTC().Format(time.TimeOnly)
		}
		if got != want {
			t.Errorf("--since %q is %q, want %q", text, got, want)
		}
	}
}

func TestStatesOfARoot(t *testing.T) {
	root, one, two := t.TempDir(), t.TempDir(), t.TempDir()
	for range 2 {
		for _, s := range []string{one, two} {
			if err := enterState(root, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	fifo := filepath.Join(root, statesDir, "deadbeefdeadbeef")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	others, foreign, err := otherStates(root, one)
	if err != nil || !slices.Equal(others, []string{two}) || !slices.Equal(foreign, []string{fifo}) {
		t.Fatalf("others %q, foreign %q, %v", others, foreign, err)
	}
	const id = "0123456789abcdef"
	if knownElsewhere(others, id) {
		t.Error("known where nothing is")
	}
	if err := os.MkdirAll(filepath.Join(two, "sandboxes", id), 0o700); err != nil {
		t.Fatal(err)
	}
	if !knownElsewhere(others, id) {
		t.Error("not known where it is")
	}
	if !knownElsewhere([]string{filepath.Join(two, "sandboxes", id, "\x00")}, id) {
		t.Error("where it cannot be told it is said not to be known")
	}
}

func TestRootDirIsLinked(t *testing.T) {
	state, root := t.TempDir(), t.TempDir()
	if err := os.Symlink("/old", filepath.Join(state, rootLink)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := linkRoot(state, root); err != nil {
			t.Fatal(err)
		}
	}
	if to, err := os.Readlink(filepath.Join(state, rootLink)); err != nil || to != root {
		t.Errorf("link to %q, %v", to, err)
	}
}

func TestWriteEvent(t *testing.T) {
	var b strings.Builder
	e := sandbox.Event{
		Seq: 7, Time: time.Now(), Type: "garbage", Reason: "a\nb\x1b[31m", Attrs: map[string]string{"name": "/x y", "kind": "layer"},
	}
	if err := writeEvent(&b, &e); err != nil {
		t.Fatal(err)
	}
	if got := b.String(); !strings.HasSuffix(got, "     7 garbage    kind=layer name=/x y (a b [31m)\n") {
		t.Errorf("%q", got)
	}
}
