//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestStoryRedis is a real server that crashes for real, with two who use its
// namespaces, and what it leaves.
func TestStoryRedis(t *testing.T) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		t.Fatalf("Debian's redis-server is needed: %v", err)
	}
	s := newStory(t)
	rootfs := filepath.Join(t.TempDir(), "redis")
	if out, err := exec.Command("../tools/rootfs.sh", rootfs, path, strings.TrimSuffix(path, "server")+"cli").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.ok("run", "web", "-d", "--name", "redis", "--rootfs", rootfs, "--tmpfs", "/data", "--",
		"redis-server", "--dir", "/data", "--save", "", "--appendonly", "yes", "--enable-debug-command", "yes")
	cli := func(args ...string) (string, int) {
		out, _, code := s.do("", append([]string{"run", "web", "--rm", "--rootfs", rootfs, "--", "redis-cli"}, args...)...)
		return out, code
	}
	s.eventually("redis answers over the shared net", func() bool { out, _ := cli("ping"); return out == "PONG\n" })
	if out, code := cli("set", "key", "kept"); out != "OK\n" || code != 0 {
		t.Fatalf("set: %q, exit code %d", out, code)
	}
	s.contains("a member in its pid namespace", s.ok(append([]string{"run", "web", "--rm", "--rootfs", rootfs, "--ns", "pid=member:redis"}, sh("ps")...)...), "redis-server")
	cli("debug", "segfault")
	v := s.exited("redis")
	if !v.Exit.Known || v.Exit.Signal != 11 || v.Exit.Code != 139 || !v.Custody.Held {
		t.Errorf("after a crash: %+v, custody %+v", v.Exit, v.Custody)
	}
	s.contains("its log", s.ok("logs", "web/redis"), "crashed by signal: 11")
	dest := filepath.Join(t.TempDir(), "data")
	s.ok("cp", "web/redis:/data", dest)
	files, err := filepath.Glob(dest + "/appendonlydir/*.incr.aof")
	if err != nil || len(files) != 1 {
		t.Fatalf("the tmpfs has %v, %v", files, err)
	}
	if b, err := os.ReadFile(files[0]); err != nil || !strings.Contains(string(b), "kept") {
		t.Errorf("what it left: %q, %v", b, err)
	}
}
