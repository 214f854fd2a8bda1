//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStoryCustody(t *testing.T) {
	s := newStory(t)
	vol := t.TempDir()
	s.write(filepath.Join(vol, "in"), "volume\n")
	const leave = `mkdir -p /over; echo under >/over/f; mount -t tmpfs x /over; echo over >/over/f
		echo tmp >/t/f; echo layer >/root/f; echo late >/v/late; rm /etc/group; echo ready; `
	const ruin = `x=x; while :; do x=$x$x; done`
	flags := []string{"--cap-add", "SYS_ADMIN", "--tmpfs", "/t", "-v", vol + ":/v"}
	s.startMember("exited", leave+"exit 1", flags...)
	s.startMember("killed", leave+"sleep 1000", flags...)
	s.startMember("oom", leave+ruin, append(flags, "--memory", "8m")...)
	s.startMember("orphan", leave+"while [ ! -e /v/go ]; do sleep 0.02; done; exit 4", flags...)
	for _, m := range []string{"exited", "killed", "oom", "orphan"} {
		s.logged(m, "ready")
	}
	s.ok("kill", "web/killed")
	s.kill(t) // the daemon
	s.write(filepath.Join(vol, "go"), "")
	s.eventually("the member has exited without the daemon", func() bool { v := s.inspect("orphan"); return v.Exit != nil })
	s.contains("copy without the daemon", s.ok("join", "web/orphan", "--", "cat", "/t/f"), "tmp")
	s.start(t)
	want := map[string]int{"exited": 1, "killed": 137, "oom": 137, "orphan": 4}
	for m, code := range want {
		v := s.exited(m)
		if !v.Exit.Known || v.Exit.Code != code || !v.Custody.Held || v.Exit.OOMKilled != (m == "oom") {
			t.Errorf("%s: %+v, custody %+v", m, v.Exit, v.Custody)
		}
		s.expect(m+", by join", s.join(m, "cat /over/f /t/f /root/f /v/in /v/late; [ ! -e /etc/group ]"), "over\ntmp\nlayer\nvolume\nlate\n")
		dest := t.TempDir()
		for _, f := range []string{"/over/f", "/t/f", "/root/f", "/v/in"} {
			out := filepath.Join(dest, strings.ReplaceAll(f, "/", "_"))
			s.ok("cp", "web/"+m+":"+f, out)
			if b, err := os.ReadFile(out); err != nil || len(b) == 0 || !strings.Contains("over tmp layer volume", strings.TrimSpace(string(b))) {
				t.Errorf("%s: copy of %s is %q, %v", m, f, b, err)
			}
		}
		// Into what it left, for the next who looks.
		s.ok("cp", filepath.Join(vol, "in"), "web/"+m+":/t/added")
		s.expect(m+", what was copied in", s.join(m, "cat /t/added"), "volume\n")
	}
}

func TestStoryCustodyPolicies(t *testing.T) {
	s := newStory(t)
	tests := []struct {
		policy, script string
		held           bool
	}{
		{"always", "exit 0", true}, {"always", "exit 1", true},
		{"failure", "exit 0", false}, {"failure", "exit 1", true}, {"failure", "sleep 1000", true},
		{"never", "exit 0", false}, {"never", "exit 1", false}, {"never", "sleep 1000", false},
	}
	for i, tt := range tests {
		name := tt.policy + string(rune('a'+i))
		s.startMember(name, "dd if=/dev/zero of=/t/big bs=1M count=4 2>/dev/null; echo ready; "+tt.script, "--custody", tt.policy, "--tmpfs", "/t")
		s.logged(name, "ready")
		before := s.inspect(name)
		if tt.script == "sleep 1000" {
			s.ok("kill", "web/"+name)
		}
		v := s.exited(name)
		s.eventually(name+": custody as the policy says", func() bool { v = s.inspect(name); return v.Custody.Held == tt.held })
		if !tt.held {
			s.eventually(name+": the monitor ends", func() bool {
				_, err := os.Stat(filepath.Join("/proc", strconv.Itoa(before.MonitorPID)))
				return err != nil
			})
		}
		_, _, code := s.do("", "join", "web/"+name, "--", "true")
		if _, err := os.Stat(filepath.Join("/proc", strconv.Itoa(before.MonitorPID))); (err == nil) != tt.held || (code == 0) != tt.held {
			t.Errorf("%s after %s: monitor: %v, join: exit code %d, want held %v", tt.policy, tt.script, err, code, tt.held)
		}
		// Its mount namespace, and so the 4 MiB in its tmpfs, is held by nobody.
		if held := s.holds(before.Namespaces["mnt"].Inode); held != tt.held {
			t.Errorf("%s after %s: the mount namespace is held: %v", tt.policy, tt.script, held)
		}
		if _, stderr, code := s.do("", "cp", "web/"+name+":/t/big", "-"); (code == 0) != tt.held {
			t.Errorf("%s after %s: cp: exit code %d, %s", tt.policy, tt.script, code, stderr)
		}
	}
}

// holds reports whether a process of the daemon's, or the daemon, has a descriptor of
// the mount namespace, or is in it. Others are not asked: whoever makes one next can
// get the same inode number.
func (s *story) holds(inode uint64) bool {
	s.t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, dir := range dirs {
		cgroups, _ := os.ReadFile(dir + "/cgroup")
		if filepath.Base(dir) != strconv.Itoa(s.cmd.Process.Pid) && !strings.Contains(string(cgroups), ":"+s.parent+"/") {
			continue
		}
		names, _ := filepath.Glob(dir + "/fd/*")
		for _, name := range append(names, dir+"/ns/mnt") {
			if l, err := os.Readlink(name); err == nil && l == "mnt:["+strconv.FormatUint(inode, 10)+"]" {
				return true
			}
		}
	}
	return false
}

func TestStoryCopy(t *testing.T) {
	s := newStory(t)
	s.startMember("m", `mkdir -p /d/sub /d/empty; echo one >/d/f; echo two >/d/sub/g; ln /d/f /d/hard; ln -s f /d/soft; ln -s /nowhere /d/dangling
		mkfifo /d/fifo; mknod /d/dev c 1 3; chmod 4751 /d/f; chmod 1777 /d/empty; chown 12:34 /d/sub/g; touch -d "2001-02-03 04:05:06" /d/sub/g
		dd if=/dev/zero of=/d/sparse bs=1 count=1 seek=1073741823 2>/dev/null; echo ready; sleep 1000`)
	s.logged("m", "ready")
	dest := t.TempDir()

	// Out: everything as it was.
	s.ok("cp", "web/m:/d", dest+"/new")
	const script = `cd "$1" && find . | sort | while read -r f; do stat -c "%n %F %a %u:%g %t:%T %h" "$f"; done; cat f sub/g; readlink soft; readlink dangling; stat -c "%Y" sub/g; stat -c %s sparse`
	here := func(dir string) string {
		t.Helper()
		out, err := exec.Command("/bin/busybox", "sh", "-c", script, "sh", dir).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	there := s.ok("exec", "web/m", "--", "/bin/sh", "-c", script, "sh", "/d")
	s.expect("the tree copied out", here(dest+"/new"), there)
	var st unix.Stat_t
	if err := unix.Stat(dest+"/new/sparse", &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("a sparse GiB takes %d bytes, %v", st.Blocks*512, err)
	}

	// And in again.
	s.ok("cp", dest+"/new", "web/m:/back")
	s.expect("the tree copied in", s.ok("exec", "web/m", "--", "/bin/sh", "-c", script, "sh", "/back"), there)

	// Where things go, as docker cp has it.
	if err := os.Mkdir(dest+"/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	isFile := func(name string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(dest, name)); err != nil || string(b) != "one\n" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	s.ok("cp", "web/m:/d/f", dest+"/file")
	isFile("file")
	s.ok("cp", "web/m:/d/f", dest+"/dir")
	isFile("dir/f")
	s.ok("cp", "web/m:/d", dest+"/dir")
	isFile("dir/d/f")
	s.ok("cp", "web/m:/d/.", dest+"/dir/d2")
	isFile("dir/d2/f")
	s.write(dest+"/old", "old")
	s.ok("cp", "web/m:/d/f", dest+"/old")
	isFile("old")
	for _, args := range [][]string{
		{"cp", "web/m:/d/f", dest + "/none/"}, {"cp", "web/m:/d", dest + "/file"}, {"cp", "web/m:/d/nothing", dest},
		{"cp", "web/m:/d/f", dest + "/none/f"}, {"cp", dest + "/nothing", "web/m:/"}, {"cp", dest + "/dir", "web/m:/d/f"},
	} {
		if _, stderr, code := s.do("", args...); code != 125 || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: exit code %d, %q", args, code, stderr)
		}
	}

	// Streams, of and for tar(1).
	stream := s.ok("cp", "web/m:/d/sub", "-")
	if h, err := tar.NewReader(strings.NewReader(stream)).Next(); err != nil || h.Name != "sub/" {
		t.Errorf("the stream begins with %+v, %v", h, err)
	}
	list := exec.Command("tar", "-tf", "-")
	list.Stdin = strings.NewReader(stream)
	if out, err := list.CombinedOutput(); err != nil || string(out) != "sub/\nsub/g\n" {
		t.Errorf("tar -t: %s, %v", out, err)
	}
	made, err := exec.Command("tar", "-C", dest+"/dir/d", "-cf", "-", "f", "sub").Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := s.do(string(made), "cp", "-", "web/m:/tmp"); code != 0 {
		t.Errorf("cp of a stream: %s", stderr)
	}
	s.expect("the stream unpacked", s.ok(append([]string{"exec", "web/m"}, sh("cat /tmp/f /tmp/sub/g")...)...), "one\ntwo\n")
}

func TestStoryCopyStreams(t *testing.T) {
	s := newStory(t)
	s.startMember("m", `dd if=/dev/zero of=/big bs=1M count=200 2>/dev/null; echo ready; sleep 1000`)
	s.logged("m", "ready")
	cmd := s.command("cp", "web/m:/big", "-")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	// Most of it, and then what its memory has been at most: the maximum that the
	// kernel tells of a process that has ended begins with that of this one, which
	// forked it (getrusage(2)).
	n, err := io.CopyN(io.Discard, out, 190<<20)
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var peak int // KiB
	if _, rest, ok := strings.Cut(string(status), "VmHWM:"); ok {
		fmt.Sscan(rest, &peak)
	}
	rest, err := io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if err != nil || n+rest < 200<<20 || peak == 0 || peak > 64<<10 {
		t.Errorf("a stream of 200 MiB: %d bytes, %v; %d KiB resident", n+rest, err, peak)
	}
}

func TestStoryCopyLinks(t *testing.T) {
	s := newStory(t)
	s.startMember("m", `echo mine >/secret; ln -s / /root/up; ln -s ../../../../../../etc/passwd /root/pw; mkdir -p /evil; ln -s /tmp /evil/out; sleep 1000`)
	s.eventually("it has begun", func() bool {
		_, _, code := s.do("", "exec", "web/m", "--", "test", "-L", "/evil/out")
		return code == 0
	})
	dest := t.TempDir()
	s.ok("cp", "web/m:/root/up/secret", dest+"/a")
	if b, _ := os.ReadFile(dest + "/a"); string(b) != "mine\n" {
		t.Errorf("through a link to /: %q", b)
	}
	s.ok("cp", "web/m:/root/up/etc/passwd", dest+"/b")
	if b, _ := os.ReadFile(dest + "/b"); !bytes.Contains(b, []byte("App:")) {
		t.Errorf("the member's passwd: %q", b)
	}
	name := "sandboxd-e2e-link-" + strings.ReplaceAll(time.Now().Format("150405.000000"), ".", "")
	s.write(filepath.Join(dest, name), "x")
	s.ok("cp", filepath.Join(dest, name), "web/m:/evil/out/"+name)
	if _, err := os.Lstat("/tmp/" + name); err == nil {
		t.Errorf("/tmp/%s was made on the host", name)
	}
	s.expect("in the member", s.ok("exec", "web/m", "--", "cat", "/tmp/"+name), "x")
}
