package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Names under the root directory; see docs/ARCHITECTURE.md.
const (
	eventsDir = "events"
)

// rootLink is a link in the state directory to the daemon's root directory, for
// commands that look there without it.
const rootLink = "root"

// rootDir is what the daemon keeps open of its root directory.
type rootDir struct {
	lock    *os.File
	journal *journal.Journal
}

// openRootDir makes this process the only one that uses the root directory, which
// exists, and opens the journal in it.
func openRootDir(path string, eventsMax int64) (*rootDir, error) {
	dir, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	r := new(rootDir)
	if r.lock, err = sandbox.Lock(dir, "root directory "+path); err != nil {
		return nil, err
	}
	if r.journal, err = journal.Open(filepath.Join(path, eventsDir), journal.Options{Max: eventsMax}); err != nil {
		return nil, errors.Join(err, r.lock.Close())
	}
	return r, nil
}

// Close lets go of the root directory.
func (r *rootDir) Close() error { return errors.Join(r.journal.Close(), r.lock.Close()) }

// linkRoot makes the link to the root directory in the state directory.
func linkRoot(state, root string) error {
	link := filepath.Join(state, rootLink)
	if to, err := os.Readlink(link); err == nil && to == root {
		return nil
	}
	tmp := link + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(root, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, link)
}
