package crilog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Options say which part of a log [Read] reads.
type Options struct {
	// Tail is the number of lines at the end of the file to begin with; -1 means
	// all. The parts of one line count once, and a line at the end of the file
	// that is not finished does not count.
	Tail int
	// Follow goes on at the end of the file with what is written later, to the
	// file and to those that take its place at the same path.
	Follow bool
	// Done, when it is closed, says that nothing will be written any more: Read
	// then follows to the end and returns. nil means never.
	Done <-chan struct{}
	// Bad, if not nil, is told of what could not be parsed and is passed over.
	Bad func(*LineError)
}

// LineError says what part of a log file is not a line.
type LineError struct {
	Path   string
	Line   int   // counted from 1; 0 if the file was not read from its beginning
	Offset int64 // of the line's first byte in the file
	Err    error
}

func (e *LineError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: at byte %d: %v", e.Path, e.Offset, e.Err)
	}
	return fmt.Sprintf("%s:%d: %v", e.Path, e.Line, e.Err)
}

// Unwrap returns the reason.
func (e *LineError) Unwrap() error { return e.Err }

// Read calls fn for each line of the log file at path; Content is valid until fn
// returns. It returns nil at the end of the file, or, when it follows, once Done
// is closed or the file and its directory are removed, and everything has been
// read. It
// returns ctx's error when ctx ends, and fn's as soon as fn returns one.
//
// A line without a line feed at the end of the file is not delivered: its writer
// has not finished it.
//
// A file that replaces the one being read (renamed or removed, and created
// anew) is read from its beginning after the old one's end; so is a file that
// has become shorter. The name of a replaced file must be given to the new one
// only after the last write to the old one.
func Read(ctx context.Context, path string, o Options, fn func(Line) error) error {
	r := &reader{path: path, bad: o.Bad, fn: fn, buf: make([]byte, 2*MaxLine)}
	defer r.close()
	var w *watcher
	if o.Follow {
		// Before the file is opened, so that no change is missed between.
		var err error
		if w, err = newWatcher(filepath.Dir(path)); err != nil {
			return err
		}
		defer w.close()
	}
	err := r.open()
	if err != nil && !(o.Follow && errors.Is(err, os.ErrNotExist)) {
		return err
	}
	if err == nil && o.Tail >= 0 {
		if r.offset, err = tailOffset(r.f, o.Tail); err != nil {
			return err
		}
		r.start = r.offset
		if r.offset > 0 {
			r.line = -1
		}
	}
	for {
		// Read before the end is looked for: what is written before Done is
		// closed must be found.
		done := !o.Follow || isClosed(o.Done)
		if w != nil && r.f != nil {
			if err := w.watch(r.f); err != nil {
				return err
			}
		}
		if err := r.readToEnd(ctx); err != nil {
			return err
		}
		if o.Follow {
			replaced, err := r.next(ctx)
			if err != nil {
				return err
			}
			if replaced {
				continue
			}
		}
		if done {
			return nil
		}
		if _, err := os.Stat(filepath.Dir(path)); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-o.Done:
		case err, ok := <-w.events:
			if ok && err != nil {
				return err
			}
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// reader reads lines from the file that has a path at the moment.
type reader struct {
	path string
	bad  func(*LineError)
	fn   func(Line) error

	f      *os.File
	start  int64 // where the line that is being read begins
	offset int64 // where the next read begins
	line   int   // lines before start; -1 if unknown
	buf    []byte
	n      int   // bytes of an unfinished line in buf
	passed int64 // bytes of it before them, not kept because it is too long
}

func (r *reader) open() error {
	// Not blocking on a FIFO; whether it is a file is seen below. No link is
	// followed: who is logged may be able to make one.
	fd, err := unix.Openat2(unix.AT_FDCWD, r.path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return &os.PathError{Op: "open", Path: r.path, Err: err}
	}
	f := os.NewFile(uintptr(fd), r.path)
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", r.path)
	}
	if err != nil {
		f.Close()
		return err
	}
	r.close()
	r.f = f
	r.rewind()
	return nil
}

func (r *reader) close() {
	if r.f != nil {
		r.f.Close()
	}
}

func (r *reader) rewind() { r.start, r.offset, r.line, r.n, r.passed = 0, 0, 0, 0, 0 }

// next reports whether there is something to read from a beginning: the path
// leads to another file, which is opened, or the file has become shorter.
func (r *reader) next(ctx context.Context) (bool, error) {
	named, err := os.Stat(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return false, r.dropRemoved(ctx)
	}
	if err != nil {
		return false, err
	}
	if r.f == nil {
		return r.reopen()
	}
	open, err := r.f.Stat()
	if err != nil {
		return false, err
	}
	if os.SameFile(named, open) {
		if open.Size() < r.offset {
			r.rewind()
			return true, nil
		}
		return false, nil
	}
	// The end seen before may have been that of a file still written to.
	if err := r.readToEnd(ctx); err != nil {
		return false, err
	}
	return r.reopen()
}

// dropRemoved closes the file if it has no name any more: an open file keeps
// the kernel from telling that its directory is gone.
func (r *reader) dropRemoved(ctx context.Context) error {
	if r.f == nil {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(r.f.Fd()), &st); err != nil || st.Nlink > 0 {
		return os.NewSyscallError("fstat", err)
	}
	if err := r.readToEnd(ctx); err != nil {
		return err
	}
	r.close()
	r.f = nil
	return nil
}

func (r *reader) reopen() (bool, error) {
	err := r.open()
	if errors.Is(err, os.ErrNotExist) { // replaced once more this moment
		return false, nil
	}
	return err == nil, err
}

func (r *reader) readToEnd(ctx context.Context) error {
	if r.f == nil {
		return nil
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.f.ReadAt(r.buf[r.n:], r.offset)
		r.offset += int64(n)
		if ferr := r.feed(n); ferr != nil {
			return ferr
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// feed takes the n bytes that were read into buf behind the unfinished line.
func (r *reader) feed(n int) error {
	b := r.buf[:r.n+n]
	from := r.n // no line feed before it
	for {
		i := bytes.IndexByte(b[from:], '\n')
		if i < 0 {
			break
		}
		line := b[:from+i]
		if err := r.deliver(line); err != nil {
			return err
		}
		b, from = b[len(line)+1:], 0
	}
	if r.passed > 0 || len(b) > MaxLine {
		r.passed += int64(len(b))
		b = nil
	}
	r.n = copy(r.buf, b)
	return nil
}

func (r *reader) deliver(b []byte) error {
	at, length := r.start, r.passed+int64(len(b))
	r.start, r.passed = at+length+1, 0
	if r.line >= 0 {
		r.line++
	}
	var l Line
	err := errTooLong
	if length <= MaxLine {
		l, err = Parse(b)
	}
	if err == nil {
		return r.fn(l)
	}
	if r.bad != nil {
		r.bad(&LineError{r.path, max(r.line, 0), at, err})
	}
	return nil
}

var errTooLong = fmt.Errorf("longer than %d bytes", MaxLine)
