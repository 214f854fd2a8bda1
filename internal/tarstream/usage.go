package tarstream

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Usage returns how many bytes the directory top and what is below it take on disk.
// Mounts are not crossed, a file with several names counts in parts, one for each
// name, and what cannot be read counts nothing. If ctx ends, what has been counted
// is returned with its error.
func Usage(ctx context.Context, top *os.File) (sum int64, err error) {
	count := func(f *os.File) bool {
		st, err := fstat(f)
		if err != nil {
			return false
		}
		isDir := isType(&st, unix.S_IFDIR)
		if n := int64(st.Nlink); n > 1 && !isDir {
			sum += st.Blocks * 512 / n
		} else {
			sum += st.Blocks * 512
		}
		return isDir
	}
	var dirs []*dir
	enter := func(f *os.File) error {
		if !count(f) || len(dirs) == maxDepth {
			return nil
		}
		r, err := reopen(f, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == nil {
			dirs = append(dirs, &dir{file: r})
		}
		return err
	}
	defer func() {
		for _, d := range dirs {
			d.file.Close()
		}
	}()
	if err := enter(top); err != nil {
		return 0, err
	}
	for len(dirs) > 0 {
		if err := ctx.Err(); err != nil {
			return sum, err
		}
		d := dirs[len(dirs)-1]
		name, ok, err := d.next()
		if !ok || err != nil {
			d.file.Close()
			dirs = dirs[:len(dirs)-1]
			continue
		}
		f, err := open(d.file, name, unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV)
		if err != nil {
			continue
		}
		err = enter(f)
		f.Close()
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			return sum, err
		}
	}
	return sum, nil
}
