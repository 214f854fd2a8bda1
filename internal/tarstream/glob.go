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
// matches nothing. At most limit paths are returned; more says that there are
// others. A directory that cannot be read has nothing that matches.
func Glob(ctx context.Context, root *os.File, pattern string, limit int) (paths []string, more bool, err error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, false, err
	}
	found := []string{""}
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
			if err != nil {
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
		f, err := openIn(root, p, unix.O_PATH|unix.O_NOFOLLOW)
		if err == nil {
			f.Close()
		}
		return err != nil
	})
	slices.Sort(found)
	return found, more, nil
}

// matching returns the names in the directory dir that match pattern, limit at
// most.
func matching(ctx context.Context, root *os.File, dir, pattern string, limit int) (names []string, more bool, err error) {
	d, err := openIn(root, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, false, nil
	}
	defer d.Close()
	if pseudo, err := isPseudo(d); err != nil || pseudo {
		return nil, false, nil
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
