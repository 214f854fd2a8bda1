package main

import (
	"errors"
	"fmt"
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
	path    string // without links in it: logs are opened without following any
	lock    *os.File
	journal *journal.Journal
}

// openRootDir makes the root directory, if need be, and this process the only
// one that uses it, together with the state directory, and opens the journal in it.
func openRootDir(path, state string, eventsMax int64) (*rootDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	dir, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	defer dir.Close()
	r := &rootDir{path: path}
	if r.lock, err = sandbox.Lock(dir, "root directory "+path); err != nil {
		return nil, err
	}
	if err = enterState(path, state); err == nil {
		r.journal, err = journal.Open(filepath.Join(path, eventsDir), journal.Options{Max: eventsMax})
	}
	if err != nil {
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

// statesDir has, under the root directory, a link to every state directory that
// it has been used with, by mark: what lies there can belong to a sandbox of another.
const statesDir = "states"

// enterState notes that the root directory is used with the state directory.
func enterState(root, state string) error {
	if err := os.Mkdir(filepath.Join(root, statesDir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	err := os.Symlink(state, filepath.Join(root, statesDir, installationMark(state)))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// otherStates returns the state directories that the root directory has been
// used with, except one, and the paths of what lies there and is no link.
func otherStates(root, except string) (states, foreign []string, err error) {
	dir := filepath.Join(root, statesDir)
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range ents {
		path := filepath.Join(dir, e.Name())
		if e.Type() != fs.ModeSymlink {
			foreign = append(foreign, path)
			continue
		}
		to, err := os.Readlink(path)
		if err != nil {
			return nil, nil, err
		}
		if to != except {
			states = append(states, to)
		}
	}
	return states, foreign, nil
}

// knownElsewhere reports whether one of the state directories has a sandbox with
// that id. Where that cannot be told, it does.
func knownElsewhere(states []string, id string) bool {
	for _, s := range states {
		if _, err := os.Lstat(filepath.Join(s, "sandboxes", id)); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}
