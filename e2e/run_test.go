//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

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

// A signal that comes before the member is started leaves no member, and the exit
// code is that of the signal.
func TestRunInterruptedBeforeStart(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	for sig, flags := range map[unix.Signal][]string{unix.SIGINT: nil, unix.SIGTERM: {"--rm"}} {
		for _, stopped := range []bool{false, true} {
			began := filepath.Join(t.TempDir(), "began")
			hook := filepath.Join(t.TempDir(), "hook")
			if err := os.WriteFile(hook, []byte("#!/bin/sh\n: >"+began+"\nsleep 0.2\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"run", "box", "--name", "m", "--rootfs", r.rootfs}, flags...)
			args = append(append(args, hookFlags(hook, "createRuntime")...), "--", "sleep", "1000")
			client := r.command(args...)
			if err := client.Start(); err != nil {
				t.Fatal(err)
			}
			r.eventually("the hook begins", func() bool { _, err := os.Stat(began); return err == nil })
			if stopped { // it learns of the member and of the signal together
				r.sig(client.Process.Pid, unix.SIGSTOP)
				r.eventually("the member is created", func() bool { return r.member("box/m").State == "Created" })
			}
			r.sig(client.Process.Pid, sig)
			if stopped {
				r.sig(client.Process.Pid, unix.SIGCONT)
			}
			client.Wait()
			if code := client.ProcessState.ExitCode(); code != 128+int(sig) {
				t.Errorf("%s, stopped %t: exit code %d", sig, stopped, code)
			}
			if ps := r.ok("ps", "-q", "box"); ps != "" {
				t.Errorf("%s, stopped %t: a member is left: %s", sig, stopped, ps)
				r.ok("rm", "-f", "box/m")
			}
		}
	}
	r.ok("rm", "-f", "box")
	r.sound()
}
