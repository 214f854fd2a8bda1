package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

// Kill kills every process in the cgroup at path and below, and returns when
// none is left or ctx ends. It succeeds if there is no such cgroup.
func (h *Host) Kill(ctx context.Context, path string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	return h.kill(ctx, h.tracking(), path)
}

// Remove kills every process in the cgroup at path and below and removes it and
// all below it, in every hierarchy. It tries until ctx ends.
func (h *Host) Remove(ctx context.Context, path string) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	if err := h.Kill(ctx, path); err != nil {
		return err
	}
	var errs []error
	// The tracking hierarchy has the mark, so it is the last.
	for _, m := range slices.Backward(h.mounts()) {
		errs = append(errs, h.remove(ctx, m, path))
	}
	return errors.Join(errs...)
}

// remove removes the cgroup and all below it in one hierarchy.
func (h *Host) remove(ctx context.Context, mount, path string) error {
	dir := filepath.Join(mount, path)
	for wait := newBackoff(); ; {
		err := rmdirAll(dir)
		if err == nil || !errors.Is(err, unix.EBUSY) {
			return err
		}
		// Somebody moved a process here that is elsewhere in the tracking
		// hierarchy, or the kernel has not taken leave of a dead one yet.
		if kerr := h.kill(ctx, mount, path); kerr != nil {
			return kerr
		}
		if !wait.pause(ctx) {
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}

// rmdirAll removes dir and the cgroups in it.
func rmdirAll(dir string) error {
	err := unix.Rmdir(dir)
	switch {
	case err == nil || errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.EBUSY):
		return &fs.PathError{Op: "remove cgroup", Path: dir, Err: err}
	}
	subs, lerr := children(dir)
	if lerr != nil && !errors.Is(lerr, os.ErrNotExist) {
		return lerr
	}
	for _, s := range subs {
		if err := rmdirAll(filepath.Join(dir, s)); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove cgroup", Path: dir, Err: err}
	}
	return nil
}

// kill empties the cgroup and all below it in one hierarchy.
func (h *Host) kill(ctx context.Context, mount, path string) error {
	return h.killBy(ctx, mount, path, h.killOnce)
}

// killBy calls once, which sends signals, until no process is left.
func (h *Host) killBy(ctx context.Context, mount, path string, once func(mount, path string) error) error {
	dir := filepath.Join(mount, path)
	for wait := newBackoff(); ; {
		empty, err := h.empty(mount, dir)
		if err != nil {
			return fmt.Errorf("look for processes in cgroup %s: %w", dir, err)
		}
		if empty {
			return nil
		}
		if err := once(mount, path); err != nil {
			return fmt.Errorf("kill cgroup %s: %w", dir, err)
		}
		if !wait.pause(ctx) {
			pids, _ := pidsBelow(dir)
			return fmt.Errorf("processes %v in cgroup %s do not end: %w", pids, dir, context.Cause(ctx))
		}
	}
}

// empty reports whether no process is in dir and below.
func (h *Host) empty(mount, dir string) (bool, error) {
	if mount == h.v2 {
		b, err := read(dir, "cgroup.events")
		if gone(err) {
			return true, nil
		}
		return bytes.Contains(b, []byte("populated 0")), err
	}
	pids, err := pidsBelow(dir)
	return len(pids) == 0, err
}

// killOnce sends SIGKILL to every process in the cgroup and below, by the
// surest way that the hierarchy has.
func (h *Host) killOnce(mount, path string) error {
	dir := filepath.Join(mount, path)
	if mount == h.v2 {
		err := write(dir, "cgroup.kill", "1") // Linux 5.14
		if err == nil || gone(err) && !exists(dir) {
			return nil
		}
		if !gone(err) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	return h.killByPID(mount, path)
}

// killByPID is killOnce where there is no cgroup.kill.
func (h *Host) killByPID(mount, path string) error {
	thaw, err := h.freeze(mount, path)
	if err != nil {
		return err
	}
	err = signalAll(filepath.Join(mount, path))
	return errors.Join(err, thaw())
}

// freeze keeps the processes of the cgroup from making new ones, as far as the
// host can, and returns what undoes it. SIGKILL takes effect then, or at once with v2.
func (h *Host) freeze(mount, path string) (thaw func() error, err error) {
	dir, name, frozen, thawed := filepath.Join(mount, path), "cgroup.freeze", "1", "0"
	if mount != h.v2 {
		m := h.V1Controllers()["freezer"]
		if m == "" {
			return func() error { return nil }, nil
		}
		dir, name, frozen, thawed = filepath.Join(m, path), "freezer.state", "FROZEN", "THAWED"
	}
	write := func(v string) error {
		if err := write(dir, name, v); err != nil && !gone(err) {
			return err
		}
		return nil
	}
	return func() error { return write(thawed) }, write(frozen)
}

// signalAll kills every process in dir and below. Between the listing and the
// signal a pid may come to mean another process; a pidfd cannot, so those are
// opened first and only what is still listed after that is killed.
func signalAll(dir string) error {
	pids, err := pidsBelow(dir)
	if err != nil {
		return err
	}
	pidfds := make(map[int]int, len(pids))
	defer func() {
		for _, fd := range pidfds {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		fd, err := procid.Pidfd(pid)
		if errors.Is(err, procid.ErrGone) {
			continue
		}
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			break // the rest has its turn in the next round
		}
		if err != nil {
			return fmt.Errorf("open process %d: %w", pid, err)
		}
		pidfds[pid] = fd
	}
	pids, err = pidsBelow(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		fd, ok := pidfds[pid]
		if !ok {
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return nil
}

// pidsBelow returns the processes in dir and below.
func pidsBelow(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if gone(err) {
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := read(path, "cgroup.procs")
		if gone(err) {
			return nil
		}
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			pid, err := strconv.Atoi(strings.TrimSpace(line))
			if err != nil {
				return fmt.Errorf("%s/cgroup.procs: %w", path, err)
			}
			if pid > 0 { // 0 is a process that this pid namespace does not see
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// gone reports whether err says that the cgroup is not there: ENODEV comes from
// the files of one that was removed while they were open.
func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

func exists(dir string) bool {
	_, err := os.Lstat(dir)
	return !errors.Is(err, os.ErrNotExist)
}

// backoff waits between looks at the kernel: it tells of an empty cgroup only in v2, and
// of a removable one not at all.
type backoff struct{ d time.Duration }

func newBackoff() *backoff { return &backoff{100 * time.Microsecond} }

// pause waits, longer each time. It is false if ctx has ended.
func (b *backoff) pause(ctx context.Context) bool {
	t := time.NewTimer(b.d)
	defer t.Stop()
	b.d = min(2*b.d, 50*time.Millisecond)
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
