package member

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// MakeMountPoints makes, in the directory layer, what root lacks for mounts to lie on,
// and reports whether that is anything: layer then goes above root, which is to be
// read-only and is not written to. Directories that root has on the way get its
// attributes, since those of an overlay are the ones of its highest layer.
//
// Links in root are followed as the member will see them, and never out of it; nothing
// is made where one leads nowhere.
func MakeMountPoints(root, layer string, mounts []specs.Mount) (bool, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: root, Err: err}
	}
	r := os.NewFile(uintptr(fd), root)
	defer r.Close()
	to, err := os.OpenRoot(layer)
	if err != nil {
		return false, err
	}
	defer to.Close()
	made := false
	for i, m := range mounts {
		at := path.Clean("/" + m.Destination)
		if slices.ContainsFunc(mounts[:i], func(before specs.Mount) bool {
			return strings.HasPrefix(at, strings.TrimSuffix(path.Clean("/"+before.Destination), "/")+"/")
		}) {
			continue // made in what is mounted there
		}
		file := false
		if m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			fi, err := os.Stat(m.Source)
			file = err == nil && !fi.IsDir()
		}
		ok, err := makePoint(r, to, strings.Split(at[1:], "/"), file)
		if err != nil {
			return made, fmt.Errorf("mount point %s: %w", at, err)
		}
		made = made || ok
	}
	return made, nil
}

// makePoint makes the directory, or the empty file, that root does not have at parts.
func makePoint(root *os.File, layer *os.Root, parts []string, file bool) (bool, error) {
	if f, err := openLower(root, path.Join(parts...), 0); !errors.Is(err, unix.ENOENT) {
		f.Close()         // of nil too
		return false, nil // it is there, or the mount will fail and say why
	}
	n := len(parts) - 1
	var parent *os.File
	for ; ; n-- {
		var err error
		if parent, err = openLower(root, path.Join(append([]string{"."}, parts[:n]...)...), unix.O_DIRECTORY); err == nil {
			break
		}
		if n == 0 || !errors.Is(err, unix.ENOENT) {
			return false, nil
		}
	}
	defer parent.Close()
	var st unix.Stat_t
	if err := unix.Fstatat(int(parent.Fd()), parts[n], &st, unix.AT_SYMLINK_NOFOLLOW); !errors.Is(err, unix.ENOENT) {
		return false, nil // a link that leads nowhere
	}
	// Without the links that lead there.
	real, err := below(root, parent)
	if err != nil {
		return false, err
	}
	if err := copyDirs(root, layer, real); err != nil {
		return false, err
	}
	at := path.Join(real, path.Join(parts[n:]...))
	if !file {
		return true, layer.MkdirAll(at, 0o755)
	}
	if err := layer.MkdirAll(path.Dir(at), 0o755); err != nil {
		return false, err
	}
	f, err := layer.OpenFile(at, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return false, err
	}
	return true, f.Close()
}

// openLower opens what is at name in root, where it belongs to root's own file system:
// what is mounted in it is not part of a layer.
func openLower(root *os.File, name string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | flags,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// below returns the path of dir relative to root, which it is in.
func below(root, dir *os.File) (string, error) {
	var names [2]string
	for i, f := range []*os.File{root, dir} {
		var err error
		if names[i], err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil {
			return "", err
		}
	}
	return filepath.Rel(names[0], names[1])
}

// copyDirs makes the directory name in layer, and those above it, as they are in root.
func copyDirs(root *os.File, layer *os.Root, name string) error {
	if name == "." {
		return nil
	}
	if err := copyDirs(root, layer, path.Dir(name)); err != nil {
		return err
	}
	if err := layer.Mkdir(name, 0o755); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	f, err := openLower(root, name, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if err := layer.Chown(name, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	d, err := layer.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	// Not Root.Chmod, whose modes have the higher bits elsewhere.
	return os.NewSyscallError("fchmod", unix.Fchmod(int(d.Fd()), st.Mode&0o7777))
}
