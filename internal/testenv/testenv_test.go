package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRequired(t *testing.T) {
	for _, tt := range []struct {
		list, what string
		want       bool
	}{
		{"", "root", false},
		{"root", "root", true},
		{"root,cgroup2", "cgroup2", true},
		{"rooted", "root", false},
		{"all", "kernel:idmap", true},
		{"all,-kernel:idmap", "kernel:idmap", false},
		{"all,-kernel:idmap", "root", true},
	} {
		if got := required(tt.list, tt.what); got != tt.want {
			t.Errorf("required(%q, %q) = %t", tt.list, tt.what, got)
		}
	}
}

// The tests run themselves once more in a process whose only task is to lack
// something, since a test cannot look at its own failure.
func TestNeed(t *testing.T) {
	if os.Getenv("TESTENV_LACKS") != "" {
		Program(t, "no-such-program")
		t.Log("went on")
		return
	}
	for _, tt := range []struct {
		require string
		want    string
	}{
		{"", "--- SKIP: TestNeed"},
		{"root", "--- SKIP: TestNeed"},
		{"all", "--- FAIL: TestNeed"},
		{"root,program:no-such-program", "--- FAIL: TestNeed"},
		{"all,-program:no-such-program", "--- SKIP: TestNeed"},
	} {
		out := rerun(t, "TestNeed", "TESTENV_LACKS=1", RequireVar+"="+tt.require)
		if !strings.Contains(out, tt.want) || !strings.Contains(out, "program:no-such-program") || strings.Contains(out, "went on") {
			t.Errorf("%s=%q: no %q that names the program in:\n%s", RequireVar, tt.require, tt.want, out)
		}
	}
}

func TestNoFDLeak(t *testing.T) {
	switch os.Getenv("TESTENV_LEAKS") {
	case "":
		if out := rerun(t, "TestNoFDLeak", "TESTENV_LEAKS=yes"); !strings.Contains(out, "left files open: ") || !strings.Contains(out, "pipe:[") {
			t.Errorf("a pipe was left open, and the test said:\n%s", out)
		}
		if out := rerun(t, "TestNoFDLeak", "TESTENV_LEAKS=no"); !strings.Contains(out, "--- PASS") {
			t.Errorf("no file was left open, and the test said:\n%s", out)
		}
	case "yes":
		NoFDLeak(t)
		var p [2]int
		if err := unix.Pipe(p[:]); err != nil {
			t.Fatal(err)
		}
	case "no":
		NoFDLeak(t)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			r.Close()
			w.Close()
		})
	}
}

// rerun runs one test of this binary in a new process and returns its output.
func rerun(t *testing.T, test string, env ...string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run=^"+test+"$")
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		t.Fatal(err)
	}
	return string(out)
}

func TestBusybox(t *testing.T) {
	Root(t)
	rootfs := Busybox(t)
	cmd := exec.Command("/bin/sh", "-c", "ls -d /dev /proc /sys /tmp && id -un && echo $((6*7)) >/tmp/x && cat /tmp/x")
	cmd.SysProcAttr = &unix.SysProcAttr{Chroot: rootfs}
	out, err := cmd.CombinedOutput()
	if want := "/dev\n/proc\n/sys\n/tmp\nroot\n42\n"; err != nil || string(out) != want {
		t.Errorf("got %q, %v; want %q", out, err, want)
	}
	fi, err := os.Stat(filepath.Join(rootfs, "tmp"))
	if err != nil || fi.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("/tmp: %v, %v", fi.Mode(), err)
	}
}

func TestCapability(t *testing.T) {
	Root(t)
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	if err := haveCap(unix.CAP_SYS_CHROOT); err != nil {
		t.Fatal(err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[0].Effective &^= 1 << unix.CAP_SYS_CHROOT
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	if err := haveCap(unix.CAP_SYS_CHROOT); err == nil {
		t.Error("the thread has given CAP_SYS_CHROOT away, and is said to have it")
	}
}

func TestProbe(t *testing.T) {
	Root(t)
	for _, f := range []Feature{Overlay, TimeNS, UserNS, CgroupKill, IDMap, PIDFDInfo, Seccomp, IPVLAN} {
		t.Logf("%s: %v", f, probe(f))
	}
	// Older than the oldest kernel that is supported.
	for _, f := range []Feature{TimeNS, Seccomp} {
		if err := probe(f); err != nil {
			t.Errorf("%s: %v", f, err)
		}
	}
	if err := probe("nonsense"); err == nil {
		t.Error("an unknown feature is there")
	}
}
