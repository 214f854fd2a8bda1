//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
	"github.com/sandboxd/sandboxd/sandbox"
)

// A scene is a piece of a sandbox's life, in the course of which a daemon may
// be killed anywhere.
type scene struct {
	name string
	// before sets the scene, with a daemon that it starts itself and that does
	// not crash. It leaves it running, or dead.
	before func(r *rig)
	// act is what happens while the daemon may die. Its clients may fail. If
	// before has left no daemon, one was started, and may be dead already.
	act func(r *rig)
	// after looks at what a scene has left before all is removed; nil for most.
	after func(r *rig)
	// points are a part of those that act must pass, lest a scene lose its
	// sense unseen.
	points []string
	// networks gives the daemon a host of its own, with a CNI network of two
	// plugins.
	networks bool
}

// Members of all scenes exit with this code if they exit by themselves.
const sceneCode = 7

func quick(r *rig, sandbox, name string, flags ...string) []string {
	return append(append([]string{"run", sandbox, "--rootfs", r.rootfs, "--name", name, "-d"}, flags...), "--", "sh", "-c", "exit 7")
}

func long(r *rig, command, sandbox, name string, flags ...string) []string {
	args := append([]string{command, sandbox, "--rootfs", r.rootfs, "--name", name}, flags...)
	if command == "run" {
		args = append(args, "-d")
	}
	// It goes at SIGTERM; a child that it leaves behind does not.
	return append(args, "--", "sh", "-c", `trap "exit 7" TERM; (trap "" TERM; while :; do sleep 1000; done) & wait`)
}

// alive is a sandbox with members in every state.
func alive(r *rig) {
	r.mustServe()
	r.ok("create", "box")
	r.ok(long(r, "run", "box", "running")...)
	r.ok(long(r, "add", "box", "created")...)
	r.ok(quick(r, "box", "exited")...)
	r.exited("box/exited")
	r.collected("box/exited") // it has failed; what follows that is another scene
}

// dead is the same, with a daemon that is dead.
func dead(r *rig) { alive(r); r.kill() }

var scenes = []scene{
	{
		name: "create and remove",
		act: func(r *rig) {
			r.cli("create", "box", "--hostname", "h")
			r.cli("rm", "box")
		},
		points: []string{"create record after", "create pause after", "create ready before", "remove deleting after", "remove cgroup before", "removal before told", "removal after told", "remove record after", "event before", "event after"},
	},
	{
		name: "create with pid and user namespaces",
		act: func(r *rig) {
			r.cli("create", "box", "--share", "net,ipc,uts,pid,user")
			r.cli(long(r, "run", "box", "m")...)
			r.cli("rm", "-f", "box")
		},
		points: []string{"create pause after", "add monitor after", "remove monitor after"},
	},
	{
		name:   "create that fails",
		act:    func(r *rig) { r.cli("create", "box", "--sysctl", "kernel.msgmax=nonsense") },
		points: []string{"create-undo pause before", "create-undo cgroup after", "create-undo record after"},
	},
	{
		name:   "add",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		act:    func(r *rig) { r.cli(long(r, "add", "box", "m")...) },
		points: []string{"add record before", "add cgroup after", "add data after", "add monitor after", "add created after"},
	},
	{
		name:   "run",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		act:    func(r *rig) { r.cli(long(r, "run", "box", "m")...) },
		points: []string{"add record before", "add monitor before", "add monitor after", "add created after"},
	},
	{
		// What has begun to run is not taken down because nobody could write that down.
		name: "recovery from half a run",
		before: func(r *rig) {
			r.mustServe("SANDBOXD_CRASH_AT=add monitor after")
			r.ok("create", "box")
			r.cli(long(r, "run", "box", "m")...)
			r.d.waitExit(r.T)
		},
		after: func(r *rig) {
			if m := r.member("box/m"); m.State != "Running" || m.PID == 0 || m.MonitorPID == 0 {
				r.Errorf("it is %s, pid %d, monitor %d", m.State, m.PID, m.MonitorPID)
			}
		},
		points: []string{"recover member before", "recover member after"},
	},
	{
		name:   "add that fails",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		// A directory on a file cannot be mounted, which only init's program finds.
		act:    func(r *rig) { r.cli(long(r, "add", "box", "m", "-v", r.rootfs+":/etc/passwd/x")...) },
		points: []string{"add-undo monitor before", "add-undo member cgroup after", "add-undo member record after"},
	},
	{
		name:   "start, exit, remove",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box"); r.ok(long(r, "add", "box", "m")...) },
		act: func(r *rig) {
			r.cli("start", "box/m")
			r.cli("kill", "box/m", "KILL")
			r.untilDeadOr(func() bool { return r.cli("rm", "box/m").code == 0 })
		},
		points: []string{"start record after", "start execve before", "start running after", "exit kill before", "exit record after", "remove member deleting after", "remove member data after"},
	},
	{
		name: "start that fails",
		before: func(r *rig) {
			r.mustServe()
			r.ok("create", "box")
			// Its interpreter is looked for only by execve.
			script := r.TempDir() + "/script"
			if err := os.WriteFile(script, []byte("#!/no-such-interpreter\n"), 0o755); err != nil {
				r.Fatal(err)
			}
			r.ok("add", "box", "--rootfs", r.rootfs, "--name", "m", "-v", script+":/script", "--", "/script")
		},
		act:    func(r *rig) { r.cli("start", "box/m") },
		points: []string{"start execve before", "exit record after"},
	},
	{
		name:   "auto-remove",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		act: func(r *rig) {
			r.cli(quick(r, "box", "goes", "--rm")...)
			r.untilDeadOr(func() bool { return len(r.list()[0].Members) == 0 })
		},
		points: []string{"exit record before", "remove member deleting before", "remove member record after"},
	},
	{
		name:   "stop",
		before: alive,
		act: func(r *rig) {
			r.cli("stop", "box/running")
			r.cli("stop", "--time", "0s", "box")
		},
		points: []string{"stop signal after", "stop kill before", "stop members after", "stop record after"},
	},
	{
		name:   "remove by force",
		before: alive,
		act:    func(r *rig) { r.cli("rm", "-f", "box/running"); r.cli("rm", "-f", "box") },
		points: []string{"remove monitor after", "remove member record before", "remove pause after", "remove record after"},
	},
	{
		name:     "builtin network",
		networks: true,
		act: func(r *rig) {
			r.cli("create", "box", "--net", "builtin", "--publish", "8080:80")
			r.cli("rm", "box")
		},
		points: []string{"create network plan after", "network record after", "builtin attach lease after", "builtin attach link after", "create network after", "network down before", "builtin detach nft after", "remove network after"},
	},
	{
		name:     "cni network",
		networks: true,
		act: func(r *rig) {
			r.cli("create", "box", "--net", "cni")
			r.cli("rm", "box")
		},
		points: []string{"network record after", "cni ADD after", "cni ADD after#2", "create network after", "cni DEL before", "cni DEL after#2", "network down after"},
	},
	{
		name:     "cni network that does not go down",
		networks: true,
		before: func(r *rig) {
			r.mustServe()
			r.ok("create", "box", "--net", "cni")
			r.failPlugins("DEL", true)
		},
		act: func(r *rig) {
			r.cli("rm", "box")
			r.failPlugins("DEL", false)
			r.untilDeadOr(func() bool { return r.cli("ls", "-a", "-q").out == "" })
		},
		points: []string{"tombstone before", "tombstone after", "network down after"},
	},
	{
		name:     "network that is given up",
		networks: true,
		before: func(r *rig) {
			r.mustServe()
			r.ok("create", "box", "--net", "cni")
			r.failPlugins("DEL", true)
			r.ok("rm", "box")
		},
		act: func(r *rig) {
			// Not while an attempt of its start is made, or before it: what is passed then is chance.
			r.untilDeadOr(func() bool {
				log := r.d.log.String()
				return strings.Contains(log[strings.LastIndex(log, "--- serve"):], "Network not taken down")
			})
			if id := strings.TrimSpace(r.cli("ls", "-a", "-q").out); id != "" { // else it died in that attempt
				r.cli("gc", "--forget", id)
			}
		},
		after: func(r *rig) {
			if id := r.ok("ls", "-a", "-q"); id != "" {
				r.ok("gc", "--forget", id)
			}
			if id := r.ok("ls", "-a", "-q"); id != "" {
				r.Errorf("%s is still to be taken down", id)
			}
			if left, _ := filepath.Glob(r.d.root + "/network/cni/results/*"); len(left) > 0 {
				r.Errorf("results of ADD are left: %v", left)
			}
			for _, name := range []string{"one", "two"} { // what is left stays, for whoever gave it up
				left, _ := filepath.Glob(r.d.root + "/" + name + "/*")
				if len(left) != 1 {
					r.Errorf("plugin %s has left %v", name, left)
				}
				for _, f := range left {
					os.Remove(f)
				}
			}
		},
		points: []string{"tombstone after", "tombstone forget before", "cni DEL after", "tombstone forget after", "tombstone forget removed", "event after"},
	},
	{
		name:     "recovery of a network",
		networks: true,
		before: func(r *rig) {
			r.mustServe()
			r.ok("create", "box", "--net", "builtin")
		},
		points: []string{"recover network before", "recover network after"},
	},
	{
		name:   "recovery",
		before: dead,
		points: []string{"recover pause after", "recover member before", "recover member after"},
	},
	{
		name: "recovery from half a creation",
		before: func(r *rig) {
			r.mustServe("SANDBOXD_CRASH_AT=create pause after")
			r.cli("create", "box")
			r.d.waitExit(r.T)
		},
		points: []string{"recover pause before", "recover pause after", "recover cgroup after", "recover record after"},
	},
	{
		name: "recovery from half a member",
		before: func(r *rig) {
			r.mustServe("SANDBOXD_CRASH_AT=add monitor after")
			r.ok("create", "box")
			r.cli(long(r, "add", "box", "m")...)
			r.d.waitExit(r.T)
		},
		points: []string{"recover monitor before", "recover member data after", "recover member record after"},
	},
	{
		name: "recovery from half a removal",
		before: func(r *rig) {
			r.mustServe("SANDBOXD_CRASH_AT=remove pause before")
			r.ok("create", "box")
			r.ok(long(r, "run", "box", "m")...)
			r.cli("rm", "-f", "box")
			r.d.waitExit(r.T)
		},
		points: []string{"recover pause before", "recover cgroup after", "recover record after"},
	},
	{
		name: "exits while no daemon runs",
		before: func(r *rig) {
			dead(r)
			m := r.member("box/running")
			r.sig(m.PID, unix.SIGTERM)
			r.gone(m.PID)
		},
		points: []string{"exit kill before", "exit record before", "exit record after"},
	},
	{
		name: "monitor killed while no daemon runs",
		before: func(r *rig) {
			dead(r)
			for _, m := range []string{"box/running", "box/created"} {
				pid := r.member(m).MonitorPID
				r.sig(pid, unix.SIGKILL)
				r.gone(pid)
			}
		},
		points: []string{"monitor replace before", "monitor replace after"},
	},
	{
		name: "pause killed while no daemon runs",
		before: func(r *rig) {
			dead(r)
			pid := r.sandbox("box").PausePID
			r.sig(pid, unix.SIGKILL)
			r.gone(pid)
		},
		points: []string{"reanchor before", "reanchor after", "reanchor record after"},
	},
	{
		name: "exit with a collector",
		before: func(r *rig) {
			r.mustServe()
			r.ok("create", "box")
			r.ok("run", "box", "--rootfs", r.rootfs, "--name", "m", "-d", "--tmpfs", "/t", "--collect", "/t/*", "--custody", "never",
				"--", "sh", "-c", `echo kept >/t/f; trap "exit 7" TERM; while :; do sleep 0.02; done`)
			r.catches(r.member("box/m").PID, unix.SIGTERM)
		},
		act: func(r *rig) {
			r.cli("kill", "box/m", "TERM")
			r.untilDeadOr(func() bool { return r.member("box/m").Custody.Released != nil })
		},
		after: collectedOnce,
		points: []string{
			"poststop collect before", "collect temp before", "collect temp after", "collect manifest after", "collect archive after", "collect rename before",
			"collect rename after", "poststop collect after", "poststop collect record before", "poststop record after", "custody record after", "custody monitor before",
		},
	},
	{
		name: "journal that is full",
		before: func(r *rig) {
			r.d.flags = append(r.d.flags, "--events-max", "3m")
			r.pastEvents(2, 1<<20)
			r.pastEvents(1, 1<<20-300) // the next one begins in the middle of act
		},
		act: func(r *rig) {
			r.cli("create", "box")
			r.cli("rm", "box")
		},
		points: []string{"journal segment before", "journal segment after", "journal drop after"},
	},
	{
		name:   "garbage collection",
		before: lostRecord,
		act:    untilClean,
		after:  clean,
		points: []string{
			"gc records before", "gc litter before", "gc litter after", "gc pause before", "gc pause after", "gc monitor after",
			"gc cgroup before", "gc cgroup after", "gc mount before", "gc mount after", "gc layer before", "gc temp after", "gc node after",
		},
	},
	{
		name:     "garbage of networks",
		networks: true,
		before:   lostNetworks,
		act:      untilClean,
		after: func(r *rig) {
			clean(r)
			for _, dir := range []string{"one", "two", "network/cni/results", "network/builtin/leases"} {
				if left, err := os.ReadDir(filepath.Join(r.d.root, dir)); err != nil || len(left) > 0 {
					r.Errorf("%s has %v, %v", dir, left, err)
				}
			}
			for _, look := range [][]string{{"ip", "-o", "link", "show"}, {"nft", "list", "ruleset"}} {
				out, err := inNetNS(r.d.netns, look...)
				if err != nil || strings.Contains(out, "@if") || strings.Contains(out, "8080") {
					r.Errorf("%v shows, %v\n%s", look, err, out)
				}
			}
		},
		points: []string{
			"gc link before", "gc link after", "gc nft before", "gc nft after", "gc lease before", "gc lease after", "gc cni before", "gc cni after",
		},
	},
	{
		name:   "garbage of collections",
		before: lostCollections,
		act:    untilClean,
		after: func(r *rig) {
			clean(r)
			if ls := r.ok("collected", "ls", "-q"); ls != "" {
				r.Errorf("collections: %q", ls)
			}
		},
		points: []string{"gc collection before", "gc collection after"},
	},
	{
		name:   "monitor and pause killed",
		before: alive,
		act: func(r *rig) {
			box := r.sandbox("box")
			r.sig(box.PausePID, unix.SIGKILL)
			var m sandbox.MemberInfo
			for _, m = range box.Members {
				if m.Name == "running" {
					r.sig(m.MonitorPID, unix.SIGKILL)
					break
				}
			}
			r.untilDeadOr(func() bool {
				now := r.sandbox("box")
				again := r.member("box/running")
				return now.PausePID != 0 && now.PausePID != box.PausePID && again.MonitorPID != 0 && again.MonitorPID != m.MonitorPID
			})
		},
		points: []string{"monitor replace after", "reanchor after", "reanchor record after"},
	},
}

// collectedOnce checks that box/m, once it has exited, is collected once and
// completely, and that its custody ends.
func collectedOnce(r *rig) {
	r.Helper()
	if m := r.member("box/m"); m.Exit == nil {
		r.ok("kill", "box/m", "TERM") // the daemon died before it was told
	}
	r.eventually("box/m is collected and let go", func() bool {
		m := r.member("box/m")
		return m.State == "Collected" && m.Collection == "box/m-1" && !m.Custody.Held && m.MonitorPID == 0
	})
	if ls := r.ok("collected", "ls", "-q"); ls != "box/m-1" {
		r.Errorf("collections: %q", ls)
	}
	// The archive is packed as it was read: in its entirety, or not at all.
	if p := r.postmortem("box/m"); p.Manifest.Archive == nil || p.Manifest.Archive.Error != "" || p.Manifest.Archive.Entries != 1 || p.Manifest.Exit.Code != sceneCode {
		r.Errorf("the collection: %+v", p.Manifest)
	}
}

// untilDeadOr waits until ok, which may use the daemon, or until the daemon has died.
func (r *rig) untilDeadOr(ok func() bool) {
	r.Helper()
	for deadline := time.Now().Add(20 * time.Second); r.running(); time.Sleep(10 * time.Millisecond) {
		// A daemon that dies during it makes ls and inspect read the state
		// directory: both are right.
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			r.Fatal("nothing of what was expected within 20 s")
		}
	}
}

// play acts a scene with a daemon that has env.
func (r *rig) play(s scene, env string) {
	r.Helper()
	if s.before != nil {
		s.before(r)
		if r.running() {
			r.kill() // what it was like to end it politely is not the question
		}
	}
	// Taking up what was left is part of the scene.
	if r.serve(env) && s.act != nil {
		s.act(r)
	}
}

// TestCrashMatrix kills the daemon at every crash point that there is, in every
// scene in which it passes it, at the first time and at the second.
func TestCrashMatrix(t *testing.T) {
	testenv.Root(t)
	rootfs := testenv.Busybox(t)
	for _, s := range slices.Concat(scenes, hookScenes) {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			points := passed(t, rootfs, s)
			for _, p := range s.points {
				if !slices.Contains(points, p) {
					t.Errorf("the scene does not pass %q but %q", p, points)
				}
			}
			for _, p := range points {
				t.Run(p, func(t *testing.T) {
					t.Parallel()
					r := s.rig(t, rootfs)
					r.dies = p
					r.play(s, "SANDBOXD_CRASH_AT="+p)
					r.awaitCrash(p)
					r.mustServe()
					if s.after != nil {
						s.after(r)
					}
					r.sound()
				})
			}
		})
	}
}

// rig makes what a scene is played on.
func (s scene) rig(t *testing.T, rootfs string) *rig {
	t.Helper()
	if !s.networks {
		return newRigOn(t, rootfs)
	}
	r := newNetRigOn(t, rootfs)
	r.chain("one", "two")
	return r.rig
}

// passed acts a scene without a crash and returns the points that it passes,
// "NAME" and, for those passed more than once, "NAME#2".
func passed(t *testing.T, rootfs string, s scene) []string {
	var points []string
	ok := t.Run("no crash", func(t *testing.T) {
		r := s.rig(t, rootfs)
		file := filepath.Join(r.TempDir(), "points")
		r.play(s, "SANDBOXD_CRASH_LOG="+file)
		// What was asked for last may still be going on behind the answer.
		r.d.cmd.Process.Signal(unix.SIGTERM)
		r.d.waitExit(r.T)
		f, err := os.Open(file)
		if err != nil {
			r.Fatal(err)
		}
		defer f.Close()
		count := map[string]int{}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			p := lines.Text()
			// What act begins with is taken up in the scenes of recovery.
			if s.act != nil && (strings.HasPrefix(p, "recover pause ") || strings.HasPrefix(p, "recover member ")) {
				continue
			}
			// Garbage is collected behind what act does; that has a scene of its own.
			if strings.HasPrefix(p, "gc ") != strings.HasPrefix(s.name, "garbage") {
				continue
			}
			switch count[p]++; count[p] {
			case 1:
				points = append(points, p)
			case 2:
				if strings.HasPrefix(p, "gc ") {
					break // how often it is asked for garbage is chance
				}
				points = append(points, p+"#2")
			}
		}
		r.mustServe()
		if s.after != nil {
			s.after(r)
		}
		r.sound()
	})
	if !ok {
		t.FailNow()
	}
	return points
}

// awaitCrash waits for the daemon's death at point p.
func (r *rig) awaitCrash(p string) {
	r.Helper()
	select {
	case <-r.d.exited:
	case <-time.After(20 * time.Second):
		r.Fatalf("the daemon did not come to %q", p)
	}
	if ws := r.d.cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		r.Fatalf("the daemon ended otherwise than at %q: %v", p, r.d.cmd.ProcessState)
	}
}

// sound checks that all there is after a recovery is complete and works, that
// all else is gone, and that nothing is left once all is removed.
func (r *rig) sound() {
	r.Helper()
	names := map[string]bool{"box": true}
	for _, box := range r.list() {
		delete(names, box.Name)
		switch box.State {
		case "Ready":
			r.soundReady(box)
		case "Stopped":
			for _, m := range box.Members {
				if m.State != "Exited" {
					r.Errorf("member %s of a stopped sandbox is %s", m.Name, m.State)
				}
			}
		default:
			r.Errorf("sandbox %s is %s: %s", box.Name, box.State, box.Reason)
		}
		r.ok("rm", "-f", box.Name)
	}
	for name := range names {
		r.ok("create", name)
		r.ok("rm", name)
	}
	r.failPlugins("DEL", false)
	r.eventually("every network has been taken down", func() bool { return r.cli("ls", "-a", "-q").out == "" })
	if left := r.list(); len(left) != 0 {
		r.Errorf("after everything was removed there is %+v", left)
	}
	if left, _ := os.ReadDir(r.d.state + "/quarantine"); len(left) != 0 {
		r.Errorf("in the quarantine: %v", left)
	}
	r.wholeEvents()
}

// soundReady checks a sandbox that is Ready.
func (r *rig) soundReady(box sandbox.Info) {
	r.Helper()
	if !pidRuns(box.PausePID) {
		r.Errorf("pause %d does not run", box.PausePID)
	}
	seen := map[string]bool{}
	for _, m := range box.Members {
		seen[m.Name] = true
		ref := box.Name + "/" + m.Name
		if m.Name == "goes" { // by itself, while this looks
			if m.State == "Created" {
				r.ok("start", ref)
			}
			r.eventually(ref+" is gone", func() bool { return r.cli("inspect", ref).code != 0 })
			continue
		}
		switch m.State {
		case "Created":
			if !pidRuns(m.PID) || !pidRuns(m.MonitorPID) {
				r.Errorf("%s is created, but its init %d or monitor %d does not run", ref, m.PID, m.MonitorPID)
			}
			res := r.cli("start", ref)
			if m.Command[0] == "/script" {
				if res.code != 127 {
					r.Errorf("%v; want 127", res)
				}
				r.expectExit(ref, 127)
				break
			}
			if res.code != 0 {
				r.Fatal(res)
			}
			r.soundRunning(ref)
		case "Running":
			r.soundRunning(ref)
		case "Exited", "Collected":
			want := sceneCode
			if m.Command[0] == "/script" {
				want = 127
			}
			if m.Exit == nil || !m.Exit.Known || (m.Exit.Code != want && m.Exit.Signal != int(unix.SIGKILL)) {
				r.Errorf("%s has exited with %+v; want code %d, or signal 9", ref, m.Exit, want)
			}
			if m.Custody.Held != pidRuns(m.MonitorPID) {
				r.Errorf("custody of %s is held: %v; its monitor is %d", ref, m.Custody.Held, m.MonitorPID)
			}
		default:
			r.Errorf("member %s is %s", ref, m.State)
		}
		r.ok("rm", "-f", ref)
	}
	// A name that is not taken is free, and a new member can be run.
	name := "m"
	if !seen["m"] {
		name = "fresh"
	}
	res := r.cli("run", box.Name, "--rootfs", r.rootfs, "--name", name, "--", "sh", "-c", "echo fresh; exit 9")
	if res.code != 9 || res.out != "fresh\n" {
		r.Errorf("%v; want 9 and \"fresh\"", res)
	}
}

// soundRunning checks that a running member can be entered and ends as it was
// told. One that exits by itself may have done so.
func (r *rig) soundRunning(ref string) {
	r.Helper()
	m := r.member(ref)
	if strings.Contains(strings.Join(m.Command, " "), "trap") {
		if res := r.cli("exec", ref, "--", "echo", "in"); res.code != 0 || res.out != "in\n" {
			r.Errorf("%v", res)
		}
		r.catches(m.PID, unix.SIGTERM)
		r.ok("kill", ref, "TERM")
	}
	r.expectExit(ref, sceneCode)
}

// catches waits until a process has a handler for s: before that, the signal
// would end it.
func (r *rig) catches(pid int, s unix.Signal) {
	r.Helper()
	r.eventually(fmt.Sprintf("process %d catches signal %d", pid, s), func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			r.Fatal(err)
		}
		_, mask, _ := strings.Cut(string(b), "SigCgt:\t")
		caught, err := strconv.ParseUint(mask[:16], 16, 64)
		return err == nil && caught&(1<<(s-1)) != 0
	})
}

// expectExit waits for a member's exit with code.
func (r *rig) expectExit(ref string, code int) {
	r.Helper()
	if e := r.exited(ref); !e.Known || e.Code != code {
		r.Errorf("%s has exited with %+v; want code %d", ref, e, code)
	}
}

// pidRuns reports whether a process is there and is not a zombie.
func pidRuns(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return pid > 0 && err == nil && !strings.Contains(string(b), ") Z ")
}

// TestRandomKills kills the daemon at any moment, not only at those that
// somebody has thought of.
func TestRandomKills(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	kills := 0
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		r.mustServe()
		story := make(chan struct{})
		go func() {
			defer close(story)
			// Their errors are the subject of the other tests.
			for _, args := range [][]string{
				{"create", "box"},
				quick(r, "box", "exits"),
				long(r, "run", "box", "stays"),
				{"stop", "box/stays"},
				quick(r, "box", "removed", "--rm"),
				{"rm", "-f", "box"},
				{"create", "box"},
				long(r, "add", "box", "waits"),
				{"rm", "-f", "box"},
			} {
				r.command(args...).Run()
				if !r.running() {
					return
				}
			}
		}()
		time.Sleep(time.Duration(rnd.IntN(300_000)) * time.Microsecond) // not a wait: the moment is the point
		r.kill()
		<-story
		kills++
		r.mustServe()
		for _, box := range r.list() {
			if box.State != "Ready" && box.State != "Stopped" {
				r.Errorf("after kill %d sandbox %s is %s: %s", kills, box.Name, box.State, box.Reason)
			}
			for _, m := range box.Members {
				if m.State == "Deleting" && m.Name == "removed" {
					// It has exited, and --rm takes its course after the daemon is ready.
					r.eventually("a member with --rm goes", func() bool { return len(r.sandbox(box.Name).Members) < len(box.Members) })
					continue
				}
				if m.State != "Created" && m.State != "Running" && m.State != "Exited" {
					r.Errorf("after kill %d member %s is %s", kills, m.Name, m.State)
				}
				if m.Exit != nil && !m.Exit.Known {
					r.Errorf("after kill %d the exit of %s is not known: %s", kills, m.Name, m.Exit.Reason)
				}
			}
			r.ok("rm", "-f", box.Name)
		}
		if r.Failed() {
			return
		}
		r.kill()
	}
	t.Logf("%d kills", kills)
	r.mustServe()
	r.sound()
}
