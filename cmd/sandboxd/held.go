package main

import (
	"os"
	"path"

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

// tmpfsTargets returns where a member has file systems in memory that are its own:
// those of its configuration. What a privileged member has mounted by itself is
// not among them, nor is the sandbox's /dev/shm, which pause holds.
func tmpfsTargets(m *sandbox.MemberRecord, dir string) []string {
	targets := []string{}
	shared := m.Namespaces[namespace.IPC].From == namespace.Sandbox
	for _, mt := range specMounts(dir) {
		to := path.Clean(mt.Destination)
		if mt.Type == "tmpfs" && !(shared && to == "/dev/shm") {
			targets = append(targets, to)
		}
	}
	return targets
}
