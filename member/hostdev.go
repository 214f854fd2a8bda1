package member

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hostDevices are the character and block devices below dir, the host's /dev, as
// a privileged member gets them. Left out is what the member has of its own: its
// terminals and the devices of every container.
func hostDevices(dir string) ([]specs.LinuxDevice, error) {
	var devices []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // devices come and go
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if e.IsDir() {
			// File systems of their own; the member has its own of them, too.
			if slices.Contains([]string{"pts", "shm", "mqueue", "hugepages"}, rel) {
				return fs.SkipDir
			}
			return nil
		}
		dest := filepath.Join("/dev", rel)
		own := dest == "/dev/ptmx" || dest == "/dev/console" ||
			slices.ContainsFunc(defaultDevices, func(d specs.LinuxDevice) bool { return d.Path == dest })
		if e.Type()&fs.ModeDevice == 0 || own {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return &os.PathError{Op: "stat", Path: name, Err: err}
		}
		typ := "b"
		if st.Mode&unix.S_IFMT == unix.S_IFCHR {
			typ = "c"
		}
		mode := os.FileMode(st.Mode & 0o777)
		devices = append(devices, specs.LinuxDevice{
			Path: dest, Type: typ, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
			FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
		})
		return nil
	})
	return devices, err
}
