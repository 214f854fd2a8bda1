package member

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
)

// mount is a mount of the specification with its options understood.
type mount struct {
	specs.Mount
	what string // for step names: "mount proc on /proc"

	bind      bool
	recursive bool // rbind
	dir       bool // the mount point is a directory
	file      bool // one of Input.Files
	shm       bool // the sandbox's /dev/shm takes its place
	early     bool // of a file system on the host's files: made where these are seen
	peer      bool // a bind that stays tied to the host's mount: cloned before the mount namespace is left
	idmap     bool // asked for, not only because there is a user namespace
	idmapRec  bool

	attr, rec attrs // of the mount itself, and of all below it
	prop      []propagation
	data      []string // for the file system

	tree launch.Arg // the detached mount

	cgroups []launch.Arg // likewise, of hierarchies that were cloned
}

type attrs struct{ set, clr uint64 }

type propagation struct {
	flag      uint64
	recursive bool
}

var propagations = map[string]uint64{
	"private": unix.MS_PRIVATE, "slave": unix.MS_SLAVE, "shared": unix.MS_SHARED, "unbindable": unix.MS_UNBINDABLE,
}

// mountAttrs are the options of mount(8) that are attributes of a mount
// (mount_setattr(2)). With an r before them they go for all mounts below too.
var mountAttrs = map[string]attrs{
	"ro": {set: unix.MOUNT_ATTR_RDONLY}, "rw": {clr: unix.MOUNT_ATTR_RDONLY},
	"nosuid": {set: unix.MOUNT_ATTR_NOSUID}, "suid": {clr: unix.MOUNT_ATTR_NOSUID},
	"nodev": {set: unix.MOUNT_ATTR_NODEV}, "dev": {clr: unix.MOUNT_ATTR_NODEV},
	"noexec": {set: unix.MOUNT_ATTR_NOEXEC}, "exec": {clr: unix.MOUNT_ATTR_NOEXEC},
	"nodiratime": {set: unix.MOUNT_ATTR_NODIRATIME}, "diratime": {clr: unix.MOUNT_ATTR_NODIRATIME},
	"nosymfollow": {set: unix.MOUNT_ATTR_NOSYMFOLLOW}, "symfollow": {clr: unix.MOUNT_ATTR_NOSYMFOLLOW},
	// The times are one field of three values.
	"relatime": {clr: unix.MOUNT_ATTR__ATIME}, "norelatime": {set: unix.MOUNT_ATTR_STRICTATIME, clr: unix.MOUNT_ATTR__ATIME},
	"noatime": {set: unix.MOUNT_ATTR_NOATIME, clr: unix.MOUNT_ATTR__ATIME}, "atime": {clr: unix.MOUNT_ATTR__ATIME},
	"strictatime": {set: unix.MOUNT_ATTR_STRICTATIME, clr: unix.MOUNT_ATTR__ATIME}, "nostrictatime": {clr: unix.MOUNT_ATTR__ATIME},
}

// add puts b over a: what b sets is no longer cleared and the other way round.
func (a *attrs) add(b attrs) {
	a.set = a.set&^b.clr | b.set
	a.clr = a.clr&^b.set | b.clr
}

// parse understands the mount's options.
func (m *mount) parse() error {
	if m.Type == "bind" {
		m.bind = true
	}
	for _, o := range m.Options {
		if strings.Contains(o, "\x00") {
			return fmt.Errorf("option %q holds a NUL byte", o)
		}
		if a, ok := mountAttrs[o]; ok {
			m.attr.add(a)
			continue
		}
		if f, ok := propagations[o]; ok {
			m.prop = append(m.prop, propagation{f, false})
			continue
		}
		if r, ok := strings.CutPrefix(o, "r"); ok {
			if a, ok := mountAttrs[r]; ok {
				m.rec.add(a)
				continue
			}
			if f, ok := propagations[r]; ok {
				m.prop = append(m.prop, propagation{f, true})
				continue
			}
		}
		switch o {
		case "defaults", "", "async", "loud", "silent", "noiversion", "nolazytime", "nomand":
			// What is so anyway, and what only the kernel's log would tell of.
		case "bind":
			m.bind = true
		case "rbind":
			m.bind, m.recursive = true, true
		case "idmap":
			m.idmap = true
		case "ridmap":
			m.idmap, m.idmapRec = true, true
		case "tmpcopyup", "remount", "copy-symlink", "src-nofollow":
			return fmt.Errorf("option %q is not supported", o)
		default:
			m.data = append(m.data, o)
		}
	}
	for i := range m.prop {
		m.peer = m.peer || m.prop[i].flag == unix.MS_SLAVE || m.prop[i].flag == unix.MS_SHARED
	}
	return nil
}

// parseMounts understands all mounts of the specification.
func (c *compiler) parseMounts() ([]*mount, error) {
	var ms []*mount
	for i, sm := range c.Spec.Mounts {
		m := &mount{Mount: sm, dir: true}
		fail := func(err error) ([]*mount, error) {
			return nil, fmt.Errorf("mounts[%d] on %q: %w", i, sm.Destination, err)
		}
		m.Destination = path.Clean("/" + sm.Destination) // relative ones are legal, and relative to the root
		if sm.Destination == "" || m.Destination == "/" || strings.Contains(sm.Destination+sm.Source+sm.Type, "\x00") {
			return fail(fmt.Errorf("not a place to mount %q", sm.Source))
		}
		if err := m.parse(); err != nil {
			return fail(err)
		}
		switch {
		case m.bind:
			m.what = fmt.Sprintf("bind %s on %s", m.Source, m.Destination)
			if !path.IsAbs(m.Source) {
				return fail(fmt.Errorf("source %q is not an absolute path", m.Source))
			}
			if len(m.data) > 0 {
				return fail(fmt.Errorf("option %q means nothing for a bind mount", m.data[0]))
			}
			isDir := c.IsDir
			if isDir == nil {
				isDir = statIsDir
			}
			var err error
			if m.dir, err = isDir(m.Source); err != nil {
				return fail(err)
			}
		case m.Type == "":
			return fail(fmt.Errorf("it has no type"))
		default:
			m.what = fmt.Sprintf("mount %s on %s", m.Type, m.Destination)
			m.shm = c.Shm != nil && m.Destination == "/dev/shm" && m.Type == "tmpfs"
			if m.Type == "cgroup" && len(m.data) > 0 {
				return fail(fmt.Errorf("option %q means nothing for the hierarchies that there are", m.data[0]))
			}
			// The source is a device of the host, or options may be names of directories.
			m.early = path.IsAbs(m.Source) || m.Type == "overlay"
			if err := c.mapIDs(m); err != nil {
				return fail(err)
			}
		}
		if len(m.UIDMappings)+len(m.GIDMappings) > 0 {
			// Mappings of a mount's own need a user namespace of its own.
			if !slices.Equal(m.UIDMappings, c.UIDs) || !slices.Equal(m.GIDMappings, c.GIDs) {
				return fail(fmt.Errorf("id mappings other than those of the user namespace are not supported"))
			}
			m.idmap = true
		}
		if m.idmap && (c.UserNS == nil || !m.bind) {
			return fail(fmt.Errorf("id mapping is for bind mounts with a user namespace"))
		}
		ms = append(ms, m)
	}
	c.mounts = ms
	c.addFiles()
	m := c.mountOn("/dev")
	c.ownDev = m != nil && !m.bind && m.Type == "tmpfs" && c.mountOn("/dev/null") == nil
	for _, d := range c.lx.Devices {
		c.ownDev = c.ownDev && path.Clean(d.Path) != "/dev/null"
	}
	return c.mounts, nil
}

// addFiles adds the bind mounts of Input.Files.
func (c *compiler) addFiles() {
	given := c.mounts
	for _, at := range slices.Sorted(maps.Keys(c.Files)) {
		taken := slices.ContainsFunc(given, func(m *mount) bool { return at == m.Destination || strings.HasPrefix(at, m.Destination+"/") })
		if c.Root == nil || taken || !c.makesFiles() && c.Made == nil && absent(c.Root.Path, at) {
			continue
		}
		c.mounts = append(c.mounts, &mount{
			Mount: specs.Mount{Destination: at, Source: c.Files[at]}, what: fmt.Sprintf("bind %s on %s", c.Files[at], at), bind: true, file: true,
		})
	}
}

// makesFiles says whether places for Input.Files are made in the root.
func (c *compiler) makesFiles() bool { return c.Root.Overlay && !c.Root.ReadOnly }

// absent reports that there is nothing at name in the root, nor will be when mounts
// are made: no link on the way that could lead into one. To find that out in the
// program takes the kernel an RCU grace period for each file, since it lets go of a
// mount then.
func absent(root, name string) bool {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, strings.TrimPrefix(name, "/"), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.ENOENT)
}

// attachFile puts a file where it belongs in the member's root. There a link may
// be, which is followed like every other; one that leads nowhere gives way. If it
// is the directory that leads nowhere, there is no such file.
func (c *compiler) attachFile(m *mount) {
	if c.makesFiles() {
		step := "make mount point " + m.Destination
		found := c.openIn(step, m.Destination, unix.O_PATH)
		found.Else(func() {
			dir, name := path.Split(m.Destination)
			c.makePath(step, path.Clean(dir), true)
			opened := c.openIn(step, dir, unix.O_PATH|unix.O_DIRECTORY)
			opened.Then(func() {
				parent := opened.Result()
				c.p.Call(step, unix.SYS_UNLINKAT, parent, c.p.String(name), launch.Int(0)).Ignore(unix.ENOENT)
				const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
				c.close(c.p.Call(step, unix.SYS_OPENAT, parent, c.p.String(name), launch.Int(flags), launch.Int(0o644)).Result())
				c.close(parent)
			}, unix.ENOENT)
		}, unix.ENOENT)
		c.p.Call("close", unix.SYS_CLOSE, found.Result()).Ignore(unix.EBADF)
	}
	at := c.openIn(m.what, m.Destination, unix.O_PATH)
	at.Then(func() {
		const flags = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
		// A root can have a directory there, with which it has to make do.
		c.p.Call(m.what, unix.SYS_MOVE_MOUNT, m.tree, c.p.String(""), at.Result(), c.p.String(""), launch.Int(flags)).Ignore(unix.EINVAL)
		c.close(at.Result())
	}, unix.ENOENT, unix.ENOTDIR, unix.ELOOP)
	c.close(m.tree)
}

// mapIDs makes the uid and gid options of a new file system the host's ids: the
// kernel takes them as the mounter's, who is not in the user namespace yet.
func (c *compiler) mapIDs(m *mount) error {
	if c.UserNS == nil {
		return nil
	}
	for i, o := range m.data {
		for key, ids := range map[string][]specs.LinuxIDMapping{"uid=": c.UIDs, "gid=": c.GIDs} {
			v, ok := strings.CutPrefix(o, key)
			if !ok {
				continue
			}
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil {
				return fmt.Errorf("option %q: %w", o, err)
			}
			id, err := hostID(ids, true, uint32(n))
			if err != nil {
				return fmt.Errorf("option %q: %w", o, err)
			}
			m.data[i] = key + strconv.FormatUint(uint64(id), 10)
		}
	}
	return nil
}

func statIsDir(name string) (bool, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return false, err
	}
	return fi.IsDir(), nil
}

// mountOn is the last mount on dst, or nil.
func (c *compiler) mountOn(dst string) *mount {
	for _, m := range slices.Backward(c.mounts) {
		if m.Destination == dst {
			return m
		}
	}
	return nil
}

// cloneShm takes a clone of the sandbox's /dev/shm out of the mount namespace
// that has it.
func (c *compiler) cloneShm() {
	for _, m := range c.mounts {
		if !m.shm {
			continue
		}
		c.p.Call("enter the sandbox's mnt namespace", unix.SYS_SETNS, c.p.File(c.Shm), launch.Int(unix.CLONE_NEWNS))
		m.what = "mount the sandbox's shm on " + m.Destination
		m.tree = c.openTree(m.what, launch.Int(unix.AT_FDCWD), "/", 0)
		c.p.Call("come back to the host's mnt namespace", unix.SYS_SETNS, c.p.File(c.HostMnt), launch.Int(unix.CLONE_NEWNS))
		c.setattr(m.what, m.tree, "", 0, unix.MountAttr{Attr_set: m.attr.set, Attr_clr: m.attr.clr, Propagation: unix.MS_PRIVATE})
	}
}

// clonePeers clones the sources of bind mounts, and the root, that are to see what
// is mounted on the host later: in a new mount namespace, whose mounts have been
// made private, they would have no peers any more.
func (c *compiler) clonePeers() {
	if c.Root != nil && !c.Root.Overlay && strings.HasSuffix(c.lx.RootfsPropagation, "slave") {
		c.cloneRoot()
		c.setattr("make the root "+c.lx.RootfsPropagation, c.rootTree, "", unix.AT_RECURSIVE, unix.MountAttr{Propagation: unix.MS_SLAVE})
	}
	for _, m := range c.mounts {
		if m.bind && m.peer {
			c.cloneSource(m)
		}
	}
}

// cloneSource makes m.tree of the source of a bind mount.
func (c *compiler) cloneSource(m *mount) {
	rec := 0
	if m.recursive {
		rec = unix.AT_RECURSIVE
	}
	m.tree = c.openTree(m.what, launch.Int(unix.AT_FDCWD), m.Source, rec)
	if c.UserNS != nil {
		if !m.idmap {
			m.idmapRec = m.recursive
		}
		flags := 0
		if m.idmapRec {
			flags = unix.AT_RECURSIVE
		}
		op := c.idmap(m.what+": idmap", m.tree, flags)
		if !m.idmap && !m.dir {
			// A single file on a file system that cannot be idmapped, such as a
			// tmpfs before Linux 6.3, is of use although nobody owns it.
			op.Ignore(unix.EINVAL)
		}
	}
	for _, r := range []struct {
		attrs
		flags int
	}{{m.rec, unix.AT_RECURSIVE}, {m.attr, 0}} {
		if r.attrs != (attrs{}) {
			c.setattr(m.what, m.tree, "", r.flags, unix.MountAttr{Attr_set: r.set, Attr_clr: r.clr})
		}
	}
	c.propagate(m)
}

func (c *compiler) propagate(m *mount) {
	for _, pr := range m.prop {
		flags := 0
		if pr.recursive {
			flags = unix.AT_RECURSIVE
		}
		c.setattr(m.what+": propagation", m.tree, "", flags, unix.MountAttr{Propagation: pr.flag})
	}
}

// attach puts a mount where it belongs in the member's root.
func (c *compiler) attach(m *mount) error {
	switch {
	case m.bind || m.shm || m.early:
	case m.Type == "cgroup":
		return c.attachCgroups(m)
	default:
		c.newFromSpec(m)
	}
	c.attachTree(m)
	switch {
	case c.ownDev && m == c.mountOn("/dev"):
		c.dev = m.tree
	case m.ofKernel() && m == c.mountOn(m.Destination):
		c.kernel = append(c.kernel, m)
	default:
		c.close(m.tree)
	}
	return nil
}

// ofKernel says whether the mount shows what is the whole host's.
func (m *mount) ofKernel() bool { return !m.bind && (m.Type == "proc" || m.Type == "sysfs") }

func (c *compiler) newFromSpec(m *mount) {
	source := m.Source
	if source == "" {
		source = m.Type
	}
	m.tree = c.newMount(m.what, m.Type, source, m.data, m.attr.set|m.rec.set)
	c.propagate(m)
}

func (c *compiler) attachTree(m *mount) {
	// In the fresh /dev of this program nothing has to be looked for, and what
	// is made there is what is mounted on.
	if dir, name := path.Split(m.Destination); dir == "/dev/" && m.dir && c.freshIn(m) {
		c.p.Call("make mount point "+m.Destination, unix.SYS_MKDIRAT, c.dev, c.p.String(name), launch.Int(0o755))
		c.moveMount(m.what, m.tree, c.dev, name)
		return
	}
	c.makeMountPoint(m.Destination, m.dir)
	how := c.how(unix.O_PATH|unix.O_CLOEXEC, 0)
	if m.ofKernel() {
		// Through a link it could come to lie over the root itself, say, where no
		// mask finds it and the member still does, by /.. .
		how = c.howTo(unix.O_PATH|unix.O_CLOEXEC, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	}
	t := c.openBelow(m.what, c.root, m.Destination, how).Result()
	c.moveMount(m.what, m.tree, t, "")
	c.close(t)
}

// freshIn says whether nothing has been made at or below m's place in the /dev
// that this program mounts, and nothing was mounted over it.
func (c *compiler) freshIn(m *mount) bool {
	if !c.ownDev {
		return false
	}
	dev := slices.Index(c.mounts, c.mountOn("/dev"))
	at := slices.Index(c.mounts, m)
	if at < dev {
		return false
	}
	for _, before := range c.mounts[dev+1 : at] {
		if before.Destination == m.Destination || strings.HasPrefix(before.Destination, m.Destination+"/") || !strings.HasPrefix(before.Destination, "/dev/") {
			return false
		}
	}
	return true
}

// CgroupHierarchies makes [Input.Cgroups] of the hierarchies that the host has
// mounted. They have the same names as there.
func CgroupHierarchies(host []cgroup.Hierarchy) []CgroupHierarchy {
	if len(host) == 1 && host[0].V2 {
		return []CgroupHierarchy{{Unified: true}}
	}
	hs := make([]CgroupHierarchy, len(host))
	for i, h := range host {
		hs[i] = CgroupHierarchy{Dir: path.Base(h.Mount), Unified: h.V2, Options: h.Controllers}
	}
	return hs
}

// cloneCgroups clones the mounts of v1 hierarchies, and of the unified one beside
// them, from the member's cgroup on the host down. That is what new mounts in the
// new cgroup namespace would show, but each of these has a superblock of its own,
// which takes the kernel ten times as long.
//
// Whoever has CAP_SYS_ADMIN can remount a superblock, for the host too, and gets new ones.
func (c *compiler) cloneCgroups(m *mount) {
	caps := c.Spec.Process.Capabilities
	if !c.ns(namespace.Cgroup).Private || caps != nil && slices.Contains(caps.Bounding, "CAP_SYS_ADMIN") {
		return
	}
	if slices.ContainsFunc(c.Cgroups, func(h CgroupHierarchy) bool { return h.Dir == "" || h.Own == "" }) {
		return
	}
	const flags = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	attr := m.attr.set | m.rec.set
	for _, h := range c.Cgroups {
		step := "clone cgroup " + h.Own
		t := c.openTree(step, launch.Int(unix.AT_FDCWD), h.Own, 0)
		c.setattr(step, t, "", 0, unix.MountAttr{Attr_set: attr, Attr_clr: flags&^attr | unix.MOUNT_ATTR__ATIME})
		m.cgroups = append(m.cgroups, t)
	}
}

// attachCgroups mounts the cgroup hierarchies that the host has: the unified one
// alone, or a tmpfs with one mount for each.
func (c *compiler) attachCgroups(m *mount) error {
	hs, attr := c.Cgroups, m.attr.set|m.rec.set
	if len(hs) == 0 {
		return fmt.Errorf("mount cgroup on %s: the host has no cgroups", m.Destination)
	}
	if len(hs) == 1 && hs[0].Dir == "" {
		m.tree = c.newMount(m.what, "cgroup2", "cgroup", nil, attr)
		c.propagate(m)
		c.attachTree(m)
		c.close(m.tree)
		return nil
	}
	rdonly := attr & unix.MOUNT_ATTR_RDONLY
	m.tree = c.newMount(m.what, "tmpfs", "tmpfs", []string{"mode=755"}, attr&^unix.MOUNT_ATTR_RDONLY)
	c.attachTree(m)
	for i, h := range hs {
		if h.Dir == "" || path.Base(h.Dir) != h.Dir || h.Dir == ".." || h.Dir == "." {
			return fmt.Errorf("mount cgroup on %s: %q is not the name of a hierarchy", m.Destination, h.Dir)
		}
		step := fmt.Sprintf("mount cgroup %s on %s/%s", h.Dir, m.Destination, h.Dir)
		c.p.Call(step, unix.SYS_MKDIRAT, m.tree, c.p.String(h.Dir), launch.Int(0o755))
		typ, opts := "cgroup", h.Options
		if h.Unified {
			typ, opts = "cgroup2", nil
		}
		var t launch.Arg
		if len(m.cgroups) > 0 {
			t = m.cgroups[i]
		} else {
			t = c.newMount(step, typ, "cgroup", opts, attr)
		}
		c.moveMount(step, t, m.tree, h.Dir)
		c.close(t)
		for _, o := range h.Options {
			if o != h.Dir && slices.Contains(strings.Split(h.Dir, ","), o) {
				c.p.Call("make symlink "+m.Destination+"/"+o, unix.SYS_SYMLINKAT, c.p.String(h.Dir), m.tree, c.p.String(o))
			}
		}
	}
	c.propagate(m)
	if rdonly != 0 {
		c.setattr(m.what, m.tree, "", 0, unix.MountAttr{Attr_set: rdonly})
	}
	c.close(m.tree)
	return nil
}

// makeMountPoint makes a directory or an empty file, and the directories that
// lead to it, if it is not there.
func (c *compiler) makeMountPoint(name string, dir bool) {
	c.makePath("make mount point "+name, name, dir)
}

func (c *compiler) makePath(step, name string, dir bool) {
	p := c.p
	found := c.openIn(step, name, unix.O_PATH)
	found.Else(func() {
		parts := strings.Split(strings.TrimPrefix(name, "/"), "/")
		for i, part := range parts {
			parent := c.openIn(step, path.Join(parts[:i]...), unix.O_PATH|unix.O_DIRECTORY).Result()
			if i < len(parts)-1 || dir {
				p.Call(step, unix.SYS_MKDIRAT, parent, p.String(part), launch.Int(0o755)).Ignore(unix.EEXIST)
			} else {
				const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
				f := p.Call(step, unix.SYS_OPENAT, parent, p.String(part), launch.Int(flags), launch.Int(0o644))
				f.Then(func() { c.close(f.Result()) }, unix.EEXIST)
			}
			c.close(parent)
		}
	}, unix.ENOENT)
	c.p.Call("close", unix.SYS_CLOSE, found.Result()).Ignore(unix.EBADF)
}

// newMount adds the making of a new, detached mount and returns its descriptor.
func (c *compiler) newMount(step, typ, source string, data []string, attr uint64) launch.Arg {
	p := c.p
	fs := p.Call(step, unix.SYS_FSOPEN, p.String(typ), launch.Int(unix.FSOPEN_CLOEXEC)).Result()
	if source != "" {
		p.Call(step, unix.SYS_FSCONFIG, fs, launch.Int(unix.FSCONFIG_SET_STRING), p.String("source"), p.String(source), launch.Int(0))
	}
	for _, o := range data {
		ostep := fmt.Sprintf("%s: option %q", step, o)
		if key, val, ok := strings.Cut(o, "="); ok {
			p.Call(ostep, unix.SYS_FSCONFIG, fs, launch.Int(unix.FSCONFIG_SET_STRING), p.String(key), p.String(val), launch.Int(0))
		} else {
			p.Call(ostep, unix.SYS_FSCONFIG, fs, launch.Int(unix.FSCONFIG_SET_FLAG), p.String(o), launch.Int(0), launch.Int(0))
		}
	}
	p.Call(step, unix.SYS_FSCONFIG, fs, launch.Int(unix.FSCONFIG_CMD_CREATE), launch.Int(0), launch.Int(0), launch.Int(0))
	m := p.Call(step, unix.SYS_FSMOUNT, fs, launch.Int(unix.FSMOUNT_CLOEXEC), launch.Int(attr)).Result()
	c.close(fs)
	return m
}

// openTree adds the cloning of the mount that a path, or with "" a descriptor,
// is in; flags may be AT_RECURSIVE. It returns the detached mount's descriptor.
func (c *compiler) openTree(step string, dir launch.Arg, name string, flags int) launch.Arg {
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	return c.p.Call(step, unix.SYS_OPEN_TREE, dir, c.p.String(name), launch.Int(unix.OPEN_TREE_CLONE|unix.O_CLOEXEC|flags)).Result()
}

// moveMount adds the attaching of a detached mount at a path, or with "" at a
// descriptor.
func (c *compiler) moveMount(step string, tree, dir launch.Arg, name string) {
	flags := unix.MOVE_MOUNT_F_EMPTY_PATH
	if name == "" {
		flags |= unix.MOVE_MOUNT_T_EMPTY_PATH
	}
	c.p.Call(step, unix.SYS_MOVE_MOUNT, tree, c.p.String(""), dir, c.p.String(name), launch.Int(flags))
}

// setattr adds a mount_setattr(2).
func (c *compiler) setattr(step string, dir launch.Arg, name string, flags int, a unix.MountAttr) launch.Op {
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	b := make([]byte, 0, unix.MOUNT_ATTR_SIZE_VER0)
	for _, v := range []uint64{a.Attr_set, a.Attr_clr, a.Propagation, a.Userns_fd} {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	return c.p.Call(step, unix.SYS_MOUNT_SETATTR, dir, c.p.String(name), launch.Int(flags), c.p.Bytes(b), launch.Int(len(b)))
}

// idmap adds the mapping of a detached mount's ids by the user namespace.
func (c *compiler) idmap(step string, tree launch.Arg, flags int) launch.Op {
	return c.setattr(step, tree, "", flags, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(c.p.FileNumber(c.UserNS))})
}
