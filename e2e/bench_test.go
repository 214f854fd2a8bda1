//go:build e2e

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// A bench that nobody reads any more takes its daemon with it.
func TestBenchCutOff(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	testenv.Program(t, "gcc")
	dir := t.TempDir()
	bench, daemon, pid := filepath.Join(dir, "bench"), filepath.Join(dir, "daemon"), filepath.Join(dir, "pid")
	if out, err := exec.Command("go", "build", "-o", bench, "./bench").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	if err := os.WriteFile(daemon, []byte("#!/bin/sh\necho $$ >"+pid+"\nexec "+binary+" \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	cmd := exec.Command(bench, "--rounds", "1", "--standing", "1", "--net-standing", "1", "--runc", "", "--crun", "", "--sandboxd", daemon)
	cmd.Dir = ".." // as `make bench` runs it
	cmd.Stdout = w
	out := new(strings.Builder)
	cmd.Stderr = out
	err = cmd.Run()
	w.Close()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("the bench ended by %v, want code 1: %s", err, out)
	}
	text, err := os.ReadFile(pid)
	if err != nil {
		t.Fatalf("the bench has started no daemon: %v: %s", err, out)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if unix.Kill(n, 0) == nil {
		unix.Kill(n, unix.SIGTERM)
		t.Error("the daemon runs on")
	}
}
