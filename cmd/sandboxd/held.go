package main

import (
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/statefile"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// HeldTmpfs implements [sandbox.StatusReader].
func (statusReader) HeldTmpfs(m *sandbox.MemberRecord, dir string) int64 {
	return heldTmpfs(m, tmpfsTargets(m, dir))
}

func heldTmpfs(m *sandbox.MemberRecord, targets []string) int64 {
	if len(targets) == 0 {
		return 0
	}
	root, err := member.OpenRoot(m.Monitor)
	if err != nil {
		return 0
	}
	defer root.Close()
	return collect.Tmpfs(root, targets)
}

// HeldTmpfs implements [sandbox.MemberNode]. What is mounted where is read once:
// this is on the way of every list.
func (n *node) HeldTmpfs(m *sandbox.MemberRecord, dir string) int64 {
	t, ok := n.targets.Load(m.ID)
	if !ok {
		t = tmpfsTargets(m, dir)
		n.targets.Store(m.ID, t)
	}
	return heldTmpfs(m, t.([]string))
}

// specMounts returns the mounts of the configuration that a member was made from,
// whose directory is dir.
func specMounts(dir string) []specs.Mount {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil
	}
	defer root.Close()
	var spec specs.Spec
	if err := statefile.Read(root, "config.json", &spec); err != nil {
		return nil
	}
	return spec.Mounts
}

// targets returns where something is mounted in a member's root by its
// configuration, and whose it is. What a privileged member has mounted by itself is
// not among them, nor is what a later mount hides, or what the kernel makes up.
func targets(m *sandbox.MemberRecord, dir string) []collect.Target {
	mounts := specMounts(dir)
	hidden := func(i int, to string) bool {
		return slices.ContainsFunc(mounts[i+1:], func(later specs.Mount) bool {
			over := path.Clean(later.Destination)
			return to == over || strings.HasPrefix(to, strings.TrimSuffix(over, "/")+"/")
		})
	}
	out := []collect.Target{}
	for i, mt := range mounts {
		t := collect.Target{Path: path.Clean(mt.Destination), From: string(namespace.Private), Tmpfs: mt.Type == "tmpfs"}
		switch {
		case hidden(i, t.Path):
			continue
		case t.Tmpfs && t.Path == "/dev/shm" && m.Namespaces[namespace.IPC].From == namespace.Sandbox:
			t.From = string(namespace.Sandbox) // pause holds it
		case mt.Type == "bind", slices.Contains(mt.Options, "bind"), slices.Contains(mt.Options, "rbind"):
			t.From, t.Tmpfs = string(namespace.Host), false
		case !t.Tmpfs:
			continue
		}
		out = append(out, t)
	}
	return out
}

// tmpfsTargets returns where a member has file systems in memory that it alone holds.
func tmpfsTargets(m *sandbox.MemberRecord, dir string) []string {
	out := []string{}
	for _, t := range targets(m, dir) {
		if t.Tmpfs && t.From == string(namespace.Private) {
			out = append(out, t.Path)
		}
	}
	return out
}
