//go:build e2e

package e2e

import (
	"testing"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// A member with --rm is gone when run returns, so that the next may have its
// name, and nothing of its output is lost however soon it goes.
func TestRunRemoves(t *testing.T) {
	rootfs := testenv.Busybox(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "box")
	for range 40 {
		args := append([]string{"run", "box", "--rm", "--name", "same", "--rootfs", rootfs}, sh("echo out; exit 4")...)
		stdout, stderr, code := d.run(t, args...)
		if stdout != "out\n" || stderr != "" || code != 4 {
			t.Fatalf("exit code %d, %q, %q; want 4, %q and nothing", code, stdout, stderr, "out\n")
		}
		if ps := d.must(t, "ps", "-q", "box"); ps != "" {
			t.Fatalf("there are members when run has returned: %s", ps)
		}
	}
	d.must(t, "rm", "box")
}
