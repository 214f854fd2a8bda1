package member

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
)

// ErrDeadPID means that a pid namespace was to be joined whose first process is
// gone. The kernel lets nobody enter it any more (pid_namespaces(7)).
var ErrDeadPID = errors.New("pid namespace is dead")

// JoinSpec says what a process that joins others is: in which namespaces and
// under which root it runs, and what it is there. It serves exec and join, with
// members that run and with members that have exited.
type JoinSpec struct {
	// Namespaces are joined: of each kind the namespace, or a pidfd of a process in
	// it. They are lent until the program has been started. Kinds that are neither
	// here nor in Private stay the caller's own.
	Namespaces map[namespace.Kind]*os.File
	// Private are made anew. A user namespace cannot be.
	Private []namespace.Kind
	// Root is an O_PATH descriptor of the directory that becomes the root, in
	// the mount namespace of the process; lent like the namespaces. nil is the
	// root of that namespace, or with the caller's mount namespace its own root.
	Root *os.File
	// RootDir is a directory of the caller's that becomes the root of a copy of
	// the caller's mount namespace, in place of Root and of a mnt namespace. It
	// is itself the root, not a copy; the caller's /dev is bound to its /dev,
	// and sysfs is mounted on its /sys, if there are such directories.
	RootDir string
	// Proc, if not nil, puts a new /proc over the one there is, in a copy of the
	// mount namespace that only the process has: one that shows the pid
	// namespace that the process is in.
	Proc *ProcMount
	// CgroupDir is the cgroup v2 directory to be in, or nil; lent. CgroupTasks
	// are the tasks files of the v1 cgroups to join, as paths of the caller's.
	CgroupDir   *os.File
	CgroupTasks []string
	Process     *specs.Process // Terminal asks for one: see CompileJoin
	// UIDs is the mapping of the user namespace that is joined, if there is one: the
	// caller's root, as which a terminal is opened, is nobody there.
	UIDs        []specs.LinuxIDMapping
	Exe         string // the program to execute, if it is not what Process.Args[0] names
	Seccomp     []unix.SockFilter
	SeccompFlag uintptr // SECCOMP_FILTER_FLAG_*
}

// ProcMount is how a new /proc is mounted.
type ProcMount struct {
	// Options are those of the mount, as in [specs.Mount]; nil is nosuid, nodev
	// and noexec.
	Options []string
	// Masked and ReadOnly are paths as in [specs.Linux], of which those under
	// /proc matter: what a member's own /proc hid must not come back.
	Masked, ReadOnly []string
}

// enterPID is the step that fails with ENOMEM if the pid namespace is dead, and
// joinStep begins those that fail with ESRCH if a process is gone whose pidfd was
// given.
const (
	enterPID = "enter the pid namespace"
	joinStep = "join the "
)

// CompileJoin makes the launch program of s. It changes nothing.
//
// With a terminal, the process gets one from the /dev/pts that it will see, and
// where there is none, from the caller's; its master is at [launch.MasterFD] from
// when the program reports that the process is created.
//
// The caller's privileges are kept as long as something needs them: the user
// namespace is joined last. No descriptor of the caller's but the report pipes,
// stdio, the terminal, the cgroup and the user namespace is open any more when the pid
// namespace is entered, and the process is not dumpable until its execve.
func CompileJoin(s *JoinSpec) (*launch.Program, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	p := new(launch.Program)
	user := s.Namespaces[namespace.User]
	// The first ones, so that their numbers are known: they are kept open longest.
	kept := uint32(0)
	if user != nil {
		p.File(user)
		kept++
	}
	var cgroupDir *launch.Arg
	if s.CgroupDir != nil {
		fd := p.File(s.CgroupDir)
		cgroupDir = &fd
		kept++
	}
	at, cloexec := launch.Int(unix.AT_FDCWD), launch.Int(unix.O_WRONLY|unix.O_CLOEXEC)

	// By paths and with the privileges of the caller.
	for _, tasks := range s.CgroupTasks {
		step := "join the cgroup " + path.Dir(tasks)
		fd := p.Call(step, unix.SYS_OPENAT, at, p.String(tasks), cloexec)
		p.Call(step, unix.SYS_WRITE, fd.Result(), p.String("0"), launch.Int(1))
		p.Call(step, unix.SYS_CLOSE, fd.Result())
	}
	if adj := s.Process.OOMScoreAdj; adj != nil {
		addOOMScoreAdj(p, *adj)
	}
	if err := addLimits(p, s.Process); err != nil {
		return nil, err
	}
	if s.Process.Terminal {
		addHostPty(p)
	}

	// mnt last: it changes the root, and what is left needs no path of ours.
	kinds := []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS, namespace.Time, namespace.Cgroup, namespace.PID, namespace.Mnt}
	for i, k := range kinds {
		f := s.Namespaces[k]
		if f == nil || slices.ContainsFunc(kinds[:i], func(k namespace.Kind) bool { return s.Namespaces[k] == f }) {
			continue
		}
		step, flags := "", uintptr(0)
		for _, k := range kinds[i:] {
			if s.Namespaces[k] == f { // a pidfd can be that of several
				step += "," + string(k)
				flags |= k.Flag()
			}
		}
		p.Call(joinStep+step[1:]+" namespace", unix.SYS_SETNS, p.File(f), launch.Int(flags))
	}
	if s.Root != nil {
		p.Call("change to the root", unix.SYS_FCHDIR, p.File(s.Root))
		p.Call("change the root", unix.SYS_CHROOT, p.String("."))
	}
	// These belong to the caller's user namespace also if another is joined:
	// else the kernel would not let proc be mounted where a part of it is
	// masked already (mount_namespaces(7)).
	var early, late uintptr
	for _, k := range s.Private {
		switch k {
		case namespace.PID, namespace.Mnt, namespace.Time:
			early |= k.Flag()
		default:
			late |= k.Flag()
		}
	}
	if s.Proc != nil || s.RootDir != "" {
		early |= unix.CLONE_NEWNS
	}
	if early != 0 {
		p.Call("make the private namespaces", unix.SYS_UNSHARE, launch.Int(early))
	}
	if early&unix.CLONE_NEWNS != 0 {
		p.Call("make mounts private", unix.SYS_MOUNT, launch.Int(0), p.String("/"), launch.Int(0),
			launch.Int(unix.MS_REC|unix.MS_PRIVATE), launch.Int(0))
	}
	if s.RootDir != "" {
		addRootDir(p, s.RootDir)
	}
	if s.Process.Terminal {
		addPty(p)
		// One that is not mapped is refused when the process is to become it.
		if uid, err := hostID(s.UIDs, user != nil, s.Process.User.UID); err == nil {
			// As login(1) does, so that the terminal can be opened again by its name.
			p.Call("own the terminal", unix.SYS_FCHOWN, launch.Int(0), launch.Int(uid), launch.Int(-1)).
				Ignore(unix.EPERM, unix.EINVAL, unix.EROFS)
		}
	}

	closeRange := func(first, last uint32) {
		p.Call("close descriptors", unix.SYS_CLOSE_RANGE, launch.Int(first), launch.Int(last), launch.Int(0))
	}
	first := uint32(5)
	if s.Process.Terminal {
		closeRange(5, 5)
		first = launch.MasterFD + 1
	}
	if kept > 0 {
		closeRange(first, launch.FirstFD-1)
		first = launch.FirstFD + kept
	}
	closeRange(first, ^uint32(0))
	p.Call("be not dumpable", unix.SYS_PRCTL, launch.Int(unix.PR_SET_DUMPABLE), launch.Int(0), launch.Int(0), launch.Int(0), launch.Int(0))
	p.Fork(enterPID, 0, cgroupDir)
	if cgroupDir != nil {
		p.Call("close the cgroup", unix.SYS_CLOSE, *cgroupDir)
	}
	// A session of its own also without a terminal: a process with the caller's
	// controlling terminal could type into it (TIOCSTI).
	p.Call("make a session", unix.SYS_SETSID)
	if s.Process.Terminal {
		p.Call("take the terminal", unix.SYS_IOCTL, launch.Int(0), launch.Int(unix.TIOCSCTTY), launch.Int(0))
	}
	if s.Proc != nil {
		if err := addProc(p, s.Proc); err != nil {
			return nil, err
		}
	}
	if user != nil {
		p.Call("join the user namespace", unix.SYS_SETNS, p.File(user), launch.Int(unix.CLONE_NEWUSER))
		p.Call("become root of the user namespace", unix.SYS_SETRESGID, launch.Int(0), launch.Int(0), launch.Int(0))
		p.Call("become root of the user namespace", unix.SYS_SETRESUID, launch.Int(0), launch.Int(0), launch.Int(0))
	}
	if late != 0 {
		p.Call("make the private namespaces", unix.SYS_UNSHARE, launch.Int(late))
		if late&unix.CLONE_NEWNET != 0 {
			addLo(p)
		}
	}
	looked := *s.Process
	if s.Exe != "" {
		looked.Args = []string{s.Exe}
	}
	if err := addProcess(p, &looked, s.Seccomp, s.SeccompFlag); err != nil {
		return nil, err
	}
	if s.Process.Terminal {
		p.Created() // its master is taken then
	}
	p.Exec(commandPaths(&looked), s.Process.Args, s.Process.Env)
	return p, nil
}

func (s *JoinSpec) check() error {
	if s.Process == nil {
		return errors.New("no process to join with")
	}
	for k, f := range s.Namespaces {
		switch {
		case k.Index() < 0:
			return fmt.Errorf("unknown namespace type %q", k)
		case f == nil:
			return fmt.Errorf("no %s namespace is given", k)
		case slices.Contains(s.Private, k):
			return fmt.Errorf("the %s namespace is to be joined and private", k)
		}
	}
	for _, k := range s.Private {
		if k == namespace.User {
			return errors.New("a join cannot have a private user namespace")
		}
		if k.Index() < 0 {
			return fmt.Errorf("unknown namespace type %q", k)
		}
	}
	if s.RootDir != "" && (s.Root != nil || s.Namespaces[namespace.Mnt] != nil) {
		return fmt.Errorf("root %s: there is another root, or a mnt namespace to join", s.RootDir)
	}
	if s.RootDir != "" && !path.IsAbs(s.RootDir) {
		return fmt.Errorf("root %s is not an absolute path", s.RootDir)
	}
	return nil
}

// addHostPty opens a terminal of the caller's mount namespace, for a target
// without a devpts of its own.
func addHostPty(p *launch.Program) {
	const step = "open a terminal"
	fd := p.Call(step, unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/dev/ptmx"), launch.Int(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)).
		Ignore(unix.ENOENT, unix.ENXIO, unix.EIO)
	p.Call(step, unix.SYS_DUP3, fd.Result(), launch.Int(launch.MasterFD), launch.Int(unix.O_CLOEXEC)).Ignore(unix.EBADF)
}

// addPty replaces that terminal by one of the devpts under the present root, if
// there is one, and makes the other end stdio.
func addPty(p *launch.Program) {
	const step = "open a terminal in /dev/pts"
	// No symbolic link is followed, and a FIFO that is put there opens at once:
	// it is no terminal, which the next call finds out.
	fd := p.Call(step, unix.SYS_OPENAT2, launch.Int(unix.AT_FDCWD), p.String("/dev/pts/ptmx"),
		openHow(p, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, unix.RESOLVE_NO_SYMLINKS), launch.Int(unix.SizeofOpenHow)).
		Ignore(unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EACCES)
	// EBADF: it was not opened, the caller's stays.
	p.Call(step, unix.SYS_DUP3, fd.Result(), launch.Int(launch.MasterFD), launch.Int(unix.O_CLOEXEC)).Ignore(unix.EBADF)
	master := launch.Int(launch.MasterFD)
	p.Call("unlock the terminal", unix.SYS_IOCTL, master, launch.Int(unix.TIOCSPTLCK), p.Bytes(make([]byte, 4)))
	tty := p.Call("open the terminal's other end", unix.SYS_IOCTL, master, launch.Int(unix.TIOCGPTPEER), launch.Int(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC))
	for n := range 3 {
		p.Call("make the terminal stdio", unix.SYS_DUP3, tty.Result(), launch.Int(n), launch.Int(0))
	}
}

// addRootDir makes dir the root. It is run in a mount namespace of the
// process's own.
func addRootDir(p *launch.Program, dir string) {
	c := &compiler{Input: &Input{}, p: p}
	at := launch.Int(unix.AT_FDCWD)
	dev := c.openTree("clone /dev", at, "/dev", unix.AT_RECURSIVE)
	step := "make " + dir + " the root"
	root := c.openTree(step, at, dir, unix.AT_RECURSIVE)
	c.moveMount(step, root, at, dir) // a root must be a mount
	p.Call(step, unix.SYS_FCHDIR, root)
	p.Call(step, unix.SYS_PIVOT_ROOT, p.String("."), p.String("."))
	p.Call("detach the old root", unix.SYS_UMOUNT2, p.String("."), launch.Int(unix.MNT_DETACH))
	p.Call("change to /", unix.SYS_CHDIR, p.String("/"))
	over(p, "/dev", func(dir launch.Arg) { c.moveMount("bind /dev on /dev", dev, dir, "") })
	over(p, "/sys", func(dir launch.Arg) {
		const step, attr = "mount sysfs on /sys", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
		c.moveMount(step, c.newMount(step, "sysfs", "sysfs", nil, attr), dir, "")
	})
}

// over calls body to mount something over name, if there is a directory of that
// name in the root.
func over(p *launch.Program, name string, body func(dir launch.Arg)) {
	dir := p.Call("open "+name, unix.SYS_OPENAT2, launch.Int(unix.AT_FDCWD), p.String(name),
		openHow(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, unix.RESOLVE_NO_SYMLINKS), launch.Int(unix.SizeofOpenHow))
	dir.Then(func() { body(dir.Result()) }, unix.ENOENT, unix.ENOTDIR, unix.ELOOP)
}

// addProc mounts proc over /proc, if there is a directory of that name. It is run
// in the pid namespace that is to be seen there, and in a mount namespace of the
// process's own.
func addProc(p *launch.Program, pm *ProcMount) error {
	m := &mount{Mount: specs.Mount{Destination: "/proc", Type: "proc", Options: pm.Options}}
	if pm.Options == nil {
		m.Options = []string{"nosuid", "nodev", "noexec"}
	}
	if err := m.parse(); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	inProc := func(names []string) []string {
		return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !strings.HasPrefix(path.Clean(n), "/proc/") })
	}
	c := &compiler{Input: &Input{}, p: p, hows: map[unix.OpenHow]launch.Arg{}, ownDev: true}
	c.lx.MaskedPaths, c.lx.ReadonlyPaths = inProc(pm.Masked), inProc(pm.ReadOnly)
	over(p, "/proc", func(dir launch.Arg) {
		if len(c.lx.MaskedPaths) > 0 {
			// Files are masked with clones of a null device, in a tmpfs that
			// the new /proc is about to cover.
			const step = "make a null device"
			c.dev = c.newMount(step, "tmpfs", "", nil, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
			c.moveMount(step, c.dev, dir, "")
			p.Call(step, unix.SYS_MKNODAT, c.dev, p.String("null"), launch.Int(unix.S_IFCHR|0o666), launch.Int(unix.Mkdev(1, 3)))
		}
		const step = "mount proc on /proc"
		c.moveMount(step, c.newMount(step, "proc", "proc", m.data, m.attr.set|m.rec.set), dir, "")
		c.root = p.Call("open the root", unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/"),
			launch.Int(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), launch.Int(0)).Result()
		c.protect()
	})
	return nil
}

// openHow is a struct open_how (openat2(2)).
func openHow(p *launch.Program, flags, resolve uint64) launch.Arg {
	b := binary.NativeEndian.AppendUint64(nil, flags)
	b = binary.NativeEndian.AppendUint64(b, 0)
	return p.Bytes(binary.NativeEndian.AppendUint64(b, resolve))
}

// OpenNamespaces opens the process id, as what its namespaces are joined by: for
// setns(2) its pidfd stands for all of them (Linux 5.8). It returns their inodes
// too, of all kinds that the kernel has. The caller closes the pidfd. It fails with
// [procid.ErrGone] if the process is gone, whether or not another has its pid, or
// is a zombie, which is in no namespace any more.
func OpenNamespaces(id procid.ID) (pidfd *os.File, inodes map[namespace.Kind]uint64, err error) {
	if pidfd, err = id.Open(); err != nil {
		return nil, nil, err
	}
	inodes = make(map[namespace.Kind]uint64)
	dir := "/proc/" + strconv.Itoa(id.PID) + "/ns/"
	for _, k := range namespace.Kinds() {
		var st unix.Stat_t
		err = unix.Stat(dir+string(k), &st)
		if errors.Is(err, os.ErrNotExist) {
			if !k.Supported() {
				continue
			}
			err = procid.ErrGone // some of a zombie are still shown, not all
		}
		if err != nil {
			pidfd.Close()
			return nil, nil, err
		}
		inodes[k] = st.Ino
	}
	// Those were of this process only if it has not been reaped meanwhile.
	if err := unix.PidfdSendSignal(int(pidfd.Fd()), 0, nil, 0); errors.Is(err, unix.ESRCH) {
		pidfd.Close()
		return nil, nil, procid.ErrGone
	}
	return pidfd, inodes, nil
}
