//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestStoryDefaultMember(t *testing.T) {
	s := newStory(t)
	out := s.member(`
		for f in /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /sys/fs/cgroup; do grep -q " $f " /proc/mounts || echo no $f; done
		for d in null zero full random urandom tty; do [ -c /dev/$d ] || echo no $d; done
		for l in fd ptmx stdout; do readlink /dev/$l; done
		cat /proc/keys /proc/timer_list; ls -A /proc/acpi /sys/firmware | grep -v : | grep .; ls /proc/kcore >/dev/null
		echo x >/proc/sys/kernel/domainname || echo proc/sys is read-only
		echo x >/sys/kernel/profiling || echo sys is read-only
		grep -E "CapEff|CapBnd|CapInh|CapAmb|^Seccomp:" /proc/self/status
		env | sort; hostname; pwd; id; echo pid $$
		ls /proc/self/fd | wc -l
		mknod /tmp/mem c 1 1 && cat /tmp/mem || echo no memory
		touch /written`, "-e", "X=1")
	s.expect("a default member", regexp.MustCompile(`\t+`).ReplaceAllString(out, " "), `/proc/self/fd
pts/ptmx
/proc/self/fd/1
proc/sys is read-only
sys is read-only
CapInh: 0000000000000000
CapEff: 00000000a80425fb
CapBnd: 00000000a80425fb
CapAmb: 0000000000000000
Seccomp: 2
HOME=/root
HOSTNAME=web
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
PWD=/
SHLVL=1
X=1
web
/
uid=0(root) gid=0(root)
pid 1
4
no memory
`)
	if _, err := os.Stat(filepath.Join(s.rootfs, "written")); err == nil {
		t.Error("the root directory was written to")
	}
}

func TestStoryRunFlags(t *testing.T) {
	s := newStory(t)
	vol := t.TempDir()
	s.write(filepath.Join(vol, "in"), "volume\n")
	tests := []struct {
		name, script, want string
		flags              []string
	}{
		{"environment", `echo "$A|$B|$HOME"`, "1|x=y|/h\n", []string{"-e", "A=1", "-e", "B=x=y", "-e", "HOME=/h"}},
		{"volume", `cat /v/in; echo new >/v/out`, "volume\n", []string{"-v", vol + ":/v"}},
		{"read-only volume", `cat /v/w/in; touch /v/w/f 2>/dev/null || echo no`, "volume\nno\n", []string{"-v", vol + ":/v/w:ro"}},
		{"a file as a volume", `cat /etc/one`, "volume\n", []string{"-v", vol + "/in:/etc/one"}},
		{"tmpfs", `grep -o " /t tmpfs.*size=1024k" /proc/mounts | wc -l; dd if=/dev/zero of=/t/f bs=1M count=2 2>&1 | grep -o "No space.*"; stat -c %a /t`, "1\nNo space left on device\n1777\n", []string{"--tmpfs", "/t:size=1m"}},
		{"working directory", `pwd`, "/var/lib\n", []string{"-w", "/var/lib"}},
		{"working directory that is new", `pwd`, "/new/dir\n", []string{"-w", "/new/dir"}},
		{"user by name", `id; echo $HOME; grep CapEff /proc/self/status`, "uid=1000(app) gid=1234(app) groups=10(wheel)\n/home/app\nCapEff:\t0000000000000000\n", []string{"-u", "app"}},
		{"user and group by name", `id -u; id -g`, "1000\n10\n", []string{"-u", "app:wheel"}},
		{"user by number", `id -u; id -g`, "77\n88\n", []string{"-u", "77:88"}},
		{"read-only", `touch /x 2>/dev/null || echo no; touch /tmp/x && echo yes`, "no\nyes\n", []string{"--read-only", "--tmpfs", "/tmp"}},
		{"capabilities", `grep CapEff /proc/self/status; mount -t tmpfs x /tmp && echo mounted`, "CapEff:\t00000000a82405fb\nmounted\n", []string{"--cap-add", "sys_admin", "--cap-drop", "CAP_NET_RAW"}},
		{"no capabilities", `grep CapBnd /proc/self/status`, "CapBnd:\t0000000000000000\n", []string{"--cap-drop", "ALL"}},
		{"an init that sees no signal", `kill -TERM 1; echo alive`, "alive\n", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sub := &story{s.daemon, t, s.rootfs}
			sub.expect("output", sub.member(tt.script, tt.flags...), tt.want)
		})
	}
	if b, err := os.ReadFile(filepath.Join(vol, "out")); err != nil || string(b) != "new\n" {
		t.Errorf("written to the volume: %q, %v", b, err)
	}
}

func TestStoryPrivileged(t *testing.T) {
	s := newStory(t)
	out := s.member(`[ -c /dev/kmsg ] && echo kmsg; [ -c /dev/loop-control ] && echo loop
		grep -c " /proc/[a-z]* " /proc/mounts; grep -o " /sys sysfs rw" /proc/mounts; grep " /sys/fs/cgroup" /proc/mounts | grep -vc " rw,"
		grep "^Seccomp:" /proc/self/status; echo 1 >/proc/sys/net/ipv4/ip_forward && echo sysctl; [ -c /dev/pts/ptmx ] && echo pts`, "--privileged")
	want := "kmsg\n"
	if _, err := os.Stat("/dev/loop-control"); err == nil {
		want += "loop\n"
	}
	s.expect("a privileged member", out, want+"0\n /sys sysfs rw\n0\nSeccomp:\t0\nsysctl\npts\n")
}

// cgroupFile reads one of the files that stand for the same limit in v1 and v2.
func (s *story) cgroupFile(cgroup string, names ...string) string {
	s.t.Helper()
	dirs, err := hierarchies()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, dir := range dirs {
		for _, name := range names {
			if b, err := os.ReadFile(filepath.Join(dir, cgroup, name)); err == nil {
				return strings.TrimSpace(string(b))
			}
		}
	}
	s.t.Errorf("%s has no %v in any hierarchy", cgroup, names)
	return ""
}

func TestStoryLimits(t *testing.T) {
	s := newStory(t)
	vol := t.TempDir()
	s.startMember("small", "sleep 1000", "--memory", "64m", "--cpus", "0.5", "--pids-limit", "20", "-e", "A=b", "-v", vol+":/data:ro")
	cg := s.inspect("small").Cgroup
	s.expect("memory limit", s.cgroupFile(cg, "memory.limit_in_bytes", "memory.max"), strconv.Itoa(64<<20))
	s.expect("cpu quota", strings.Fields(s.cgroupFile(cg, "cpu.cfs_quota_us", "cpu.max"))[0], "50000")
	s.expect("pids limit", s.cgroupFile(cg, "pids.max"), "20")
	// And they limit: the script is init, exec is in the same cgroup.
	out, _, code := s.do("", append([]string{"exec", "web/small"}, sh(`i=0; while [ $i -lt 30 ]; do sleep 5 & i=$((i+1)); done; echo all`)...)...)
	if code == 0 || strings.Contains(out, "all") {
		t.Errorf("30 processes with a limit of 20: %q, exit code %d", out, code)
	}
	// They are shown, with what else it was made with, by the daemon and without.
	shown := func(who string) {
		t.Helper()
		var box struct{ Members []made }
		for _, ref := range []string{"web/small", "web"} {
			var m made
			to := any(&m)
			if ref == "web" {
				to = &box
			}
			if err := json.Unmarshal([]byte(s.ok("inspect", ref)), to); err != nil {
				t.Fatal(err)
			}
			if ref == "web" && len(box.Members) == 1 {
				m = box.Members[0]
			}
			mounted := slices.ContainsFunc(m.Mounts, func(m mounted) bool {
				return m.Destination == "/data" && m.Source == vol && m.Type == "bind" && slices.Contains(m.Options, "rro")
			})
			if m.Limits.Memory != 64<<20 || m.Limits.NanoCPUs != 500_000_000 || m.Limits.Pids != 20 || !slices.Contains(m.Env, "A=b") || !mounted {
				t.Errorf("%s shows of %s: %+v", who, ref, m)
			}
		}
		for _, args := range []string{"ls -o json", "ps -o json", "ps web -o json"} {
			if out := s.ok(strings.Fields(args)...); strings.Contains(out, "A=b") {
				t.Errorf("%s shows the environment in %s: %s", who, args, out)
			}
		}
	}
	shown("the daemon")
	s.kill(t)
	shown("the state directory")
	s.start(t)
}

// made is what inspect shows of what a member was made with.
type made struct {
	Limits struct{ Memory, NanoCPUs, Pids int64 }
	Mounts []mounted
	Env    []string
}

type mounted struct {
	Destination, Type, Source string
	Options                   []string
}

func TestStoryExitCodes(t *testing.T) {
	s := newStory(t)
	s.startMember("up", "sleep 1000")
	s.startMember("gone", "exit 7")
	s.exited("gone")
	tests := []struct {
		name string
		args []string
		want int
	}{
		{"run 0", append([]string{"run", "web", "--rm", "--rootfs", s.rootfs}, sh("exit 0")...), 0},
		{"run 7", append([]string{"run", "web", "--rm", "--rootfs", s.rootfs}, sh("exit 7")...), 7},
		{"run 255", append([]string{"run", "web", "--rm", "--rootfs", s.rootfs}, sh("exit 255")...), 255},
		{"run killed", append([]string{"run", "web", "--rm", "--ns", "pid=host", "--rootfs", s.rootfs}, sh("kill -USR2 $$")...), 128 + int(syscall.SIGUSR2)},
		{"run what is missing", []string{"run", "web", "--rootfs", s.rootfs, "--", "nowhere"}, 127},
		{"run what is no program", []string{"run", "web", "--rootfs", s.rootfs, "--", "/etc/passwd"}, 126},
		{"run without a root", []string{"run", "web", "--rootfs", "/nowhere", "--", "true"}, 125},
		{"run elsewhere", []string{"run", "nowhere", "--rootfs", s.rootfs, "--", "true"}, 125},
		{"exec 0", []string{"exec", "web/up", "--", "true"}, 0},
		{"exec 9", append([]string{"exec", "web/up"}, sh("exit 9")...), 9},
		{"exec killed", append([]string{"exec", "web/up"}, sh("kill -9 $$")...), 137},
		{"exec what is missing", []string{"exec", "web/up", "--", "nowhere"}, 127},
		{"exec what is no program", []string{"exec", "web/up", "--", "/etc/passwd"}, 126},
		{"exec in the dead", []string{"exec", "web/gone", "--", "true"}, 125},
		{"join 3", append([]string{"join", "web/gone"}, sh("exit 3")...), 3},
		{"join killed", append([]string{"join", "web/up"}, sh("kill -TERM $$")...), 143},
		{"join what is missing", []string{"join", "web/gone", "--", "nowhere"}, 127},
		{"join what is no program", []string{"join", "web/gone", "--", "/etc/passwd"}, 126},
		{"join nobody", []string{"join", "web/nobody", "--", "true"}, 125},
		{"wait", []string{"wait", "web/gone"}, 7},
		{"wait for nobody", []string{"wait", "web/nobody"}, 125},
	}
	for _, tt := range tests {
		if _, stderr, code := s.do("", tt.args...); code != tt.want {
			t.Errorf("%s: exit code %d, want %d: %s", tt.name, code, tt.want, stderr)
		}
	}
	s.expect("the members after those that failed", s.names(), "gone up")
}

// names are those of web's members, sorted.
func (s *story) names() string {
	var names []string
	for _, line := range strings.Split(s.ok("ps", "web"), "\n")[1:] {
		if f := strings.Fields(line); len(f) > 2 {
			names = append(names, f[2])
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func TestStoryRunRemovesItself(t *testing.T) {
	s := newStory(t)
	for i := range 30 { // the exit must not be missed
		if _, stderr, code := s.do("", append([]string{"run", "web", "--rm", "--rootfs", s.rootfs}, sh(fmt.Sprintf("exit %d", i))...)...); code != i {
			t.Fatalf("exit code %d, want %d: %s", code, i, stderr)
		}
	}
	id := strings.TrimSpace(s.ok(append([]string{"run", "web", "--rm", "-d", "--rootfs", s.rootfs}, sh("exit 5")...)...))
	s.eventually("it is gone", func() bool { return s.names() == "" })
	sandbox := s.sandboxID()
	if _, stderr, code := s.do("", "wait", sandbox+"/"+id); code != 5 {
		t.Errorf("a wait that comes late: exit code %d: %s", code, stderr)
	}
}

func (s *story) sandboxID() string {
	s.t.Helper()
	return regexp.MustCompile(`"id": "([0-9a-f]+)"`).FindStringSubmatch(s.ok("inspect", "web"))[1]
}

func TestStoryAddAndStart(t *testing.T) {
	s := newStory(t)
	mark := filepath.Join(t.TempDir(), "ran")
	s.write(mark, "")
	s.ok(append([]string{"add", "web", "--rootfs", s.rootfs, "--name", "job", "-v", mark + ":/ran"}, sh("echo ran >/ran; echo out")...)...)
	v := s.inspect("job")
	if b, _ := os.ReadFile(mark); v.State != "Created" || v.PID == 0 || len(b) > 0 || v.Exit != nil {
		t.Errorf("an added member: %+v; it has run: %q", v, b)
	}
	// Everything but its command is there.
	s.expect("its /dev/null", s.join("job", "test -c /dev/null && echo yes"), "yes\n")
	s.ok("start", "web/job")
	if _, _, code := s.do("", "wait", "web/job"); code != 0 {
		t.Errorf("wait: exit code %d", code)
	}
	s.expect("its log", s.ok("logs", "web/job"), "out\n")
	if _, stderr, code := s.do("", "start", "web/job"); code != 125 {
		t.Errorf("a second start: exit code %d, %s", code, stderr)
	}
	// One that is never started can be removed by force only.
	s.ok(append([]string{"add", "web", "--rootfs", s.rootfs, "--name", "never"}, sh("true")...)...)
	if _, _, code := s.do("", "rm", "web/never"); code != 125 {
		t.Errorf("rm of a created member: exit code %d", code)
	}
	s.ok("rm", "-f", "web/never")
}

func TestStoryStopAndKill(t *testing.T) {
	s := newStory(t)
	const catch = `trap "echo hup" HUP; trap "echo rt" 36; trap "echo term" TERM; trap "exit 6" USR1; echo up; while :; do sleep 0.02; done`
	s.startMember("a", catch)
	s.startMember("b", catch, "--stop-signal", "SIGUSR1")
	s.logged("a", "up")
	s.logged("b", "up")
	for _, sig := range []string{"HUP", "sighup", "1"} {
		before := strings.Count(s.ok("logs", "web/a"), "hup")
		s.ok("kill", "web/a", sig)
		s.eventually("kill "+sig, func() bool { return strings.Count(s.ok("logs", "web/a"), "hup") == before+1 })
	}
	s.ok("kill", "web/a", "RTMIN+2")
	s.logged("a", "rt")
	s.ok("stop", "web/b")
	if e := s.inspect("b").Exit; e == nil || e.Code != 6 || e.Signal != 0 || !e.Known {
		t.Errorf("after its stop signal: %+v", e)
	}
	s.ok("stop", "--time", "100ms", "web/a") // it does not end at TERM
	if e := s.inspect("a").Exit; e == nil || e.Code != 137 || e.Signal != 9 || e.OOMKilled {
		t.Errorf("after the time was up: %+v", e)
	}
	s.contains("the log", s.ok("logs", "web/a"), "term")
	s.startMember("c", "sleep 1000")
	s.ok("kill", "web/c")
	if _, _, code := s.do("", "wait", "web/c"); code != 137 {
		t.Errorf("killed: exit code %d", code)
	}
	s.startMember("d", "sleep 1000")
	if _, stderr, code := s.do("", "rm", "web/d"); code != 125 || !strings.Contains(stderr, "web/d") {
		t.Errorf("rm of one that runs: exit code %d, %s", code, stderr)
	}
	// A typo for web/d: nothing is done.
	for _, verb := range []string{"stop", "rm"} {
		_, stderr, code := s.do("", verb, "web", "d")
		if v := s.inspect("d"); code != 125 || !strings.Contains(stderr, `nothing was done: no sandbox "d"`) || v.State != "Running" {
			t.Errorf("%s web d: exit code %d, %s, d is %s", verb, code, stderr, v.State)
		}
	}
	s.ok("rm", "-f", "web/d", "web/c", "web/nothing")
	s.ok("rm", "web/a", "web/b")
	s.expect("what is left", s.names(), "")
}

func TestStoryOOM(t *testing.T) {
	s := newStory(t)
	const eat = `x=x; while :; do x=$x$x; done`
	s.startMember("init", eat, "--memory", "8m", "--tmpfs", "/t")
	s.startMember("child", `echo before >/t/f; sh -c '`+eat+`'; echo $?; exit 3`, "--memory", "8m", "--tmpfs", "/t")
	if e := s.exited("init").Exit; !e.Known || !e.OOMKilled || e.Signal != 9 {
		t.Errorf("init killed for memory: %+v", e)
	}
	if e := s.exited("child").Exit; !e.Known || !e.OOMKilled || e.Code != 3 {
		t.Errorf("a child killed for memory: %+v", e)
	}
	s.expect("what it left", s.join("child", "cat /t/f"), "before\n")
}

// A read-only root that lacks what is mounted in it: nothing is made in the directory.
func TestStoryReadOnlyRootWithoutMountPoints(t *testing.T) {
	for _, share := range []string{"net,ipc,uts", "net,ipc,uts,user"} {
		t.Run(share, func(t *testing.T) {
			s := newStory(t, "--share", share)
			for _, dir := range []string{"proc", "dev", "sys", "tmp"} {
				if err := os.RemoveAll(filepath.Join(s.rootfs, dir)); err != nil {
					t.Fatal(err)
				}
			}
			before, err := os.ReadDir(s.rootfs)
			if err != nil {
				t.Fatal(err)
			}
			data := t.TempDir()
			s.write(filepath.Join(data, "f"), "content\n")
			script := `cat /srv/data/f; touch /scratch/x && echo yes; [ -d /sys/class ] && [ -e /proc/1/status ] && echo mounted
				(touch /x || touch /srv/x) 2>/dev/null || echo no; stat -c "%u %a" / /srv; exec sleep 1000`
			s.ok("run", "web", "--rootfs", s.rootfs, "--name", "m", "-d", "--read-only", "-v", data+":/srv/data", "--tmpfs", "/scratch", "--", "sh", "-c", script)
			want := "content\nyes\nmounted\nno\n0 755\n0 755\n"
			s.eventually("it has written "+want, func() bool { return s.ok("logs", "web/m") == want })
			s.expect("exec", s.ok("exec", "web/m", "--", "cat", "/srv/data/f"), "content\n")
			s.expect("ls", s.ok("exec", "web/m", "--", "ls", "/scratch"), "x\n")
			after, err := os.ReadDir(s.rootfs)
			if err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("in the root there is %v, %v, and before there was %v", after, err, before)
			}
			s.ok("rm", "-f", "web/m")
		})
	}
}
