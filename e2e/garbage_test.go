//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// garbage returns what `sandboxd gc` finds.
func (r *rig) garbage(flags ...string) []garbage.Finding {
	r.Helper()
	return decode[[]garbage.Finding](r, append([]string{"gc", "-o", "json"}, flags...)...)
}

// lostRecord is a sandbox with a member that run and are not on record any more,
// a mount in its directory, and files that were left by writers who were killed,
// without a daemon.
func lostRecord(r *rig) {
	r.mustServe()
	r.ok("create", "box")
	r.ok(quick(r, "box", "m")...)
	r.exited("box/m")
	r.ok("create", "lost")
	r.ok(long(r, "run", "lost", "m")...)
	box, lost := r.sandbox("box"), r.sandbox("lost").ID
	r.kill()
	r.lose(lost)
	r.old(filepath.Join(r.d.root, "sandboxd-launch-12345"))
	r.old(filepath.Join(r.d.state, "sandboxes", box.ID, "m", box.Members[0].ID, "exit.json.tmp"))
	dir := filepath.Join(r.d.root, "sandboxes", lost, "x")
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = unix.Mount("x", dir, "tmpfs", 0, "")
	}
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// lostNetworks is sandboxes of which neither they nor their networks are on record,
// without a daemon.
func lostNetworks(r *rig) {
	r.mustServe()
	r.ok("create", "lost", "--net", "builtin", "--publish", "8080:80")
	r.ok("create", "lost-too", "--net", "cni")
	all := r.list()
	for _, i := range all {
		// Without it the kernel removes the link when the pause has ended.
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", i.PausePID))
		if err != nil {
			r.Fatal(err)
		}
		r.Cleanup(func() { ns.Close() })
	}
	r.kill()
	for _, i := range all {
		r.lose(i.ID)
		if err := os.Remove(filepath.Join(r.d.root, "network/attachments", i.ID+".json")); err != nil {
			r.Fatal(err)
		}
	}
}

// lostCollections is collections that were begun, about to be removed, and past
// their time, without a daemon.
func lostCollections(r *rig) {
	r.mustServe()
	r.ok("create", "box")
	r.ok("run", "box", "--rootfs", r.rootfs, "--name", "m", "-d", "--collect", "/etc/passwd", "--", "sh", "-c", "exit 7")
	r.collected("box/m")
	r.kill()
	r.d.flags = append(r.d.flags, "--collect-keep", "1ms")
	for _, name := range []string{".tmp-0123456789abcdef", ".rm-0123456789abcdef"} {
		dir := filepath.Join(r.d.root, "collected", name)
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "files.tar.zst"), nil, 0o600)); err != nil {
			r.Fatal(err)
		}
	}
}

// lose removes a sandbox's record.
func (r *rig) lose(id string) {
	r.Helper()
	if err := os.RemoveAll(filepath.Join(r.d.state, "sandboxes", id)); err != nil {
		r.Fatal(err)
	}
}

// untilClean waits until there is no garbage any more.
func untilClean(r *rig) {
	r.untilDeadOr(func() bool { return r.cli("gc", "--dry-run", "-o", "json").out == "[]\n" })
}

// clean checks that there is no garbage.
func clean(r *rig) {
	r.Helper()
	r.ok("gc") // the one of the start may be under way
	if left := r.garbage("--dry-run"); len(left) > 0 {
		r.Errorf("left: %+v", left)
	}
}

// old makes a file that is an hour old.
func (r *rig) old(path string) {
	r.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		r.Fatal(err)
	}
	then := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, then, then); err != nil {
		r.Fatal(err)
	}
}

// impostor is a process that is called like one of the daemon's. It opens a
// FIFO that is called like a mark, and waits.
func (r *rig) impostor(argv0, mark string, cgroup string) int {
	r.Helper()
	dir := r.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(mark)), 0o700); err != nil {
		r.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, mark), 0o600); err != nil {
		r.Fatal(err)
	}
	cmd := &exec.Cmd{Path: "/bin/cat", Args: []string{argv0, mark}, Dir: dir}
	if err := cmd.Start(); err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if cgroup != "" {
		if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0); err != nil {
			r.Fatal(err)
		}
	}
	return cmd.Process.Pid
}

// tracking is the hierarchy that pauses are in: v2 if there is one, or the freezer's.
func tracking(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("findmnt", "-n", "-o", "TARGET", "-t", "cgroup2").Output()
	if first, _, _ := strings.Cut(string(out), "\n"); err == nil && first != "" {
		return first
	}
	return "/sys/fs/cgroup/freezer"
}

// TestGarbage has things of the daemon's that belong to nobody, and beside each
// things that look like them and are not.
func TestGarbage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "web")
	r.run("web", "app", "sleep 1000")
	live := r.sandbox("web")
	sum := sha256.Sum256([]byte(r.d.state))
	mark := hex.EncodeToString(sum[:8])
	top := filepath.Join(tracking(t), r.d.parent)
	data := filepath.Join(r.d.root, "sandboxes")

	cgroup := func(name, mark string) string {
		dir := filepath.Join(top, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for range 200 {
				if err := unix.Rmdir(dir); err == nil || err == unix.ENOENT {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Errorf("%s cannot be removed", dir)
		})
		if mark != "" {
			if err := unix.Setxattr(dir, "trusted.sandboxd", []byte(mark), 0); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	dir := func(path ...string) string {
		p := filepath.Join(path...)
		if err := os.MkdirAll(p, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p+"/file", []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(p) })
		return p
	}
	mount := func(source, target, typ string, flags uintptr) {
		if err := unix.Mount(source, target, typ, flags, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}

	// Ours.
	const a, b, c = "aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccccccc"
	gone := map[string]func() bool{}
	there := func(p string) func() bool { return func() bool { _, err := os.Lstat(p); return err == nil } }
	pausePID := r.impostor("sandboxd-pause", mark+"."+a, cgroup(a, mark))
	gone["pause"] = func() bool { return pidRuns(pausePID) }
	monPID := r.impostor("sandboxd-monitor", mark+"."+live.ID+"/"+b, cgroup(live.ID+"/pause", ""))
	gone["monitor"] = func() bool { return pidRuns(monPID) }
	gone["cgroup with the mark"] = there(filepath.Join(top, a))
	gone["cgroup of a member"] = there(cgroup(live.ID+"/"+c, ""))
	gone["directory"] = there(dir(data, a, b, "rw/upper"))
	gone["directory of a member"] = there(dir(data, live.ID, c))
	source := dir(t.TempDir(), "source")
	mounted := dir(data, b, "x")
	mount(source, mounted, "", unix.MS_BIND)
	gone["directory with a mount"] = there(filepath.Join(data, b))
	r.old(filepath.Join(r.d.root, "sandboxd-pause-77"))
	gone["old program"] = there(filepath.Join(r.d.root, "sandboxd-pause-77"))

	// Not ours, not garbage, or not for certain.
	kept := map[string]func() bool{}
	for what, argv := range map[string][3]string{
		"pause of another installation": {"sandboxd-pause", "0123456789abcdef." + a, ""},
		"pause with no mark":            {"sandboxd-pause", "1000", ""},
		"mark without an id":            {"sandboxd-pause", mark + ".web", ""},
		"mark with half an id":          {"sandboxd-monitor", mark + "." + a + "/app", ""},
		"another program with our mark": {"sandboxd-helper", mark + "." + a, ""},
		"pause in a cgroup of others":   {"sandboxd-pause", mark + "." + c, ""},
	} {
		pid := r.impostor(argv[0], argv[1], argv[2])
		kept[what] = func() bool { return pidRuns(pid) }
	}
	kept["cgroup without a mark"] = there(cgroup("dddddddddddddddd", ""))
	kept["cgroup with another mark"] = there(cgroup("eeeeeeeeeeeeeeee", "0123456789abcdef"))
	kept["cgroup with another name"] = there(cgroup("system.slice", mark))
	kept["cgroup of a member with another name"] = there(cgroup(live.ID+"/mine", ""))
	kept["directory with another name"] = there(dir(data, "backup"))
	kept["directory of a member with another name"] = there(dir(data, live.ID, "notes"))
	kept["directory elsewhere"] = there(filepath.Join(dir(t.TempDir(), "sandboxes"), "file"))
	kept["what was mounted"] = there(filepath.Join(source, "file"))
	other := dir(t.TempDir(), "state")
	dir(other, "sandboxes", c)
	if err := os.Symlink(other, filepath.Join(r.d.root, "states", "0123456789abcdef")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(r.d.root, "states", "0123456789abcdef")) })
	fifo := filepath.Join(r.d.root, "states", "deadbeefdeadbeef")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(fifo) })
	kept["what is no link to a state directory"] = there(fifo)
	kept["directory of a sandbox of another state directory"] = there(dir(data, c))
	for _, name := range []string{"sandboxd-pause-x", "sandboxd-pause-1.bak", "pause-1"} {
		file := filepath.Join(r.d.root, name)
		r.old(file)
		t.Cleanup(func() { os.Remove(file) })
		kept[name] = there(file)
	}
	young := filepath.Join(r.d.root, "sandboxd-pause-78")
	if err := os.WriteFile(young, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(young) })
	kept["young program"] = there(young)
	kept["live pause"] = func() bool { return pidRuns(live.PausePID) }
	kept["live member"] = func() bool { return pidRuns(live.Members[0].PID) && pidRuns(live.Members[0].MonitorPID) }
	kept["live directory"] = there(filepath.Join(data, live.ID, live.Members[0].ID))

	look := func(when string, wantGone bool) {
		t.Helper()
		for what, there := range kept {
			if !there() {
				t.Errorf("%s: %s is gone", when, what)
			}
		}
		for what, there := range gone {
			if there() == wantGone {
				t.Errorf("%s: %s: there %v", when, what, !wantGone)
			}
		}
	}
	actions := func(fs []garbage.Finding) []string {
		var s []string
		for _, f := range fs {
			if f.Name == "" || f.Reason == "" || f.Err != "" {
				t.Errorf("finding %+v", f)
			}
			s = append(s, fmt.Sprint(f.Kind, " ", f.Action))
		}
		slices.Sort(s)
		return s
	}
	want := func(action string) []string {
		return []string{
			"cgroup " + action, "cgroup " + action, "foreign kept", "layer " + action, "layer " + action, "layer " + action,
			"monitor " + action, "mount " + action, "pause kept", "pause " + action, "temp " + action,
		}
	}
	if got, want := actions(r.garbage("--dry-run")), want("would remove"); !slices.Equal(got, want) {
		t.Errorf("dry run: %q, want %q", got, want)
	}
	look("after a dry run", false)
	got, wanted := actions(r.garbage()), want("removed")
	slices.Sort(wanted)
	if !slices.Equal(got, wanted) {
		t.Errorf("found %q, want %q", got, wanted)
	}
	look("after", true)
	if got := actions(r.garbage()); !slices.Equal(got, []string{"foreign kept", "pause kept"}) {
		t.Errorf("again: %q", got)
	}
	if n := len(r.events("--filter", "type=garbage")); n != len(wanted) {
		t.Errorf("%d events of %d findings", n, len(wanted))
	}
	if text := r.ok("gc"); !strings.Contains(text, "pause") || !strings.Contains(text, "is not in a cgroup below") {
		t.Errorf("for people: %s", text)
	}
	// The directories of sandboxes that are gone since the boot go at the start.
	r.kill()
	litter := dir(data, "ffffffffffffffff", "rw")
	r.mustServe()
	r.eventually("the directory of an earlier boot is gone", func() bool { return !there(litter)() })
	r.ok("rm", "-f", "web")
}

// TestTwoDaemonsDoNotShareARoot: the journal and what lies in the directory have
// one owner.
func TestTwoDaemonsDoNotShareARoot(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	other := t.TempDir()
	res := r.cli("serve", "--state", other, "--root", r.d.root, "--cgroup-parent", r.d.parent, "--address", "unix://"+other+"/s")
	if res.code != 125 || !strings.Contains(res.err, "root directory "+r.d.root+" is in use by the daemon with pid") {
		t.Errorf("%v", res)
	}
}

// Two daemons may have sandboxes below the same cgroup: each takes its own away,
// also what was left by one that was killed, and nothing of the other's.
func TestTwoDaemonsShareACgroupParent(t *testing.T) {
	t.Parallel()
	rootfs := testenv.Busybox(t)
	one := newRigOn(t, rootfs)
	two := newRigWith(t, rootfs, func(d *daemon) {
		if err := removeCgroup(d.parent); err != nil {
			t.Fatal(err)
		}
		d.parent = one.d.parent
	})
	for _, r := range []*rig{one, two} {
		r.mustServe()
		r.ok("create", "box")
		r.ok(long(r, "run", "box", "m")...)
	}
	// runs fails the test if r's member does not run undisturbed.
	runs := func(r *rig) {
		t.Helper()
		if found := r.garbage(); len(found) > 0 {
			t.Errorf("garbage: %+v", found)
		}
		if m := r.member("box/m"); m.State != "Running" || m.Exit != nil || unix.Kill(m.PID, 0) != nil {
			t.Errorf("the member is %s: %+v", m.State, m.Exit)
		}
	}
	runs(one)
	runs(two)
	runs(one)
	lost := func(r, other *rig) {
		id := r.sandbox("box").ID
		r.kill()
		if err := os.RemoveAll(filepath.Join(r.d.state, "sandboxes", id)); err != nil {
			t.Fatal(err)
		}
		runs(other)
		r.mustServe()
		r.garbage() // after that of the start
		dirs, err := hierarchies()
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range dirs {
			if _, err := os.Stat(filepath.Join(dir, r.d.parent, id)); err == nil {
				t.Errorf("the sandbox that was lost has %s%s/%s", dir, r.d.parent, id)
			}
		}
		runs(other)
	}
	lost(one, two)
	one.ok("create", "box")
	one.ok(long(one, "run", "box", "m")...)
	lost(two, one)
	one.ok("rm", "-f", "box")
}
