//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/sandbox"
)

// talk is a pair of members that talk over lo: the server sends a line to its
// one client now and then, and the client writes it to its log.
func (r *rig) talk(box string) (server, client sandbox.MemberInfo) {
	r.Helper()
	r.run(box, "server", `n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done | nc -l -p 4242`)
	// It would end the connection at the end of its own input.
	r.run(box, "client", `until grep -q ":1092 .* 0A" /proc/net/tcp /proc/net/tcp6; do sleep 0.01; done; sleep 1000 | nc 127.0.0.1 4242`)
	r.eventually("client and server talk", func() bool { return strings.Contains(r.logOf(box+"/client"), "1\n") })
	return r.member(box + "/server"), r.member(box + "/client")
}

// stillTalk checks that members and their connection are the same as before.
func (r *rig) stillTalk(box string, before ...sandbox.MemberInfo) {
	r.Helper()
	for _, m := range before {
		if now := r.member(box + "/" + m.Name); now.PID != m.PID || now.State != "Running" {
			r.Errorf("%s is %s with pid %d, was Running with %d", m.Name, now.State, now.PID, m.PID)
		}
	}
	n := len(r.logOf(box + "/client"))
	r.eventually("the connection goes on", func() bool { return len(r.logOf(box+"/client")) > n })
}

// killPause kills the pause of a sandbox and returns what the sandbox was like.
func (r *rig) killPause(box string) sandbox.Info {
	r.Helper()
	i := r.sandbox(box)
	r.sig(i.PausePID, unix.SIGKILL)
	r.gone(i.PausePID)
	return i
}

// reanchored waits for another pause with the same namespaces.
func (r *rig) reanchored(before sandbox.Info) {
	r.Helper()
	var now sandbox.Info
	r.eventually("there is a new pause", func() bool {
		now = r.sandbox(before.Name)
		return now.PausePID != 0 && now.PausePID != before.PausePID
	})
	if now.State != "Ready" {
		r.Errorf("the sandbox is %s: %s", now.State, now.Reason)
	}
	if n := pauses(before.ID); n != 1 {
		r.Errorf("the sandbox has %d pauses", n)
	}
	for k, ns := range before.Namespaces {
		var st unix.Stat_t
		path := fmt.Sprintf("/proc/%d/ns/%s", now.PausePID, k)
		if err := unix.Stat(path, &st); err != nil || st.Ino != ns.Inode || now.Namespaces[k].Inode != ns.Inode {
			r.Errorf("%s namespace: %d (%v), shown as %d; want %d", k, st.Ino, err, now.Namespaces[k].Inode, ns.Inode)
		}
	}
}

// pauses counts the pauses of a sandbox, by their command lines.
func pauses(id string) (n int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		// One that has ended meanwhile reads as empty.
		b, _ := os.ReadFile(f)
		if argv := strings.Split(string(b), "\x00"); len(argv) > 1 && argv[0] == "sandboxd-pause" && strings.HasSuffix(argv[1], "."+id) {
			n++
		}
	}
	return n
}

func TestPauseKilled(t *testing.T) {
	t.Parallel()
	for _, share := range []string{"net,ipc,uts", "net,ipc,uts,user"} {
		for _, how := range []string{"daemon alive", "daemon dead", "daemon killed before it recorded the new one"} {
			t.Run(share+"/"+how, func(t *testing.T) {
				t.Parallel()
				r := newRig(t)
				r.mustServe()
				r.ok("create", "box", "--share", share)
				server, client := r.talk("box")
				r.ok("exec", "box/client", "--", "sh", "-c", "echo content >/dev/shm/kept")
				var before sandbox.Info
				if how == "daemon alive" {
					before = r.killPause("box")
				} else {
					r.kill()
					before = r.killPause("box")
					if how != "daemon dead" && r.serve("SANDBOXD_CRASH_AT=reanchor after") {
						r.Fatal("the daemon became ready")
					}
					r.mustServe()
				}
				r.reanchored(before)
				r.stillTalk("box", server, client)
				if got := r.ok("exec", "box/client", "--", "cat", "/dev/shm/kept"); got != "content" {
					r.Errorf("/dev/shm/kept of a member: %q", got)
				}
				// A member that comes later gets the same /dev/shm while somebody
				// held it, and an empty one if pause and daemon were both dead.
				want := "content"
				if how != "daemon alive" {
					want = "none"
				}
				res := r.cli("run", "box", "--rootfs", r.rootfs, "--", "sh", "-c", "cat /dev/shm/kept 2>/dev/null || echo none")
				if res.code != 0 || strings.TrimSpace(res.out) != want {
					r.Errorf("%v; want %q", res, want)
				}
				// And again, by what the new daemon holds.
				r.reanchored(r.killPause("box"))
				r.stillTalk("box", server, client)
				r.ok("rm", "-f", "box")
			})
		}
	}
}

// TestPauseKilledWithoutMembers leaves nobody who holds the namespaces.
func TestPauseKilledWithoutMembers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	r.kill()
	r.killPause("box")
	r.mustServe()
	if i := r.sandbox("box"); i.State != "NotReady" || i.Reason == "" || i.PausePID != 0 {
		r.Errorf("the sandbox is %s with pause %d: %q", i.State, i.PausePID, i.Reason)
	}
	r.fails(125, "NotReady", quick(r, "box", "m")...)
	r.ok("rm", "box")
}

// TestSharedPIDNamespaceDies kills the pause that is pid 1 of all members.
func TestSharedPIDNamespaceDies(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"daemon alive", "daemon dead"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.mustServe()
			r.ok("create", "box", "--share", "net,ipc,uts,pid")
			r.run("box", "a", "sleep 1000")
			r.run("box", "b", "sleep 1000")
			r.ok("add", "box", "--rootfs", r.rootfs, "--name", "c", "--", "sleep", "1000")
			if how == "daemon dead" {
				r.kill()
			}
			r.killPause("box")
			if how == "daemon dead" {
				r.mustServe()
			}
			for _, m := range []string{"a", "b", "c"} {
				r.known("box/"+m, 137, 9, false)
			}
			r.eventually("the sandbox is NotReady", func() bool { return r.sandbox("box").State == "NotReady" })
			if i := r.sandbox("box"); i.Namespaces[namespace.PID].Inode != 0 {
				r.Errorf("a pid namespace is shown: %+v", i.Namespaces)
			}
			r.fails(125, "NotReady", quick(r, "box", "m")...)
			r.ok("rm", "box/a")
			r.ok("rm", "box")
		})
	}
}

// Pause and monitor are killed, and nobody is there to replace them: whoever is in
// the sandbox can still be visited.
func TestVisitWithoutKeepers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "web")
	r.run("web", "m", "echo here >/tmp/f; exec sleep 1000")
	m := r.member("web/m")
	r.kill()
	r.killPause("web")
	r.sig(m.MonitorPID, unix.SIGKILL)
	r.gone(m.MonitorPID)
	for _, args := range [][]string{
		{"exec", "web/m", "--", "cat", "/tmp/f"},
		{"join", "web/m", "--", "cat", "/tmp/f"},
		{"join", "web", "--", "cat", fmt.Sprintf("/proc/%d/root/tmp/f", m.PID)},
	} {
		r.eventually(args[0]+" "+args[1], func() bool { return strings.TrimSpace(r.cli(args...).out) == "here" })
	}
	if got := strings.TrimSpace(r.ok("join", "web", "--", "hostname")); got != "web" {
		r.Errorf("join is on the host %q", got)
	}
	r.ok("cp", "web/m:/tmp/f", filepath.Join(t.TempDir(), "f"))
	r.mustServe()
	if now := r.member("web/m"); now.PID != m.PID || now.State != "Running" {
		r.Errorf("the member is %+v, it was %+v", now, m)
	}
	r.ok("rm", "-f", "web")
}
