package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// removeAll removes the directory path and all that is in it, like [os.RemoveAll].
// What is in it was made by members and whoever else, so there are differences.
//
// It goes into nothing that is mounted there, whose files are somebody else's and which
// may not answer (FUSE): that is an error, which matches [unix.EXDEV] or [unix.EBUSY].
// However deep directories are nested, few are open at a time, and errors stay short.
func removeAll(path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	top, err := openInside(parent, filepath.Base(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer top.Close()
	r := &remover{path: path, top: top}
	for before := -1; r.raised > before; { // those may have come behind what was being read
		before = r.raised
		if err := r.empty(top, 1); err != nil {
			return err
		}
	}
	return r.fail(parent, top.Name(), unix.Unlinkat(int(parent.Fd()), top.Name(), unix.AT_REMOVEDIR))
}

// openDepth is how many directories are open at most, one in another.
const openDepth = 64

type remover struct {
	path   string
	top    *os.File // the directory at path
	raised int      // how many were moved there
}

// empty removes what is in dir. One that cannot be removed does not keep the others.
func (r *remover) empty(dir *os.File, depth int) error {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return err
	}
	var first error
	for {
		names, err := dir.Readdirnames(1000)
		for _, n := range names {
			if err := r.remove(dir, n, depth); err != nil && first == nil {
				first = err
			}
		}
		if err == io.EOF {
			return first
		}
		if err != nil {
			return errors.Join(first, err)
		}
	}
}

func (r *remover) remove(dir *os.File, name string, depth int) error {
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return r.fail(dir, name, err)
	}
	if depth == openDepth {
		return r.fail(dir, name, r.raise(dir, name))
	}
	sub, err := openInside(dir, name)
	if err != nil {
		return r.fail(dir, name, err)
	}
	defer sub.Close()
	if err := r.empty(sub, depth+1); err != nil {
		return err
	}
	return r.fail(dir, name, unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR))
}

// raise moves a directory that lies too deep to the top.
func (r *remover) raise(dir *os.File, name string) error {
	for {
		r.raised++
		err := unix.Renameat2(int(dir.Fd()), name, int(r.top.Fd()), "raised-"+strconv.Itoa(r.raised), unix.RENAME_NOREPLACE)
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
}

// fail says what could not be removed. That it is gone already is no failure.
func (r *remover) fail(dir *os.File, name string, err error) error {
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("something is mounted there: %w", err)
	}
	return fmt.Errorf("remove %s: %s/%s: %w", r.path, filepath.Base(dir.Name()), name, err)
}

// openInside opens the directory name in dir, unless something is mounted there (EXDEV).
func openInside(dir *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_BENEATH,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// removeData removes a data directory. What somebody has mounted in it is unmounted, and
// nothing in that is touched.
func removeData(dir string) error {
	err := removeAll(dir)
	if !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EBUSY) {
		return err
	}
	points, err := mountPoints(dir)
	if err != nil {
		return err
	}
	for _, p := range tops(points) {
		if err := detach(p); err != nil {
			return err
		}
	}
	return removeAll(dir)
}

// mountPoints returns what is mounted at dir and below, in the daemon's mount namespace,
// parents first. It asks none of these file systems.
func mountPoints(dir string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, err
	}
	points := make([]string, len(mounts))
	for i, m := range mounts {
		points[i] = m.Mountpoint
	}
	slices.Sort(points)
	return points, nil
}

// tops leaves out of mount points those that go with another.
func tops(points []string) []string {
	var tops []string
	for _, p := range points {
		if n := len(tops); n == 0 || !strings.HasPrefix(p, tops[n-1]+"/") {
			tops = append(tops, p)
		}
	}
	return tops
}

// detach unmounts what is mounted at point, with all that is mounted in it. A path through
// a file system that does not answer would not be found.
func detach(point string) error {
	if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "umount", Path: point, Err: err}
	}
	return nil
}
