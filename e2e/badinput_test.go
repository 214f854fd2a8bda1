//go:build e2e

package e2e

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/leak"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// world is what the host looks like to a refusal: it must look the same after it.
type world struct {
	d      *daemon
	before *leak.Snapshot
}

func (d *daemon) look(t *testing.T) *world {
	t.Helper()
	s, err := leak.Take(leak.Options{Ancestor: d.cmd.Process.Pid, CgroupParent: d.parent, Dirs: []string{d.state, d.root}, Keep: []string{d.root + "/events"}, PID: d.cmd.Process.Pid})
	if err != nil {
		t.Fatal(err)
	}
	return &world{d, s}
}

// unchanged fails the test unless the host is as it was, neither more nor less.
func (w *world) unchanged(t *testing.T) {
	t.Helper()
	more, err := w.before.Wait(5 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if len(more) > 0 {
		t.Errorf("not as before: %s", leak.Report(more))
	}
	after, err := leak.Take(w.before.Options)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range leak.Diff(after, w.before) {
		// Descriptors of the daemon come and go with connections, and so do
		// processes that only look at what is ours, such as an oracle.
		if f.Kind != leak.FD && (f.Kind != leak.Process || strings.Contains(f.Detail, "(sandboxd-")) {
			t.Errorf("gone: %s", f)
		}
	}
}

// refusal is a call that must fail: with one line on stderr that holds every
// text of want, nothing on stdout, and nothing done.
type refusal struct {
	name string
	args []string
	code int // 0 stands for 125
	want []string
}

// nonsense are words of the program's own that say nothing to a user, or something
// that is wrong. (The kernel says "invalid argument" too.)
var nonsense = []string{"monitor: command ", "execve: ", "invalid: ", `invalid argument "`, "not possible in this state", "connect: permission denied; "}

func (d *daemon) refuse(t *testing.T, r refusal) {
	t.Helper()
	w := d.look(t)
	stdout, stderr, code := d.run(t, r.args...)
	checkRefusal(t, r, stdout, stderr, code)
	w.unchanged(t)
}

func checkRefusal(t *testing.T, r refusal, stdout, stderr string, code int) {
	t.Helper()
	want := r.code
	if want == 0 {
		want = 125
	}
	if code != want || stdout != "" {
		t.Errorf("exit code %d, stdout %.200q; want %d and nothing", code, stdout, want)
	}
	line, ok := strings.CutSuffix(stderr, "\n")
	if !ok || line == "" || strings.ContainsAny(line, "\n\r\x1b\x00") || !strings.HasPrefix(line, "sandboxd: ") {
		t.Errorf("stderr is not one line: %.1000q", stderr)
	}
	const longest = 1000
	if len(line) > longest {
		t.Errorf("the line has %d bytes: %.200q…", len(line), line)
	}
	for _, s := range r.want {
		if !strings.Contains(line, s) {
			t.Errorf("the line does not say %q: %.1000q", s, line)
		}
	}
	for _, s := range nonsense {
		if strings.Contains(line, s) {
			t.Errorf("the line says %q, which is nonsense: %.1000q", s, line)
		}
	}
	t.Logf("%.300s", line)
}

// sh is a command line for the shell of a busybox.
func sh(script string) []string { return []string{"--", "/bin/sh", "-c", script} }

// must runs a client that must succeed, and returns what it wrote.
func (d *daemon) must(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, code := d.run(t, args...)
	if code != 0 {
		t.Fatalf("%.300q: exit code %d, %s", args, code, stderr)
	}
	return stdout
}

// startWarm returns a daemon that has had a member already: what it opens or
// makes once for all of them is not a finding.
func startWarm(t *testing.T, rootfs string, edits ...func(*daemon)) *daemon {
	t.Helper()
	d := newDaemon(t)
	for _, edit := range edits {
		edit(d)
	}
	d.start(t)
	d.must(t, "create", "warm")
	d.must(t, append([]string{"run", "warm", "--rootfs", rootfs}, sh("exit 0")...)...)
	d.must(t, "rm", "-f", "warm")
	d.checkLeaks(t)
	return d
}

// remove takes sandboxes down at the end of the test, before the oracle looks.
func (d *daemon) remove(t *testing.T, sandboxes ...string) {
	t.Helper()
	t.Cleanup(func() {
		for _, s := range sandboxes {
			d.must(t, "rm", "-f", s)
		}
	})
}

// foreignELF writes an executable for a machine that this is not: a header is all
// that the kernel looks at before it refuses (elf(5)).
func foreignELF(t *testing.T, path string) {
	t.Helper()
	machine := elf.EM_AARCH64
	if runtime.GOARCH == "arm64" {
		machine = elf.EM_X86_64
	}
	h := make([]byte, 64)
	copy(h, []byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)})
	h[16], h[18], h[20] = byte(elf.ET_EXEC), byte(machine), byte(elf.EV_CURRENT)
	if err := os.WriteFile(path, h, 0o755); err != nil {
		t.Fatal(err)
	}
}

// bundle makes a bundle of the rootfs whose configuration change has been at.
func bundle(t *testing.T, rootfs string, change func(c map[string]any)) string {
	t.Helper()
	dir := t.TempDir()
	c := map[string]any{
		"ociVersion": "1.2.0",
		"root":       map[string]any{"path": rootfs, "readonly": true},
		"process":    map[string]any{"args": []any{"/bin/true"}, "cwd": "/", "user": map[string]any{"uid": 0, "gid": 0}},
		"mounts":     []any{map[string]any{"destination": "/proc", "type": "proc", "source": "proc"}},
		"linux":      map[string]any{"namespaces": []any{map[string]any{"type": "mount"}, map[string]any{"type": "pid"}}},
	}
	if change != nil {
		change(c)
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestBadInput(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	foreignELF(t, filepath.Join(rootfs, "bin/foreign"))
	for name, b := range map[string]string{"bin/plain": "#!/bin/sh\n", "bin/garbage": "\x7fELF garbage", "bin/nointerpreter": "#!/no/such/shell\n", "bin/empty": ""} {
		mode := os.FileMode(0o755)
		if name == "bin/plain" {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(rootfs, name), []byte(b), mode); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 10_000)

	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.must(t, "create", "pidbox", "--share", "net,pid")
	d.must(t, "create", "bare", "--share", "")
	d.remove(t, "web", "pidbox", "bare")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "dead"}, sh("exit 0")...)...)
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "gone", "--custody", "never"}, sh("exit 0")...)...)
	for deadline := time.Now().Add(ready); ; time.Sleep(20 * time.Millisecond) { // nothing is held, so its monitor goes
		var m struct{ MonitorPID int }
		if err := json.Unmarshal([]byte(d.must(t, "inspect", "web/gone")), &m); err != nil {
			t.Fatal(err)
		}
		if m.MonitorPID == 0 || !pidRuns(m.MonitorPID) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("monitor %d still runs", m.MonitorPID)
		}
	}
	d.must(t, append([]string{"add", "web", "--rootfs", rootfs, "--name", "made"}, sh("exit 0")...)...)

	d.must(t, "join", "web", "--", "/bin/true") // makes the cgroup of joins

	run := func(args ...string) []string {
		if !strings.Contains(strings.Join(args, " "), " -- ") && args[len(args)-1] != "--" {
			args = append(args, "--", "/bin/true")
		}
		return append([]string{"run", "web", "--rootfs", rootfs}, args...)
	}
	cmd := func(args ...string) []string {
		return append([]string{"run", "web", "--rootfs", rootfs, "--"}, args...)
	}
	inBundle := func(change func(map[string]any)) []string {
		return []string{"run", "web", "--bundle", bundle(t, rootfs, change)}
	}
	namespaces := func(l ...any) func(map[string]any) {
		return func(c map[string]any) { c["linux"].(map[string]any)["namespaces"] = l }
	}
	ns := func(typ string) any { return map[string]any{"type": typ} }

	for _, r := range []refusal{
		// What does not exist.
		{"inspect an unknown sandbox", []string{"inspect", "nosuch"}, 0, []string{`no sandbox "nosuch"`}},
		{"run in an unknown sandbox", []string{"run", "nosuch", "--rootfs", rootfs, "--", "/bin/true"}, 0, []string{`no sandbox "nosuch"`}},
		{"add to an unknown sandbox", []string{"add", "nosuch", "--rootfs", rootfs, "--", "/bin/true"}, 0, []string{`no sandbox "nosuch"`}},
		{"join an unknown sandbox", []string{"join", "nosuch", "--", "/bin/true"}, 0, []string{`no sandbox "nosuch"`}},
		{"stop an unknown sandbox", []string{"stop", "nosuch"}, 0, []string{`no sandbox "nosuch"`}},
		{"rm an unknown sandbox", []string{"rm", "nosuch"}, 0, []string{`no sandbox "nosuch"`}},
		{"ps of an unknown sandbox", []string{"ps", "nosuch"}, 0, []string{`sandboxd: no sandbox "nosuch"`}},
		{"inspect an unknown member", []string{"inspect", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"exec in an unknown member", []string{"exec", "web/nosuch", "--", "true"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"join an unknown member", []string{"join", "web/nosuch", "--", "true"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"start an unknown member", []string{"start", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"stop an unknown member", []string{"stop", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"kill an unknown member", []string{"kill", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"wait for an unknown member", []string{"wait", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"attach to an unknown member", []string{"attach", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"logs of an unknown member", []string{"logs", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"rm an unknown member", []string{"rm", "web/nosuch"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"cp from an unknown member", []string{"cp", "web/nosuch:/etc", "-"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"cp from an unknown sandbox", []string{"cp", "nosuch/x:/etc", "-"}, 0, []string{`no sandbox "nosuch"`}},
		{"a member where a sandbox is needed", []string{"run", "web/up", "--rootfs", rootfs, "--", "/bin/true"}, 0, []string{`"web/up"`, "sandbox"}},
		{"a sandbox where a member is needed", []string{"exec", "web", "--", "true"}, 0, []string{`"web"`, "SANDBOX/MEMBER"}},
		{"an unknown command", []string{"crate"}, 0, []string{`"crate"`, "create"}},

		// Names.
		{"a sandbox's name in use", []string{"create", "web"}, 0, []string{"web", "already"}},
		{"a member's name in use", run("--name", "up"), 0, []string{"up", "already"}},
		{"the name of an exited member", run("--name", "dead"), 0, []string{"dead", "already"}},
		{"an empty name", []string{"create", ""}, 0, []string{"name", "empty"}},
		{"a name with a slash", []string{"create", "a/b"}, 0, []string{`"a/b"`, "letter or digit"}},
		{"a name with a newline", []string{"create", "a\nb"}, 0, []string{`"a\nb"`}},
		{"a name with an escape", []string{"create", "a\x1b[31m"}, 0, []string{`"a\x1b[31m"`}},
		{"a name that is a flag", []string{"create", "--", "-x"}, 0, []string{`"-x"`}},
		{"a name that is not UTF-8", []string{"create", "a\xff"}, 0, []string{`"a\xff"`, "UTF-8"}},
		{"a name that is dots", []string{"create", ".."}, 0, []string{`".."`}},
		{"a name like an id", []string{"create", "0123456789abcdef"}, 0, []string{"looks like an id"}},
		{"a name of 10000 characters", []string{"create", long}, 0, []string{"10000 bytes", "letter or digit"}},
		{"a member's name of 10000 characters", run("--name", long), 0, []string{"10000 bytes"}},
		{"a member's name with a newline", run("--name", "a\nb"), 0, []string{`"a\nb"`}},
		{"a hostname of 10000 characters", []string{"create", "x", "--hostname", long}, 0, []string{"hostname", "10000 bytes"}},
		{"a hostname with a newline", []string{"create", "x", "--hostname", "a\nb"}, 0, []string{`hostname "a\nb"`}},
		{"a hostname without uts", []string{"create", "x", "--share", "net", "--hostname", "h"}, 0, []string{"hostname", "uts"}},
		{"a reference of 10000 characters", []string{"inspect", long}, 0, []string{"10000 bytes"}},
		{"a member's reference of 10000 characters", []string{"exec", "web/" + long, "--", "true"}, 0, []string{"10000 bytes"}},

		// Namespaces.
		{"share of an unknown namespace", []string{"create", "x", "--share", "net,disk"}, 0, []string{"disk"}},
		{"share of mnt", []string{"create", "x", "--share", "mnt"}, 0, []string{"mnt"}},
		{"an unknown network", []string{"create", "x", "--net", "bridge"}, 0, []string{"bridge", "builtin"}},
		{"a network of builtin by name", []string{"create", "x", "--net", "builtin:lan"}, 0, []string{"builtin:lan", "cni"}},
		{"a network without net", []string{"create", "x", "--net", "builtin", "--share", "uts"}, 0, []string{"builtin", "net"}},
		{"a cni network that is not configured", []string{"create", "x", "--net", "cni:nosuch"}, 0, []string{"nosuch"}},
		{"a port without a network", []string{"create", "x", "--net", "none", "--publish", "80:80"}, 0, []string{"none", "port"}},
		{"a port that is none", []string{"create", "x", "--net", "builtin", "--publish", "80"}, 0, []string{`"80"`, "HOSTPORT:PORT"}},
		{"a port that is too high", []string{"create", "x", "--net", "builtin", "--publish", "65536:80"}, 0, []string{`"65536:80"`}},
		{"a port twice", []string{"create", "x", "--net", "builtin", "-p", "80:80", "-p", "80:81"}, 0, []string{"80/tcp", "twice"}},
		{"a port of an unknown protocol", []string{"create", "x", "--net", "builtin", "-p", "80:80/icmp"}, 0, []string{"icmp", "udp"}},
		{"an address of another network", []string{"create", "x", "--net", "builtin", "--ip", "192.0.2.7"}, 0, []string{"192.0.2.7"}},
		{"an address that is none", []string{"create", "x", "--net", "builtin", "--ip", "10.88.0"}, 0, []string{`"10.88.0"`}},
		{"a mac address of a group", []string{"create", "x", "--net", "builtin", "--mac", "01:00:5e:00:00:01"}, 0, []string{"01:00:5e:00:00:01", "multicast"}},
		{"a dns server that is none", []string{"create", "x", "--dns", "one.one.one.one"}, 0, []string{`"one.one.one.one"`}},
		{"a dns option of two words", []string{"create", "x", "--dns-option", "a b"}, 0, []string{`"a b"`}},
		{"a search domain with a line feed", []string{"create", "x", "--dns-search", "a\nnameserver 192.0.2.1"}, 0, []string{"search domain"}},
		{"a host without an address", []string{"create", "x", "--add-host", "db"}, 0, []string{`"db"`, "NAME:ADDRESS"}},
		{"a host with a line feed", []string{"create", "x", "--add-host", "a\nb:192.0.2.1"}, 0, []string{"host"}},
		{"a bandwidth without a direction", []string{"create", "x", "--net", "builtin", "--bandwidth", "10M"}, 0, []string{`"10M"`, "ingress"}},
		{"a cni argument for builtin", []string{"create", "x", "--net", "builtin", "--cni-arg", "A=b"}, 0, []string{"cni"}},
		{"isolation by cni", []string{"create", "x", "--net", "cni", "--isolated"}, 0, []string{"isolation", "builtin"}},
		{"check of an unknown sandbox", []string{"check", "--sandbox", "nosuch"}, 0, []string{`no sandbox "nosuch"`}},
		{"check of no network", []string{"check", "--sandbox", "web"}, 0, []string{"none", "nothing to check"}},
		{"share of net with the host's", []string{"create", "x", "--net", "host", "--share", "net"}, 0, []string{"net", "host"}},
		{"an unknown network", []string{"create", "x", "--net", "bridge"}, 0, []string{`"bridge"`, "none"}},
		{"a namespace that the sandbox does not hold", run("--ns", "pid=sandbox"), 0, []string{"pid=sandbox", "--share pid"}},
		{"join to a namespace that the sandbox does not hold", []string{"join", "--ns", "pid=sandbox", "web", "--", "/bin/true"}, 0, []string{"pid=sandbox", "web", "--share pid"}},
		{"mnt of the sandbox", run("--ns", "mnt=sandbox"), 0, []string{"mnt=sandbox", "member:NAME"}},
		{"join to mnt of the sandbox", []string{"join", "--ns", "mnt=sandbox", "web", "--", "/bin/true"}, 0, []string{"mnt=sandbox", "member:NAME"}},
		{"a member that does not exist", run("--ns", "net=member:nosuch"), 0, []string{"net=member:nosuch", "no such member"}},
		{"join to a member that does not exist", []string{"join", "--ns", "net=member:nosuch", "web", "--", "/bin/true"}, 0, []string{`no member "nosuch" in sandbox web`}},
		{"a circle of one", run("--name", "self", "--ns", "net=member:self"), 0, []string{"net=member:self", "no such member"}},
		{"a dead pid namespace", run("--ns", "pid=member:dead"), 0, []string{"dead", "pid=private"}},
		{"join to a dead pid namespace", []string{"join", "--ns", "pid=member:dead", "web", "--", "/bin/true"}, 0, []string{"dead", "exited", "pid=private"}},
		{"a namespace that nobody holds", run("--ns", "cgroup=member:gone"), 0, []string{"cgroup=member:gone", "not held"}},
		{"the mounts that nobody holds", []string{"join", "web/gone", "--", "/bin/true"}, 0, []string{"gone", "custody is never"}},
		{"files that nobody holds", []string{"cp", "web/gone:/etc", "-"}, 0, []string{"gone", "custody is never"}},
		{"a private user namespace", run("--ns", "user=private"), 0, []string{"user=private", "--share user"}},
		{"an unknown namespace", run("--ns", "disk=host"), 0, []string{"disk"}},
		{"an unknown source", run("--ns", "net=nowhere"), 0, []string{"nowhere"}},
		{"a namespace given twice", run("--ns", "net=host,net=private"), 0, []string{"net"}},
		{"a source without a kind", run("--ns", "host"), 0, []string{"host"}},
		{"a member without a name", run("--ns", "net=member:"), 0, []string{"member:"}},
		{"a rootfs with another's mounts", run("--ns", "mnt=member:up"), 0, []string{"mnt=member:up", "rootfs"}},
		{"exec in an exited member", []string{"exec", "web/dead", "--", "/bin/true"}, 0, []string{"dead", "join"}},

		// Roots.
		{"no root", []string{"run", "web", "--", "/bin/true"}, 0, []string{"rootfs", "bundle"}},
		{"a missing rootfs", []string{"run", "web", "--rootfs", rootfs + "/no", "--", "/bin/true"}, 0, []string{rootfs + "/no", "no such file"}},
		{"a rootfs that is a file", []string{"run", "web", "--rootfs", file, "--", "/bin/true"}, 0, []string{file, "not a directory"}},
		{"an empty rootfs", []string{"run", "web", "--rootfs", "", "--", "/bin/true"}, 0, []string{"--rootfs", "empty"}},
		{"a rootfs with a newline", []string{"run", "web", "--rootfs", "/no\nsuch", "--", "/bin/true"}, 0, []string{`"/no\nsuch"`}},
		{"a rootfs of 10000 characters", []string{"run", "web", "--rootfs", "/" + long, "--", "/bin/true"}, 0, []string{"rootfs", "10001 bytes"}},
		{"a rootfs that is not UTF-8", []string{"run", "web", "--rootfs", "/no\xff", "--", "/bin/true"}, 0, []string{`"/no\xff"`, "UTF-8"}},
		{"rootfs and bundle", run("--bundle", bundle(t, rootfs, nil)), 0, []string{"rootfs", "bundle"}},
		{"join with a missing rootfs", []string{"join", "--rootfs", rootfs + "/no", "web", "--", "/bin/true"}, 0, []string{rootfs + "/no"}},
		{"join with rootfs and mnt", []string{"join", "--rootfs", rootfs, "--ns", "mnt=host", "web", "--", "/bin/true"}, 0, []string{"--rootfs", "mnt"}},

		// Commands.
		{"no command", []string{"run", "web", "--rootfs", rootfs}, 0, []string{"command"}},
		{"an empty command", cmd(""), 0, []string{"command"}},
		{"a command that is missing", cmd("/bin/nosuch"), 127, []string{`add web: command "/bin/nosuch": no such file`}},
		{"a command that is not in $PATH", cmd("nosuch"), 127, []string{`"nosuch"`, "$PATH"}},
		{"a command in a file", cmd("/etc/passwd/x"), 127, []string{"/etc/passwd/x"}},
		{"a command that is not executable", cmd("/bin/plain"), 126, []string{"/bin/plain", "permission denied"}},
		{"a command that is a directory", run("--name", "dir", "--", "/etc"), 126, []string{"start web/dir: execute /etc: permission denied"}},
		{"a command for another machine", cmd("/bin/foreign"), 126, []string{"/bin/foreign", "exec format"}},
		{"a command that is garbage", cmd("/bin/garbage"), 126, []string{"/bin/garbage", "exec format"}},
		{"a command that is empty", cmd("/bin/empty"), 126, []string{"/bin/empty", "exec format"}},
		{"a script without its interpreter", cmd("/bin/nointerpreter"), 127, []string{"/bin/nointerpreter", "no such file"}},
		{"a command of 10000 characters", cmd("/" + long), 126, []string{"too long"}},
		{"exec of a missing command", []string{"exec", "web/up", "--", "nosuch"}, 127, []string{`"nosuch"`}},
		{"exec for another machine", []string{"exec", "web/up", "--", "/bin/foreign"}, 126, []string{"/bin/foreign", "exec format"}},
		{"exec of an empty command", []string{"exec", "web/up", "--", ""}, 0, []string{"command"}},
		{"join with a missing command", []string{"join", "web/dead", "--", "nosuch"}, 127, []string{`"nosuch"`}},
		{"join with an empty command", []string{"join", "web", "--", ""}, 0, []string{"command"}},
		{"exec without a command", []string{"exec", "web/up"}, 0, []string{"CMD"}},
		{"a working directory that is missing", run("--read-only", "-w", "/nosuch"), 0, []string{"/nosuch", "no such file"}},
		{"a working directory that is a file", run("--name", "wd", "-w", "/etc/passwd"), 0, []string{"add web/wd: change to working directory /etc/passwd: not a directory"}},
		{"a relative working directory", run("-w", "etc"), 0, []string{`"etc"`, "absolute"}},
		{"exec in a relative working directory", []string{"exec", "-w", "etc", "web/up", "--", "true"}, 0, []string{`"etc"`, "absolute"}},
		{"exec in a missing working directory", []string{"exec", "-w", "/nosuch", "web/up", "--", "true"}, 0, []string{"/nosuch"}},
		{"an unknown user", run("-u", "nosuch"), 0, []string{`"nosuch"`, "/etc/passwd"}},
		{"an unknown group", run("-u", "0:nosuch"), 0, []string{`"nosuch"`, "/etc/group"}},
		{"a user beyond all", run("-u", "4294967295"), 0, []string{"4294967295"}},
		{"exec as an unknown user", []string{"exec", "-u", "nosuch", "web/up", "--", "true"}, 0, []string{`"nosuch"`}},
		{"arguments too long together", cmd(append([]string{"/bin/true"}, manyArgs(120)...)...), 0, []string{"arguments", "allowed"}},

		// Volumes and tmpfs.
		{"a missing volume", run("-v", "/no/such:/mnt"), 0, []string{"volume source", "/no/such"}},
		{"a volume without a target", run("-v", "/etc"), 0, []string{`"/etc"`, "SRC:DST"}},
		{"a volume on a relative target", run("-v", "/etc:mnt"), 0, []string{`"/etc:mnt"`, "absolute"}},
		{"a volume on the root", run("-v", "/etc:/"), 0, []string{"root"}},
		{"a volume in proc", run("-v", "/etc:/proc/sys"), 0, []string{"/proc/sys"}},
		{"a volume outside", run("-v", "/etc:/mnt/../../x"), 0, []string{"/mnt/../../x"}},
		{"a volume with an unknown option", run("-v", "/etc:/mnt:rx"), 0, []string{`"rx"`, "ro"}},
		{"a volume with a colon too many", run("-v", "/etc:/mnt:ro:x"), 0, []string{"SRC:DST"}},
		{"a volume with a newline", run("-v", "/etc\n:/mnt"), 0, []string{`\n`}},
		{"a volume of 10000 characters", run("-v", "/"+long+":/mnt"), 0, []string{"volume source", "10001 bytes"}},
		{"two volumes on one target", run("-v", "/etc:/mnt", "-v", "/usr:/mnt"), 0, []string{"/mnt", "already"}},
		{"a volume and a tmpfs on one target", run("-v", "/etc:/mnt", "--tmpfs", "/mnt"), 0, []string{"/mnt", "already"}},
		{"a tmpfs of nonsense", run("--tmpfs", "/mnt:size=lots"), 0, []string{`"lots"`, "64m"}},
		{"a tmpfs of nothing", run("--tmpfs", "/mnt:size=0"), 0, []string{"size is 0"}},
		{"a tmpfs of a byte", run("--tmpfs", "/mnt:size=1"), 0, []string{"page"}},
		{"a negative tmpfs", run("--tmpfs", "/mnt:size=-1"), 0, []string{`"-1"`}},
		{"a tmpfs beyond all", run("--tmpfs", "/mnt:size=99999999999g"), 0, []string{"99999999999g"}},
		{"an unknown option of tmpfs", run("--tmpfs", "/mnt:mode=1"), 0, []string{`"mode=1"`}},
		{"a tmpfs on the root", run("--tmpfs", "/"), 0, []string{"root"}},
		{"a relative tmpfs", run("--tmpfs", "mnt"), 0, []string{`"mnt"`}},

		// What is kept of it.
		{"a relative collector", run("--collect", "tmp/core"), 0, []string{`"tmp/core"`, "absolute"}},
		{"a collector above the root", run("--collect", "/a/../../b"), 0, []string{"collect", ".."}},
		{"a pattern that does not end", run("--collect", "/tmp/["), 0, []string{"/tmp/[", "pattern"}},
		{"a collector on a whim", run("--collect", "/a,on=whim"), 0, []string{`"whim"`, "failure"}},
		{"a collector of nothing", run("--collect", "/a,max=0"), 0, []string{"limit"}},
		{"a collector of nonsense", run("--collect", "/a,max=lots"), 0, []string{`"lots"`}},
		{"a collector with an unknown option", run("--collect", "/a,by=me"), 0, []string{`"by=me"`, "max"}},
		{"a collector with an escape", run("--collect", "/a\x1b[31m"), 0, []string{"collect"}},
		{"a collector of 10000 characters", run("--collect", "/"+long), 0, []string{"collect", "10001 bytes"}},
		{"custody for nonsense", run("--custody-ttl", "soon"), 0, []string{`"soon"`, "1h"}},
		{"custody for less than no time", run("--custody-ttl", "-1s"), 0, []string{`"-1s"`}},
		{"a postmortem of a sandbox", []string{"postmortem", "web"}, 0, []string{"SANDBOX/MEMBER"}},
		{"a postmortem of nobody", []string{"postmortem", "web/nobody"}, 0, []string{"nobody", "nothing was collected"}},
		{"a postmortem in a strange form", []string{"postmortem", "-o", "yaml", "web/up"}, 0, []string{`"yaml"`, "html"}},
		{"a collection above the directory", []string{"collected", "show", "../x-1"}, 0, []string{"../x-1", "SANDBOX/MEMBER-N"}},
		{"a collection that is missing", []string{"collected", "rm", "web/none-1"}, 0, []string{"web/none-1"}},
		{"an unknown command of collected", []string{"collected", "burn"}, 0, []string{`"burn"`}},
		{"collections in no directory", []string{"collected", "export", "--collect-dir", "/no/such", "web/up-1"}, 0, []string{"/no/such"}},
		{"shm of nonsense", []string{"create", "x", "--shm-size", "lots"}, 0, []string{`"lots"`}},
		{"shm of a byte", []string{"create", "x", "--shm-size", "1"}, 0, []string{"shm", "4096"}},

		// What a process may do and have.
		{"an unknown capability", run("--cap-add", "FLY"), 0, []string{"FLY"}},
		{"an unknown capability to drop", run("--cap-drop", "CAP_FLY"), 0, []string{"FLY"}},
		{"an unknown stop signal", run("--stop-signal", "WAVE"), 0, []string{"WAVE"}},
		{"stop signal 0", run("--stop-signal", "0"), 0, []string{"0"}},
		{"an unknown signal", []string{"kill", "web/up", "WAVE"}, 0, []string{"WAVE"}},
		{"signal 65", []string{"kill", "web/up", "65"}, 0, []string{"65"}},
		{"a signal to an exited member", []string{"kill", "web/dead"}, 0, []string{"dead"}},
		{"an unknown custody", run("--custody", "sometimes"), 0, []string{`"sometimes"`, "always"}},
		{"a sysctl of the host", []string{"create", "x", "--sysctl", "kernel.core_pattern=|/x"}, 0, []string{"kernel.core_pattern", "host"}},
		{"a sysctl of a namespace not held", []string{"create", "x", "--share", "uts", "--sysctl", "net.ipv4.ip_forward=1"}, 0, []string{"net.ipv4.ip_forward", "net namespace"}},
		{"a sysctl that leads elsewhere", []string{"create", "x", "--sysctl", "net/../kernel/core_pattern=|/x"}, 0, []string{"net/../kernel/core_pattern"}},
		{"a sysctl that does not exist", []string{"create", "x", "--sysctl", "net.nosuch=1"}, 0, []string{"net.nosuch"}},
		{"a value that a sysctl does not take", []string{"create", "x", "--sysctl", "net.ipv4.ip_forward=yes"}, 0, []string{"net.ipv4.ip_forward"}},
		{"a sysctl without a value", []string{"create", "x", "--sysctl", "net.ipv4.ip_forward"}, 0, []string{"net.ipv4.ip_forward", "KEY=VALUE"}},
		{"too little memory", run("--memory", "64k"), 0, []string{"memory", "1048576"}},
		{"memory of nonsense", run("--memory", "lots"), 0, []string{`"lots"`}},
		{"negative memory", run("--memory", "-1"), 0, []string{`"-1"`}},
		{"no CPU", run("--cpus", "0"), 0, []string{`"0"`}},
		{"too little CPU", run("--cpus", "0.001"), 0, []string{"0.001", "0.01"}},
		{"CPUs of nonsense", run("--cpus", "NaN"), 0, []string{`"NaN"`}},
		{"no processes", run("--pids-limit", "0"), 0, []string{"--pids-limit", "0"}},
		{"negative processes", run("--pids-limit", "-5"), 0, []string{"--pids-limit", "-5"}},

		// Lifecycle.
		{"rm of a running member", []string{"rm", "web/up"}, 0, []string{"up", "Running", "-f"}},
		{"rm of a sandbox with a running member", []string{"rm", "web"}, 0, []string{"web", "up", "-f"}},
		{"start of an exited member", []string{"start", "web/dead"}, 0, []string{"dead", "Exited"}},
		{"a negative time to stop", []string{"stop", "--time", "-1s", "web/up"}, 0, []string{"-1s", "negative"}},
		{"a time of nonsense", []string{"stop", "--time", "soon", "web/up"}, 0, []string{"soon"}},

		// Bundles.
		{"a missing bundle", []string{"run", "web", "--bundle", rootfs + "/no"}, 0, []string{rootfs + "/no"}},
		{"a bundle that is a file", []string{"run", "web", "--bundle", file}, 0, []string{file}},
		{"a directory that is no bundle", []string{"run", "web", "--bundle", rootfs}, 0, []string{rootfs, "config.json"}},
		{"a bundle with a namespace twice", inBundle(namespaces(ns("mount"), ns("pid"), ns("pid"))), 0, []string{"pid", "config.json"}},
		{"a bundle with an unknown namespace", inBundle(namespaces(ns("mount"), ns("disk"))), 0, []string{"disk"}},
		{"a bundle of a newer version", inBundle(func(c map[string]any) { c["ociVersion"] = "9.0.0" }), 0, []string{"9.0.0"}},
		{"a bundle with a newer field", inBundle(func(c map[string]any) { c["linux"].(map[string]any)["shiny"] = true }), 0, []string{"linux.shiny"}},
		{"a bundle without a root", inBundle(func(c map[string]any) { delete(c, "root") }), 0, []string{"root"}},
		{"a bundle without a process", inBundle(func(c map[string]any) { delete(c, "process") }), 0, []string{"command"}},
		{"a bundle whose root is missing", inBundle(func(c map[string]any) { c["root"] = map[string]any{"path": "nosuch"} }), 0, []string{"nosuch", "no such file"}},
		{"a bundle with a hook that is missing", inBundle(func(c map[string]any) {
			c["hooks"] = map[string]any{"createRuntime": []any{map[string]any{"path": "/no/such/hook"}}}
		}), 0, []string{"createRuntime", "/no/such/hook", "no such file"}},
		{"a bundle with a hook without time", inBundle(func(c map[string]any) {
			c["hooks"] = map[string]any{"poststop": []any{map[string]any{"path": "/bin/true", "timeout": 0}}}
		}), 0, []string{"hooks.poststop[0]", "timeout"}},
		{"a hook that is missing", []string{"run", "web", "--rootfs", rootfs, "--hook", "poststop=/no/such/hook", "--", "/bin/true"}, 0, []string{"/no/such/hook", "no such file"}},
		{"a hook that is not executable", []string{"run", "web", "--rootfs", rootfs, "--hook", "poststop=" + file, "--", "/bin/true"}, 0, []string{file, "not executable"}},
		{"a hook that is a directory", []string{"create", "hooked", "--hook", "poststop=/usr"}, 0, []string{"/usr", "not a regular file"}},
		{"a hook of no stage", []string{"run", "web", "--rootfs", rootfs, "--hook", "never=/bin/true"}, 0, []string{"never", "poststop"}},
		{"a hook of a member's stage for a sandbox", []string{"create", "hooked", "--hook", "prestart=/bin/true"}, 0, []string{"prestart", "poststop"}},
		{"a hook with a relative path", []string{"create", "hooked", "--hook", "poststop=bin/true"}, 0, []string{"bin/true", "absolute"}},
		{"a hook with a nonsense timeout", []string{"create", "hooked", "--hook", "poststop=/bin/true,timeout=soon"}, 0, []string{"soon", "duration"}},
		{"a hook that may take for ever", []string{"create", "hooked", "--hook", "poststop=/bin/true,timeout=10000h"}, 0, []string{"10000h", "1h0m0s"}},
		{"a bundle with a hostname in a shared uts", inBundle(func(c map[string]any) { c["hostname"] = "h" }), 0, []string{"hostname", "uts=private"}},
		{"a bundle with a sysctl in a shared net", inBundle(func(c map[string]any) {
			c["linux"].(map[string]any)["sysctl"] = map[string]any{"net.ipv4.ip_forward": "1"}
		}), 0, []string{"net.ipv4.ip_forward", "--sysctl"}},
		{"a bundle with another type", inBundle(func(c map[string]any) { c["process"].(map[string]any)["args"] = "true" }), 0, []string{"process.args"}},

		// Flags and words.
		{"an unknown flag", []string{"create", "x", "--colour"}, 0, []string{"--colour", "--help"}},
		{"an unknown letter", []string{"rm", "-z", "x"}, 0, []string{"-z"}},
		{"a flag without its value", []string{"create", "x", "--net"}, 0, []string{"--net"}},
		{"one argument too many", []string{"create", "x", "y"}, 0, []string{`"y"`}},
		{"no argument", []string{"rm"}, 0, []string{"rm", "SANDBOX"}},
		{"an argument for ls", []string{"ls", "x"}, 0, []string{`"x"`}},
		{"an environment variable without a name", run("-e", "=x"), 0, []string{`"=x"`, "name"}},
		{"an empty environment variable", run("-e", ""), 0, []string{"name"}},
		{"exec with a variable without a name", []string{"exec", "-e", "=x", "web/up", "--", "true"}, 0, []string{`"=x"`}},
		{"a label without a value", run("--label", "key"), 0, []string{`"key"`, "KEY=VALUE"}},
		{"a label without a key", run("--label", "=v"), 0, []string{`"=v"`}},
		{"a sandbox's label without a key", []string{"create", "x", "--label", "=v"}, 0, []string{`"=v"`}},
		{"a label given twice", []string{"create", "x", "--label", "a=1", "--label", "a=2"}, 0, []string{`"a"`, "twice"}},
		{"labels without end", []string{"create", "x", "--label", "a=" + strings.Repeat("x", 100_000), "--label", "b=" + strings.Repeat("x", 100_000), "--label", "c=" + strings.Repeat("x", 100_000)}, 0, []string{"label", "bytes"}},
		{"output of another form", []string{"ls", "-o", "xml"}, 0, []string{"xml", "json"}},
		{"an address of another kind", []string{"ls", "--address", "tcp://localhost:1"}, 0, []string{"tcp://localhost:1", "unix://"}},
		{"an address of 10000 characters", []string{"create", "--address", "unix:///" + long}, 0, []string{"address", "10001", "107"}},
		{"nobody at the address", []string{"create", "--address", "unix:///no/such.sock"}, 0, []string{"/no/such.sock"}},
		{"a log in a missing directory", run("--log", "/no/such/log"), 0, []string{"/no/such/log"}},
		{"lines of nonsense", []string{"logs", "--tail", "few", "web/up"}, 0, []string{"few"}},
		{"negative lines", []string{"logs", "--tail", "-1", "web/up"}, 0, []string{"-1"}},
		{"exec -t without a terminal", []string{"exec", "-i", "-t", "web/up", "--", "true"}, 0, []string{"-t", "terminal"}},
		{"run -t without a terminal", run("-i", "-t"), 0, []string{"-t", "terminal"}},

		// Copies.
		{"cp within the host", []string{"cp", "/etc/passwd", "/tmp/x"}, 0, []string{"SANDBOX/MEMBER:PATH"}},
		{"cp from member to member", []string{"cp", "web/up:/etc", "web/dead:/"}, 0, []string{"both in members"}},
		{"cp of a missing file", []string{"cp", "web/up:/nosuch", t.TempDir()}, 0, []string{"sandboxd: web/up: open /nosuch: no such file"}},
		{"cp of no file", []string{"cp", "web/up:", t.TempDir()}, 0, []string{"empty"}},
		{"cp of a missing file of the host", []string{"cp", "/no/such", "web/up:/tmp"}, 0, []string{"sandboxd: open /no/such: no such file"}},
		{"cp into a missing directory", []string{"cp", file, "web/up:/no/such/"}, 0, []string{"web/up: open /no/such"}},
		{"cp into a file", []string{"cp", file, "web/up:/etc/passwd/x"}, 0, []string{"/etc/passwd"}},
		{"cp to a missing directory of the host", []string{"cp", "web/up:/etc/passwd", "/no/such/"}, 0, []string{"/no/such"}},
		{"cp of a sandbox", []string{"cp", "web:/etc", "-"}, 0, []string{"web:/etc", "SANDBOX/MEMBER"}},
		{"cp from a path with a newline", []string{"cp", "web/up:/a\nb", "-"}, 0, []string{"no such file"}},
		{"cp of 10000 characters", []string{"cp", "web/up:/" + long, "-"}, 0, []string{"too long"}},
	} {
		t.Run(r.name, func(t *testing.T) { d.refuse(t, r) })
	}
}

// manyArgs returns n arguments of 10000 bytes.
func manyArgs(n int) []string {
	args := make([]string, n)
	for i := range args {
		args[i] = strings.Repeat("x", 10_000)
	}
	return args
}

// Whatever a path looks like, it works or is refused; none is taken for another.
func TestOddPaths(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	const odd = "a b,c\\d\\040:e'\"$(x)*%s"
	noColon := strings.ReplaceAll(odd, ":", ";")

	dir := filepath.Join(t.TempDir(), odd)
	if err := os.Rename(rootfs, dir); err != nil {
		t.Fatal(err)
	}
	vol := filepath.Join(t.TempDir(), noColon)
	if err := os.Mkdir(vol, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(vol, "x"), []byte("here"), 0o644); err != nil {
		t.Fatal(err)
	}
	script := `cat "/mnt/$0/x" && printf ' %s ' "$V" && echo new >"/tmp/$0" && touch "/mnt/t $0/y" && ls /mnt`
	args := append([]string{"run", "web", "--rootfs", dir, "--name", "odd", "-e", "V=a\nb", "-w", "/tmp", "-v", vol + ":/mnt/" + noColon, "--tmpfs", "/mnt/t " + noColon}, sh(script)...)
	if got, want := d.must(t, append(args, noColon)...), "here a\nb "+noColon+"\nt "+noColon+"\n"; got != want {
		t.Errorf("the member wrote %q, want %q", got, want)
	}
	to := t.TempDir()
	d.must(t, "cp", "web/odd:/tmp/"+noColon, to)
	if b, err := os.ReadFile(filepath.Join(to, noColon)); err != nil || string(b) != "new\n" {
		t.Errorf("the copy is %q, %v", b, err)
	}
	// A newline in a name is refused where it would be shown, and goes through
	// where it is only a file's.
	strange := "line\nline"
	if err := os.WriteFile(filepath.Join(to, strange), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	d.must(t, "cp", filepath.Join(to, strange), "web/odd:/tmp/")
	d.must(t, "cp", "web/odd:/tmp/"+strange, filepath.Join(to, "back"))
	if b, err := os.ReadFile(filepath.Join(to, "back")); err != nil || string(b) != "x" {
		t.Errorf("the copy is %q, %v", b, err)
	}
}

// What is long but legal goes through unchanged.
func TestLongArguments(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	long := strings.Repeat("x", 10_000)
	longest := strings.Repeat("y", 128<<10-1)
	args := append([]string{"run", "web", "--rootfs", rootfs, "--name", "long", "-e", "V=" + long, "--label", "l=" + long}, sh(`echo ${#0} ${#1} ${#V} $#; exec sleep 1000 </dev/null`)...)
	args = append(args, manyArgs(80)...)
	got := make(chan string, 1)
	go func() {
		stdout, _, _ := d.run(t, args...)
		got <- stdout
	}()
	for deadline := time.Now().Add(ready); ; time.Sleep(20 * time.Millisecond) {
		if out, _, code := d.run(t, "logs", "web/long"); code == 0 && out != "" {
			if want := "10000 10000 10000 79\n"; out != want {
				t.Errorf("the member wrote %q, want %q", out, want)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the member has not written")
		}
	}
	if out, want := d.must(t, "exec", "-e", "W="+long, "web/long", "--", "/bin/sh", "-c", `echo ${#0} ${#W}`, longest), "131071 10000\n"; out != want {
		t.Errorf("exec wrote %q, want %q", out, want)
	}
	if out, want := d.must(t, "join", "web/long", "--", "/bin/sh", "-c", `echo ${#0}`, longest), "131071\n"; out != want {
		t.Errorf("join wrote %q, want %q", out, want)
	}
	d.must(t, "kill", "web/long")
	<-got
}

// A state directory without room: each step fails with one line and is undone,
// or succeeds; nothing is killed by a page that cannot be had.
func TestFullStateDirectory(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	d := newDaemon(t)
	if err := unix.Mount("full", d.state, "tmpfs", 0, "size=512k,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop(t)
		if err := unix.Unmount(d.state, 0); err != nil {
			t.Error(err)
		}
	})
	d.start(t)
	d.must(t, "create", "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--rm"}, sh("exit 0")...)...)
	failed, worked := 0, 0
	for free := range 14 {
		w := d.look(t)
		ballast := filepath.Join(d.state, "ballast")
		fill(t, ballast, free)
		args := append([]string{"run", "web", "--rootfs", rootfs, "--name", "m"}, sh("exit 0")...)
		switch stdout, stderr, code := d.run(t, args...); code {
		case 0:
			worked++
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			d.must(t, "rm", "web/m")
		default:
			failed++
			checkRefusal(t, refusal{want: []string{"no space left on device"}}, stdout, stderr, code)
			for _, once := range []string{"record", "write", "sandboxes/"} {
				if strings.Count(stderr, once) > 1 {
					t.Errorf("with %d free pages %q is there more than once: %s", free, once, stderr)
				}
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
		}
		w.unchanged(t)
	}
	if failed == 0 || worked == 0 {
		t.Errorf("with 0 to 13 free pages %d failed and %d worked: some of each were expected", failed, worked)
	}
	// What is there can be removed without any room at all.
	fill(t, filepath.Join(d.state, "ballast"), 0)
	d.must(t, "rm", "web")
}

// fill writes a file until only so many pages are free on its file system.
func fill(t *testing.T, path string, free int) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &st); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, (int64(st.Bfree)-int64(free))*st.Bsize), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestReadOnlyStateDirectory(t *testing.T) {
	testenv.Root(t)
	d := newDaemon(t)
	if err := unix.Mount("ro", d.state, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.state, 0); err != nil {
			t.Error(err)
		}
	})
	stdout, stderr, code := d.run(t, d.serveArgs()...)
	checkRefusal(t, refusal{want: []string{"state directory", "read-only file system"}}, stdout, stderr, code)
}

// Garbage in the state directory is set aside and stops nobody.
func TestGarbageInStateDirectory(t *testing.T) {
	testenv.Root(t)
	d := newDaemon(t)
	boxes := filepath.Join(d.state, "sandboxes")
	for name, b := range map[string]string{
		"0000000000000001/sandbox.json":                     "garbage",
		"0000000000000002/sandbox.json":                     "",
		"0000000000000003/sandbox.json":                     "{}",
		"0000000000000004/sandbox.json":                     "[" + strings.Repeat("[", 100_000),
		"0000000000000005/m/0000000000000006/member.json":   "{}",
		"0000000000000007/sandbox.json/that/is/a/directory": "",
		"not an id/sandbox.json":                            "{}",
		"0000000000000008/m/0000000000000009/status/x":      "",
		"000000000000000a/sandbox.json.tmp":                 "{",
	} {
		path := filepath.Join(boxes, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(boxes, "000000000000000b"), []byte("a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(boxes, "000000000000000c"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(boxes, "000000000000000d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(boxes, "000000000000000d/sandbox.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.must(t, "ls") // without the daemon
	d.start(t)
	if text, want := d.log.String(), "dir="+d.state+"/quarantine/0000000000000001"; !strings.Contains(text, want) {
		t.Errorf("the log has no %q:\n%s", want, text)
	}
	d.must(t, "create", "web")
	d.must(t, "rm", "web")
	d.must(t, "ls")
}

// A socket that cannot be had is found out before anything is made.
func TestTakenSocket(t *testing.T) {
	testenv.Root(t)
	dir, err := os.MkdirTemp(states, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	taken := filepath.Join(dir, "taken.sock")
	l, err := net.Listen("unix", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := &daemon{state: filepath.Join(dir, "state"), root: filepath.Join(dir, "root"), parent: top + "/never"}
	for _, r := range []refusal{
		{"taken", []string{"unix://" + taken}, 0, []string{taken, "taken"}},
		{"not a socket", []string{"unix://" + file}, 0, []string{file, "not a socket"}},
		{"below a file", []string{"unix://" + file + "/x"}, 0, []string{file + "/x", "not a directory"}},
		{"too long", []string{"unix:///" + strings.Repeat("x", 200)}, 0, []string{"201", "107"}},
		{"in a missing directory", []string{"unix://" + dir + "/no/such"}, 0, []string{dir + "/no/such", "directory " + dir + "/no: no such file"}},
		{"in a directory that takes none", []string{"unix:///proc/self/such"}, 0, []string{"socket /proc/self/such"}},
		{"of another kind", []string{"tcp://127.0.0.1:0"}, 0, []string{"tcp://127.0.0.1:0"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			stdout, stderr, code := d.run(t, "serve", "--state", d.state, "--root", d.root, "--cgroup-parent", d.parent, "--address", r.args[0])
			checkRefusal(t, r, stdout, stderr, code)
			for _, made := range []string{d.state, d.root} {
				if _, err := os.Lstat(made); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s was made: %v", made, err)
				}
			}
		})
	}
}

func TestBadDaemonFlags(t *testing.T) {
	testenv.Root(t)
	dir, err := os.MkdirTemp(states, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := &daemon{state: filepath.Join(dir, "state"), root: filepath.Join(dir, "root")}
	for _, r := range []refusal{
		{"a cgroup parent that leads up", []string{"--cgroup-parent", "/../x"}, 0, []string{"/../x"}},
		{"a relative cgroup parent", []string{"--cgroup-parent", "x"}, 0, []string{`"x"`}},
		{"the root as cgroup parent", []string{"--cgroup-parent", "/"}, 0, []string{`"/"`}},
		{"a cgroup parent with a newline", []string{"--cgroup-parent", "/a\nb"}, 0, []string{"/a"}},
		{"a state directory that is a file", []string{"--state", file}, 0, []string{file, "not a directory"}},
		{"a root directory that is a file", []string{"--root", file}, 0, []string{file, "not a directory"}},
		{"a collection directory that is a file", []string{"--collect-dir", file}, 0, []string{"--collect-dir", file, "not a directory"}},
		{"collections of nonsense", []string{"--collect-max-total", "lots"}, 0, []string{`"lots"`, "64m"}},
		{"collections kept for nonsense", []string{"--collect-keep", "-1h"}, 0, []string{`"-1h"`}},
		{"samples without end", []string{"--sample-interval", "1ns"}, 0, []string{"1ns", "100ms"}},
		{"garbage collection without end", []string{"--gc-interval", "1ms"}, 0, []string{"1ms", "1s"}},
		{"fewer than none in custody", []string{"--custody-max", "-1"}, 0, []string{"--custody-max", "-1"}},
		{"custody of nonsense", []string{"--custody-max-tmpfs", "x"}, 0, []string{`"x"`}},
		{"a level of nonsense", []string{"--log-level", "loud"}, 0, []string{`"loud"`, "debug"}},
		{"a format of nonsense", []string{"--log-format", "xml"}, 0, []string{`"xml"`, "json"}},
		{"an argument", []string{"now"}, 0, []string{`"now"`}},
	} {
		t.Run(r.name, func(t *testing.T) {
			args := append([]string{"serve", "--state", d.state, "--root", d.root, "--address", "unix://" + filepath.Join(dir, "s")}, r.args...)
			cmd := d.command(args...)
			var o, e bytes.Buffer
			cmd.Stdout, cmd.Stderr = &o, &e
			// A daemon that starts in spite of it must not hang the test.
			kill := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
			defer kill.Stop()
			if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
				t.Fatal(err)
			}
			checkRefusal(t, r, o.String(), e.String(), cmd.ProcessState.ExitCode())
			for _, made := range []string{d.state, d.root} {
				if _, err := os.Lstat(made); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s was made: %v", made, err)
				}
				os.RemoveAll(made)
			}
		})
	}
}

// Without root there is one line that says so, whatever is called.
func TestNotRoot(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	self, err := os.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	for _, args := range [][]string{
		d.serveArgs(),
		{"create", "x"},
		{"run", "web", "--rootfs", rootfs, "--", "/bin/true"},
		{"ls"}, {"ps"}, {"inspect", "web"}, {"logs", "web/up"},
		{"exec", "web/up", "--", "/bin/true"},
		{"join", "web", "--", "/bin/true"},
		{"join", "web/up", "--", "/bin/true"},
		{"cp", "web/up:/etc/passwd", "-"},
		{"attach", "web/up"}, {"wait", "web/up"}, {"kill", "web/up"}, {"stop", "web"}, {"rm", "-f", "web"},
	} {
		t.Run(args[0], func(t *testing.T) {
			w := d.look(t)
			cmd := d.command(args...)
			// Not by its name: nobody but root may enter the directory it is in.
			cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{self}
			cmd.SysProcAttr = &unix.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			var o, e bytes.Buffer
			cmd.Stdout, cmd.Stderr = &o, &e
			if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
				t.Fatal(err)
			}
			checkRefusal(t, refusal{want: []string{"root"}}, o.String(), e.String(), cmd.ProcessState.ExitCode())
			w.unchanged(t)
		})
	}
}

// The refusals of -t have this for a control: with a terminal it works, and the
// caller's terminal is as it was afterwards.
func TestTerminalOfTheCaller(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	master, slave := openPty(t)
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 77}); err != nil {
		t.Fatal(err)
	}
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		append([]string{"run", "-i", "-t", "web", "--rootfs", rootfs, "--rm"}, sh("test -t 0 && stty size")...),
		append([]string{"exec", "-i", "-t", "web/up"}, sh("test -t 0 && stty size")...),
	} {
		cmd := d.command(args...)
		var out bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, &out, &out
		if err := cmd.Run(); err != nil || out.String() != "33 77\r\n" {
			t.Errorf("%s: %q, %v", args[0], out.String(), err)
		}
		after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil || *after != *before {
			t.Errorf("%s: the terminal was left as %+v, %v; it was %+v", args[0], after, err, before)
		}
	}
	for _, args := range [][]string{{"cp", "web/up:/etc", "-"}, {"collected", "export", "web/up-1"}} {
		cmd := d.command(args...)
		var errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = slave, &errs
		if err := cmd.Run(); err == nil || !strings.Contains(errs.String(), "a tar archive is nothing for a terminal") {
			t.Errorf("%s to a terminal: %q, %v", args[0], errs.String(), err)
		}
	}
}
