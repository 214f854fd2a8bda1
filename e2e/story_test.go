//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// story is a daemon with the sandbox "web" and a root for members.
type story struct {
	*daemon
	t      *testing.T
	rootfs string
}

// newStory starts one. It is taken down, and the oracle looks, when t ends.
func newStory(t *testing.T, createFlags ...string) *story {
	t.Helper()
	t.Parallel()
	s := &story{newDaemon(t), t, testenv.Busybox(t)}
	for _, dir := range []string{"proc", "dev", "sys", "root", "tmp", "var/lib"} {
		if err := os.MkdirAll(filepath.Join(s.rootfs, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.write(filepath.Join(s.rootfs, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1234:App:/home/app:/bin/sh\n")
	s.write(filepath.Join(s.rootfs, "etc/group"), "root:x:0:\napp:x:1234:\nwheel:x:10:app\n")
	s.start(t)
	// What a daemon makes once and keeps is no leak.
	s.ok("create", "web")
	s.member("true")
	s.ok("rm", "web")
	s.checkLeaks(t)
	s.ok(append([]string{"create", "web"}, createFlags...)...)
	s.remove(t, "web")
	return s
}

// write writes a file and makes its directory.
func (s *story) write(name, content string) {
	s.t.Helper()
	err := os.MkdirAll(filepath.Dir(name), 0o755)
	if err == nil {
		err = os.WriteFile(name, []byte(content), 0o644)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// run runs a client, with stdin if that is not "".
func (s *story) do(stdin string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	cmd := s.command(args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		s.t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// ok runs a client that must succeed, and returns what it wrote.
func (s *story) ok(args ...string) string {
	s.t.Helper()
	return s.must(s.t, args...)
}

// member runs a script in a new member to its end and returns its output. flags
// stand before the "--".
func (s *story) member(script string, flags ...string) string {
	s.t.Helper()
	return s.ok(append(append([]string{"run", "web", "--rm", "--rootfs", s.rootfs}, flags...), sh(script)...)...)
}

// start runs a script in a new member called name, in the background.
func (s *story) startMember(name, script string, flags ...string) {
	s.t.Helper()
	s.ok(append(append([]string{"run", "web", "-d", "--name", name, "--rootfs", s.rootfs}, flags...), sh(script)...)...)
}

// join runs a script in a member, by join.
func (s *story) join(name, script string) string {
	s.t.Helper()
	return s.ok(append([]string{"join", "web/" + name}, sh(script)...)...)
}

// expect fails the test if got is not want.
func (s *story) expect(what, got, want string) {
	s.t.Helper()
	if got != want {
		s.t.Errorf("%s is %q, want %q", what, got, want)
	}
}

// contains fails the test if got lacks one of wants.
func (s *story) contains(what, got string, wants ...string) {
	s.t.Helper()
	for _, w := range wants {
		if !strings.Contains(got, w) {
			s.t.Errorf("%s lacks %q: %s", what, w, got)
		}
	}
}

// eventually waits until ok, for a time that only something that hangs takes.
func (s *story) eventually(what string, ok func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(ready); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: not after %s", what, ready)
		}
	}
}

// logged waits until the log of a member has text.
func (s *story) logged(name, text string) {
	s.t.Helper()
	s.eventually(name+" logs "+text, func() bool { return strings.Contains(s.ok("logs", "web/"+name), text) })
}

// view is what inspect shows of a member.
type view struct {
	ID, Name, State, Root, LogPath, Cgroup string
	PID, MonitorPID                        int
	Namespaces                             map[string]struct {
		Source, Path string
		Inode        uint64
	}
	LogLinesDropped uint64
	Custody         struct{ Held bool }
	Exit            *struct {
		Known     bool
		Code      int
		Signal    int
		OOMKilled bool
		Reason    string
	}
}

func (s *story) inspect(name string) view {
	s.t.Helper()
	var v view
	if err := json.Unmarshal([]byte(s.ok("inspect", "web/"+name)), &v); err != nil {
		s.t.Fatal(err)
	}
	return v
}

// exited waits until a member's exit is recorded.
func (s *story) exited(name string) view {
	s.t.Helper()
	var v view
	s.eventually(name+" has exited", func() bool { v = s.inspect(name); return v.Exit != nil })
	return v
}
