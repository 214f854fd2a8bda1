// Package testenv states what a test needs from the machine, and prepares it.
//
// A test that lacks something is skipped on a developer's machine and failed
// where SANDBOXD_TEST_REQUIRE names it: a suite that skips everything is green,
// and worth nothing. The variable is a comma-separated list of the names that
// the functions below give to what they need: "root", "cgroup1", "cgroup2", "busybox",
// "cap_sys_resource", "kernel:pidfd_info", "program:runc", "cni-plugins". "all" stands for
// every one of them, and "-NAME" takes one out of it again.
package testenv

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// RequireVar is the environment variable that turns skips into failures.
const RequireVar = "SANDBOXD_TEST_REQUIRE"

// Root needs uid 0 in the initial user namespace.
func Root(tb testing.TB) {
	tb.Helper()
	switch b, err := os.ReadFile("/proc/self/uid_map"); {
	case os.Geteuid() != 0:
		need(tb, "root", errors.New("uid is not 0"))
	case err != nil:
		need(tb, "root", err)
	case strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295":
		need(tb, "root", errors.New("uid 0 only of a user namespace"))
	}
}

// Cgroup2 needs the unified hierarchy, with the pids and memory controllers, at
// /sys/fs/cgroup.
func Cgroup2(tb testing.TB) {
	tb.Helper()
	b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	has := strings.Fields(string(b))
	if err == nil && !(slices.Contains(has, "pids") && slices.Contains(has, "memory")) {
		err = errors.New("the unified hierarchy has only these controllers: " + strings.Join(has, " "))
	}
	need(tb, "cgroup2", err)
}

// Cgroup1 needs a hierarchy of cgroup v1.
func Cgroup1(tb testing.TB) {
	tb.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err == nil && !strings.Contains(string(b), " cgroup rw,") {
		err = errors.New("no file system of type cgroup is mounted")
	}
	need(tb, "cgroup1", err)
}

// Program needs an executable in PATH, and returns where it is. The requirement
// is called "program:NAME".
func Program(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	need(tb, "program:"+name, err)
	return path
}

// need goes on if err is nil, and otherwise skips the test or, where what is
// required, fails it.
func need(tb testing.TB, what string, err error) {
	tb.Helper()
	switch {
	case err == nil:
	case required(os.Getenv(RequireVar), what):
		tb.Fatalf("this machine was said to have %s, but: %v", what, err)
	default:
		tb.Skipf("needs %s: %v", what, err)
	}
}

// required reports whether list, a value of RequireVar, names what.
func required(list, what string) bool {
	names := strings.Split(list, ",")
	return !slices.Contains(names, "-"+what) && (slices.Contains(names, what) || slices.Contains(names, "all"))
}
