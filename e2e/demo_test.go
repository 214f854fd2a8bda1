//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// TestDemo runs the demonstration, which checks its own output, and compares
// what the README shows of it.
func TestDemo(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "redis-server")
	testenv.Program(t, "ss")
	testenv.Program(t, "go")
	bin := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", bin, "../internal/leak/cmd/leakcheck").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	if err := os.Symlink(binary, filepath.Join(bin, "sandboxd")); err != nil {
		t.Fatal(err)
	}
	// On a host of its own: it publishes a port.
	ns := newHost(t)
	var buf lockedBuffer
	cmd := exec.CommandContext(t.Context(), "../tools/demo.sh", bin)
	cmd.Stdout, cmd.Stderr = &buf, &buf
	err := startIn(ns, cmd)
	if err == nil {
		err = cmd.Wait()
	}
	out := []byte(buf.String())
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if regexp.MustCompile(`\x1b`).Match(out) {
		t.Error("there are colours, and no terminal")
	}
	var shown []string
	for _, f := range fences(t, "../README.md") {
		if f.lang == "text" {
			shown = append(shown, f.text...)
		}
	}
	if len(shown) == 0 {
		t.Fatal("the README shows nothing of it")
	}
	if l := missing(shown, string(out)); l != "" {
		t.Errorf("the README shows %q, which the demonstration does not print:\n%s", l, out)
	}
}
