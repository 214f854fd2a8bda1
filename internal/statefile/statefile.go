// Package statefile replaces small JSON files in such a way that a reader, and
// a daemon that is started after a power cut, finds the old contents or the new
// ones, and never a part of either.
package statefile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// TempSuffix ends the names of the files that a crash in [Write] may leave.
const TempSuffix = ".tmp"

// Write makes the JSON form of v the contents of the file name under dir.
//
// When it returns nil, contents and name are on disk. When it returns an error,
// the old contents are there, or, if only the last fsync failed, the new ones.
// Two writers of one name must not overlap.
func Write(dir *os.Root, name string, v any) error {
	return write(dir, name, v, true)
}

// WriteFast is [Write] for what may be lost, or found damaged, after a power cut.
// It does not wait for the disk. The end of the process loses nothing.
func WriteFast(dir *os.Root, name string, v any) error { return write(dir, name, v, false) }

func write(dir *os.Root, name string, v any, sync bool) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	// Opened once, and then used as it is: os.Root looks each name up one element at a
	// time, and os.File asks of each file whether it can be polled.
	parent, base := path.Split(name)
	in, err := dir.Open(path.Clean(parent))
	if err != nil {
		return err
	}
	defer in.Close()
	if op, err := writeIn(int(in.Fd()), base, append(data, '\n'), sync); err != nil {
		return &os.PathError{Op: op, Path: name, Err: err}
	}
	return nil
}

// writeIn returns what it was at when it failed.
func writeIn(dir int, name string, data []byte, sync bool) (op string, err error) {
	tmp := name + TempSuffix
	// Without O_EXCL: as writers do not overlap, a file that is there already
	// was left by a crash.
	var fd int
	err = again(func() (err error) {
		fd, err = unix.Openat(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return "create", err
	}
	if op, err := fill(fd, data, sync); err != nil {
		unix.Unlinkat(dir, tmp, 0)
		return op, err
	}
	if err := unix.Renameat(dir, tmp, dir, name); err != nil {
		unix.Unlinkat(dir, tmp, 0)
		return "replace", err
	}
	if !sync {
		return "", nil
	}
	return "sync directory of", again(func() error { return unix.Fsync(dir) })
}

// fill writes data, with sync forces it to disk, and closes the file; it returns what it
// was at when it failed. The data must be there before the rename is: otherwise a power
// cut can leave the new name with nothing in it.
func fill(fd int, data []byte, sync bool) (op string, err error) {
	defer func() {
		if cerr := unix.Close(fd); err == nil && cerr != nil {
			op, err = "close", cerr
		}
	}()
	for len(data) > 0 {
		var n int
		err := again(func() (err error) { n, err = unix.Write(fd, data); return err })
		if err != nil {
			return "write", err
		}
		data = data[n:]
	}
	if !sync {
		return "", nil
	}
	return "sync", again(func() error { return unix.Fsync(fd) })
}

// again calls fn until no signal interrupts it (signal(7)), as package os does.
func again(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

// Read decodes the file name under dir into v. A field that v does not have and
// anything after the value are errors: nobody else writes these files, so that
// either comes from a newer daemon or from a damaged disk.
func Read(dir *os.Root, name string, v any) error { return read(dir, name, v, false) }

// ReadPart is [Read] into a v that has only those fields that are wanted.
func ReadPart(dir *os.Root, name string, v any) error { return read(dir, name, v, true) }

// Bytes returns what is in the file name under dir.
func Bytes(dir *os.Root, name string) ([]byte, error) {
	f, err := openRegular(dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func openRegular(dir *os.Root, name string) (*os.File, error) {
	// A FIFO in its place must not block the daemon.
	f, err := dir.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func read(dir *os.Root, name string, v any, part bool) error {
	f, err := openRegular(dir, name)
	if err != nil {
		return err
	}
	defer f.Close()
	d := json.NewDecoder(f)
	if !part {
		d.DisallowUnknownFields()
	}
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("decode %s: %w", name, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("decode %s: data after the value", name)
	}
	return nil
}

// SyncDir makes durable which names are in the directory name under dir.
func SyncDir(dir *os.Root, name string) error {
	f, err := dir.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
