//go:build crashpoints

package crash

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

func TestParse(t *testing.T) {
	tests := []struct {
		in string
		at string
		n  int
		ok bool
	}{
		{"", "", 1, true},
		{"create pause before", "create pause before", 1, true},
		{"a#3", "a", 3, true},
		{"a#0", "", 0, false},
		{"a#-1", "", 0, false},
		{"a#", "", 0, false},
		{"a#x", "", 0, false},
		{"#2", "", 0, false},
	}
	for _, tt := range tests {
		s, err := parse(tt.in)
		if (err == nil) != tt.ok || err == nil && (s.at != tt.at || s.n != tt.n) {
			t.Errorf("parse(%q) = %+v, %v; want %q %d, ok %v", tt.in, s, err, tt.at, tt.n, tt.ok)
		}
	}
}

// TestPoint runs this test binary again, as the process that passes points.
func TestPoint(t *testing.T) {
	if os.Getenv("CRASH_TEST_CHILD") != "" {
		for _, p := range []string{"a", "b", "a"} {
			Point(p)
		}
		return
	}
	tests := []struct {
		at     string
		killed bool
		log    string
	}{
		{"", false, "a\nb\na\n"},
		{"a", true, "a\n"},
		{"b", true, "a\nb\n"},
		{"a#2", true, "a\nb\na\n"},
		{"a#3", false, "a\nb\na\n"},
		{"c", false, "a\nb\na\n"},
	}
	for _, tt := range tests {
		log := filepath.Join(t.TempDir(), "log")
		cmd := exec.Command(os.Args[0], "-test.run=^TestPoint$")
		cmd.Env = append(os.Environ(), "CRASH_TEST_CHILD=1", "SANDBOXD_CRASH_AT="+tt.at, "SANDBOXD_CRASH_LOG="+log)
		err := cmd.Run()
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if killed := ws.Signaled() && ws.Signal() == syscall.SIGKILL; killed != tt.killed || !killed && err != nil {
			t.Errorf("at %q: %v, want killed %v", tt.at, err, tt.killed)
		}
		if b, err := os.ReadFile(log); err != nil || string(b) != tt.log {
			t.Errorf("at %q: log %q, %v; want %q", tt.at, b, err, tt.log)
		}
	}
}
