package testenv

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// NoFDLeak fails the test if, once its other clean-ups have run, the process
// holds files it did not hold now. Not for parallel tests. Do the thing under
// test once before calling it: descriptors opened once per process (a netlink
// socket, a cgroup root) are not leaks.
func NoFDLeak(tb testing.TB) {
	tb.Helper()
	startPoller(tb)
	before := openFiles(tb)
	tb.Cleanup(func() {
		var leaked []string
		// A descriptor may close a little after the call that waited for its user
		// has returned, in another goroutine.
		for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			leaked = leaked[:0]
			for fd, target := range openFiles(tb) {
				if before[fd] != target {
					leaked = append(leaked, fd+" → "+target)
				}
			}
			if len(leaked) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
		}
		slices.Sort(leaked)
		tb.Errorf("the test left files open: %s", strings.Join(leaked, ", "))
	})
}

// startPoller makes Go's runtime open the epoll instance and the eventfd that it
// keeps from the first pipe or socket on, so that they are not taken for leaks.
func startPoller(tb testing.TB) {
	tb.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	r.Close()
	w.Close()
}

// openFiles maps the process's descriptor numbers to what they point at. Pipes,
// sockets and namespaces show their inode, so that a number that was closed and
// used again is seen.
func openFiles(tb testing.TB) map[string]string {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	files := make(map[string]string, len(entries))
	for _, e := range entries {
		// The descriptor that ReadDir itself had is closed by now.
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			files[e.Name()] = target
		}
	}
	return files
}
