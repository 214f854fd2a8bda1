//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hookScenes are scenes with hooks at every stage. Each hook appends what it is
// told to one file.
var hookScenes = []scene{
	{
		name:   "hooks of a member's beginning",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		act: func(r *rig) {
			r.cli(long(r, "run", "box", "m", r.hooked("createRuntime", "createContainer", "postcreate", "prestart", "poststart")...)...)
		},
		after: hookedOnce,
		points: []string{
			"hook createRuntime before", "hook createContainer after", "hook postcreate result after", "hook prestart before", "hook prestart after",
			"hook poststart before", "hook poststart result after",
		},
	},
	{
		name:   "OCI hooks of a member's beginning",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		act: func(r *rig) {
			hooks := r.hooked("oci-prestart", "startContainer") // this one is run in the member
			for _, file := range []string{r.hookProgram(), r.hookFile()} {
				hooks = append(hooks, "-v", file+":"+file)
			}
			r.cli(long(r, "run", "box", "m", hooks...)...)
		},
		after: hookedOnce,
		points: []string{
			"hook oci-prestart before", "hook oci-prestart after", "hook oci-prestart result after",
			"hook startContainer before", "hook startContainer after", "hook startContainer result after", "start execve before",
		},
	},
	{
		name:   "a hook of a member's beginning that fails",
		before: func(r *rig) { r.mustServe(); r.ok("create", "box") },
		act: func(r *rig) {
			hooks := r.hooked("predelete")
			fails := filepath.Join(r.TempDir(), "fails")
			if err := os.WriteFile(fails, []byte("#!/bin/sh\n"+r.hookProgram()+"\nexit 1\n"), 0o755); err != nil {
				r.Fatal(err)
			}
			r.cli(long(r, "run", "box", "m", append(hooks, hookFlags(fails, "postcreate")...)...)...)
		},
		after: hookedOnce,
		points: []string{
			"hook postcreate before", "hook postcreate result after", "hook predelete before", "hook predelete after", "hook predelete result after",
			"add-undo monitor before", "add-undo member record after",
		},
	},
	{
		name: "hooks of a member's end",
		before: func(r *rig) {
			r.mustServe()
			r.ok("create", "box")
			r.ok(long(r, "run", "box", "m", r.hooked("prestop", "poststop", "predelete", "oci-poststop")...)...)
			r.catches(r.member("box/m").PID, unix.SIGTERM)
		},
		act: func(r *rig) {
			r.cli("stop", "box/m")
			r.untilDeadOr(func() bool { return r.member("box/m").State == "Collected" })
			r.cli("rm", "box/m")
		},
		after: hookedOnce,
		points: []string{
			"hook prestop after", "hook poststop before", "hook poststop after", "hook poststop result after", "poststop record after",
			"hook predelete after", "hook oci-poststop before", "hook oci-poststop result after", "remove member record after",
		},
	},
	{
		name: "hooks of a sandbox",
		act: func(r *rig) {
			r.cli(append([]string{"create", "box"}, r.hooked("postcreate", "prestop", "poststop", "predelete")...)...)
			r.cli("stop", "box")
			r.cli("rm", "box")
		},
		after: hookedOnce,
		points: []string{
			"hook postcreate before", "hook postcreate result after", "hook prestop after", "hook poststop before", "hook poststop after",
			"hook predelete result after", "remove record after",
		},
	},
}

// hookFile is what the hooks of a scene append to.
func (r *rig) hookFile() string { return r.d.root + ".hooked" }

// hookProgram is what they are.
func (r *rig) hookProgram() string { return r.d.root + ".hook" }

// hooked asks for hooks of a scene at these stages.
func (r *rig) hooked(stages ...string) []string {
	r.Helper()
	script := fmt.Sprintf("#!/bin/sh\nin=$(cat)\nprintf '%%s\\n' \"$in\" >> %s\n", r.hookFile())
	if err := os.WriteFile(r.hookProgram(), []byte(script), 0o755); err != nil {
		r.Fatal(err)
	}
	if err := os.WriteFile(r.hookFile(), nil, 0o600); err != nil {
		r.Fatal(err)
	}
	return hookFlags(r.hookProgram(), stages...)
}

// hookedOnce checks that no hook was run again after it had succeeded, and that
// those that follow an exit have been run.
func hookedOnce(r *rig) {
	r.Helper()
	// What was under way goes on behind the daemon's readiness.
	r.eventually("what was begun is finished", func() bool {
		for _, box := range r.list() {
			if box.State == "Deleting" || box.State == "Creating" {
				return false
			}
			for _, h := range box.Hooks {
				if h.State == "running" && h.Stage != "prestop" { // that of a stop that was cut off
					return false
				}
			}
			for _, m := range box.Members {
				if m.State == "Deleting" || m.State == "Creating" {
					return false
				}
				for _, h := range m.Hooks {
					// Those of a start or stop that was cut off wait for the next one.
					if h.State == "running" && h.Stage != "prestart" && h.Stage != "startContainer" && h.Stage != "prestop" {
						return false
					}
				}
				if declared := len(m.Hooks) > 0 && m.Hooks[0].Stage == "prestop"; declared && m.State == "Exited" {
					return false
				}
			}
		}
		return true
	})
	attempts := map[string][]int{}
	for _, in := range r.inputs(r.hookFile()) {
		stage := in.Sandboxd.Stage
		if stage == "poststop" && in.Sandboxd.Member != nil && in.Sandboxd.Member.MonitorPID == 0 {
			stage = "oci-poststop"
		}
		k := stage + " of " + in.ID
		attempts[k] = append(attempts[k], in.Sandboxd.Attempt)
	}
	for k, got := range attempts {
		stage, _, _ := strings.Cut(k, " ")
		switch {
		case slices.Equal(got, []int{1}):
		case slices.Equal(got, []int{2}) && r.dies == "hook "+stage+" before":
		case slices.Equal(got, []int{1, 2}) && r.dies == "hook "+stage+" after":
		default:
			r.Errorf("hook %s was run as attempts %v; the daemon died at %q", k, got, r.dies)
		}
	}
}

// TestHookCutOff kills the daemon while a hook runs. The next daemon ends the hook, and
// runs it again if its operation goes on.
func TestHookCutOff(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "attempts")
	h := r.script("#!/bin/sh\njq .sandboxd.attempt >> " + file + "\nwhile [ \"$(tail -n 1 " + file + ")\" = 1 ]; do sleep 0.05; done\n")
	attempts := func() string {
		b, err := os.ReadFile(file)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return strings.Join(strings.Fields(string(b)), " ")
	}
	none := func(*rig) {}
	create := func(r *rig) { r.ok("create", "box") }
	for _, tt := range []struct {
		stage   string
		sandbox bool // the hook is the sandbox's
		before  func(*rig)
		act     []string // the hook's flags are put behind these if before does not use them
		want    string
	}{
		{stage: "oci-prestart", before: create, want: "1"},
		{stage: "createRuntime", before: create, want: "1"},
		{stage: "createContainer", before: create, want: "1"},
		{stage: "postcreate", before: create, want: "1"},
		{stage: "prestart", before: create, want: "1"},
		{stage: "poststart", before: create, want: "1 2"},
		{stage: "prestop", before: create, act: []string{"stop", "box/m"}, want: "1"},
		{stage: "poststop", before: create, act: []string{"stop", "box/m"}, want: "1 2"},
		{stage: "predelete", before: create, act: []string{"rm", "-f", "box/m"}, want: "1 2"},
		{stage: "oci-poststop", before: create, act: []string{"rm", "-f", "box/m"}, want: "1 2"},
		{stage: "postcreate", sandbox: true, before: none, want: "1"},
		{stage: "prestop", sandbox: true, before: none, act: []string{"stop", "box"}, want: "1"},
		{stage: "poststop", sandbox: true, before: none, act: []string{"stop", "box"}, want: "1 2"},
		{stage: "predelete", sandbox: true, before: none, act: []string{"rm", "box"}, want: "1 2"},
	} {
		what := fmt.Sprintf("%s, of the sandbox %v", tt.stage, tt.sandbox)
		r.mustServe()
		tt.before(r)
		begin := append([]string{"create", "box"}, hookFlags(h, tt.stage)...)
		if !tt.sandbox {
			begin = long(r, "run", "box", "m", hookFlags(h, tt.stage)...)
		}
		act := tt.act
		if act == nil {
			act = begin
		} else {
			r.ok(begin...)
			if !tt.sandbox {
				r.catches(r.member("box/m").PID, unix.SIGTERM)
			}
		}
		client := r.command(act...)
		if err := client.Start(); err != nil {
			t.Fatal(err)
		}
		r.eventually("a hook begins: "+what, func() bool { return attempts() == "1" })
		if running(t, h) == 0 {
			t.Errorf("%s: no hook runs, which shows that this test does not see them", what)
		}
		r.kill()
		client.Wait()
		r.mustServe()
		if n := running(t, h); n != 0 && tt.want == "1" {
			t.Errorf("%s: it goes on, and is not wanted any more", what)
		}
		r.eventually("what was begun is finished: "+what, func() bool { return attempts() == tt.want && running(t, h) == 0 })
		if r.cli("inspect", "box").code == 0 {
			r.cli("rm", "-f", "box") // a removal may be under way
			r.eventually("box is gone", func() bool { return r.cli("inspect", "box").code != 0 })
		}
		r.kill()
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	r.mustServe()
	r.sound()
}

// running counts the processes that run the script at path, subshells too.
func running(t *testing.T, path string) (n int) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		// It may have ended meanwhile.
		if b, err := os.ReadFile(d + "/cmdline"); err == nil && string(b) == "/bin/sh\x00"+path+"\x00" {
			n++
		}
	}
	return n
}
