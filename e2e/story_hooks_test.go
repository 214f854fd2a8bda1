//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/hook"
	"github.com/sandboxd/sandboxd/internal/testenv"
	"github.com/sandboxd/sandboxd/sandbox"
)

// hookSchema is read when it is needed: this binary also runs inside of members.
var hookSchema = sync.OnceValue(func() *jsonschema.Schema {
	s, err := jsonschema.NewCompiler().Compile("../docs/hooks/input.schema.json")
	if err != nil {
		panic(err)
	}
	return s
})

// recorder makes a hook that appends what it reads, as one line, to the file that it
// returns too. more is shell, run before.
func (r *rig) recorder(more string) (hook, file string) {
	r.Helper()
	dir := r.TempDir()
	file = filepath.Join(dir, "inputs")
	script := fmt.Sprintf("#!/bin/sh\nin=$(cat)\n%s\nprintf '%%s\\n' \"$in\" >> %s\n", more, file)
	return r.script(script), file
}

// script makes a program of a shell script.
func (r *rig) script(text string) string {
	r.Helper()
	path := filepath.Join(r.TempDir(), "hook")
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		r.Fatal(err)
	}
	return path
}

// inputs reads what a recorder has recorded. Each must be as the schema says.
func (r *rig) inputs(file string) []hook.Input {
	r.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		r.Fatal(err)
	}
	var ins []hook.Input
	for line := range bytes.Lines(b) {
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(line))
		if err == nil {
			err = hookSchema().Validate(v)
		}
		var in hook.Input
		if err == nil {
			err = json.Unmarshal(line, &in)
		}
		if err != nil {
			r.Fatalf("hook input %s: %v", line, err)
		}
		ins = append(ins, in)
	}
	return ins
}

func stages(ins []hook.Input) (s []string) {
	for _, in := range ins {
		s = append(s, in.Sandboxd.Stage)
	}
	return s
}

// hookFlags asks for a hook at each of the stages.
func hookFlags(hook string, stages ...string) (flags []string) {
	for _, s := range stages {
		flags = append(flags, "--hook", s+"="+hook)
	}
	return flags
}

// gotHooks are a member's or sandbox's hooks, as "stage state code".
func gotHooks(runs []sandbox.HookRun) (s []string) {
	for _, h := range runs {
		s = append(s, fmt.Sprintf("%s %s %d", h.Stage, h.State, h.Code))
	}
	return s
}

// settled waits until what follows a member's exit is done.
func (r *rig) settled(ref string) sandbox.MemberInfo {
	r.Helper()
	var m sandbox.MemberInfo
	r.eventually(ref+" is collected", func() bool { m = r.member(ref); return m.State == "Collected" })
	return m
}

// Each stage is run once, at its moment, and told what the schema says.
func TestStoryHooks(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	h, file := r.recorder("echo said")
	boxStages := []string{"postcreate", "prestop", "poststop", "predelete"}
	memberStages := []string{
		"oci-prestart", "createRuntime", "createContainer", "postcreate", "prestart", "poststart", "prestop", "poststop", "predelete", "oci-poststop",
	}
	r.ok(append([]string{"create", "box", "--label", "l=v", "--annotation", "a=b"}, hookFlags(h, boxStages...)...)...)
	r.run("box", "m", `trap "exit 7" TERM; while :; do sleep 0.1; done`, hookFlags(h, memberStages...)...)
	r.catches(r.member("box/m").PID, unix.SIGTERM)
	r.ok("stop", "box/m")
	m := r.settled("box/m")
	want := []string{"oci-prestart", "createRuntime", "createContainer", "postcreate", "prestart", "poststart", "prestop", "poststop"}
	for i, s := range want {
		want[i] = s + " succeeded 0"
	}
	if got := gotHooks(m.Hooks); !slices.Equal(got, want) || m.Hooks[0].Output != "said\n" {
		t.Errorf("hooks %q, want %q; output %q", got, want, m.Hooks[0].Output)
	}
	// Without the daemon the same is shown.
	r.kill()
	if again := r.member("box/m"); fmt.Sprint(again.Hooks) != fmt.Sprint(m.Hooks) {
		t.Errorf("without the daemon\n%+v, with it\n%+v", again.Hooks, m.Hooks)
	}
	r.mustServe()
	r.ok("rm", "box/m")
	r.ok("stop", "box")
	if got := gotHooks(r.sandbox("box").Hooks); !slices.Equal(got, []string{"postcreate succeeded 0", "prestop succeeded 0", "poststop succeeded 0"}) {
		t.Errorf("the sandbox's hooks %q", got)
	}
	r.ok("rm", "box")
	ins := r.inputs(file)
	wantStages := []string{
		"postcreate", "prestart", "createRuntime", "createContainer", "postcreate", "prestart", "poststart", "prestop", "poststop", "predelete", "poststop",
		"prestop", "poststop", "predelete",
	}
	if got := stages(ins); !slices.Equal(got, wantStages) {
		t.Fatalf("hooks were run at %q, want %q", got, wantStages)
	}
	status := []specs.ContainerState{"created", "creating", "creating", "creating", "created", "created", "running", "running", "stopped", "stopped", "stopped", "running", "stopped", "stopped"}
	for i, in := range ins {
		if in.Status != status[i] || in.Sandboxd.Attempt != 1 || in.Sandboxd.Sandbox.Labels["l"] != "v" || in.Annotations["a"] != "b" {
			t.Errorf("hook %d of stage %s was told %+v, want status %s", i, in.Sandboxd.Stage, in, status[i])
		}
	}
	if e := ins[8].Exit; e == nil || e.Code != 7 || ins[8].Sandboxd.Member.Root == "" || ins[3].Pid != 1 {
		t.Errorf("poststop was told %+v", ins[8])
	}
	h, file = r.recorder("")
	r.ok("create", "box", "--hook", "poststop="+h)
	r.run("box", "m", "sleep 1000", "--hook", "poststop="+h)
	r.ok("rm", "-f", "box") // without a stop
	if got := stages(r.inputs(file)); !slices.Equal(got, []string{"poststop", "poststop"}) {
		t.Errorf("a forced removal ran %q", got)
	}
}

// A poststop hook reads what a crashed member had in memory, and reaches its namespaces
// and the sandbox's network.
func TestPoststopHookReaches(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	out := filepath.Join(t.TempDir(), "out")
	h := r.script(`#!/bin/sh
in=$(cat)
get() { printf %s "$in" | jq -r "$1"; }
{
	cat "$(get .sandboxd.member.root)/scratch/file"
	nsenter --mount="$(get .sandboxd.member.namespaces.mnt)" /bin/busybox cat /scratch/file
	nsenter --net="$(get .sandboxd.sandbox.namespaces.net)" ip -o link show lo | grep -c LOOPBACK
} > ` + out + ` 2>&1
`)
	r.ok("create", "box")
	for _, custody := range []string{"always", "never"} { // either way it is there for the hook
		res := r.cli("run", "box", "--rootfs", r.rootfs, "--name", "m", "--tmpfs", "/scratch", "--custody", custody, "--hook", "poststop="+h, "--",
			"sh", "-c", "echo precious > /scratch/file; exit 9")
		if res.code != 9 {
			t.Fatal(res)
		}
		m := r.settled("box/m")
		b, _ := os.ReadFile(out)
		if lines := strings.Fields(string(b)); len(lines) != 3 || lines[0] != "precious" || lines[1] != "precious" || lines[2] != "1" {
			t.Errorf("custody %s: the hook saw %q; %+v", custody, b, m.Hooks)
		}
		r.eventually("custody is as asked", func() bool { return r.member("box/m").Custody.Held == (custody == "always") })
		r.ok("rm", "box/m")
	}
	r.ok("rm", "box")
}

// OCI's hooks at OCI's moments.
func TestStoryBundleHooks(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	bundle := t.TempDir()
	if out, err := exec.Command("cp", "-a", r.rootfs, bundle+"/rootfs").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	h, file := r.recorder("")
	inside := r.script("#!/bin/sh\nb=$(jq -r .bundle)\nmount -t tmpfs made $b/rootfs/mnt && echo mounted > $b/rootfs/mnt/file && ls $b/rootfs/proc/self/exe\n")
	if err := os.WriteFile(bundle+"/rootfs/bin/inside", []byte("#!/bin/sh\ncat >/dev/null; echo \"$0 $1 $K\" > /mnt/start; cat /proc/self/cgroup\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ociHooks := func(path string, args ...string) []specs.Hook {
		return []specs.Hook{{Path: path, Args: append([]string{path}, args...), Env: []string{"K=V"}}}
	}
	spec := specs.Spec{
		Version: "1.2.0", Root: &specs.Root{Path: "rootfs"}, Annotations: map[string]string{"of": "bundle"},
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", "cat /mnt/file /mnt/start"}, Env: []string{"PATH=/bin"}, Cwd: "/"},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: "mount"}, {Type: "pid"}}},
		Hooks: &specs.Hooks{
			//lint:ignore SA1019 deprecated, and used
			Prestart:      ociHooks(h),
			CreateRuntime: ociHooks(h), CreateContainer: ociHooks(inside),
			StartContainer: ociHooks("/bin/inside", "one"), Poststart: ociHooks(h), Poststop: ociHooks(h),
		},
	}
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bundle+"/config.json", b, 0o644); err != nil {
		t.Fatal(err)
	}
	r.ok("create", "box")
	res := r.cli("run", "box", "--bundle", bundle, "--name", "m")
	if res.code != 0 || res.out != "mounted\n/bin/inside one V\n" {
		t.Errorf("%v; %+v", res, r.member("box/m").Hooks)
	}
	// Its own limits are those of a program out of a member's root, seen from its cgroup namespace.
	if h := r.member("box/m").Hooks[3]; h.Stage != "startContainer" || !strings.Contains(h.Output, ":/") || strings.Contains(h.Output, "..") {
		t.Errorf("a startContainer hook is not in the member's cgroup: %+v", h)
	}
	if got := stages(r.inputs(file)); !slices.Equal(got, []string{"prestart", "createRuntime", "poststart"}) {
		t.Errorf("before the removal: %q", got)
	}
	r.ok("rm", "box/m")
	ins := r.inputs(file)
	last := ins[len(ins)-1]
	if len(ins) != 4 || last.Sandboxd.Stage != "poststop" || last.Status != "stopped" || last.Bundle != bundle || last.Sandboxd.Member.MonitorPID != 0 {
		t.Errorf("at the removal: %+v", last)
	}
	if left, err := os.ReadDir(bundle + "/rootfs/mnt"); err != nil || len(left) != 0 {
		t.Errorf("what a createContainer hook mounted shows on the host: %v, %v", left, err)
	}
	// One that fails undoes the creation.
	spec.Hooks = &specs.Hooks{CreateContainer: ociHooks("/bin/sh", "-c", "echo no luck; exit 5"), Poststop: ociHooks(h)}
	if b, err = json.Marshal(spec); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bundle+"/config.json", b, 0o644); err != nil {
		t.Fatal(err)
	}
	r.fails(125, "createContainer hook /bin/sh: exit code 5: no luck", "run", "box", "--bundle", bundle, "--name", "m")
	if ms := r.sandbox("box").Members; len(ms) != 0 || len(r.inputs(file)) != 5 {
		t.Errorf("after a creation that failed there are members %+v, and %d hooks were run", ms, len(r.inputs(file)))
	}
	r.ok("rm", "box")
}

func TestHooksDirectory(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	h, file := r.recorder("")
	dir := t.TempDir()
	put := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("a.json", fmt.Sprintf(`{"version":"1.0.0","hook":{"path":%q},"when":{"annotations":{"^dep$":"fluid"},"hasBindMounts":true},"stages":["poststop","sandbox-predelete"]}`, h))
	r.d.flags = []string{"--hooks-dir", dir + "/none", "--hooks-dir", dir}
	r.mustServe()
	if text := r.d.log.String(); !strings.Contains(text, `msg="No hooks directory yet" dir=`+dir+"/none") || strings.Count(text, "No hooks directory") != 1 {
		t.Errorf("the log: %s", text)
	}
	r.ok("create", "box", "--annotation", "dep=fluid dynamics")
	r.run("box", "without", "exit 0")
	r.run("box", "with", "exit 0", "-v", "/etc:/mnt:ro")
	r.settled("box/with")
	if m := r.exited("box/without"); m.Code != 0 || len(r.inputs(file)) != 1 || r.inputs(file)[0].Sandboxd.Member.Name != "with" {
		t.Errorf("hooks: %+v", r.inputs(file))
	}
	put("b.json", "{")
	r.fails(125, dir+"/b.json", "create", "other")
	r.fails(125, dir+"/b.json", "run", "box", "--rootfs", r.rootfs, "--", "true")
	if n := len(r.sandbox("box").Members); n != 2 || len(r.list()) != 1 {
		t.Errorf("a broken hook file leaves %d members", n)
	}
	r.ok("rm", "box")
}

// Hooks that do what hooks should not.
func TestUnrulyHooks(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	pids := filepath.Join(t.TempDir(), "pids")
	hangs := r.script("#!/bin/sh\nsetsid sleep 1000 & echo $! >> " + pids + "; echo hanging; sleep 1000\n")
	leaves := r.script("#!/bin/sh\n(setsid sleep 1000 & echo $! >> " + pids + ") ; echo left\n")
	floods := r.script("#!/bin/sh\nhead -c 100000000 /dev/zero | tr '\\0' x; echo end\n")
	r.run("box", "m", "exit 0", "--hook", "poststop="+hangs+",timeout=500ms,retries=1", "--hook", "poststop="+leaves, "--hook", "poststop="+floods,
		"--hook", "poststop="+hangs+",timeout=500ms,retries=1")
	m := r.settled("box/m")
	want := []string{"poststop failed -1", "poststop succeeded 0", "poststop succeeded 0", "poststop failed -1"}
	if got := gotHooks(m.Hooks); !slices.Equal(got, want) || m.Hooks[0].Failures != 2 || !strings.Contains(m.Hooks[0].Error, "timeout of 500ms") || m.Hooks[0].Output != "hanging\n" {
		t.Errorf("hooks %+v, want %q", m.Hooks, want)
	}
	if out := m.Hooks[2].Output; len(out) != 64<<10 || !strings.HasSuffix(out, "xend\n") || !m.Hooks[2].Truncated {
		t.Errorf("%d bytes of output are kept", len(out))
	}
	if l := r.list()[0].Members[0].Hooks; len(l) != 4 || l[2].Output != "" {
		t.Errorf("a list shows the output of hooks")
	}
	if p := r.postmortem("box/m").Hooks; len(p) != 4 || p[0].State != "failed" || p[0].Attempts != 2 || p[0].Output != "hanging" || p[0].Path != hangs ||
		len(p[2].Output) > 1000 || !strings.HasSuffix(p[2].Output, "xend") {
		t.Errorf("postmortem shows %+v", p)
	}
	b, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	var left []int
	for _, f := range strings.Fields(string(b)) {
		var pid int
		fmt.Sscan(f, &pid)
		left = append(left, pid)
	}
	for _, pid := range slices.Concat(left[:2], left[3:]) {
		r.gone(pid) // of those that were killed
	}
	if !pidRuns(left[2]) {
		t.Error("what a hook left running does not run, or was ended with another hook")
	}
	r.ok("rm", "box")
	r.gone(left[2])
}

// An exit while no daemon runs is followed by the hook, and one that was cut off
// with its daemon by another attempt.
func TestHookAndDeadDaemon(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	began := filepath.Join(t.TempDir(), "began")
	h, file := r.recorder("echo $$ >> " + began + "; [ $(printf %s \"$in\" | jq .sandboxd.attempt) -gt 1 ] || sleep 1000")
	r.ok("create", "box")
	r.run("box", "m", "sleep 1000", "--hook", "poststop="+h+",timeout=5m")
	pid := r.member("box/m").PID
	r.kill()
	r.sig(pid, unix.SIGKILL)
	r.gone(pid)
	r.mustServe()
	r.eventually("the hook has begun", func() bool { b, _ := os.ReadFile(began); return len(b) > 0 })
	if res := r.cli("wait", "box/m"); res.code != 137 { // it does not wait for the hook
		t.Error(res)
	}
	r.kill()
	r.mustServe()
	m := r.settled("box/m")
	if ins := r.inputs(file); len(ins) != 1 || ins[0].Sandboxd.Attempt != 2 || m.Hooks[0].Attempt != 2 || m.Hooks[0].Failures != 0 {
		t.Errorf("inputs %+v, results %+v", ins, m.Hooks)
	}
	b, _ := os.ReadFile(began)
	for _, f := range strings.Fields(string(b)) {
		var pid int
		fmt.Sscan(f, &pid)
		r.gone(pid)
	}
	r.ok("rm", "box")
}

// The samples do what they say.
func TestSampleHooks(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	for _, p := range []string{"jq", "curl", "nsenter", "flock"} {
		testenv.Program(t, p)
	}
	sample, err := filepath.Abs("../docs/hooks")
	if err != nil {
		t.Fatal(err)
	}
	uploads := make(chan string, 8)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		b, _ := io.ReadAll(q.Body)
		uploads <- fmt.Sprintf("%s %s %s", q.Method, q.URL.Path, b)
	}))
	defer server.Close()
	dir := t.TempDir()
	audit := ",arg=" + dir + "/audit"
	r.ok("create", "box")
	r.ok("run", "box", "--rootfs", r.rootfs, "--name", "m", "-d", "--tmpfs", "/scratch",
		"--hook", "prestop="+sample+"/heap-dump,arg=http://127.0.0.1:6060/heap,arg="+dir+"/heaps",
		"--hook", "poststop="+sample+"/upload-core,arg=/scratch,env=UPLOAD_URL="+server.URL,
		"--hook", "poststart="+sample+"/audit"+audit, "--hook", "poststop="+sample+"/audit"+audit, "--",
		"sh", "-c", `mkdir /www; echo the heap > /www/heap; echo a core > /scratch/core.1; ln -s /etc/passwd /scratch/core.2
			trap 'exit 6' TERM; busybox httpd -f -p 127.0.0.1:6060 -h /www & wait`)
	ref := r.member("box/m")
	r.eventually("the member serves", func() bool {
		return r.cli("exec", "box/m", "--", "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:6060/heap").out == "the heap\n"
	})
	r.ok("stop", "box/m")
	m := r.settled("box/m")
	for _, h := range m.Hooks {
		if h.State != sandbox.HookSucceeded {
			t.Errorf("%+v", h)
		}
	}
	name := "box-m-" + ref.ID
	if b, err := os.ReadFile(dir + "/heaps/" + name + ".heap"); err != nil || string(b) != "the heap\n" {
		t.Errorf("heap %q, %v", b, err)
	}
	if len(uploads) != 1 {
		t.Fatalf("%d files were uploaded", len(uploads))
	}
	if got := <-uploads; got != "PUT /"+name+"/core.1 a core\n" {
		t.Errorf("uploaded %q", got)
	}
	b, err := os.ReadFile(dir + "/audit")
	if lines := strings.Split(strings.TrimSpace(string(b)), "\n"); err != nil || len(lines) != 2 || !strings.Contains(lines[0], `"stage":"poststart"`) || !strings.Contains(lines[1], `"code":6,"reason":"Error"`) {
		t.Errorf("audit %q, %v", b, err)
	}
	// A directory that a member has exchanged for a link leads nowhere.
	r.run("box", "evil", "ln -s /etc /there", "--hook", "poststop="+sample+"/upload-core,arg=/there,env=UPLOAD_URL="+server.URL)
	if h := r.settled("box/evil").Hooks[0]; h.State != sandbox.HookFailed || !strings.Contains(h.Error, "link") || len(uploads) != 0 {
		t.Errorf("a link: %+v", h)
	}
	r.ok("rm", "box")
}

// The sample forgets the connections of the address that a sandbox had, and no others.
func TestFlushConntrackHook(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	testenv.Program(t, "jq")
	testenv.Program(t, "conntrack")
	sample, err := filepath.Abs("../docs/hooks/flush-conntrack")
	if err != nil {
		t.Fatal(err)
	}
	r.mustServe()
	r.ok("create", "--publish", "8080:80", "--hook", "poststop="+sample, "a")
	r.ok("create", "--publish", "8081:80", "b")
	r.web("a", "hello")
	r.web("b", "bonjour")
	if a, b := r.fetch("127.0.0.1:8080"), r.fetch("127.0.0.1:8081"); a != "hello\n" || b != "bonjour\n" {
		t.Fatalf("published ports answer %q, %q", a, b)
	}
	a, b := "src="+r.address("a")+" ", "src="+r.address("b")+" "
	if all := r.host("conntrack -L"); !strings.Contains(all, a) || !strings.Contains(all, b) {
		t.Fatalf("connections:\n%s", all)
	}
	r.ok("stop", "--time", "1s", "a")
	if h := r.sandbox("a").Hooks[0]; h.State != sandbox.HookSucceeded {
		t.Errorf("%+v", h)
	}
	if all := r.host("conntrack -L"); strings.Contains(all, a) || !strings.Contains(all, b) {
		t.Errorf("connections after the flush:\n%s", all)
	}
	r.ok("rm", "a")
	r.ok("rm", "-f", "b")
}
