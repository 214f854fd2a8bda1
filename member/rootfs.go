package member

import (
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
)

// enterRoot enters the mount namespace and the root.
func (c *compiler) enterRoot() error {
	p := c.p
	mnt := c.ns(namespace.Mnt)
	switch {
	case mnt.File != nil:
		p.Call("join the mnt namespace", unix.SYS_SETNS, p.File(mnt.File), launch.Int(unix.CLONE_NEWNS))
		if c.RootFD != nil {
			p.Call("change to the member's root", unix.SYS_FCHDIR, p.File(c.RootFD))
			p.Call("make it the root", unix.SYS_CHROOT, p.String("."))
		}
	case mnt.Private:
		p.Call("make a mnt namespace", unix.SYS_UNSHARE, launch.Int(unix.CLONE_NEWNS))
		// Not slave: what was cloned from the host and is to be a slave was
		// cloned before, and nothing else of the host's mounts is kept.
		c.setattr("make the host's mounts private", launch.Int(unix.AT_FDCWD), "/", unix.AT_RECURSIVE, unix.MountAttr{Propagation: unix.MS_PRIVATE})
	}
	p.Call("clear umask", unix.SYS_UMASK, launch.Int(0))
	if c.UserNS != nil {
		if err := c.becomeMappedRoot(); err != nil {
			return err
		}
	}
	if c.Root != nil {
		c.attachRoot()
		if c.Made != nil { // it is entered later
			c.root = p.Call("open the root", unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String(c.Root.Path), launch.Int(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)).Result()
			return nil
		}
		p.Call("change to the root file system", unix.SYS_CHDIR, p.String("rootfs"))
		c.pivot()
	}
	c.root = p.Call("open the root", unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/"), launch.Int(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)).Result()
	return nil
}

// becomeMappedRoot makes files that are created from here on belong to the root
// of the user namespace. The host's root has no id in an idmapped mount, and a
// file that it makes there is refused with EOVERFLOW (mount_setattr(2)). The
// overlay also works on its layers as who mounted it.
func (c *compiler) becomeMappedRoot() error {
	uid, err := hostID(c.UIDs, true, 0)
	if err != nil {
		return fmt.Errorf("uid mappings: %w", err)
	}
	gid, err := hostID(c.GIDs, true, 0)
	if err != nil {
		return fmt.Errorf("gid mappings: %w", err)
	}
	const noSetuidFixup = 1 << 2 // else setfsuid takes CAP_DAC_OVERRIDE away
	c.p.Call("keep capabilities", unix.SYS_PRCTL, launch.Int(unix.PR_SET_SECUREBITS), launch.Int(noSetuidFixup), launch.Int(0), launch.Int(0), launch.Int(0))
	c.p.Call(fmt.Sprintf("make files as group %d", gid), unix.SYS_SETFSGID, launch.Int(gid))
	c.p.Call(fmt.Sprintf("make files as user %d", uid), unix.SYS_SETFSUID, launch.Int(uid))
	return nil
}

// attachRoot mounts the root at DataDir/rootfs. Names of DataDir are
// relative, so that no path has to be quoted for the overlay and none of the
// host's paths shows in the member's /proc/mounts.
func (c *compiler) attachRoot() {
	p, r := c.p, c.Root
	at := "rootfs"
	if c.Made != nil {
		at = r.Path
	}
	if !c.ownDev { // whatever the root has at /dev/null, it is not used as a mask
		for range c.lx.MaskedPaths {
			c.nulls = append(c.nulls, c.openTree("clone /dev/null", launch.Int(unix.AT_FDCWD), "/dev/null", 0))
		}
	}
	for _, m := range c.mounts {
		switch {
		case m.bind && !m.peer:
			c.cloneSource(m)
		case m.early:
			c.newFromSpec(m)
		case m.Type == "cgroup":
			c.cloneCgroups(m)
		}
	}
	if c.rootTree == (launch.Arg{}) {
		c.cloneRoot()
	}
	tree := c.rootTree
	p.Call("change to "+c.DataDir, unix.SYS_CHDIR, p.String(c.DataDir))
	if !r.Overlay || r.ReadOnly && !r.Points {
		// An overlay of one layer alone is refused by the kernel; the layer
		// does as well.
		if r.Overlay {
			c.setattr("make the root file system read-only", tree, "", 0, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		}
		c.moveMount("attach the root file system", tree, launch.Int(unix.AT_FDCWD), at)
	} else {
		c.moveMount("attach the overlay's lower layer", tree, launch.Int(unix.AT_FDCWD), "lower")
		if c.UserNS != nil {
			rw := c.openTree("clone the writable layer", launch.Int(unix.AT_FDCWD), "rw", 0)
			c.idmap("idmap the writable layer", rw, 0)
			c.moveMount("attach the writable layer", rw, launch.Int(unix.AT_FDCWD), "rw")
		}
		layers, attr := []string{"lowerdir=lower", "upperdir=rw/upper", "workdir=rw/work"}, uint64(0)
		if r.ReadOnly {
			layers, attr = []string{"lowerdir=rw/upper:lower"}, unix.MOUNT_ATTR_RDONLY
		}
		ov := c.newMount("mount overlay on /", "overlay", "overlay", layers, attr)
		c.moveMount("attach the overlay", ov, launch.Int(unix.AT_FDCWD), at)
	}
}

// cloneRoot makes c.rootTree.
func (c *compiler) cloneRoot() {
	rec := unix.AT_RECURSIVE
	if c.Root.Overlay {
		rec = 0 // what is mounted in the lower directory is not part of it
	}
	step := "clone root file system " + c.Root.Path
	c.rootTree = c.openTree(step, launch.Int(unix.AT_FDCWD), c.Root.Path, rec)
	if c.UserNS != nil {
		c.idmap("idmap root file system "+c.Root.Path, c.rootTree, rec)
	}
}

// awaitHooks lets others look at what has been made, and then enters the root.
func (c *compiler) awaitHooks() {
	p, sock := c.p, c.p.File(c.Made)
	buf := p.Bytes([]byte{'m'})
	p.Call("report that the namespaces are made", unix.SYS_WRITE, sock, buf, launch.Int(1))
	p.Call("wait for the hooks", unix.SYS_READ, sock, buf, launch.Int(1))
	if c.Root != nil {
		p.Call("change to the root file system", unix.SYS_FCHDIR, c.root)
		c.pivot()
	}
}

// pivot makes the working directory, which is a mount point, the root.
func (c *compiler) pivot() {
	p := c.p
	p.Call("pivot to the root file system", unix.SYS_PIVOT_ROOT, p.String("."), p.String("."))
	p.Call("detach the host's mounts", unix.SYS_UMOUNT2, p.String("."), launch.Int(unix.MNT_DETACH))
	p.Call("change to /", unix.SYS_CHDIR, p.String("/"))
}

// closeRoot does what must come after everything has been made: read-only and
// masked paths, a read-only root, its propagation.
func (c *compiler) closeRoot() error {
	c.protect()
	if c.Root.ReadOnly && !c.Root.Overlay {
		c.setattr("make the root file system read-only", c.root, "", 0, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if name := c.lx.RootfsPropagation; name != "" {
		prop, ok := propagations[strings.TrimPrefix(name, "r")]
		if !ok {
			return fmt.Errorf("linux.rootfsPropagation %q is unknown", name)
		}
		flags := 0
		if strings.HasPrefix(name, "r") {
			flags = unix.AT_RECURSIVE
		}
		c.setattr("make the root "+name, c.root, "", flags, unix.MountAttr{Propagation: prop})
	}
	return nil
}

// protect makes the read-only paths so and covers the masked ones.
func (c *compiler) protect() {
	for _, name := range c.lx.ReadonlyPaths {
		step := "make " + name + " read-only"
		o := c.openKernel(step, name, unix.O_PATH)
		o.Then(func() {
			t := o.Result()
			clone := c.openTree(step, t, "", unix.AT_RECURSIVE)
			c.setattr(step, clone, "", unix.AT_RECURSIVE, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
			c.moveMount(step, clone, t, "")
			c.close(clone)
			c.close(t)
		}, unix.ENOENT, unix.ENOTDIR)
	}
	c.mask()
}

// mask covers files with /dev/null and directories with an empty read-only
// tmpfs. Which of the two a path is, is found out when the program runs.
func (c *compiler) mask() {
	p := c.p
	const attrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	for i, name := range c.lx.MaskedPaths {
		step := "mask " + name
		o := c.openKernel(step, name, unix.O_PATH)
		o.Then(func() {
			t := o.Result()
			isDir := func() launch.Op {
				return p.Call(step, unix.SYS_OPENAT, t, p.String("."), launch.Int(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC))
			}
			isDir().Else(func() {
				if c.ownDev {
					null := c.openTree(step, c.dev, "null", 0)
					c.moveMount(step, null, t, "")
					c.close(null)
				} else {
					c.moveMount(step, c.nulls[i], t, "")
				}
			}, unix.ENOTDIR)
			// t is still what was found, below what has just covered it.
			d := isDir()
			d.Then(func() {
				c.close(d.Result())
				empty := c.newMount(step, "tmpfs", "", nil, attrs)
				c.moveMount(step, empty, t, "")
				c.close(empty)
			}, unix.ENOTDIR)
			c.close(t)
		}, unix.ENOENT, unix.ENOTDIR)
	}
}

// defaultDevices are the ones that runtime-spec wants in every container
// (config-linux.md, "Default Devices").
var defaultDevices = []specs.LinuxDevice{
	{Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
	{Path: "/dev/zero", Type: "c", Major: 1, Minor: 5},
	{Path: "/dev/full", Type: "c", Major: 1, Minor: 7},
	{Path: "/dev/random", Type: "c", Major: 1, Minor: 8},
	{Path: "/dev/urandom", Type: "c", Major: 1, Minor: 9},
	{Path: "/dev/tty", Type: "c", Major: 5, Minor: 0},
}

// makeDevices makes the device nodes and symlinks of /dev, unless /dev is a
// bind mount: then it is somebody else's. The nodes work in a user namespace
// too, because the file system they are in belongs to the host's.
func (c *compiler) makeDevices() error {
	p := c.p
	if m := c.mountOn("/dev"); m != nil && m.bind {
		if len(c.lx.Devices) > 0 {
			return fmt.Errorf("linux.devices: /dev is a bind mount of %s", m.Source)
		}
		return nil
	}
	if !c.ownDev {
		c.makeMountPoint("/dev", true)
		c.dev = c.openIn("open /dev", "/dev", unix.O_PATH|unix.O_DIRECTORY).Result()
	}
	listed := map[string]bool{}
	for _, d := range c.lx.Devices {
		listed[path.Clean(d.Path)] = true
	}
	for _, d := range defaultDevices {
		if listed[d.Path] {
			continue
		}
		mk := p.Call("make device "+d.Path, unix.SYS_MKNODAT, c.dev, p.String(path.Base(d.Path)),
			launch.Int(unix.S_IFCHR|0o666), launch.Int(unix.Mkdev(uint32(d.Major), uint32(d.Minor))))
		if !c.ownDev || d.Path != "/dev/null" {
			mk.Ignore(unix.EEXIST)
		}
	}
	for i, d := range c.lx.Devices {
		if err := c.makeDevice(d); err != nil {
			return fmt.Errorf("linux.devices[%d]: %w", i, err)
		}
	}
	links := [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}}
	if c.mountOn("/dev/pts") != nil {
		links = append(links, [2]string{"pts/ptmx", "ptmx"})
	}
	for _, l := range links {
		p.Call("make symlink /dev/"+l[1], unix.SYS_SYMLINKAT, p.String(l[0]), c.dev, p.String(l[1])).Ignore(unix.EEXIST)
	}
	return nil
}

func (c *compiler) makeDevice(d specs.LinuxDevice) error {
	p := c.p
	kind, ok := map[string]uint32{"c": unix.S_IFCHR, "u": unix.S_IFCHR, "b": unix.S_IFBLK, "p": unix.S_IFIFO}[d.Type]
	name := path.Clean(d.Path)
	switch {
	case !ok:
		return fmt.Errorf("type %q of %s is unknown", d.Type, d.Path)
	case !path.IsAbs(d.Path) || name == "/" || strings.Contains(name, "\x00"):
		return fmt.Errorf("path %q is not that of a device", d.Path)
	case d.Major < 0 || d.Minor < 0 || d.Major > 1<<12-1 || d.Minor > 1<<20-1:
		return fmt.Errorf("%s has number %d:%d, which does not exist", name, d.Major, d.Minor)
	}
	mode := uint32(0o666)
	if d.FileMode != nil {
		mode = uint32(d.FileMode.Perm())
	}
	var uid, gid uint32
	if d.UID != nil {
		uid = *d.UID
	}
	if d.GID != nil {
		gid = *d.GID
	}
	hostUID, err := hostID(c.UIDs, c.UserNS != nil, uid)
	if err != nil {
		return fmt.Errorf("owner of %s: %w", name, err)
	}
	hostGID, err := hostID(c.GIDs, c.UserNS != nil, gid)
	if err != nil {
		return fmt.Errorf("group of %s: %w", name, err)
	}
	step := "make device " + name
	// A privileged member has hundreds, and almost all of them are directly in
	// the fresh /dev: nothing has to be looked for there.
	dir, base := c.dev, p.String(path.Base(name))
	if direct := c.ownDev && path.Dir(name) == "/dev"; !direct {
		c.makeMountPoint(path.Dir(name), true)
		dir = c.openIn(step, path.Dir(name), unix.O_PATH|unix.O_DIRECTORY).Result()
		defer c.close(dir)
	}
	p.Call(step, unix.SYS_MKNODAT, dir, base, launch.Int(kind|mode), launch.Int(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))).Then(func() {
		if uid != 0 || gid != 0 {
			p.Call(step, unix.SYS_FCHOWNAT, dir, base, launch.Int(hostUID), launch.Int(hostGID), launch.Int(unix.AT_SYMLINK_NOFOLLOW))
		}
	}, unix.EEXIST)
	return nil
}

// makeConsole puts the terminal on /dev/console.
func (c *compiler) makeConsole(slave launch.Arg) {
	c.makeMountPoint("/dev/console", false)
	clone := c.openTree("clone the terminal", slave, "", 0)
	t := c.openIn("open /dev/console", "/dev/console", unix.O_PATH).Result()
	c.moveMount("mount the terminal on /dev/console", clone, t, "")
	c.close(clone)
	c.close(t)
}
