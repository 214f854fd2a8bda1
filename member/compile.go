package member

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
)

// Join says where one namespace of a member comes from. The zero value is the
// host's, which is the launcher's own.
type Join struct {
	Private bool     // a new one
	File    *os.File // this one; lent
}

// Root says what the root of a member is made of.
type Root struct {
	Path string // absolute, on the host
	// Overlay puts a writable layer over Path, or, with ReadOnly, nothing:
	// either way Path is never written to. Without it, Path itself is the root.
	Overlay  bool
	ReadOnly bool
	// Points says that rw/upper of the data directory has the mount points that Path
	// lacks ([MakeMountPoints]): with ReadOnly it goes above Path, as a layer that
	// nothing is written to either.
	Points bool
}

// CgroupHierarchy is one hierarchy as a mount of type "cgroup" shows it.
type CgroupHierarchy struct {
	Dir     string   // name under the mount; "" for the unified hierarchy alone, which is the mount itself
	Unified bool     // cgroup v2
	Options []string // of the v1 mount: controllers, or "name=N"
	Own     string   // the member's cgroup on the host: an absolute path, or "" if it is not known
}

// Input is what [Compile] makes a launch program of. Files are lent: they must
// stay open until the program's starter has given them to the child.
type Input struct {
	// Spec is done as it stands: nothing is added but what an OCI runtime adds
	// (the default devices and symlinks in /dev). Namespaces, hooks, the
	// cgroup path and resources in it are not looked at.
	Spec       *specs.Spec
	Namespaces map[namespace.Kind]Join

	Root    *Root    // nil: the root of the mount namespace that is joined, or the host's
	RootFD  *os.File // with a joined mount namespace: the directory in it that becomes the root
	DataDir string   // the member's data directory, with rw/upper, rw/work, lower and rootfs

	// Shm is a mount namespace whose root is the sandbox's /dev/shm. It takes
	// the place of a tmpfs that Spec mounts there. HostMnt is the launcher's
	// mount namespace, to come back to. Both or none.
	Shm, HostMnt *os.File

	// UserNS is the user namespace that is joined; the ids are its map. With
	// it, the root and bind mounts are idmapped.
	UserNS     *os.File
	UIDs, GIDs []specs.LinuxIDMapping

	CgroupDir   *os.File          // the cgroup v2 directory to be in, or nil
	CgroupTasks []string          // absolute paths of the tasks files of the v1 cgroups to join
	Cgroups     []CgroupHierarchy // what a mount of type "cgroup" shows; see [CgroupHierarchies]

	// Files are files of the host that the member has at these places, in place
	// of what its root has there. Where Spec mounts something at or above a place
	// they give way to it; and where there is none in a root that is not to
	// be written to, they are left out.
	Files map[string]string

	// Made, if not nil, is a socket on which the process says, by one byte, that its
	// namespaces and mounts are made and its root is not entered, and then
	// waits for one byte, or the end. The root is mounted on Root.Path then,
	// where hooks look for it, and what the host shows is around it still.
	Made *os.File

	Stdin, Stdout, Stderr *os.File // nil: left as they are; not used with a terminal

	Seccomp      []unix.SockFilter
	SeccompFlags uintptr // SECCOMP_FILTER_FLAG_*

	// IsDir says whether the source of a bind mount is a directory. nil asks
	// the file system.
	IsDir func(path string) (bool, error)
}

// Compile makes the launch program of a member's init. It reports a field of
// the specification that it does not do, and never passes one over.
//
// Paths on the host (Root.Path, DataDir, sources of bind mounts, tasks files)
// are trusted. Paths inside the root are not: they are resolved with openat2(2)
// from its descriptor, and no magic link is followed.
func Compile(in *Input) (*launch.Program, error) {
	c := &compiler{Input: in, p: new(launch.Program), hows: map[unix.OpenHow]launch.Arg{}}
	if err := c.check(); err != nil {
		return nil, err
	}
	if err := c.compile(); err != nil {
		return nil, err
	}
	if _, err := c.p.Size(); err != nil {
		return nil, err
	}
	return c.p, nil
}

type compiler struct {
	*Input
	p    *launch.Program
	lx   specs.Linux
	hows map[unix.OpenHow]launch.Arg

	mounts   []*mount
	rootTree launch.Arg // what becomes the root, or the lower layer of it, detached; zero until it is cloned
	root     launch.Arg // O_PATH descriptor of the member's root, once it is entered
	dev      launch.Arg // and of its /dev, where devices are made
	ownDev   bool       // /dev is a fresh tmpfs, and /dev/null in it is what this program makes
	nulls    []launch.Arg
	kernel   []*mount    // proc and sysfs; what is masked below them is found from their trees
	master   *launch.Arg // of the terminal, if there is one
}

// check refuses what is not supported and what cannot be meant.
func (c *compiler) check() error {
	if c.Spec == nil || c.Spec.Process == nil {
		return errors.New("process is missing")
	}
	if c.Spec.Linux != nil {
		c.lx = *c.Spec.Linux
	}
	l := &c.lx
	switch {
	case len(l.NetDevices) > 0:
		return errors.New("linux.netDevices is not supported")
	case l.IntelRdt != nil:
		return errors.New("linux.intelRdt is not supported")
	case l.MemoryPolicy != nil:
		return errors.New("linux.memoryPolicy is not supported")
	case l.Personality != nil:
		return errors.New("linux.personality is not supported")
	case l.MountLabel != "":
		return errors.New("linux.mountLabel is not supported")
	case c.ns(namespace.User).Private:
		return errors.New("user namespace: a private one is not supported")
	case (c.UserNS == nil) != (c.ns(namespace.User).File == nil):
		return errors.New("user namespace: its map and the one that is joined do not go together")
	case c.Root == nil && (len(c.Spec.Mounts) > 0 || len(l.Devices) > 0 || len(l.MaskedPaths) > 0 || len(l.ReadonlyPaths) > 0):
		return errors.New("mounts, devices, masked and read-only paths need a root of one's own")
	case c.Root != nil && !c.ns(namespace.Mnt).Private:
		return errors.New("a root of one's own needs a private mount namespace")
	case c.Root != nil && !path.IsAbs(c.Root.Path):
		return fmt.Errorf("root.path %q is not an absolute path", c.Root.Path)
	case (c.Shm == nil) != (c.HostMnt == nil):
		return errors.New("a shared /dev/shm needs the host's mount namespace to come back to")
	}
	for what, set := range map[string]bool{"hostname": c.Spec.Hostname != "", "domainname": c.Spec.Domainname != ""} {
		if set && !c.ns(namespace.UTS).Private {
			return fmt.Errorf("%s: the uts namespace is shared", what)
		}
	}
	if len(l.TimeOffsets) > 0 && !c.ns(namespace.Time).Private {
		return errors.New("linux.timeOffsets: the time namespace is not private")
	}
	for _, s := range slices.Concat([]string{c.Spec.Hostname, c.Spec.Domainname, c.DataDir}, l.MaskedPaths, l.ReadonlyPaths, c.CgroupTasks) {
		if strings.Contains(s, "\x00") {
			return fmt.Errorf("%q holds a NUL byte", s)
		}
	}
	for _, m := range slices.Concat(c.UIDs, c.GIDs) {
		if uint64(m.ContainerID)+uint64(m.Size) > 1<<32 || uint64(m.HostID)+uint64(m.Size) > 1<<32 {
			return fmt.Errorf("id mapping %d:%d:%d is out of range", m.ContainerID, m.HostID, m.Size)
		}
	}
	return nil
}

func (c *compiler) ns(k namespace.Kind) Join { return c.Namespaces[k] }

// compile puts the program together, in the order of docs/ARCHITECTURE.md.
func (c *compiler) compile() error {
	proc := c.Spec.Process
	var err error
	if c.mounts, err = c.parseMounts(); err != nil {
		return err
	}
	if c.bornAtOnce() {
		var flags uintptr
		if c.ns(namespace.PID).Private {
			flags = unix.CLONE_NEWPID
		}
		c.fork("be born in the cgroup and pid namespace", flags)
	}
	for _, f := range c.CgroupTasks {
		c.writeFile("join cgroup "+path.Dir(f), f, "0")
	}
	if n := proc.OOMScoreAdj; n != nil {
		addOOMScoreAdj(c.p, *n)
	}
	c.cloneShm()
	c.clonePeers()

	c.enterNamespaces()
	if err := c.setUpNamespaces(); err != nil {
		return err
	}
	if err := c.enterRoot(); err != nil {
		return err
	}
	if c.Root != nil {
		for _, m := range c.mounts {
			if m.file {
				c.attachFile(m)
			} else if err := c.attach(m); err != nil {
				return err
			}
		}
		if err := c.makeDevices(); err != nil {
			return err
		}
		// As runc does, since images name directories that they lack.
		if cwd := proc.Cwd; cwd != "/" && !c.Root.ReadOnly {
			c.makePath("make working directory "+cwd, cwd, true)
		}
	}
	if c.Made != nil {
		c.awaitHooks()
	}
	if err := c.stdio(); err != nil {
		return err
	}
	if c.Root != nil {
		if err := c.closeRoot(); err != nil {
			return err
		}
	}
	if c.master != nil {
		// Not before: any result, the terminal's other side too, may have that
		// number. EINVAL: it is the master itself.
		c.p.Call("keep the terminal's master", unix.SYS_DUP3, *c.master, launch.Int(launch.MasterFD), launch.Int(unix.O_CLOEXEC)).Ignore(unix.EINVAL)
	}
	if err := addLimits(c.p, proc); err != nil {
		return err
	}
	if c.UserNS != nil {
		c.p.Call("join the user namespace", unix.SYS_SETNS, c.p.File(c.UserNS), launch.Int(unix.CLONE_NEWUSER))
		if c.ns(namespace.Mnt).Private {
			c.p.Call("give the mount namespace to the user namespace", unix.SYS_UNSHARE, launch.Int(unix.CLONE_NEWNS))
		}
	}
	if err := addProcess(c.p, proc, c.Seccomp, c.SeccompFlags); err != nil {
		return err
	}
	c.p.Created()
	c.p.Exec(commandPaths(proc), proc.Args, proc.Env)
	return nil
}

// bornAtOnce reports whether the process can be born where it belongs, in its
// cgroup and new pid namespace, rather than fork once it has entered others.
func (c *compiler) bornAtOnce() bool {
	return c.ns(namespace.PID).File == nil && !c.ns(namespace.Time).Private &&
		(c.ns(namespace.PID).Private || c.CgroupDir != nil)
}

// fork makes the process that will be init.
func (c *compiler) fork(step string, flags uintptr) {
	var dir *launch.Arg
	if c.CgroupDir != nil {
		fd := c.p.File(c.CgroupDir)
		dir = &fd
	}
	c.p.Fork(step, flags, dir)
}

// enterNamespaces joins and unshares, and forks where that is what enters a
// namespace. The mount namespace comes last: everything before sees the host's
// files. A new cgroup namespace shows the cgroup that it was made in, so it
// comes after the fork.
func (c *compiler) enterNamespaces() {
	kinds := []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS, namespace.Time, namespace.PID}
	born := c.bornAtOnce()
	if born {
		kinds = kinds[:len(kinds)-1]
	}
	fork := c.CgroupDir != nil
	for _, k := range kinds {
		c.enter(k)
		j := c.ns(k)
		fork = fork || k == namespace.PID && (j.Private || j.File != nil) || k == namespace.Time && j.Private
	}
	if fork && !born {
		// In a shared pid namespace others see this process, which has the
		// host's files open until its execve.
		c.p.Call("be not dumpable", unix.SYS_PRCTL, launch.Int(unix.PR_SET_DUMPABLE), launch.Int(0), launch.Int(0), launch.Int(0), launch.Int(0))
		c.fork("fork into the pid namespace and the cgroup", 0)
	}
	c.enter(namespace.Cgroup)
}

// enter joins or makes the namespace of kind k.
func (c *compiler) enter(k namespace.Kind) {
	switch j := c.ns(k); {
	case j.File != nil:
		c.p.Call(fmt.Sprintf("join the %s namespace", k), unix.SYS_SETNS, c.p.File(j.File), launch.Int(k.Flag()))
	case j.Private:
		c.p.Call(fmt.Sprintf("make a %s namespace", k), unix.SYS_UNSHARE, launch.Int(k.Flag()))
		if k == namespace.Time && len(c.lx.TimeOffsets) > 0 {
			var lines strings.Builder
			for _, clock := range slices.Sorted(maps.Keys(c.lx.TimeOffsets)) {
				o := c.lx.TimeOffsets[clock]
				fmt.Fprintf(&lines, "%s %d %d\n", clock, o.Secs, o.Nanosecs)
			}
			c.writeFile("set time offsets", "/proc/self/timens_offsets", lines.String())
		}
	}
}

// setUpNamespaces sets the names and sysctls of private namespaces. The host's
// /proc/sys shows a process its own namespaces' values, and unlike the
// member's it is neither masked nor anybody's to replace.
func (c *compiler) setUpNamespaces() error {
	if c.ns(namespace.Net).Private {
		addLo(c.p)
	}
	if h := c.Spec.Hostname; h != "" {
		c.p.Call("set hostname to "+h, unix.SYS_SETHOSTNAME, c.p.String(h), launch.Int(len(h)))
	}
	if d := c.Spec.Domainname; d != "" {
		c.p.Call("set domainname to "+d, unix.SYS_SETDOMAINNAME, c.p.String(d), launch.Int(len(d)))
	}
	for _, k := range slices.Sorted(maps.Keys(c.lx.Sysctl)) {
		kind, ok := sysctlKind(k)
		if !ok {
			return fmt.Errorf("linux.sysctl: %q belongs to no namespace", k)
		}
		if !c.ns(kind).Private {
			return fmt.Errorf("linux.sysctl: %q: the %s namespace is shared", k, kind)
		}
		name := strings.ReplaceAll(k, ".", "/")
		if strings.Contains(k, "/") { // sysctl.d(5): a name with slashes keeps its dots
			name = k
		}
		if strings.Contains(name, "\x00") || path.Clean("/"+name) != "/"+name {
			return fmt.Errorf("linux.sysctl: %q is not a name", k)
		}
		c.writeFile(fmt.Sprintf("set sysctl %s to %q", k, c.lx.Sysctl[k]), "/proc/sys/"+name, c.lx.Sysctl[k])
	}
	return nil
}

// addLo makes localhost work in a new network namespace (netdevice(7)).
func addLo(p *launch.Program) {
	const step = "bring lo up"
	ifreq := make([]byte, 40)
	copy(ifreq, "lo")
	binary.NativeEndian.PutUint16(ifreq[unix.IFNAMSIZ:], unix.IFF_UP|unix.IFF_RUNNING)
	fd := p.Call(step, unix.SYS_SOCKET, launch.Int(unix.AF_INET), launch.Int(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), launch.Int(0)).Result()
	p.Call(step, unix.SYS_IOCTL, fd, launch.Int(unix.SIOCSIFFLAGS), p.Bytes(ifreq))
	p.Call("close", unix.SYS_CLOSE, fd)
}

// sysctlKind says which kind of namespace a sysctl belongs to (ipc_namespaces(7),
// network_namespaces(7)).
func sysctlKind(name string) (namespace.Kind, bool) {
	name = strings.ReplaceAll(name, "/", ".")
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced":
		return namespace.IPC, true
	case "kernel.domainname", "kernel.hostname":
		return namespace.UTS, true
	}
	switch {
	case strings.HasPrefix(name, "fs.mqueue."):
		return namespace.IPC, true
	case strings.HasPrefix(name, "net."):
		return namespace.Net, true
	}
	return "", false
}

// stdio makes the session and puts the terminal, or the files, on 0 to 2.
func (c *compiler) stdio() error {
	p, proc := c.p, c.Spec.Process
	if !proc.Terminal {
		for n, f := range []*os.File{c.Stdin, c.Stdout, c.Stderr} {
			if f != nil {
				p.Call(fmt.Sprintf("set up descriptor %d", n), unix.SYS_DUP3, p.File(f), launch.Int(n), launch.Int(0))
			}
		}
		// EPERM: it has been made the leader already.
		p.Call("make a session", unix.SYS_SETSID).Ignore(unix.EPERM)
		return nil
	}
	master := p.Call("open the terminal /dev/pts/ptmx", unix.SYS_OPENAT2, c.root, p.String("dev/pts/ptmx"),
		c.how(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0), launch.Int(unix.SizeofOpenHow)).Result()
	p.Call("unlock the terminal", unix.SYS_IOCTL, master, launch.Int(unix.TIOCSPTLCK), p.Bytes(make([]byte, 4)))
	slave := p.Call("open the terminal's other side", unix.SYS_IOCTL, master, launch.Int(unix.TIOCGPTPEER),
		launch.Int(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)).Result()
	if b := proc.ConsoleSize; b != nil {
		if b.Height > 65535 || b.Width > 65535 {
			return fmt.Errorf("process.consoleSize: %d by %d is too large", b.Height, b.Width)
		}
		var ws []byte
		for _, n := range []uint{b.Height, b.Width, 0, 0} {
			ws = binary.NativeEndian.AppendUint16(ws, uint16(n))
		}
		p.Call("set the terminal's size", unix.SYS_IOCTL, master, launch.Int(unix.TIOCSWINSZ), p.Bytes(ws))
	}
	uid, err := hostID(c.UIDs, c.UserNS != nil, proc.User.UID)
	if err != nil {
		return fmt.Errorf("process.user.uid: %w", err)
	}
	p.Call("give the terminal to the user", unix.SYS_FCHOWN, slave, launch.Int(uid), launch.Int(^uint32(0)))
	if c.Root != nil {
		c.makeConsole(slave)
	}
	c.master = &master
	p.Call("make a session", unix.SYS_SETSID).Ignore(unix.EPERM)
	p.Call("make the terminal the controlling one", unix.SYS_IOCTL, slave, launch.Int(unix.TIOCSCTTY), launch.Int(0))
	for n := range 3 {
		p.Call(fmt.Sprintf("set up descriptor %d", n), unix.SYS_DUP3, slave, launch.Int(n), launch.Int(0))
	}
	return nil
}

// writeFile adds the writing of s to a file of the host.
func (c *compiler) writeFile(step, file, s string) {
	fd := c.p.Call(step, unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), c.p.String(file), launch.Int(unix.O_WRONLY|unix.O_CLOEXEC), launch.Int(0)).Result()
	c.p.Call(step, unix.SYS_WRITE, fd, c.p.String(s), launch.Int(len(s)))
	c.close(fd)
}

func (c *compiler) close(fd launch.Arg) { c.p.Call("close", unix.SYS_CLOSE, fd) }

// how is a pointer to a struct open_how for a path inside the member's root.
func (c *compiler) how(flags int, mode uint64) launch.Arg {
	return c.howTo(flags, mode, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

func (c *compiler) howTo(flags int, mode, resolve uint64) launch.Arg {
	h := unix.OpenHow{Flags: uint64(flags), Mode: mode, Resolve: resolve}
	a, ok := c.hows[h]
	if !ok {
		b := binary.NativeEndian.AppendUint64(nil, h.Flags)
		b = binary.NativeEndian.AppendUint64(b, h.Mode)
		a = c.p.Bytes(binary.NativeEndian.AppendUint64(b, h.Resolve))
		c.hows[h] = a
	}
	return a
}

// openIn adds the opening of a path inside the member's root.
func (c *compiler) openIn(step, name string, flags int) launch.Op {
	return c.openBelow(step, c.root, name, c.how(flags|unix.O_CLOEXEC, 0))
}

// openKernel is openIn for what the kernel shows below a proc or sysfs of this
// program. It starts from that very mount: a member that shares its root with this
// one could exchange the directories above while this is made.
func (c *compiler) openKernel(step, name string, flags int) launch.Op {
	name = path.Clean("/" + name)
	for _, m := range c.kernel {
		if rel, ok := strings.CutPrefix(name, m.Destination+"/"); ok {
			return c.openBelow(step, m.tree, rel, c.how(flags|unix.O_CLOEXEC, 0))
		}
	}
	return c.openIn(step, name, flags)
}

func (c *compiler) openBelow(step string, dir launch.Arg, name string, how launch.Arg) launch.Op {
	rel := strings.TrimPrefix(path.Clean("/"+name), "/")
	if rel == "" {
		rel = "."
	}
	return c.p.Call(step, unix.SYS_OPENAT2, dir, c.p.String(rel), how, launch.Int(unix.SizeofOpenHow))
}

// hostID is what id inside a user namespace is on the host.
func hostID(m []specs.LinuxIDMapping, mapped bool, id uint32) (uint32, error) {
	if !mapped {
		return id, nil
	}
	for _, e := range m {
		if id >= e.ContainerID && id-e.ContainerID < e.Size {
			return e.HostID + (id - e.ContainerID), nil
		}
	}
	return 0, fmt.Errorf("id %d is not mapped in the user namespace", id)
}
