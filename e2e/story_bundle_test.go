//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// object is a JSON object.
type object = map[string]any

// specBundle makes the bundle that `runc spec` makes, with the story's root, and
// lets change change its configuration.
func (s *story) specBundle(change func(c object)) string {
	s.t.Helper()
	dir := s.t.TempDir()
	b, err := os.ReadFile("../member/testdata/spec-runc.golden.json")
	if path, lerr := exec.LookPath("runc"); lerr == nil {
		if out, rerr := exec.Command(path, "spec", "--bundle", dir).CombinedOutput(); rerr != nil {
			s.t.Fatalf("runc spec: %v: %s", rerr, out)
		}
		b, err = os.ReadFile(filepath.Join(dir, "config.json"))
	}
	if err != nil {
		s.t.Fatal(err)
	}
	var c object
	if err := json.Unmarshal(b, &c); err != nil {
		s.t.Fatal(err)
	}
	c["process"].(object)["terminal"] = false
	change(c)
	if b, err = json.Marshal(c); err != nil {
		s.t.Fatal(err)
	}
	s.write(filepath.Join(dir, "config.json"), string(b))
	if out, err := exec.Command("cp", "-a", s.rootfs, filepath.Join(dir, "rootfs")).CombinedOutput(); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	return dir
}

func TestStoryBundle(t *testing.T) {
	s := newStory(t)
	vol := t.TempDir()
	s.write(filepath.Join(vol, "f"), "volume\n")
	proc := func(c object) object { return c["process"].(object) }
	linux := func(c object) object { return c["linux"].(object) }
	tests := []struct {
		name, script, want string
		change             func(c object)
	}{
		{"as it is", `echo ok; touch /x 2>/dev/null || echo read-only`, "ok\nread-only\n", func(object) {}},
		{"process", `pwd; id; echo $A; umask; ulimit -n; grep -E "CapEff|CapAmb|NoNewPrivs" /proc/self/status; cat /proc/self/oom_score_adj`,
			"/tmp\nuid=7 gid=8 groups=9,10(wheel)\n1\n0027\n64\nCapEff:\t0000000000000400\nCapAmb:\t0000000000000400\nNoNewPrivs:\t1\n500\n", func(c object) {
				p, caps := proc(c), []string{"CAP_NET_BIND_SERVICE"}
				p["cwd"], p["env"], p["oomScoreAdj"] = "/tmp", []string{"PATH=/bin", "A=1"}, 500
				p["user"] = object{"uid": 7, "gid": 8, "umask": 0o27, "additionalGids": []int{9, 10}}
				p["rlimits"] = []object{{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}}
				p["capabilities"] = object{"bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps}
			}},
		{"mounts", `cat /v/f; touch /v/x 2>/dev/null || echo ro; grep -o " /t tmpfs.*noexec.*size=1024k" /proc/mounts | wc -l; grep " /p " /proc/self/mountinfo | grep -c master; awk '$5=="/" && /shared:/ {print 1}' /proc/self/mountinfo`,
			"volume\nro\n1\n0\n1\n", func(c object) {
				c["mounts"] = append(c["mounts"].([]any),
					object{"destination": "/v", "type": "bind", "source": vol, "options": []string{"rbind", "ro"}},
					object{"destination": "/p", "type": "bind", "source": vol, "options": []string{"rbind", "rprivate"}},
					object{"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": []string{"noexec", "size=1m"}})
				c["root"].(object)["readonly"] = false
				linux(c)["rootfsPropagation"] = "shared"
			}},
		{"masks and devices", `cat /etc/passwd; echo x 2>/dev/null >/etc/group || echo ro; stat -c "%F %a %t:%T" /dev/my`, "ro\ncharacter special file 640 1:5\n", func(c object) {
			linux(c)["maskedPaths"], linux(c)["readonlyPaths"] = []string{"/etc/passwd"}, []string{"/etc/group"}
			linux(c)["devices"] = []object{{"path": "/dev/my", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640}}
			c["root"].(object)["readonly"] = false
		}},
		{"seccomp", `mkdir /tmp/a 2>&1 | grep -o "Operation not permitted"; echo on`, "Operation not permitted\non\n", func(c object) {
			linux(c)["seccomp"] = object{"defaultAction": "SCMP_ACT_ALLOW", "architectures": []string{"SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"},
				"syscalls": []object{{"names": []string{"mkdir", "mkdirat"}, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}}}
			c["root"].(object)["readonly"] = false
		}},
		{"a terminal without -t", `test -t 0 && test -t 1 && echo terminal; sleep 0.1; echo still`, "terminal\r\nstill\r\n", func(c object) {
			proc(c)["terminal"] = true // as runc spec says
		}},
		{"names of its own", `hostname; cat /proc/sys/kernel/shmmni`, "mine\n99\n", func(c object) {
			c["hostname"] = "mine"
			linux(c)["sysctl"] = object{"kernel.shmmni": "99"}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sub := &story{s.daemon, t, s.rootfs}
			dir := sub.specBundle(func(c object) {
				delete(c, "hostname")
				tt.change(c)
				proc(c)["args"] = []string{"/bin/sh", "-c", tt.script}
			})
			args := []string{"run", "web", "--rm", "--bundle", dir}
			if tt.name == "names of its own" {
				args = append(args, "--ns", "uts=private,ipc=private")
			}
			sub.expect("output", sub.ok(args...), tt.want)
		})
	}
	limited := s.specBundle(func(c object) {
		delete(c, "hostname")
		proc(c)["args"] = []string{"sleep", "1000"}
		linux(c)["resources"] = object{"memory": object{"limit": 32 << 20}, "pids": object{"limit": 33}, "cpu": object{"quota": 20000, "period": 100000}}
	})
	s.ok("run", "web", "-d", "--name", "limited", "--bundle", limited)
	cg := s.inspect("limited").Cgroup
	s.expect("memory limit", s.cgroupFile(cg, "memory.limit_in_bytes", "memory.max"), "33554432")
	s.expect("pids limit", s.cgroupFile(cg, "pids.max"), "33")
	s.expect("cpu quota", strings.Fields(s.cgroupFile(cg, "cpu.cfs_quota_us", "cpu.max"))[0], "20000")

	// A host name in a shared uts namespace is refused, and the error says what to do.
	named := s.specBundle(func(c object) { c["hostname"] = "runc" })
	_, stderr, code := s.do("", "run", "web", "--bundle", named)
	if code != 125 || !strings.Contains(stderr, "hostname") || !strings.Contains(stderr, "--ns uts=private") {
		t.Errorf("a bundle with a host name: exit code %d, %s", code, stderr)
	}
}
