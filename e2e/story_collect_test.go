//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// postmortem is the part of `sandboxd postmortem -o json` that tests look at.
type postmortem struct {
	Ref, Verdict string
	Manifest     struct {
		Name, Member, MemberID string
		Exit                   struct {
			Code      int
			OOMKilled bool
		}
		Counters struct {
			Memory struct{ PeakBytes, LimitBytes, OOMKills int64 }
		}
		Log struct {
			Lines []struct{ Stream, Text string }
		}
		Samples *struct{ UnixMs []int64 }
		Files   []struct {
			Path, Type, Why string
			Taken           bool
		}
		Archive *struct {
			Entries int
			Error   string
		}
	}
	Custody struct {
		Held   bool
		Until  string
		Why    string
		Mounts []struct {
			Target    string
			UsedBytes int64
		}
	}
	Hooks []struct {
		Stage, Path, State, Error, Output string
		Attempts                          int
	}
}

func (r *rig) postmortem(ref string) postmortem {
	r.Helper()
	return decode[postmortem](r, "postmortem", "-o", "json", ref)
}

// collected waits until a member's collection is on record and returns its name.
func (r *rig) collected(ref string) string {
	r.Helper()
	name := ""
	r.eventually(ref+" is collected", func() bool { name = r.member(ref).Collection; return name != "" })
	return name
}

// archive returns the names that tar finds in a collection.
func (r *rig) archive(name string) string {
	r.Helper()
	out, err := exec.Command("tar", "--zstd", "-tf", filepath.Join(r.d.root, "collected", name, "files.tar.zst")).CombinedOutput()
	if err != nil {
		r.Fatalf("tar: %v\n%s", err, out)
	}
	return string(out)
}

func TestStoryCollect(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	testenv.Program(t, "zstd")
	r.d.flags = []string{"--sample-interval", "100ms"}
	r.mustServe()
	r.ok("create", "web")

	// A crash leaves files in memory, and traps beside them.
	r.run("web", "crash", `echo starting; echo oops >&2; echo data >/t/f; ln -s /etc/passwd /t/l; mkfifo /t/p; mkdir /t/d; echo deep >/t/d/x
		dd if=/dev/null of=/t/sparse bs=1M seek=1048576 count=0 2>/dev/null; exec sh -c 'sleep 0.5; kill -SEGV $$'`, "--tmpfs", "/t:size=4m", "--ns", "pid=host", "--collect", "/t/*", "--custody-ttl", "1h")
	if name := r.collected("web/crash"); name != "web/crash-1" {
		t.Errorf("the collection is called %q", name)
	}
	if m := r.member("web/crash"); m.State != "Collected" || m.Custody.TmpfsBytes == 0 || m.Custody.Until.Sub(m.Custody.Since).Hours() != 1 {
		t.Errorf("%s, custody %+v", m.State, m.Custody)
	}
	if got := r.archive("web/crash-1"); got != "t/d/\nt/d/x\nt/f\nt/l\nt/sparse\n" {
		t.Errorf("archive:\n%s", got)
	}
	p := r.postmortem("web/crash")
	if p.Verdict != "It was killed by signal 11 (SIGSEGV), because of a bad access to memory." || p.Manifest.Exit.Code != 139 || !p.Custody.Held {
		t.Errorf("postmortem: %+v", p)
	}
	if l := p.Manifest.Log.Lines; len(l) != 2 || l[0].Text != "starting" || l[1].Stream != "stderr" {
		t.Errorf("last words %+v", l)
	}
	if s := p.Manifest.Samples; s == nil || len(s.UnixMs) == 0 {
		t.Error("nothing was measured")
	}
	if ps := r.ok("ps"); !strings.Contains(ps, "TMPFS") || !strings.Contains(ps, "held 59m") {
		t.Errorf("ps:\n%s", ps)
	}
	r.pages("web/crash", "SIGSEGV", "/t/p", "sandboxd cp web/crash:PATH .")

	// Nothing was asked for: a failure leaves a manifest, a success nothing.
	r.run("web", "fails", "echo bye; exit 3")
	r.collected("web/fails")
	if p := r.postmortem("web/fails"); p.Verdict != "It ended by itself, with code 3." || p.Manifest.Archive != nil || p.Manifest.Name != "web/fails-1" {
		t.Errorf("postmortem of a failure: %+v", p)
	}
	if m := r.member("web/fails"); m.State != "Exited" {
		t.Errorf("a member without collectors is %s", m.State)
	}
	r.run("web", "works", "echo done")
	r.exited("web/works")
	if p := r.postmortem("web/works"); p.Verdict != "It ended well, with code 0." || p.Manifest.Name != "" || len(p.Manifest.Log.Lines) != 1 {
		t.Errorf("postmortem of a success: %+v", p)
	}
	r.run("web", "runs", "sleep 1000")
	if p := r.postmortem("web/runs"); p.Verdict != "It is running." || !p.Custody.Held {
		t.Errorf("postmortem of one that runs: %+v", p)
	}

	// For memory. What it needs it holds in a variable.
	r.run("web", "oom", "x=x; while :; do x=$x$x; done", "--memory", "16m", "--collect", "/etc/passwd,on=oom", "--collect", "/etc/group,on=signal", "--collect", "/none,on=always")
	if got := r.archive(r.collected("web/oom")); got != "etc/passwd\netc/group\n" {
		t.Errorf("after a kill for memory: %q", got)
	}
	p = r.postmortem("web/oom")
	if c := p.Manifest.Counters.Memory; !p.Manifest.Exit.OOMKilled || c.LimitBytes != 16<<20 || c.OOMKills == 0 || !strings.Contains(p.Verdict, "more memory than its limit of 16.0 MiB") {
		t.Errorf("postmortem of one killed for memory: %+v", p)
	}

	// Whose condition is not met, and who wants nothing to be held.
	r.run("web", "calm", "exit 0", "--collect", "/etc/passwd,on=failure", "--custody", "never")
	r.eventually("nothing of calm is held", func() bool { m := r.member("web/calm"); return m.State == "Collected" && m.MonitorPID == 0 })
	if m := r.member("web/calm"); m.Collection != "" || m.Custody.Released == nil || !strings.HasPrefix(m.Custody.Released.Reason, "policy: ") {
		t.Errorf("calm: collection %q, custody %+v", m.Collection, m.Custody)
	}

	// One that removes itself is collected before, and can be asked about afterwards.
	r.ok("run", "web", "--rootfs", r.rootfs, "--name", "goes", "--rm", "-d", "--collect", "/etc/passwd", "--", "sh", "-c", "echo gone; exit 9")
	r.eventually("goes is gone", func() bool { return r.cli("inspect", "web/goes").code != 0 })
	if p := r.postmortem("web/goes"); p.Manifest.Exit.Code != 9 || p.Custody.Held || p.Custody.Why != "the member has been removed" || p.Manifest.Archive.Entries != 1 {
		t.Errorf("postmortem of one that is gone: %+v", p)
	}
	r.ok("run", "web", "--rootfs", r.rootfs, "--name", "goes", "--rm", "-d", "--", "sh", "-c", "exit 8")
	r.eventually("goes is gone again", func() bool {
		return r.cli("inspect", "web/goes").code != 0 && r.postmortem("web/goes").Manifest.Exit.Code == 8
	})
	if p := r.postmortem("web/goes-1"); p.Manifest.Exit.Code != 9 {
		t.Errorf("postmortem of the one before: %+v", p)
	}

	// The directory, without a daemon.
	r.kill()
	if ls := r.ok("collected", "ls", "-q"); ls != "web/crash-1\nweb/fails-1\nweb/oom-1\nweb/goes-1\nweb/goes-2" {
		t.Errorf("collected ls: %q", ls)
	}
	if ls := r.ok("collected", "ls"); !strings.Contains(ls, "137, out of memory") || !strings.Contains(ls, "139, SIGSEGV") {
		t.Errorf("collected ls:\n%s", ls)
	}
	if show := r.ok("collected", "show", "web/fails-1"); !strings.Contains(show, "bye") {
		t.Errorf("collected show:\n%s", show)
	}
	file := filepath.Join(t.TempDir(), "x.tar")
	r.ok("collected", "export", "web/crash-1", file)
	if out, err := exec.Command("tar", "-tf", file).CombinedOutput(); err != nil || string(out) != "web/crash-1/manifest.json\nweb/crash-1/files.tar.zst\n" {
		t.Errorf("exported: %q, %v", out, err)
	}
	r.fails(125, "file exists", "collected", "export", "web/crash-1", file)
	r.fails(125, "no such collection: web/none-1", "collected", "rm", "web/fails-1", "web/none-1")
	r.fails(125, "no such collection: web/fails-1", "collected", "show", "web/fails-1")
	r.fails(125, "SANDBOX/MEMBER-N", "collected", "export", "../etc/passwd-1", file+"2")
	r.fails(125, "nothing was collected of it", "postmortem", "web/never")
	r.fails(125, "nothing was collected of it", "postmortem", "../web")
	r.fails(125, "there is no collection directory /nonexistent", "collected", "ls", "--collect-dir", "/nonexistent")
	// Of what has been removed by hand, much is still known.
	if p := r.postmortem("web/fails"); p.Manifest.Exit.Code != 3 || p.Manifest.Name != "" {
		t.Errorf("postmortem without its collection: %+v", p)
	}
	r.mustServe()
	r.ok("rm", "-f", "web")
}

// pages checks that the text and the HTML page of a postmortem say all of want.
func (r *rig) pages(ref string, want ...string) {
	r.Helper()
	text, html := r.ok("postmortem", ref), r.ok("postmortem", "-o", "html", ref)
	for _, w := range want {
		if !strings.Contains(text, w) {
			r.Errorf("the page does not say %q:\n%s", w, text)
		}
		if !strings.Contains(html, w) {
			r.Errorf("the HTML page does not say %q", w)
		}
	}
}

// Who exits while no daemon runs is collected by the next one, with what was in
// memory.
func TestCollectedByTheNextDaemon(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	testenv.Program(t, "zstd")
	r.mustServe()
	r.ok("create", "web")
	r.run("web", "m", `trap "echo late >/t/f; exit 5" TERM; while :; do sleep 0.02; done`, "--tmpfs", "/t", "--collect", "/t")
	m := r.member("web/m")
	r.catches(m.PID, unix.SIGTERM)
	r.kill()
	r.sig(m.PID, unix.SIGTERM)
	r.gone(m.PID)
	if p := r.postmortem("web/m"); p.Manifest.Exit.Code != 5 || p.Manifest.Name != "" {
		t.Errorf("without a daemon: %+v", p)
	}
	r.mustServe()
	if got := r.archive(r.collected("web/m")); got != "t/\nt/f\n" {
		t.Errorf("archive: %q", got)
	}
	r.ok("rm", "-f", "web")
}

// Who kills a monitor ends custody, but takes nothing away from a collection that is
// being made.
func TestCollectAfterTheMonitorIsKilled(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	testenv.Program(t, "zstd")
	testenv.Kernel(t, testenv.FUSE)
	dir := t.TempDir()
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	slow := filepath.Join(dir, "slow")
	if err := errors.Join(os.Mkdir(slow, 0o700), testenv.MountFUSE(dev, slow)); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(slow, unix.MNT_DETACH)
	r.mustServe()
	r.ok("create", "web")
	r.run("web", "m", "echo kept >/t/f; exit 5", "--tmpfs", "/t", "-v", dir+":/v", "--collect", "/v/slow", "--collect", "/t")
	r.exited("web/m")
	r.eventually("the archive has been begun", func() bool {
		found, _ := filepath.Glob(filepath.Join(r.d.root, "collected/.tmp-*/files.tar.zst"))
		return len(found) == 1
	})
	m := r.member("web/m")
	r.sig(m.MonitorPID, unix.SIGKILL)
	r.gone(m.MonitorPID)
	dev.Close() // what waits gets an error now
	if got := r.archive(r.collected("web/m")); got != "t/\nt/f\n" {
		t.Errorf("archive: %q", got)
	}
	p := r.postmortem("web/m")
	if f := p.Manifest.Files; p.Manifest.Exit.Code != 5 || len(f) != 3 || f[0].Path != "/v/slow" || f[0].Taken || f[0].Why == "" {
		t.Errorf("%+v", p.Manifest)
	}
	r.ok("rm", "-f", "web")
}

// The kernel writes a core to where a process works.
func TestCollectKernelCore(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	testenv.Program(t, "zstd")
	testenv.Kernel(t, testenv.CoreFile)
	r.mustServe()
	r.ok("create", "web")
	r.run("web", "m", `ulimit -c unlimited; sleep 1000 & kill -SEGV $!; wait; exit 1`, "--tmpfs", "/w", "-w", "/w", "--collect", "/w/*")
	name := r.collected("web/m")
	b, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	prefix, _, _ := strings.Cut(strings.TrimSpace(string(b)), "%")
	if got := r.archive(name); !strings.Contains(got, "w/"+prefix) {
		t.Errorf("archive: %q, without a core", got)
	}
	r.ok("rm", "-f", "web")
}

// A full disk loses files, and neither the manifest nor the exit.
func TestCollectOnAFullDisk(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	r.d.flags = []string{"--collect-dir", dir}
	r.mustServe()
	r.ok("create", "web")
	const leave = "head -c 2000000 /dev/urandom >/t/f; echo said; exit 4"
	r.run("web", "a", leave, "--tmpfs", "/t", "--collect", "/t/f")
	r.collected("web/a")
	if err := os.WriteFile(filepath.Join(dir, "full"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	r.run("web", "b", leave, "--tmpfs", "/t", "--collect", "/t/f")
	r.collected("web/b")
	for _, name := range []string{"a", "b"} {
		p := r.postmortem("web/" + name)
		if p.Manifest.Exit.Code != 4 || p.Manifest.Archive == nil || p.Manifest.Archive.Error != "no space left on device" || len(p.Manifest.Log.Lines) != 1 {
			t.Errorf("%s: %+v", name, p.Manifest)
		}
		if m := r.member("web/" + name); m.State != "Collected" || !m.Custody.Held {
			t.Errorf("%s is %s, custody %+v", name, m.State, m.Custody)
		}
	}
	r.kill()
	r.mustServe()
	r.ok("rm", "-f", "web")
}

// Room is made by successes before failures; what one member may take is bounded.
func TestCollectQuota(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.d.flags = []string{"--collect-max-total", "300k"}
	r.mustServe()
	r.ok("create", "web")
	for i, code := range []int{1, 0, 2, 0, 3} {
		name := "m" + strconv.Itoa(i)
		r.run("web", name, "head -c 61440 /dev/urandom >/t/f; exit "+strconv.Itoa(code), "--tmpfs", "/t", "--collect", "/t/f,max=1m")
		r.collected("web/" + name)
	}
	if ls := r.ok("collected", "ls", "-q"); ls != "web/m0-1\nweb/m2-1\nweb/m4-1" {
		t.Errorf("what is left: %q", ls)
	}
	r.ok("rm", "-f", "web")
}

func TestCustodyIsEnded(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.d.flags = []string{"--custody-max", "2", "--custody-max-tmpfs", "3m"}
	r.mustServe()
	r.ok("create", "web")
	released := func(ref, reason string) {
		t.Helper()
		r.eventually(ref+" is not held", func() bool { m := r.member(ref); return m.Custody.Released != nil && m.MonitorPID == 0 })
		m := r.member(ref)
		if m.Custody.Held || !strings.HasPrefix(m.Custody.Released.Reason, reason+": ") || m.Exit == nil || m.Root != "" {
			t.Errorf("%s: %+v", ref, m)
		}
		r.fails(125, "nothing of it is held (custody has ended, "+reason+": ", "cp", ref+":/etc/passwd", t.TempDir())
		if p := r.postmortem(ref); p.Custody.Held || !strings.Contains(p.Custody.Why, reason+": ") {
			t.Errorf("postmortem of %s: %+v", ref, p.Custody)
		}
	}
	r.run("web", "short", "exit 1", "--custody-ttl", "1ms")
	released("web/short", "ttl")
	r.run("web", "a", "exit 1")
	r.collected("web/a")
	// An hour of the clock of somebody else: it counts from the record, whoever the daemon is.
	r.run("web", "b", "exit 1", "--custody-ttl", "1h")
	r.collected("web/b")
	r.run("web", "c", "exit 1")
	released("web/a", "max")
	for _, name := range []string{"d", "e"} {
		r.run("web", name, "head -c 2097152 /dev/zero >/t/f; exit 1", "--tmpfs", "/t")
		r.collected("web/" + name)
	}
	released("web/d", "tmpfs")
	if m := r.member("web/e"); !m.Custody.Held || m.Custody.TmpfsBytes != 2<<20 {
		t.Errorf("e: %+v", m.Custody)
	}
	// In a user namespace too, and there as well what the sandbox holds counts for nobody.
	r.ok("create", "users", "--share", "net,ipc,uts,user")
	r.run("users", "m", "head -c 1048576 /dev/zero >/t/f; echo >/dev/shm/f; exit 1", "--tmpfs", "/t", "--tmpfs", "/home/a/b")
	r.collected("users/m")
	if m := r.member("users/m"); m.Custody.TmpfsBytes != 1<<20 {
		t.Errorf("in a user namespace: %+v", m.Custody)
	}
	if ms := r.postmortem("users/m").Custody.Mounts; len(ms) != 5 || ms[4].Target != "/home/a/b" {
		t.Errorf("in a user namespace: %+v", ms)
	}
	r.ok("rm", "-f", "users")
	var events []string
	for line := range strings.Lines(r.ok("events", "-o", "json", "--filter", "type=custody")) {
		var e struct {
			MemberName, Reason string
			Attrs              map[string]string
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if word, _, _ := strings.Cut(e.Reason, ":"); e.Attrs["action"] == "released" {
			events = append(events, e.MemberName+" "+word)
		}
	}
	if got := strings.Join(events, ", "); !strings.HasPrefix(got, "short ttl, a max, ") || !strings.Contains(got, "d tmpfs") {
		t.Errorf("events: %s", got)
	}
	r.ok("rm", "-f", "web")
}
