//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"

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

// hooked asks for hooks of a scene at these stages.
func (r *rig) hooked(stages ...string) []string {
	r.Helper()
	script := fmt.Sprintf("#!/bin/sh\nin=$(cat)\nprintf '%%s\\n' \"$in\" >> %s\n", r.hookFile())
	if err := os.WriteFile(r.d.root+".hook", []byte(script), 0o755); err != nil {
		r.Fatal(err)
	}
	return hookFlags(r.d.root+".hook", stages...)
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
					if h.State == "running" && h.Stage != "prestart" && h.Stage != "prestop" {
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
