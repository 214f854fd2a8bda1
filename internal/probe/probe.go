// Package probe finds out what a host can do, by trying it: never by its
// version, because distributors backport, and sandboxes around this program
// forbid what the kernel could do.
package probe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/launch"
)

// Result says whether the host can do one thing.
type Result struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"`
	Detail   string `json:"detail,omitempty"` // what was found; if not OK, why not
	Lost     string `json:"lost,omitempty"`   // what does not work without it; only if not OK
}

// errChild ends a child that was made only to be looked at.
var errChild = errors.New("probe is done with the child")

// Host tries everything that matters. It leaves nothing behind. root is the
// daemon's root directory; if it does not exist yet, its nearest parent that
// does stands for it. The caller is root in the host's namespaces.
func Host(root string) []Result {
	dir := existing(root)
	probes := []struct {
		name     string
		required bool
		lost     string
		try      func() (detail string, err error)
	}{
		{"openat2", true, "paths in members could not be resolved safely (Linux 5.6)", openat2},
		{"clone3", true, "nothing can be started (Linux 5.3)", clone3},
		{"close_range", true, "nothing can be started (Linux 5.9)", closeRange},
		{"pidfd_getfd", true, "exec -t, attach, and taking up members after a restart (Linux 5.6)", pidfdGetfd},
		{"mount API", true, "no member can be started (Linux 5.2)", mountAPI},
		{"overlay on " + dir, true, "members with --rootfs", func() (string, error) { return overlay(dir) }},
		{"seccomp", false, "members cannot be confined to safe system calls", seccompFilter},
		{"executable memfd", false, "a copy of the helper programs is put into a file under the root directory (sysctl vm.memfd_noexec)", memfdExec},
		{"cgroups", true, "members cannot be killed as a whole, nor limited", cgroups},
		{"memory controller", false, "--memory, and telling OOM kills", func() (string, error) { return controller("memory") }},
		{"cpu controller", false, "--cpus", func() (string, error) { return controller("cpu") }},
		{"pids controller", false, "--pids-limit", func() (string, error) { return controller("pids") }},
		{"user namespaces", false, "--share user", func() (string, error) { return "", unshare(unix.CLONE_NEWUSER) }},
		{"idmapped mounts on " + dir, false, "members with --rootfs in a sandbox with --share user (Linux 5.12; overlay 5.19, tmpfs 6.3)", func() (string, error) { return "", idmap(dir) }},
		{"time namespaces", false, "--share time (Linux 5.6)", func() (string, error) { return "", unshare(unix.CLONE_NEWTIME) }},
		{"CAP_SYS_RESOURCE", false, "oom_score_adj cannot be lowered, rlimits not be raised", sysResource},
		{"builtin network", false, "--net builtin (bridges, veth pairs, NAT by nftables)", builtinNetwork},
		{"pidfd exit status", false, "the exit status of a member whose monitor was killed may stay unknown (Linux 6.15)", pidfdExit},
	}
	out := make([]Result, 0, len(probes))
	for _, p := range probes {
		r := Result{Name: p.name, Required: p.required}
		var err error
		if r.Detail, err = p.try(); err != nil {
			r.Detail, r.Lost = err.Error(), p.lost
		}
		r.OK = err == nil
		out = append(out, r)
	}
	return out
}

// existing returns dir or its nearest parent that exists.
func existing(dir string) string {
	for dir = filepath.Clean(dir); ; dir = filepath.Dir(dir) {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() || dir == filepath.Dir(dir) {
			return dir
		}
	}
}

func openat2() (string, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return "", os.NewSyscallError("openat2", err)
	}
	return "", unix.Close(fd)
}

// clone3 is called with a size that no kernel takes, so that it makes nothing.
func clone3() (string, error) {
	_, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
	if errno == unix.EINVAL {
		return "", nil
	}
	return "", os.NewSyscallError("clone3", errno)
}

// closeRange closes a range that no process has descriptors in.
func closeRange() (string, error) {
	const none = 1<<31 - 1
	return "", os.NewSyscallError("close_range", unix.CloseRange(none, none, 0))
}

func pidfdGetfd() (string, error) {
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return "", os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, pidfd, 0)
	if err != nil {
		return "", os.NewSyscallError("pidfd_getfd", err)
	}
	return "", unix.Close(fd)
}

func mountAPI() (string, error) {
	return "", detached("tmpfs", nil)
}

// detached makes a mount that is attached nowhere and ends at once.
func detached(fstype string, options [][2]string) error {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	for _, o := range options {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return fmt.Errorf("fsconfig %s: %w", o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return os.NewSyscallError("fsconfig", err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fsmount", err)
	}
	return unix.Close(m)
}

func overlay(dir string) (string, error) {
	tmp, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	var options [][2]string
	for _, d := range []string{"lower", "upper", "work"} {
		p := filepath.Join(tmp, d)
		if err := os.Mkdir(p, 0o700); err != nil {
			return "", err
		}
		options = append(options, [2]string{d + "dir", p})
	}
	return "", detached("overlay", options)
}

func seccompFilter() (string, error) {
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if errno != 0 {
		return "", os.NewSyscallError("seccomp", errno)
	}
	return "", nil
}

func memfdExec() (string, error) {
	fd, err := unix.MemfdCreate("sandboxd-probe", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3 every memfd could be executed
		fd, err = unix.MemfdCreate("sandboxd-probe", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return "", os.NewSyscallError("memfd_create", err)
	}
	return "", unix.Close(fd)
}

func cgroups() (string, error) {
	h, err := cgroup.Detect()
	if err != nil {
		return "", err
	}
	var where []string
	for _, hi := range h.Hierarchies() {
		if hi.V2 {
			where = append(where, hi.Mount+" (v2)")
		}
	}
	detail := string(h.Mode())
	if len(where) > 0 {
		detail += ", " + strings.Join(where, ", ")
	}
	return detail, nil
}

func controller(name string) (string, error) {
	h, err := cgroup.Detect()
	if err != nil {
		return "", err
	}
	if m := h.V1Controllers()[name]; m != "" {
		return "v1, " + m, nil
	}
	if h.V2Mount() == "" {
		return "", errors.New("no hierarchy has it")
	}
	b, err := os.ReadFile(filepath.Join(h.V2Mount(), "cgroup.controllers"))
	if err != nil {
		return "", err
	}
	if !slices.Contains(strings.Fields(string(b)), name) {
		return "", errors.New("no hierarchy has it")
	}
	return "v2", nil
}

// unshare tries it in a child.
func unshare(flag uintptr) error {
	return inChild(flag, func(int) error { return nil })
}

// inChild makes a child in new namespaces, calls fn while it waits, and ends it.
func inChild(flags uintptr, fn func(pid int) error) error {
	p := new(launch.Program)
	p.Call("unshare", unix.SYS_UNSHARE, launch.Int(flags))
	p.Created()
	p.Exec([]string{"/"}, []string{"probe"}, nil) // never reached
	var fnErr error
	_, err := launch.Start(p, launch.Options{Dir: os.TempDir(), Created: func(pid int) error {
		fnErr = fn(pid)
		return errChild // so that it is killed and reaped
	}})
	if errors.Is(err, errChild) {
		return fnErr
	}
	return err
}

func idmap(dir string) error {
	return inChild(unix.CLONE_NEWUSER, func(pid int) error {
		proc := fmt.Sprintf("/proc/%d/", pid)
		for _, f := range []string{"uid_map", "gid_map"} {
			if err := os.WriteFile(proc+f, []byte("0 100000 65536"), 0); err != nil {
				return err
			}
		}
		user, err := os.Open(proc + "ns/user")
		if err != nil {
			return err
		}
		defer user.Close()
		tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return os.NewSyscallError("open_tree", err)
		}
		defer unix.Close(tree)
		err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user.Fd())})
		runtime.KeepAlive(user)
		return os.NewSyscallError("mount_setattr", err)
	})
}

func sysResource() (string, error) {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return "", os.NewSyscallError("capget", err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return "", errors.New("this process does not have it")
	}
	return "", nil
}

// pidfdExit asks a pidfd for the exit status of a child that has been reaped.
func pidfdExit() (string, error) {
	pidfd := -1
	err := inChild(0, func(pid int) (err error) {
		pidfd, err = unix.PidfdOpen(pid, 0)
		return os.NewSyscallError("pidfd_open", err)
	})
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if err != nil {
		return "", err
	}
	info := [11]uint64{unix.PIDFD_INFO_EXIT} // struct pidfd_info; it begins with the mask
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), unix.PIDFD_GET_INFO, uintptr(unsafe.Pointer(&info)))
	if errno != 0 {
		return "", os.NewSyscallError("ioctl PIDFD_GET_INFO", errno)
	}
	if info[0]&unix.PIDFD_INFO_EXIT == 0 {
		return "", errors.New("ioctl PIDFD_GET_INFO does not tell it")
	}
	return "", nil
}
