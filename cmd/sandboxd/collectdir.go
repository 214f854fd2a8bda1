package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/sandboxd/sandboxd/collect"
)

// collectOptions are the daemon's options about what is taken of members.
type collectOptions struct {
	collectDir     string // absolute
	collectMax     int64
	collectKeep    time.Duration
	sampleInterval time.Duration
}

const (
	collectMaxDefault  = 1 << 30
	collectKeepDefault = 168 * time.Hour

	// minSampleInterval keeps the daemon from doing nothing else.
	minSampleInterval = 100 * time.Millisecond
)

// collectedDefault is where collections are unless the daemon was told otherwise.
const collectedDefault = "/var/lib/sandboxd/collected"

// collectedLink is a symbolic link in the state directory to the collection
// directory, which the CLI works on by itself.
const collectedLink = "collected"

// linkCollected makes the link.
func linkCollected(state, dir string) error {
	name := filepath.Join(state, collectedLink)
	if to, err := os.Readlink(name); err == nil && to == dir {
		return nil
	}
	tmp := name + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(dir, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// collected opens the collection directory: the one that is given, or that of the
// daemon that the state directory belongs to.
func (a *app) collected(dir string) (*collect.Store, error) {
	if dir == "" {
		var err error
		if dir, err = os.Readlink(filepath.Join(a.stateDir(), collectedLink)); err != nil {
			dir = collectedDefault // no daemon has been here since the host was started
		}
	}
	s, err := collect.OpenExisting(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no collection directory %s", collect.ErrNotFound, dir)
	}
	return s, err
}
