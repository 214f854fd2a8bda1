//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// inodes returns the inodes of a process's namespaces, as a script in it sees them.
const inodes = `for k in net ipc uts pid mnt user cgroup time; do [ -e /proc/self/ns/$k ] && readlink /proc/self/ns/$k; done`

// parseInodes reads the output of that script.
func parseInodes(out string) map[string]string {
	m := map[string]string{}
	for _, f := range regexp.MustCompile(`(\w+):\[(\d+)\]`).FindAllStringSubmatch(out, -1) {
		m[f[1]] = f[2]
	}
	return m
}

func TestStoryNamespaceSources(t *testing.T) {
	s := newStory(t)
	host := map[string]string{}
	kinds := []string{"net", "ipc", "uts", "pid", "mnt", "user", "cgroup", "time"}
	for _, k := range kinds {
		l, err := os.Readlink("/proc/self/ns/" + k)
		if err != nil {
			t.Fatal(err)
		}
		host[k] = parseInodes(l)[k]
	}
	s.startMember("one", inodes+`; echo; sleep 1000`)
	s.logged("one", "\n\n")
	one := parseInodes(s.ok("logs", "web/one"))
	v := s.inspect("one")
	for k, n := range v.Namespaces {
		if strconv.FormatUint(n.Inode, 10) != one[k] {
			t.Errorf("inspect says that %s is %d, the member is in %s", k, n.Inode, one[k])
		}
		if l, err := os.Readlink(n.Path); err != nil || parseInodes(l)[k] != one[k] {
			t.Errorf("path %s of %s leads to %s, %v", n.Path, k, l, err)
		}
	}
	const fresh = "fresh"
	tests := []struct {
		ns   string
		want map[string]map[string]string // of the kinds that are not as in a default member
	}{
		{"", nil},
		{"net=host,ipc=host,uts=host", map[string]map[string]string{"net": host, "ipc": host, "uts": host}},
		{"net=private,ipc=private,uts=private,time=private", map[string]map[string]string{"net": nil, "ipc": nil, "uts": nil, "time": nil}},
		{"pid=member:one", map[string]map[string]string{"pid": one}},
		{"pid=host,cgroup=host", map[string]map[string]string{"pid": host, "cgroup": host}},
		{"net=member:one,cgroup=member:one,ipc=private", map[string]map[string]string{"net": one, "cgroup": one, "ipc": nil}},
	}
	for _, tt := range tests {
		args := []string{}
		if tt.ns != "" {
			args = []string{"--ns", tt.ns}
		}
		got := parseInodes(s.member(inodes, args...))
		for _, k := range kinds {
			from, other := tt.want[k]
			switch {
			case !other && (k == "pid" || k == "mnt" || k == "cgroup"), other && from == nil:
				if got[k] == host[k] || got[k] == one[k] || got[k] == "" {
					t.Errorf("--ns %q: %s is not %s: %s", tt.ns, k, fresh, got[k])
				}
			case !other && got[k] != one[k], other && got[k] != from[k]:
				t.Errorf("--ns %q: %s is %s", tt.ns, k, got[k])
			}
		}
	}
	// Another's mounts: no root of its own.
	got := parseInodes(s.ok(append([]string{"run", "web", "--rm", "--ns", "mnt=member:one,pid=member:one"}, sh(inodes)...)...))
	if got["mnt"] != one["mnt"] || got["pid"] != one["pid"] || got["cgroup"] == one["cgroup"] {
		t.Errorf("mnt=member:one: %v, one's are %v", got, one)
	}
	got = parseInodes(s.ok(append([]string{"run", "web", "--rm", "--ns", "all=member:one"}, sh(inodes)...)...))
	for _, k := range kinds {
		if got[k] != one[k] {
			t.Errorf("all=member:one: %s is %s, want %s", k, got[k], one[k])
		}
	}
}

func TestStoryJoinSubsets(t *testing.T) {
	s := newStory(t)
	s.startMember("living", "echo living >/tmp/who; sleep 1000", "--tmpfs", "/tmp", "--ns", "net=private,uts=private")
	s.startMember("dead", "echo dead >/tmp/who; exit 3", "--tmpfs", "/tmp")
	s.exited("dead")
	s.eventually("living has begun", func() bool {
		_, _, code := s.do("", "exec", "web/living", "--", "test", "-s", "/tmp/who")
		return code == 0
	})
	live := s.inspect("living")

	// net of the sandbox, pid of one, mnt of another that is dead.
	out := s.ok(append([]string{"join", "--ns", "net=sandbox,pid=member:living,mnt=member:dead", "web"}, sh(inodes+`; cat /tmp/who; ps | grep -c "sleep 1000"; [ -d /proc/self/fd ] && echo self`)...)...)
	got := parseInodes(out)
	web := parseInodes(s.ok(append([]string{"join", "web"}, sh(inodes)...)...))
	if got["net"] != web["net"] || got["pid"] != strconv.FormatUint(live.Namespaces["pid"].Inode, 10) {
		t.Errorf("joined %v; net of the sandbox is %s, pid of the living %d", got, web["net"], live.Namespaces["pid"].Inode)
	}
	s.contains("what it sees", out, "dead\n", "\nself\n")
	if !regexp.MustCompile(`(?m)^[1-9]$`).MatchString(out) {
		t.Errorf("it does not see the processes of the living: %s", out)
	}
	s.contains("mnt of the living", s.ok(append([]string{"join", "--ns", "all=member:living", "web"}, sh("cat /tmp/who")...)...), "living")
	// What only the joiner sees is not there for others.
	s.expect("the dead member's /proc mounts", strconv.Itoa(strings.Count(s.join("dead", `cat /proc/mounts`), "proc /proc proc")),
		strconv.Itoa(strings.Count(s.join("dead", `cat /proc/mounts`), "proc /proc proc")))
	// A dead pid namespace that is asked for by name is an error that says so.
	_, stderr, code := s.do("", append([]string{"join", "--ns", "pid=member:dead", "web"}, sh("true")...)...)
	if code != 125 || !strings.Contains(stderr, "dead") || !strings.Contains(stderr, "pid") {
		t.Errorf("join of a dead pid namespace: exit code %d, %s", code, stderr)
	}
	if _, stderr, code := s.do("", append([]string{"run", "web", "--rootfs", s.rootfs, "--ns", "pid=member:dead"}, sh("true")...)...); code != 125 || !strings.Contains(stderr, "dead") {
		t.Errorf("run in a dead pid namespace: exit code %d, %s", code, stderr)
	}
	// The dead one's mounts for a new member, with all that a /proc has for joiners.
	s.expect("a member in the dead one's mounts", s.ok(append([]string{"run", "web", "--rm", "--ns", "mnt=member:dead"}, sh("cat /tmp/who")...)...), "dead\n")
	s.contains("/proc of a joiner", s.join("dead", "cat /proc/meminfo /proc/mounts; free; mount; cat /proc/keys; echo k >/proc/sys/kernel/domainname || echo ro"), "MemTotal", "tmpfs /tmp", "Mem:", "ro\n")
}

func TestStoryJoinWithHostTools(t *testing.T) {
	s := newStory(t)
	s.startMember("server", "nc -l -p 7777 >/dev/null & sleep 1000")
	// The host's own program sees the sandbox's net and the host's files.
	s.eventually("the server listens", func() bool {
		return strings.Contains(s.ok("join", "web", "--", "cat", "/proc/net/tcp", "/proc/net/tcp6"), ":1E61 ")
	})
	mark := filepath.Join(t.TempDir(), "host")
	s.write(mark, "host file\n")
	s.expect("a file of the host", s.ok("join", "web", "--", "cat", mark), "host file\n")
	s.expect("hostname", s.ok("join", "web", "--", "uname", "-n"), "web\n")
	out := s.ok("join", "--rootfs", s.rootfs, "web/server", "--", "/bin/sh", "-c", "grep -c 1000 /proc/1/cmdline; : </dev/null; ls /sys/class/net; cat /proc/1/root/etc/hostname 2>/dev/null; hostname")
	s.expect("a toolbox in the member's namespaces", out, "1\nlo\nweb\nweb\n")
	if _, err := os.Stat(filepath.Join(s.rootfs, "proc/1")); err == nil {
		t.Error("the toolbox's /proc is mounted for the host too")
	}
}

func TestStorySharedPIDs(t *testing.T) {
	s := newStory(t, "--share", "net,ipc,uts,pid")
	s.startMember("a", "exec sleep 1111")
	s.startMember("b", "sh -c 'sleep 2222 & sleep 2222' & sleep 2222")
	s.startMember("c", "sleep 3333")
	seen := func() string { return s.ok(append([]string{"exec", "web/c"}, sh("ps")...)...) }
	s.eventually("they see each other", func() bool {
		o := seen()
		return strings.Contains(o, "sleep 1111") && strings.Count(o, "sleep 2222") >= 3 && strings.Contains(o, "sandboxd-pause")
	})
	s.expect("pid 1", s.ok("exec", "web/c", "--", "cat", "/proc/1/comm"), s.ok("join", "web", "--", "cat", "/proc/1/comm"))
	s.ok("rm", "-f", "web/b")
	if o := seen(); strings.Contains(o, "2222") || !strings.Contains(o, "1111") {
		t.Errorf("after b was removed: %s", o)
	}
	// What a member leaves to pause is reaped.
	s.member("(sleep 0.05 & ) ; exit 0")
	s.eventually("no zombies", func() bool { return !strings.Contains(s.ok("exec", "web/c", "--", "ps", "-o", "stat,comm"), "Z") })
	// The death of a member's init leaves the namespace, and it can be joined.
	s.ok("kill", "web/a")
	s.exited("a")
	s.contains("processes seen from the dead member's root", s.join("a", "ps"), "sleep 3333")
}

func TestStoryUserNamespace(t *testing.T) {
	s := newStory(t, "--share", "net,ipc,uts,user,cgroup,time")
	vol := t.TempDir()
	s.write(filepath.Join(vol, "f"), "x")
	if err := os.Chown(filepath.Join(vol, "f"), 1000, 1234); err != nil {
		t.Fatal(err)
	}
	s.startMember("m", `stat -c "%u:%g" /v/f /bin/busybox; id -u; touch /v/made /made; chown 5:6 /made; cat /proc/self/uid_map; sleep 1000`, "-v", vol+":/v")
	s.logged("m", "65536")
	out := strings.Fields(s.ok("logs", "web/m"))
	if len(out) != 6 || out[0] != "1000:1234" || out[1] != "0:0" || out[2] != "0" || out[3] != "0" || out[5] != "65536" {
		t.Fatalf("in the member: %q", out)
	}
	first, err := strconv.Atoi(out[4])
	if err != nil || first < 65536 {
		t.Fatalf("ids begin at %q", out[4])
	}
	owner := func(path string) int {
		t.Helper()
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return int(fi.Sys().(*syscall.Stat_t).Uid)
	}
	// On the host nothing has an id of the range: neither files nor the root.
	if o := []int{owner(vol + "/f"), owner(vol + "/made"), owner(s.rootfs + "/bin/busybox")}; o[0] != 1000 || o[1] != 0 || o[2] != 0 {
		t.Errorf("owners on the host: %v", o)
	}
	if o := owner("/proc/" + strconv.Itoa(s.inspect("m").PID)); o != first {
		t.Errorf("the member's process has uid %d on the host, want %d", o, first)
	}
	// Into it and out of it, alive and dead.
	src := filepath.Join(t.TempDir(), "d")
	s.write(filepath.Join(src, "sub/f"), "copied")
	for _, alive := range []bool{true, false} {
		if !alive {
			s.ok("kill", "web/m")
			s.exited("m")
		}
		dest := map[bool]string{true: "/living", false: "/dead"}[alive]
		s.ok("cp", src, "web/m:"+dest)
		s.expect("copied in", s.join("m", `cat `+dest+`/sub/f; stat -c " %u" `+dest+`/sub/f`), "copied 0\n")
		out := filepath.Join(t.TempDir(), "out")
		s.ok("cp", "web/m:/made", out)
		if o := owner(out); o != 5 {
			t.Errorf("copied out with owner %d, want 5", o)
		}
	}
	s.ok("create", "other", "--share", "user")
	defer s.ok("rm", "-f", "other")
	other := s.ok(append([]string{"run", "other", "--rm", "--rootfs", s.rootfs}, sh("cat /proc/self/uid_map")...)...)
	if f := strings.Fields(other); len(f) != 3 || f[1] == out[4] {
		t.Errorf("another sandbox has the ids %q", f)
	}
}

func TestStorySandboxFlags(t *testing.T) {
	s := newStory(t, "--hostname", "host1", "--sysctl", "net.ipv4.ip_unprivileged_port_start=7", "--sysctl", "kernel.shmmni=77",
		"--shm-size", "1m", "--label", "a=b", "--annotation", "note=x y")
	s.expect("in a member", s.member(`hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni; grep -o "/dev/shm.*size=1024k" /proc/mounts | wc -l; ip addr show lo | grep -c "inet 127.0.0.1"`),
		"host1\n7\n77\n1\n1\n")
	s.member("echo shared >/dev/shm/f")
	s.expect("/dev/shm of another member", s.member("cat /dev/shm/f"), "shared\n")
	s.contains("inspect", s.ok("inspect", "web"), `"a": "b"`, `"note": "x y"`, `"hostname": "host1"`)
	var before string
	if b, err := os.ReadFile("/proc/sys/kernel/shmmni"); err == nil {
		before = strings.TrimSpace(string(b))
	}
	if before == "77" {
		t.Error("the sysctl is the host's")
	}
	s.ok("create", "hosted", "--net", "host")
	defer s.ok("rm", "-f", "hosted")
	l, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	s.expect("net of a sandbox with the host's", s.ok(append([]string{"run", "hosted", "--rm", "--rootfs", s.rootfs}, sh("readlink /proc/self/ns/net")...)...), l+"\n")
}
