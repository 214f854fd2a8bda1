package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // lets the library set device rules
	"github.com/opencontainers/cgroups/fs"
	"github.com/opencontainers/cgroups/fs2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// MakeSandbox makes the cgroup at path, and those above it that are not there,
// in the tracking hierarchy, for members' cgroups and leaves to be made in. In
// the v1 hierarchies it is made with the first member: a sandbox alone has no
// use for it there, and eight directories take longer than its namespaces.
func (h *Host) MakeSandbox(path string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	if err := h.makeAll(h.tracking(), path); err != nil {
		return err
	}
	if h.v2 == "" {
		return nil
	}
	return enableControllers(h.v2, path)
}

// MakeMember makes the cgroup at path in every hierarchy and sets its limits: it is
// [Host.MakeLeaf] and [Host.Limit].
func (h *Host) MakeMember(path string, res *specs.LinuxResources) error {
	if err := h.MakeLeaf(path); err != nil {
		return err
	}
	return h.Limit(path, res)
}

// Limit makes a cgroup that was made by [Host.MakeLeaf] in the other hierarchies
// too and sets its limits. An empty res.Devices leaves the access to devices as it
// is; else what no rule allows is denied. res may be nil. A limit that the host
// cannot set is an error that names it; the cgroup is to be removed then.
func (h *Host) Limit(path string, res *specs.LinuxResources) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	if err := h.makeOthers(path); err != nil {
		return err
	}
	if res == nil {
		return nil
	}
	return h.set(path, res)
}

// MakeParent makes a cgroup that was made by [Host.MakeSandbox] in the other
// hierarchies too. [Host.Limit] does so for the one above its own.
func (h *Host) MakeParent(path string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	return h.makeOthers(path)
}

// makeOthers makes the cgroup at path in all hierarchies but the tracking one.
func (h *Host) makeOthers(path string) error {
	for _, m := range h.mounts()[1:] {
		if err := h.makeAll(m, path); err != nil {
			return err
		}
	}
	return nil
}

// MakeLeaf makes the cgroup at path in the tracking hierarchy alone.
// [Host.MakeSandbox] must have made the one above.
func (h *Host) MakeLeaf(path string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	return h.make(h.tracking(), path)
}

// CheckPath fails if path is not one that this package makes and removes: below
// the root of the hierarchies, absolute, in its shortest form, and of one line.
func CheckPath(path string) error {
	if len(path) < 2 || path[0] != '/' || filepath.Clean(path) != path || strings.ContainsFunc(path, unicode.IsControl) {
		return fmt.Errorf("cgroup path %q is not absolute, clean and below the root", path)
	}
	return nil
}

func (h *Host) makeAll(mount, path string) error {
	err := h.make(mount, path)
	if errors.Is(err, os.ErrNotExist) && filepath.Dir(path) != "/" {
		if err := h.makeAll(mount, filepath.Dir(path)); err != nil {
			return err
		}
		return h.make(mount, path)
	}
	return err
}

// make makes one cgroup in one hierarchy.
func (h *Host) make(mount, path string) error {
	dir := filepath.Join(mount, path)
	err := os.Mkdir(dir, 0o755)
	if err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make cgroup: %w", err)
	}
	if mount == h.cpuset {
		return inheritCpuset(dir, err == nil)
	}
	return nil
}

// inheritCpuset gives a v1 cpuset cgroup its parent's processors and memory
// nodes: it is made with none, and no process can join it then (cpusets.rst). One
// that is ours is told to pass them on by itself, which children inherit too.
func inheritCpuset(dir string, ours bool) error {
	for _, name := range []string{"cpus", "mems"} {
		name = "cpuset." + name
		now, err := read(dir, name)
		if errors.Is(err, os.ErrNotExist) { // mounted with noprefix
			name = strings.TrimPrefix(name, "cpuset.")
			now, err = read(dir, name)
		}
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(now)) > 0 {
			continue
		}
		parents, err := read(filepath.Dir(dir), name)
		if err == nil && len(bytes.TrimSpace(parents)) == 0 {
			// Somebody else made that one. The hierarchy's root always has some.
			if err = inheritCpuset(filepath.Dir(dir), false); err == nil {
				parents, err = read(filepath.Dir(dir), name)
			}
		}
		if err != nil {
			return err
		}
		if err := write(dir, name, string(bytes.TrimSpace(parents))); err != nil {
			return err
		}
		if ours {
			if err := write(dir, "cgroup.clone_children", "1"); err != nil {
				return err
			}
			ours = false
		}
	}
	return nil
}

// enableControllers makes every controller of the v2 hierarchy that there is
// usable in the children of path, and so in the children of all above it.
func enableControllers(mount, path string) error {
	all, err := fields(mount, "cgroup.controllers")
	if err != nil {
		return err
	}
	dirs := []string{filepath.Join(mount, path)}
	for p := path; p != "/"; {
		if have, err := fields(dirs[len(dirs)-1], "cgroup.controllers"); err == nil && len(have) == len(all) {
			break // so they are in all above it
		}
		p = filepath.Dir(p)
		dirs = append(dirs, filepath.Join(mount, p))
	}
	slices.Reverse(dirs)
	for _, dir := range dirs {
		have, err := fields(dir, "cgroup.controllers")
		if err != nil {
			return err
		}
		if len(have) == 0 { // hybrid: nothing to enable here or below
			return nil
		}
		enabled, err := fields(dir, "cgroup.subtree_control")
		if err != nil {
			return err
		}
		missing := slices.DeleteFunc(have, func(c string) bool { return slices.Contains(enabled, c) })
		if len(missing) == 0 {
			continue
		}
		if write(dir, "cgroup.subtree_control", "+"+strings.Join(missing, " +")) == nil {
			continue
		}
		// One that is refused takes the others with it. What it would be needed
		// for says so when a limit is set, unless nothing will work.
		for _, c := range missing {
			if err := write(dir, "cgroup.subtree_control", "+"+c); errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("enable the %s controller: there are processes in %s itself, which cgroup v2 does not allow beside child cgroups: %w", c, dir, unix.EBUSY)
			}
		}
	}
	return nil
}

// set writes limits.
func (h *Host) set(path string, res *specs.LinuxResources) error {
	v2 := h.Mode() == V2
	r, err := resources(res, v2)
	if err != nil {
		return err
	}
	have, err := h.controllers(path)
	if err != nil {
		return err
	}
	for _, need := range needs(res, v2) {
		if !slices.Contains(have, need.controller) {
			return fmt.Errorf("cannot set %s: this host's cgroups have no %s controller", need.limit, need.controller)
		}
	}
	// The library passes over weights of devices that this kernel has no way to set.
	if v2 && len(r.BlkioWeightDevice) > 0 {
		if _, err := os.Stat(filepath.Join(h.v2, path, "io.bfq.weight")); err != nil {
			return fmt.Errorf("cannot set weights of block devices: this kernel has no BFQ I/O scheduler: %w", err)
		}
	}
	cg := &cgroups.Cgroup{Resources: r}
	var m cgroups.Manager
	if v2 {
		m, err = fs2.NewManager(cg, filepath.Join(h.v2, path))
	} else {
		paths := h.V1Controllers()
		for c, mount := range paths {
			paths[c] = filepath.Join(mount, path)
		}
		m, err = fs.NewManager(cg, paths)
	}
	if err == nil {
		err = m.Set(r)
	}
	if err != nil {
		return fmt.Errorf("set limits of cgroup %s: %w", path, err)
	}
	return nil
}

// controllers are those that a member's cgroup at path has.
func (h *Host) controllers(path string) ([]string, error) {
	if h.Mode() == V2 {
		cs, err := fields(filepath.Join(h.v2, path), "cgroup.controllers")
		return append(cs, "devices"), err // a BPF program, not a controller
	}
	var cs []string
	for _, v1 := range h.v1 {
		cs = append(cs, v1.Controllers...)
	}
	return cs, nil
}

func fields(dir, name string) ([]string, error) {
	b, err := read(dir, name)
	return strings.Fields(string(b)), err
}

// read and write do without package os, whose files go through the runtime's
// poller: with the small files of a cgroup that is most of the cost. Neither
// makes a file.

func read(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 512)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return b, nil
		default:
			b = slices.Grow(b[:len(b)+n], 512)
		}
	}
}

func write(dir, name, value string) error {
	path := filepath.Join(dir, name)
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for {
		_, err := unix.Write(fd, []byte(value)) // whole, or not at all
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "write " + value + " to", Path: path, Err: err}
		}
		return nil
	}
}

func open(path string, mode int) (int, error) {
	for {
		fd, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return fd, nil
	}
}
