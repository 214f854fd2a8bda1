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

// Matches is what [Glob] has found.
type Matches struct {
	Paths  []string // sorted
	More   bool     // there are others
	Unread error    // why the first directory that could not be read, or not to its end, could not
}

// Glob returns the paths under root that match pattern, limit at most: an absolute path
// of which each element may be a pattern as of [path.Match]. Links are followed
// under root, except at the end. What is in proc, sysfs and cgroup file systems
// matches nothing; if nothing else does, the error is [ErrPseudo].
func Glob(ctx context.Context, root *os.File, pattern string, limit int) (m Matches, err error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return m, err
	}
	found, pseudo := []string{""}, false
	elements := strings.Split(strings.Trim(path.Clean("/"+pattern), "/"), "/")
	for _, el := range elements {
		if el == "" { // the root itself
			return Matches{Paths: []string{"/"}}, nil
		}
		if !strings.ContainsAny(el, `*?[\`) {
			for i := range found {
				found[i] += "/" + el
			}
			continue
		}
		var next []string
		for _, dir := range found {
			names, more, err := matching(ctx, root, dir+"/", el, limit-len(next))
			switch {
			case ctx.Err() != nil:
				return Matches{}, ctx.Err()
			case errors.Is(err, ErrPseudo):
				pseudo = true
			case err != nil && m.Unread == nil:
				m.Unread = err
			}
			m.More = m.More || more
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
		return Matches{}, err
	}
	if len(found) == 0 && pseudo {
		return Matches{}, ErrPseudo
	}
	slices.Sort(found)
	m.Paths = found
	return m, nil
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
// most. With an error, they are those that were read before it.
func matching(ctx context.Context, root *os.File, dir, pattern string, limit int) (names []string, more bool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	d, err := openIn(root, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil, false, nil // no directory
	case err != nil:
		return nil, false, err
	}
	defer d.Close()
	if pseudo, err := isPseudo(d); err != nil {
		return nil, false, err
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
		if errors.Is(err, io.EOF) {
			return names, false, nil
		} else if err != nil {
			return names, false, err
		}
	}
}
