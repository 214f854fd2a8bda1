package tarstream

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// Extract unpacks a tar stream into the directory at name under root, which may
// be an O_PATH descriptor and is lent. Nothing is made or changed outside that
// directory: entries whose name holds ".." are refused, and so are those under a
// symbolic link, whoever made it. Files that exist are replaced; a directory is
// not replaced by a file nor a file by a directory. The directory itself keeps
// its owner, mode and times, also if the stream has an entry for it.
func Extract(ctx context.Context, root *os.File, name string, r io.Reader, o Options) error {
	dir, err := openIn(root, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unpack(tar.NewReader(r), nil, newExtractor(ctx, dir, o))
}

// unpack lets x unpack first, if it is not nil, and the rest of r, as the root
// of the user namespace if there is one.
func unpack(r *tar.Reader, first *tar.Header, x *extractor) error {
	if x.o.IDs == nil {
		return x.all(r, first)
	}
	// The member's mounts are idmapped, and its root is who can make files there.
	root := int(x.o.IDs.Start)
	return nsthread.FilesAs(root, root, func() error { return x.all(r, first) })
}

// Copy unpacks a stream of [Write] to name under root, as docker cp does:
//
//   - name is a directory: the entry is put into it, under its own name;
//     the entries of a stream that has the content of a directory (".") are.
//   - name does not exist: the entry gets that name, whose directory must exist.
//     If name ends in a slash, the entry must be a directory.
//   - name is a file: the entry must not be a directory, and replaces it.
//
// A symbolic link at the end of name is followed under root.
func Copy(ctx context.Context, root *os.File, name string, r io.Reader, o Options) error {
	tr := tar.NewReader(r)
	first, err := tr.Next()
	if err == io.EOF {
		return errors.New("the stream is empty")
	}
	if err != nil {
		return fmt.Errorf("read the stream: %w", err)
	}
	top, err := entryName(first.Name)
	if err != nil {
		return err
	}
	if i := strings.IndexByte(top, '/'); i >= 0 {
		return fmt.Errorf("the stream does not begin with the entry of a file or directory but with %q", first.Name)
	}
	isDir := first.Typeflag == tar.TypeDir

	as := top
	if name, err = followEnd(root, name); err != nil {
		return err
	}
	dest, err := openIn(root, name, unix.O_PATH)
	switch {
	case err == nil:
		st, serr := fstat(dest)
		if serr != nil {
			dest.Close()
			return serr
		}
		if isType(&st, unix.S_IFDIR) {
			break
		}
		dest.Close()
		if isDir {
			return fmt.Errorf("%s is not a directory, and the source is: %w", name, unix.ENOTDIR)
		}
		if dest, as, err = openParent(root, name); err != nil {
			return err
		}
	case errors.Is(err, unix.ENOENT):
		if strings.HasSuffix(name, "/") && !isDir {
			return err
		}
		if dest, as, err = openParent(root, name); err != nil {
			return err
		}
	default:
		return err
	}
	defer dest.Close()
	x := newExtractor(ctx, dest, o)
	x.from, x.as = top, as
	return unpack(tr, first, x)
}

// followEnd replaces name by what the symbolic links at its end lead to, unless
// that is a directory, so that a file is made or replaced there and not here.
// The result is a path under root like any other: nothing is decided by it.
func followEnd(root *os.File, name string) (string, error) {
	const most = 40 // as the kernel does
	for range most {
		f, err := openIn(root, name, unix.O_PATH|unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			return name, nil
		}
		if err != nil {
			return "", err
		}
		st, err := fstat(f)
		b := make([]byte, unix.PathMax)
		n := 0
		if err == nil && isType(&st, unix.S_IFLNK) {
			n, err = unix.Readlinkat(int(f.Fd()), "", b)
		}
		f.Close()
		if err != nil || n == 0 {
			return name, err
		}
		if target := string(b[:n]); strings.HasPrefix(target, "/") {
			name = target
		} else {
			dir, _ := path.Split(name)
			name = dir + target
		}
	}
	return "", &os.PathError{Op: "open", Path: name, Err: unix.ELOOP}
}

// openParent opens the directory that name is in, and returns the last element.
func openParent(root *os.File, name string) (*os.File, string, error) {
	clean := strings.TrimRight(name, "/")
	dir, base := path.Split(clean)
	if base == "" || base == "." || base == ".." {
		return nil, "", fmt.Errorf("%q does not end in the name of a file", name)
	}
	if dir == "" {
		dir = "."
	}
	f, err := openIn(root, dir, unix.O_PATH|unix.O_DIRECTORY)
	return f, base, err
}

// entryName cleans the name of an entry. It is relative, and "." for the top.
func entryName(name string) (string, error) {
	for elem := range strings.SplitSeq(name, "/") {
		if elem == ".." {
			return "", fmt.Errorf("entry %q leads out of its directory", name)
		}
	}
	if strings.Contains(name, "\x00") {
		return "", fmt.Errorf("entry %q holds a NUL byte", name)
	}
	return path.Clean(strings.TrimLeft(name, "/") + "/."), nil
}

type extractor struct {
	ctx      context.Context
	o        Options
	dir      *os.File // O_PATH; everything happens beneath it
	from, as string   // the first element of names, and what to call it instead; "" is to leave them
	buf      []byte
	open     []*pending
}

// pending is a directory whose attributes are set when it is complete, because
// what is made in it changes its times and its mode might not let it be made.
type pending struct {
	name string
	file *os.File
	h    *tar.Header
}

func newExtractor(ctx context.Context, dir *os.File, o Options) *extractor {
	return &extractor{ctx: ctx, o: o, dir: dir, buf: make([]byte, 256<<10)}
}

// all unpacks first, if it is not nil, and the rest of r.
func (x *extractor) all(r *tar.Reader, first *tar.Header) error {
	defer func() {
		for _, d := range x.open {
			d.file.Close()
		}
	}()
	for h := first; ; h = nil {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		if h == nil {
			var err error
			if h, err = r.Next(); err == io.EOF {
				return x.leave("")
			}
			if err != nil {
				return fmt.Errorf("read the stream: %w", err)
			}
		}
		if err := x.entry(h, r); err != nil {
			return err
		}
	}
}

// place returns where an entry goes, relative to dir.
func (x *extractor) place(name string) (string, error) {
	name, err := entryName(name)
	if err != nil || x.from == "" {
		return name, err
	}
	if x.from == "." {
		return path.Join(x.as, name), nil
	}
	rest, ok := strings.CutPrefix(name+"/", x.from+"/")
	if !ok {
		return "", fmt.Errorf("entry %q is not part of %q, which the stream began with", name, x.from)
	}
	return path.Join(x.as, rest), nil
}

func (x *extractor) entry(h *tar.Header, r io.Reader) error {
	name, err := x.place(h.Name)
	if err != nil {
		return err
	}
	if err := x.leave(name); err != nil {
		return err
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("entry %q has no name", h.Name)
		}
		return nil
	}
	parent, err := x.mkdirs(path.Dir(name))
	if err != nil {
		return err
	}
	if parent != x.dir {
		defer parent.Close()
	}
	if err := x.make(parent, path.Base(name), name, h, r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// leave finishes the directories that name is not in.
func (x *extractor) leave(name string) error {
	for len(x.open) > 0 {
		d := x.open[len(x.open)-1]
		if strings.HasPrefix(name, d.name+"/") {
			return nil
		}
		x.open = x.open[:len(x.open)-1]
		err := x.attributes(d.file, d.h)
		d.file.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
	}
	return nil
}

// chunk is how much of a path is resolved at once: less than PATH_MAX.
const chunk = 2048

// mkdirs opens the directory name, and makes what is missing on the way. The
// caller closes it unless it is x.dir.
func (x *extractor) mkdirs(name string) (*os.File, error) {
	if name == "." {
		return x.dir, nil
	}
	if n := len(x.open); n > 0 && x.open[n-1].name == name {
		return dup(x.open[n-1].file)
	}
	if len(name) < chunk {
		f, err := openBeneath(x.dir, name, unix.O_PATH|unix.O_DIRECTORY)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.ENOENT) {
			return nil, parentError(name, err)
		}
	}
	dir := x.dir
	for elem := range strings.SplitSeq(name, "/") {
		next, err := openBeneath(dir, elem, unix.O_PATH|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) {
			if err = unix.Mkdirat(int(dir.Fd()), elem, 0o755); err == nil {
				if next, err = openBeneath(dir, elem, unix.O_PATH|unix.O_DIRECTORY); err == nil {
					err = x.own(next, 0, 0)
				}
			}
		}
		if dir != x.dir {
			dir.Close()
		}
		if err != nil {
			if next != nil {
				next.Close()
			}
			return nil, parentError(name, err)
		}
		dir = next
	}
	return dir, nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func parentError(name string, err error) error {
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%s: a symbolic link is in the way: %w", name, unix.ELOOP)
	}
	return fmt.Errorf("%s: %w", name, errors.Unwrap(err))
}

// own gives f to these ids of the user namespace.
func (x *extractor) own(f *os.File, uid, gid int) error {
	u, err := x.o.IDs.outside(uid)
	if err != nil {
		return err
	}
	g, err := x.o.IDs.outside(gid)
	if err != nil {
		return err
	}
	return os.NewSyscallError("chown", unix.Fchownat(int(f.Fd()), "", u, g, unix.AT_EMPTY_PATH))
}

// make makes the entry h as base in parent. name is for open directories.
func (x *extractor) make(parent *os.File, base, name string, h *tar.Header, r io.Reader) error {
	p := int(parent.Fd())
	switch h.Typeflag {
	case tar.TypeDir:
		if err := unix.Mkdirat(p, base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return os.NewSyscallError("mkdir", err)
		}
		f, err := openBeneath(parent, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_DIRECTORY)
		if err != nil {
			return errors.Unwrap(err)
		}
		if len(x.open) == maxDepth {
			f.Close()
			return fmt.Errorf("directories are nested deeper than %d levels", maxDepth)
		}
		x.open = append(x.open, &pending{name, f, h})
		return nil
	case tar.TypeReg, tar.TypeGNUSparse, '\x00':
		return x.regular(parent, base, h, r)
	case tar.TypeLink:
		return x.link(parent, base, h)
	case tar.TypeSymlink:
		return x.node(parent, base, h, func() error { return unix.Symlinkat(h.Linkname, p, base) })
	case tar.TypeFifo:
		return x.node(parent, base, h, func() error { return unix.Mknodat(p, base, unix.S_IFIFO|0o600, 0) })
	case tar.TypeChar, tar.TypeBlock:
		mode := uint32(unix.S_IFCHR | 0o600)
		if h.Typeflag == tar.TypeBlock {
			mode = unix.S_IFBLK | 0o600
		}
		dev := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		return x.node(parent, base, h, func() error { return unix.Mknodat(p, base, mode, int(dev)) })
	case tar.TypeXGlobalHeader:
		return nil
	}
	return fmt.Errorf("an entry of type %q, which is not known", h.Typeflag)
}

// create calls mk until the name is free for it: what is there is removed
// first. It fails with EISDIR if a directory is there.
func create(parent *os.File, base string, mk func() error) error {
	const tries = 100 // somebody may make the name again each time
	for range tries {
		err := mk()
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		if err := unix.Unlinkat(int(parent.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return os.NewSyscallError("replace", err)
		}
	}
	return unix.EEXIST
}

func (x *extractor) node(parent *os.File, base string, h *tar.Header, mk func() error) error {
	if err := create(parent, base, mk); err != nil {
		return err
	}
	f, err := openBeneath(parent, base, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer f.Close()
	return x.attributes(f, h)
}

func (x *extractor) link(parent *os.File, base string, h *tar.Header) error {
	target, err := x.place(h.Linkname)
	if err != nil {
		return err
	}
	dir, err := x.mkdirs(path.Dir(target))
	if err != nil {
		return err
	}
	if dir != x.dir {
		defer dir.Close()
	}
	f, err := openBeneath(dir, path.Base(target), unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("link to %s: %w", target, errors.Unwrap(err))
	}
	defer f.Close()
	there, err := openBeneath(parent, base, unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil { // already that file: removing it might remove its last name
		a, aerr := fstat(f)
		b, berr := fstat(there)
		there.Close()
		if err := errors.Join(aerr, berr); err != nil || a.Dev == b.Dev && a.Ino == b.Ino {
			return err
		}
	}
	// By descriptor: the name may be another file's by now.
	return create(parent, base, func() error {
		err := unix.Linkat(unix.AT_FDCWD, self(f), int(parent.Fd()), base, unix.AT_SYMLINK_FOLLOW)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("link to %s: %w", target, err)
		}
		return err
	})
}

func (x *extractor) regular(parent *os.File, base string, h *tar.Header, r io.Reader) error {
	var f *os.File
	err := create(parent, base, func() (err error) {
		f, err = openBeneath(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)
		return errors.Unwrap(err)
	})
	if errors.Is(err, unix.EBUSY) { // a mount point: its content is replaced
		f, err = overwrite(parent, base)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := writeSparse(f, r, x.buf, x.ctx.Err)
	if err == nil && n != h.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	if err := x.attributes(f, h); err != nil {
		return err
	}
	return f.Close() // some file systems say here that they are full
}

func overwrite(parent *os.File, base string) (*os.File, error) {
	f, err := openBeneath(parent, base, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	defer f.Close()
	st, err := fstat(f)
	if err != nil {
		return nil, err
	}
	if !isType(&st, unix.S_IFREG) {
		return nil, fmt.Errorf("a mount point that is no regular file: %w", unix.EBUSY)
	}
	return reopen(f, unix.O_WRONLY|unix.O_TRUNC)
}

// attributes sets owner, mode, extended attributes and times of f, in an order
// in which none undoes another: chown clears set-id bits and capabilities.
func (x *extractor) attributes(f *os.File, h *tar.Header) error {
	if err := x.own(f, h.Uid, h.Gid); err != nil {
		return err
	}
	where := self(f)
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(where, uint32(h.Mode)&0o7777); err != nil {
			return os.NewSyscallError("chmod", err)
		}
	}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrPrefix)
		if !ok || !keepXattr(name, x.o.IDs) {
			continue
		}
		val := []byte(v)
		if name == capability {
			val = capabilityOutside(val, x.o.IDs)
		}
		err := unix.Setxattr(where, name, val, 0)
		if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) && h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
			x.o.note(h.Name, "the file system does not keep attribute "+name)
			continue
		}
		if err != nil {
			return os.NewSyscallError("set attribute "+name, err)
		}
	}
	mtime, err := unix.TimeToTimespec(h.ModTime)
	if err != nil {
		return fmt.Errorf("time %v: %w", h.ModTime, err)
	}
	atime := unix.Timespec{Nsec: unix.UTIME_NOW}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, where, []unix.Timespec{atime, mtime}, 0); err != nil {
		return os.NewSyscallError("set times", err)
	}
	return nil
}
