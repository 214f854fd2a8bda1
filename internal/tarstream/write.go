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
	"time"

	"golang.org/x/sys/unix"
)

// Write writes a tar stream of the file or directory at name under root, which
// may be an O_PATH descriptor and is lent. A symbolic link at the end of name is
// copied as such, unless a slash follows it.
//
// Entries are called by the last element of name and what is below it; a
// name that ends in "/." gives the directory's content, under ".". Mounts are
// crossed. Sockets, and what is in proc, sysfs and cgroup file systems, are left
// out and noted. A file that shrinks while it is read is filled with zeros, one
// that grows is cut, and both are noted.
func Write(ctx context.Context, root *os.File, name string, w io.Writer, o Options) error {
	top, err := openIn(root, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	as := path.Base(path.Clean("/" + name))
	if as == "/" || name == "." || strings.HasSuffix(name, "/.") {
		as = "."
	}
	t := newWriter(w, false)
	t.ctx, t.o = ctx, o
	defer t.close()
	if pseudo, err := isPseudo(top); err != nil || pseudo {
		top.Close()
		if err == nil {
			err = fmt.Errorf("%s is in a proc, sysfs or cgroup file system, which cannot be copied", name)
		}
		return err
	}
	if err := t.walk(top, as); err != nil {
		return err
	}
	return t.tar.Close()
}

// Archive is a tar stream that files and trees are written to one after the
// other, as far as they can be read: what cannot be is left out and noted, where
// [Write] would fail. It is not safe for concurrent use.
type Archive struct{ t *writer }

// NewArchive returns an Archive that writes to w. Nothing is written before the
// first [Archive.Add].
func NewArchive(w io.Writer) *Archive {
	return &Archive{newWriter(w, true)}
}

// Add writes the file or directory at name under root as [Write] does, but calls
// entries by their whole path in root, without the slash at the beginning. What
// cannot be read is left out, name itself too. It fails if name does not exist, with [ErrEnough] if o.Admit did, with ctx's error,
// and with what the stream's writer returns; after the last two, the stream is of
// no use any more.
func (a *Archive) Add(ctx context.Context, root *os.File, name string, o Options) error {
	t := a.t
	t.ctx, t.o = ctx, o
	as := strings.TrimPrefix(path.Clean("/"+name), "/")
	if as == "" {
		as = "."
	}
	top, err := openIn(root, name, unix.O_PATH|unix.O_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return err
	}
	if err != nil {
		return t.tolerate(as, err)
	}
	if pseudo, err := isPseudo(top); err != nil || pseudo {
		top.Close()
		if err == nil {
			err = ErrPseudo
		}
		return t.tolerate(as, err)
	}
	err = t.walk(top, as)
	t.close()
	return err
}

// Close ends the stream.
func (a *Archive) Close() error { return a.t.tar.Close() }

type inode struct{ dev, ino uint64 }

type link struct {
	name string
	left uint64 // names that were not met yet
}

// dir is a directory that is being copied.
type dir struct {
	file  *os.File
	name  string
	dev   uint64
	names []string // read, and not copied yet
}

type writer struct {
	ctx   context.Context
	o     Options
	out   *output
	tar   *tar.Writer
	dirs  []*dir
	links map[inode]*link
	buf   []byte
	// lenient leaves out what cannot be read.
	lenient bool
}

func newWriter(w io.Writer, lenient bool) *writer {
	out := &output{w: w}
	return &writer{out: out, tar: tar.NewWriter(out), links: make(map[inode]*link), buf: make([]byte, 256<<10), lenient: lenient}
}

// output remembers that the stream cannot be written, which is no fault of the
// file that is being copied.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(b []byte) (int, error) {
	n, err := o.w.Write(b)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

func (t *writer) close() {
	for _, d := range t.dirs {
		d.file.Close()
	}
	t.dirs = nil
}

// walk copies top, an O_PATH descriptor, which it closes, and what is below it.
func (t *writer) walk(top *os.File, as string) error {
	if err := t.tolerate(as, t.entry(top, as, 0)); err != nil {
		return err
	}
	for len(t.dirs) > 0 {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		d := t.dirs[len(t.dirs)-1]
		name, ok, err := d.next()
		if !ok {
			d.file.Close()
			t.dirs = t.dirs[:len(t.dirs)-1]
			if err = t.tolerate(d.name, err); err != nil {
				return err
			}
			continue
		}
		if err := t.tolerate(d.name+"/"+name, t.step(d, name)); err != nil {
			return err
		}
	}
	return nil
}

// tolerate notes an error of a file that is left out, instead of returning it.
// Nothing of that file is in the stream.
func (t *writer) tolerate(name string, err error) error {
	if err == nil || !t.lenient || t.out.err != nil || t.ctx.Err() != nil || errors.Is(err, ErrEnough) {
		return err
	}
	t.o.note(name, "left out: "+err.Error())
	return nil
}

// next returns the next name in d; ok is false at its end, and with an error.
func (d *dir) next() (name string, ok bool, err error) {
	if len(d.names) == 0 {
		d.names, err = d.file.Readdirnames(256)
		if err == io.EOF || len(d.names) == 0 && errors.Is(err, unix.ENOENT) { // removed meanwhile
			return "", false, nil
		}
		if err != nil {
			return "", false, fmt.Errorf("read directory %s: %w", d.name, err)
		}
	}
	name, d.names = d.names[0], d.names[1:]
	return name, true, nil
}

// step copies the entry name of the directory d.
func (t *writer) step(d *dir, name string) error {
	full := d.name + "/" + name
	f, err := openBeneath(d.file, name, unix.O_PATH|unix.O_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		t.o.note(full, "removed before it was copied")
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", full, errors.Unwrap(err))
	}
	return t.entry(f, full, d.dev)
}

// entry copies f, an O_PATH descriptor, which it closes. parent is the device of
// the directory that it is in.
func (t *writer) entry(f *os.File, name string, parent uint64) (err error) {
	defer f.Close()
	st, err := fstat(f)
	if err != nil {
		return err
	}
	h := &tar.Header{
		Format:  tar.FormatPAX,
		Name:    name,
		Mode:    int64(st.Mode & 0o7777),
		Uid:     t.o.IDs.inside(st.Uid),
		Gid:     t.o.IDs.inside(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()),
	}
	if len(name) > maxName {
		return fmt.Errorf("%.100s…: the path has more than %d bytes", name, maxName)
	}
	records, left, err := readXattrs(f, t.o.IDs)
	if err != nil {
		return err
	}
	h.PAXRecords = records
	defer func() {
		if left != "" && err == nil {
			t.o.note(name, left)
		}
	}()
	if !isType(&st, unix.S_IFREG) {
		if err := t.admit(h, &st, 0); err != nil {
			return err
		}
	}
	if st.Nlink > 1 && !isType(&st, unix.S_IFDIR) && !isType(&st, unix.S_IFSOCK) {
		if first := t.seen(&st, name); first != "" {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
			if isType(&st, unix.S_IFREG) {
				if err := t.admit(h, &st, 0); err != nil {
					return err
				}
			}
			return t.header(h)
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		err := t.regular(f, h, &st)
		if err != nil { // other names of it are not links to this one
			delete(t.links, inode{st.Dev, st.Ino})
		}
		return err
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if err := t.header(h); err != nil {
			return err
		}
		return t.enter(f, name, st.Dev, parent)
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(f.Fd()), "", b)
		if err != nil {
			return &os.PathError{Op: "readlink", Path: name, Err: err}
		}
		h.Linkname = string(b[:n])
		return t.header(h)
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if isType(&st, unix.S_IFBLK) {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		return t.header(h)
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
		return t.header(h)
	}
	t.o.note(name, "a socket, left out")
	return nil
}

// seen notes that a file with several names was met as name, and returns the
// name that it was met as first, if that was another.
func (t *writer) seen(st *unix.Stat_t, name string) string {
	key := inode{st.Dev, st.Ino}
	l := t.links[key]
	if l == nil {
		t.links[key] = &link{name, uint64(st.Nlink) - 1} //nolint:unconvert // 32 bits on arm64
		return ""
	}
	if l.left--; l.left == 0 {
		delete(t.links, key)
	}
	return l.name
}

func (t *writer) header(h *tar.Header) error {
	if err := t.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	return nil
}

func (t *writer) enter(f *os.File, name string, dev, parent uint64) error {
	if dev != parent {
		if pseudo, err := isPseudo(f); err != nil {
			return err
		} else if pseudo {
			t.o.note(name, "a proc, sysfs or cgroup file system, its content is left out")
			return nil
		}
	}
	if len(t.dirs) == maxDepth {
		return fmt.Errorf("%.100s…: directories are nested deeper than %d levels", name, maxDepth)
	}
	r, err := reopen(f, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	t.dirs = append(t.dirs, &dir{file: r, name: name, dev: dev})
	return nil
}

func isPseudo(f *os.File) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return false, &os.PathError{Op: "statfs", Path: f.Name(), Err: err}
	}
	switch fs.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
		unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC:
		return true, nil
	}
	return false, nil
}

// regular copies the content of a regular file.
func (t *writer) regular(f *os.File, h *tar.Header, st *unix.Stat_t) error {
	r, err := reopen(f, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer r.Close()
	var parts []part
	if st.Blocks*512 < st.Size { // st_blocks counts 512 bytes, whatever the file system's block is
		parts = dataParts(r, st.Size)
	}
	size := st.Size
	if parts != nil {
		size = 0
		for _, p := range parts {
			size += p.length
		}
	}
	if err := t.admit(h, st, size); err != nil {
		return err
	}
	if parts != nil {
		return t.sparse(r, h, parts)
	}
	if err := t.header(h); err != nil {
		return err
	}
	if err := t.copy(t.tar, r, h.Name, part{0, st.Size}); err != nil {
		return err
	}
	if now, err := fstat(r); err == nil && now.Size > st.Size {
		t.o.note(h.Name, "grew while it was copied, and is cut")
	}
	return nil
}

// admit asks whether an entry is to be written.
func (t *writer) admit(h *tar.Header, st *unix.Stat_t, size int64) error {
	if t.o.Admit == nil {
		return nil
	}
	extra := len(h.Name) + len(h.Linkname)
	for k, v := range h.PAXRecords {
		extra += len(k) + len(v)
	}
	e := Entry{Name: h.Name, Mode: st.Mode, Size: size, Extra: int64(extra)}
	if h.Typeflag == tar.TypeLink {
		e.Link = h.Linkname
	}
	return t.o.Admit(e)
}

// copy writes exactly p of r.
func (t *writer) copy(w io.Writer, r *os.File, name string, p part) error {
	for p.length > 0 {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		b := t.buf[:min(int64(len(t.buf)), p.length)]
		n, err := r.ReadAt(b, p.offset)
		if err != nil && err != io.EOF && !t.lenient {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if n < len(b) {
			clear(b[n:])
			what := "shrank while it was copied"
			if err != nil && err != io.EOF {
				what = "cannot be read to its end: " + err.Error()
			}
			t.o.note(name, what+", and is filled with zeros")
			// Noted once: the rest is zeros without asking again.
			if _, err := w.Write(b); err != nil {
				return err
			}
			return writeZeros(w, b, p.length-int64(len(b)))
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		p.offset, p.length = p.offset+int64(n), p.length-int64(n)
	}
	return nil
}

func writeZeros(w io.Writer, buf []byte, n int64) error {
	clear(buf)
	for n > 0 {
		b := buf[:min(int64(len(buf)), n)]
		if _, err := w.Write(b); err != nil {
			return err
		}
		n -= int64(len(b))
	}
	return nil
}
