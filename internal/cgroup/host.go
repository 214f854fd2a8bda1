// Package cgroup makes, limits, empties and removes the cgroups of sandboxes
// and members, on hosts with cgroup v2, v1, or both ("hybrid", where v1 has the
// controllers and v2 none).
//
// A cgroup is named by one absolute path, such as /sandboxd/SANDBOX/MEMBER,
// which is the same in every hierarchy. A member is in all of them. Processes that
// are only to be kept track of (pause, monitors, joined programs) are in a leaf,
// which exists in one: the tracking hierarchy, which is v2 wherever it is mounted.
// Limits are written by github.com/opencontainers/cgroups.
//
// A [Host] holds no state of cgroups: everything is read from the kernel when
// it is asked for. It is safe for concurrent use. Making what is there and
// removing what is not succeeds.
package cgroup

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mode is the layout of a host's hierarchies.
type Mode string

// The modes.
const (
	V1     Mode = "v1"     // controllers in v1 hierarchies, no v2
	Hybrid Mode = "hybrid" // controllers in v1 hierarchies, and v2 beside them
	V2     Mode = "v2"     // v2 alone
)

// Hierarchy is a mounted cgroup hierarchy.
type Hierarchy struct {
	Mount       string   // mount point
	V2          bool     // cgroup v2
	Controllers []string // v1: the controllers, or one "name=…"; nil for v2
}

// Host is what [Detect] found.
type Host struct {
	v2     string // mount point, or empty
	v1     []Hierarchy
	cpuset string // mount point of the v1 hierarchy that has the cpuset controller, or empty
}

// Detect reads which hierarchies are mounted.
func Detect() (*Host, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}

// parseMounts reads proc_pid_mountinfo(5). A hierarchy that is mounted more than once
// counts where it is mounted first.
func parseMounts(r io.Reader) (*Host, error) {
	mounts, err := mountinfo.GetMountsFromReader(r, mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	h := new(Host)
	seen := map[string]bool{}
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			h.v2 = cmp.Or(h.v2, m.Mountpoint)
			continue
		}
		cs := v1Controllers(m.VFSOptions)
		key := strings.Join(cs, ",")
		if len(cs) == 0 || seen[key] {
			continue
		}
		seen[key] = true
		h.v1 = append(h.v1, Hierarchy{Mount: m.Mountpoint, Controllers: cs})
		if slices.Contains(cs, "cpuset") {
			h.cpuset = m.Mountpoint
		}
	}
	if h.v2 == "" && len(h.v1) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return h, nil
}

// v1Controllers picks the controllers out of the options of a superblock.
func v1Controllers(opts string) []string {
	var cs []string
	for o := range strings.SplitSeq(opts, ",") {
		key, _, valued := strings.Cut(o, "=")
		switch {
		case o == "rw", o == "ro", o == "noprefix", o == "clone_children", o == "xattr", o == "cpuset_v2_mode", o == "favordynmods", o == "none":
		case valued && key != "name": // release_agent=…
		default:
			cs = append(cs, o)
		}
	}
	return cs
}

// Mode returns the layout.
func (h *Host) Mode() Mode {
	switch {
	case len(h.v1) == 0:
		return V2
	case h.v2 == "":
		return V1
	}
	return Hybrid
}

// Hierarchies returns every hierarchy that members are in, v2 last: what a
// member's /sys/fs/cgroup is made of.
func (h *Host) Hierarchies() []Hierarchy {
	hs := make([]Hierarchy, 0, len(h.v1)+1)
	for _, v1 := range h.v1 {
		v1.Controllers = slices.Clone(v1.Controllers)
		hs = append(hs, v1)
	}
	if h.v2 != "" {
		hs = append(hs, Hierarchy{Mount: h.v2, V2: true})
	}
	return hs
}

// V1Controllers returns, by the name of each v1 controller ("memory",
// "name=systemd"), where its hierarchy is mounted.
func (h *Host) V1Controllers() map[string]string {
	m := make(map[string]string)
	for _, v1 := range h.v1 {
		for _, c := range v1.Controllers {
			m[c] = v1.Mount
		}
	}
	return m
}

// V2Mount returns where v2 is mounted, or "".
func (h *Host) V2Mount() string { return h.v2 }

// mounts are the mount points of all hierarchies, the tracking one first.
func (h *Host) mounts() []string {
	ms := make([]string, 0, len(h.v1)+1)
	if h.v2 != "" {
		ms = append(ms, h.v2)
	}
	// Without v2, the freezer's hierarchy makes the best tracker.
	for _, v1 := range h.v1 {
		if slices.Contains(v1.Controllers, "freezer") {
			ms = append(ms, v1.Mount)
		}
	}
	for _, v1 := range h.v1 {
		if !slices.Contains(v1.Controllers, "freezer") {
			ms = append(ms, v1.Mount)
		}
	}
	return ms
}

// tracking is the mount point of the hierarchy that every process of a
// sandbox is in.
func (h *Host) tracking() string { return h.mounts()[0] }

// Tasks returns the tasks files of the cgroup at path, one in each v1 hierarchy.
// A process with a single thread puts itself in by writing "0" to each. It could
// write to cgroup.procs as well, but would then wait for an RCU grace period: the
// kernel takes the lock that keeps thread groups whole (cgroup_threadgroup_rwsem)
// for that file, and does without for a thread that moves only itself.
//
// There is no such file in v2; see [Host.TrackingDir].
func (h *Host) Tasks(path string) []string {
	var ts []string
	for _, v1 := range h.v1 {
		ts = append(ts, filepath.Join(v1.Mount, path, "tasks"))
	}
	return ts
}

// LeafProcs returns the one cgroup.procs file of a cgroup made by [Host.MakeLeaf].
func (h *Host) LeafProcs(path string) string {
	return filepath.Join(h.tracking(), path, "cgroup.procs")
}

// LeafTasks returns the tasks file of a cgroup made by [Host.MakeLeaf] where the
// tracking hierarchy is v1; see [Host.Tasks].
func (h *Host) LeafTasks(path string) string {
	return filepath.Join(h.tracking(), path, "tasks")
}

// TrackingDir opens the cgroup at path in v2, for a child to be born in
// (CLONE_INTO_CGROUP, clone(2)); the caller closes it. It is nil where there is no v2.
func (h *Host) TrackingDir(path string) (*os.File, error) {
	if h.v2 == "" {
		return nil, nil
	}
	return os.OpenFile(filepath.Join(h.v2, path), unix.O_PATH|unix.O_DIRECTORY, 0)
}

// OOMFile returns the file that tells of processes killed for want of memory in
// the cgroup at path: memory.events (v2) or memory.oom_control (v1). It is "" if
// the host has no memory controller.
func (h *Host) OOMFile(path string) string {
	if m := h.V1Controllers()["memory"]; m != "" {
		return filepath.Join(m, path, "memory.oom_control")
	}
	if h.v2 == "" {
		return ""
	}
	f := filepath.Join(h.v2, path, "memory.events")
	if _, err := os.Stat(f); err != nil {
		return ""
	}
	return f
}

// List returns the names of the cgroups right below parent in any hierarchy,
// sorted: the sandboxes, if parent is where these are made.
func (h *Host) List(parent string) ([]string, error) {
	names := map[string]bool{}
	for _, m := range h.mounts() {
		subs, err := children(filepath.Join(m, parent))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, s := range subs {
			names[s] = true
		}
	}
	list := make([]string, 0, len(names))
	for n := range names {
		list = append(list, n)
	}
	slices.Sort(list)
	return list, nil
}

// children returns the names of the cgroups in the directory dir.
func children(dir string) ([]string, error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range ents {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
