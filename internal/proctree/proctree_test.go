package proctree

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		in   string
		kind Kind
		mark string
		ok   bool
	}{
		{"sandboxd-pause\x000123.s\x00mode=1777\x00", Pause, "0123.s", true},
		{"sandboxd-monitor\x000123.s/m\x00", Monitor, "0123.s/m", true},
		{"sandboxd-launch\x000123.s/m\x00", Launch, "0123.s/m", true},
		{"sandboxd-launch\x00", "", "", false},
		{"sandboxd-pause\x00\x00", "", "", false},
		{"sandboxd-pause\x000123.s", "", "", false}, // cut off
		{"sandboxd\x00serve\x00", "", "", false},
		{"sandboxd-other\x000123.s\x00", "", "", false},
		{"/bin/sandboxd-pause\x000123.s\x00", "", "", false},
		{"sh\x00sandboxd-pause\x000123.s\x00", "", "", false},
		{"", "", "", false}, // kernel thread or zombie
	} {
		kind, mark, ok := parse([]byte(tt.in))
		if kind != tt.kind || mark != tt.mark || ok != tt.ok {
			t.Errorf("parse(%q) = %q, %q, %v, want %q, %q, %v", tt.in, kind, mark, ok, tt.kind, tt.mark, tt.ok)
		}
	}
}

// start starts a shell that calls itself argv and waits for commands from the
// fifo that argv[1] names. It is gone at the end of the test.
func start(t *testing.T, argv ...string) procid.ID {
	t.Helper()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(argv[1], 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: sh, Args: argv}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	id, err := procid.Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestFind(t *testing.T) {
	t.Chdir(t.TempDir())
	pause := start(t, "sandboxd-pause", "aaaa.s1")
	monitor := start(t, "sandboxd-monitor", "aaaa.s2")
	other := start(t, "sandboxd-pause", "bbbb.s3")
	want := []Found{{pause, Pause, "aaaa.s1"}, {monitor, Monitor, "aaaa.s2"}}
	slices.SortFunc(want, func(a, b Found) int { return a.ID.PID - b.ID.PID })
	for prefix, want := range map[string][]Found{
		"aaaa.":   want,
		"aaaa.s2": {{monitor, Monitor, "aaaa.s2"}},
		"bbbb.":   {{other, Pause, "bbbb.s3"}},
		"cccc.":   nil,
	} {
		got, err := Find(prefix)
		slices.SortFunc(got, func(a, b Found) int { return a.ID.PID - b.ID.PID })
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Find(%q) = %v, %v, want %v", prefix, got, err, want)
		}
	}
}

// A process may end between the looks at it. Of the fake tree's processes one
// has only a command line and the other nothing: their pids are beyond the
// largest that there can be (PID_MAX_LIMIT).
func TestFindPassesOverTheGone(t *testing.T) {
	proc := t.TempDir()
	dir := filepath.Join(proc, "4194305")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cmdline"), []byte("sandboxd-pause\x00aaaa.s1\x00"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(proc, "4194306"), 0o755); err != nil { // ended: no command line
		t.Fatal(err)
	}
	if got, err := find(proc, ""); err != nil || len(got) != 0 {
		t.Errorf("find = %v, %v, want nothing", got, err)
	}
}
