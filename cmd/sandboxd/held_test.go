package main

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/statefile"
	"github.com/sandboxd/sandboxd/sandbox"
)

// TestTargets: what comes from the host, or from the sandbox, is not what a dead
// member holds, nor is what is hidden by it.
func TestTargets(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	bind := func(to string) specs.Mount {
		return specs.Mount{Destination: to, Type: "bind", Source: "/src", Options: []string{"rbind"}}
	}
	tmpfs := func(to string) specs.Mount { return specs.Mount{Destination: to, Type: "tmpfs", Source: "tmpfs"} }
	spec := specs.Spec{Mounts: []specs.Mount{
		{Destination: "/proc", Type: "proc"}, tmpfs("/dev"), tmpfs("/dev/shm"), tmpfs("/own/"), tmpfs("/a/b"), tmpfs("/c"), tmpfs("/ab"),
		bind("/a"), bind("/c"), {Destination: "/d", Source: "/src", Options: []string{"bind"}},
	}}
	if err := statefile.Write(root, "config.json", spec); err != nil {
		t.Fatal(err)
	}
	m := &sandbox.MemberRecord{Namespaces: namespace.Selection{namespace.IPC: {From: namespace.Sandbox}}}
	want := []collect.Target{
		{Path: "/dev", From: "private", Tmpfs: true}, {Path: "/dev/shm", From: "sandbox", Tmpfs: true}, {Path: "/own", From: "private", Tmpfs: true},
		{Path: "/ab", From: "private", Tmpfs: true}, {Path: "/a", From: "host"}, {Path: "/c", From: "host"}, {Path: "/d", From: "host"},
	}
	if d := cmp.Diff(want, targets(m, dir)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if d := cmp.Diff([]string{"/dev", "/own", "/ab"}, tmpfsTargets(m, dir)); d != "" {
		t.Errorf("counted, -want +got:\n%s", d)
	}
	m.Namespaces[namespace.IPC] = namespace.Source{From: namespace.Private}
	if d := cmp.Diff([]string{"/dev", "/dev/shm", "/own", "/ab"}, tmpfsTargets(m, dir)); d != "" {
		t.Errorf("counted of one with an ipc namespace of its own, -want +got:\n%s", d)
	}
}

func TestWhyNotHeld(t *testing.T) {
	failed, fine := &sandbox.Exit{Known: true, Code: 1}, &sandbox.Exit{Known: true}
	for want, m := range map[string]*sandbox.MemberRecord{
		"its monitor was killed":          {Exit: fine, Config: sandbox.MemberConfig{Custody: request.CustodyAlways}},
		"its custody is never":            {Exit: failed, Config: sandbox.MemberConfig{Custody: request.CustodyNever}},
		"its custody is failure":          {Exit: fine, Config: sandbox.MemberConfig{Custody: request.CustodyFailure}},
		"custody has ended, ttl: 1s over": {Exit: fine, Released: &sandbox.CustodyRelease{Reason: "ttl: 1s over"}},
	} {
		if got := whyNotHeld(m); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	// What was declared needs the root whatever the policy says, as does a failure.
	for _, c := range []sandbox.MemberConfig{
		{Custody: request.CustodyNever, Collect: []request.Collect{{Path: "/x"}}}, {Custody: request.CustodyFailure},
	} {
		if got := whyNotHeld(&sandbox.MemberRecord{Exit: failed, Config: c}); got != "its monitor was killed" {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
