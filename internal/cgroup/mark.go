package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// markAttr is the extended attribute that says to whom a cgroup belongs. A
// parent can be shared with others, who name their cgroups in the same way.
const markAttr = "trusted.sandboxd"

// Mark notes on the cgroup at path to which installation it belongs. Hierarchies
// that have no extended attributes are left as they are: there what runs
// in it has to tell.
func (h *Host) Mark(path, mark string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	dir := filepath.Join(h.tracking(), path)
	err := unix.Setxattr(dir, markAttr, []byte(mark), 0)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return &os.PathError{Op: "mark cgroup", Path: dir, Err: err}
	}
	return nil
}

// MarkOf returns what [Host.Mark] has noted on the cgroup at path; empty if
// there is no note, or no such cgroup.
func (h *Host) MarkOf(path string) string {
	if CheckPath(path) != nil {
		return ""
	}
	b := make([]byte, 256)
	n, err := unix.Getxattr(filepath.Join(h.tracking(), path), markAttr, b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// Processes returns the pids in the cgroup at path and below, in the tracking
// hierarchy.
func (h *Host) Processes(path string) ([]int, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	return pidsBelow(filepath.Join(h.tracking(), path))
}

// Exists reports whether the cgroup at path is there in any hierarchy.
func (h *Host) Exists(path string) bool {
	for _, m := range h.mounts() {
		if CheckPath(path) == nil && exists(filepath.Join(m, path)) {
			return true
		}
	}
	return false
}

// Since is when the cgroup at path was made, as far as the kernel remembers; the
// zero time if it is not there.
func (h *Host) Since(path string) time.Time {
	fi, err := os.Lstat(filepath.Join(h.tracking(), path))
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime().UTC()
}
