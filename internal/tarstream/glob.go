package tarstream

import (
	"context"
	"errors"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Glob returns the paths under root that match pattern, sorted: an absolute path
// of which each element may be a pattern as of [path.Match]. Links are followed
// under root, except at the end. What is in proc, sysfs and cgroup file systems
// matches nothing; if nothing else does, the error is [ErrPseudo]. At most limit
// paths are returned; more says that there are others. A directory that cannot be
// read has nothing that matches.
func Glob(ctx context.Context, root *os.File, pattern string, limit int) (paths []string, more bool, err error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, false, err
	}
	found, pseudo := []string{""}, false
	elements := strings.Split(strings.Trim(path.Clean("/"+pattern), "/"), "/")
	for _, el := range elements {
		if el == "" { // the root itself
			return []string{"/"}, false, nil
		}
		if !strings.ContainsAny(el, `*?[\`) {
			for i := range found {
				found[i] += "/" + el
			}
			continue
		}
		var next []string
		for _, dir := range found {
			names, cut, err := matching(ctx, root, dir+"/", el, limit-len(next))
			if errors.Is(err, ErrPseudo) {
				pseudo = true
			} else if err != nil {
				return nil, false, err
			}
			more = more || cut
			for _, n := range names {
				next = append(next, dir+"/"+n)
			}
		}
		found = next
	}
	found = slices.DeleteFunc(found, func(p string) bool {
		if ctx.Err() != nil {
			return true
		}
		f, err := openIn(root, p, unix.O_PATH|unix.O_NOFOLLOW)
		switch {
		case err == nil:
			f.Close()
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			pseudo = pseudo || inPseudo(root, p)
			return true
		}
		return false // who cannot open it will say why
	})
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	if len(found) == 0 && pseudo {
		return nil, false, ErrPseudo
	}
	slices.Sort(found)
	return found, more, nil
}

// inPseudo reports whether what there is of the way to p ends in a file system of
// which nothing is copied.
func inPseudo(root *os.File, p string) bool {
	for p != "/" {
		p = path.Dir(p)
		f, err := openIn(root, p, unix.O_PATH)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return false
		}
		pseudo, err := isPseudo(f)
		f.Close()
		return err == nil && pseudo
	}
	return false
}

// matching returns the names in the directory dir that match pattern, limit at
// most.
func matching(ctx context.Context, root *os.File, dir, pattern string, limit int) (names []string, more bool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	d, err := openIn(root, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, false, nil
	}
	defer d.Close()
	if pseudo, err := isPseudo(d); err != nil {
		return nil, false, nil
	} else if pseudo {
		return nil, false, ErrPseudo
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		batch, err := d.Readdirnames(256)
		for _, n := range batch {
			if ok, _ := path.Match(pattern, n); !ok {
				continue
			}
			if len(names) == limit {
				return names, true, nil
			}
			names = append(names, n)
		}
		if errors.Is(err, io.EOF) || len(batch) == 0 {
			return names, false, nil
		}
	}
}
