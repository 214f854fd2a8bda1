// Package tarstream copies trees of files into and out of a root that is given
// by a descriptor, as tar streams, while somebody who is not trusted may be
// changing what is in that root.
//
// What a path means is decided by the kernel, under that root: the first path
// is resolved with RESOLVE_IN_ROOT (openat2(2)), what is below it one name at a
// time and without following symbolic links. Files are looked at (O_PATH)
// before they are opened, so no FIFO blocks and no device is touched.
//
// Streams are in PAX format, with nanoseconds, extended attributes
// (SCHILY.xattr) and holes (GNU.sparse, version 1.0), and are never held in
// memory. What grows is: for each directory level one descriptor, and for each
// file with hard links that were not all seen yet its name.
package tarstream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth is how deep directories may be nested. Each level takes a descriptor;
// deeper trees than this cannot be reached by paths anyway (PATH_MAX).
const maxDepth = 2048

// maxName is how long an entry's name may be. Each level of a tree has that of its
// directory in memory, and who makes the tree decides how long names are.
const maxName = 4 * unix.PathMax

// IDs says which ids of the host a user namespace has: 0 to Size-1 inside are
// Start to Start+Size-1 on the host.
type IDs struct{ Start, Size uint32 }

// Options are what [Write] and [Extract] need to know. The zero value is right
// for a root without a user namespace.
type Options struct {
	// IDs, if not nil, are those of the root's user namespace. Streams hold the
	// ids inside it; ids that it does not have become 65534 in a stream, and are
	// refused from one.
	IDs *IDs
	// Note, if not nil, is told of what was left out and of what changed while
	// it was copied. path is the name in the stream.
	Note func(path, what string)
	// Admit, if not nil, is asked by [Archive.Add] for each entry before it is
	// written. An error leaves the entry out, and is noted; [ErrEnough] leaves
	// out everything from there on.
	Admit func(Entry) error
}

// Entry is a file that is about to be written.
type Entry struct {
	Name  string // in the stream
	Mode  uint32 // st_mode (inode(7))
	Size  int64  // bytes of content that will be written; 0 for what is no regular file, or a link to one
	Extra int64  // bytes of its names and extended attributes
	Link  string // if it is written as another name of an entry that has come before, that one's name
}

// ErrPseudo means that there is something, but only in a proc, sysfs or cgroup file
// system, of which nothing is copied.
var ErrPseudo = errors.New("in a proc, sysfs or cgroup file system")

// ErrEnough is what [Options.Admit] returns to end a copy.
var ErrEnough = errors.New("enough has been copied")

func (o *Options) note(path, what string) {
	if o.Note != nil {
		o.Note(path, what)
	}
}

const overflowID = 65534

func (d *IDs) inside(host uint32) int {
	switch {
	case d == nil:
		return int(host)
	case host < d.Start || host-d.Start >= d.Size:
		return overflowID
	}
	return int(host - d.Start)
}

func (d *IDs) outside(id int) (int, error) {
	if d == nil {
		if id < 0 || int64(id) >= 1<<32-1 {
			return 0, fmt.Errorf("id %d does not exist", id)
		}
		return id, nil
	}
	if id < 0 || int64(id) >= int64(d.Size) {
		return 0, fmt.Errorf("id %d is not in the user namespace, which has %d", id, d.Size)
	}
	return int(d.Start) + id, nil
}

// openIn opens path under root, following links there as a process does whose
// root it is.
func openIn(root *os.File, path string, flags int) (*os.File, error) {
	if path == "" {
		return nil, &os.PathError{Op: "open", Path: path, Err: unix.ENOENT}
	}
	return open(root, path, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// openBeneath opens path below dir. Nothing on the way may be a link.
func openBeneath(dir *os.File, path string, flags int) (*os.File, error) {
	return open(dir, path, flags, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

func open(dir *os.File, path string, flags int, resolve uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve}
	if flags&unix.O_CREAT != 0 {
		how.Mode = 0o600
	}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), path, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		// EAGAIN: something was renamed while the kernel looked for "..".
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
}

// self is a path that leads to what f is, whatever its own path leads to by now.
func self(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// reopen opens an O_PATH descriptor of a regular file or directory for good.
func reopen(f *os.File, flags int) (*os.File, error) {
	g, err := os.OpenFile(self(f), flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: errors.Unwrap(err)}
	}
	return g, nil
}

func fstat(f *os.File) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	if err != nil {
		return st, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st, nil
}

func isType(st *unix.Stat_t, typ uint32) bool { return st.Mode&unix.S_IFMT == typ }

// xattrPrefix is what extended attributes are called in PAX records.
const xattrPrefix = "SCHILY.xattr."

const capability = "security.capability"

// keepXattr reports whether an attribute is copied. Others are labels that are
// given by the place where a file is (security.selinux), or belong to the file
// system (trusted.overlay). ACLs hold ids, which nothing here translates.
func keepXattr(name string, ids *IDs) bool {
	return strings.HasPrefix(name, "user.") || name == capability ||
		ids == nil && (name == "system.posix_acl_access" || name == "system.posix_acl_default")
}

// maxXattrs is how many bytes of attributes are copied of one file: tar readers take
// headers of 1 MiB at most.
const maxXattrs = 512 << 10

// readXattrs returns the attributes of f, which may be O_PATH, as PAX records, and
// what is left out of them.
func readXattrs(f *os.File, ids *IDs) (_ map[string]string, left string, _ error) {
	path := self(f)
	names, err := sized(func(b []byte) (int, error) { return unix.Listxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) || len(names) == 0 && err == nil {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", &os.PathError{Op: "list extended attributes of", Path: f.Name(), Err: err}
	}
	var records map[string]string
	size := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if !keepXattr(name, ids) {
			continue
		}
		if strings.Contains(name, "=") { // it would end the name in a PAX record
			left = fmt.Sprintf("its extended attribute %q is left out", name)
			continue
		}
		v, err := sized(func(b []byte) (int, error) { return unix.Getxattr(path, name, b) })
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, "", &os.PathError{Op: "read attribute " + name + " of", Path: f.Name(), Err: err}
		}
		if name == capability {
			v = capabilityInside(v, ids)
		}
		if size += len(name) + len(v); size > maxXattrs {
			return nil, fmt.Sprintf("its extended attributes, more than %d bytes, are left out", maxXattrs), nil
		}
		if records == nil {
			records = make(map[string]string)
		}
		records[xattrPrefix+name] = string(v)
	}
	return records, left, nil
}

// sized calls get with a buffer that is large enough, also if what it gets grows.
func sized(get func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := get(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		b := make([]byte, n)
		n, err = get(b)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}

// File capabilities (struct vfs_ns_cap_data): version 3 is version 2 followed by
// the id, on the host, of the root user of the namespace that they hold in.
const (
	capMaskRevision = 0xff000000
	capRevision2    = 0x02000000
	capRevision3    = 0x03000000
	capSize2        = 20
	capSize3        = 24
)

// capabilityInside makes version 2 of capabilities that belong to ids' root.
func capabilityInside(v []byte, ids *IDs) []byte {
	le := binary.LittleEndian
	if ids == nil || len(v) != capSize3 || le.Uint32(v)&capMaskRevision != capRevision3 || le.Uint32(v[capSize2:]) != ids.Start {
		return v
	}
	le.PutUint32(v, le.Uint32(v)&^capMaskRevision|capRevision2)
	return v[:capSize2]
}

// capabilityOutside is its inverse: the kernel takes nothing else for a file on
// an idmapped mount.
func capabilityOutside(v []byte, ids *IDs) []byte {
	le := binary.LittleEndian
	if ids == nil || len(v) != capSize2 || le.Uint32(v)&capMaskRevision != capRevision2 {
		return v
	}
	v = append([]byte(nil), v...)
	le.PutUint32(v, le.Uint32(v)&^capMaskRevision|capRevision3)
	return le.AppendUint32(v, ids.Start)
}
