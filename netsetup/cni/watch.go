package cni

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long a change is left alone before what is wrong with the files
// is logged: they may still be written to.
const settle = 200 * time.Millisecond

// watcher keeps what a configuration directory says, and follows its changes by
// inotify(7). The kernel queues an event before the call that made the change
// returns, and current reads the queue, so that it is never behind.
type watcher struct {
	dir  string
	log  *slog.Logger
	in   *os.File // the inotify instance
	done sync.WaitGroup

	mu       sync.Mutex
	watched  os.FileInfo // what dir was when it was watched; nil if it is not. Guarded by mu.
	cur      *config     // guarded by mu
	reported map[string]string
	report   *time.Timer // guarded by mu
	closed   bool        // guarded by mu
}

func watch(dir string, log *slog.Logger) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	w := &watcher{dir: dir, log: log, in: os.NewFile(uintptr(fd), "inotify"), cur: &config{dir: dir}}
	w.current()
	raw, err := w.in.SyscallConn()
	if err != nil {
		w.in.Close()
		return nil, err
	}
	w.done.Go(func() {
		for {
			err := raw.Read(func(fd uintptr) bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				changed := w.drain(int(fd))
				if changed {
					w.refresh(true)
				}
				return changed
			})
			if err != nil {
				return // closed
			}
		}
	})
	return w, nil
}

// current returns what the directory says now.
func (w *watcher) current() *config {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := false
	if raw, err := w.in.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { changed = w.drain(int(fd)) })
	}
	w.refresh(changed)
	return w.cur
}

// refresh reads the directory again if it has changed or is not the one that is watched.
//
// Preconditions: w.mu is held.
func (w *watcher) refresh(changed bool) {
	fi, err := os.Stat(w.dir)
	switch {
	case err != nil && w.watched == nil && !changed && len(w.cur.problems) == 0:
		if errors.Is(err, os.ErrNotExist) {
			return
		}
		fallthrough
	case err != nil:
		w.watched = nil
	case w.watched == nil || !os.SameFile(fi, w.watched):
		if w.addWatch(w.dir) {
			w.watched = fi
		}
	case !changed:
		return
	}
	w.cur = load(w.dir)
	for _, n := range w.cur.networks {
		// Plugins of a network may be in files of their own.
		if sub := filepath.Join(w.dir, n.Name); isDir(sub) {
			w.addWatch(sub)
		}
	}
	if w.report == nil {
		w.report = time.AfterFunc(settle, w.logProblems)
	} else if !w.closed {
		w.report.Reset(settle)
	}
}

func (w *watcher) addWatch(dir string) (ok bool) {
	raw, err := w.in.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			_, err = unix.InotifyAddWatch(int(fd), dir, unix.IN_ONLYDIR|unix.IN_CREATE|unix.IN_MODIFY|
				unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		// It is read again each time when it is needed.
		w.log.Warn("CNI configuration cannot be watched", "dir", dir, "err", err)
	}
	return err == nil
}

// logProblems logs what is wrong with files, once each.
func (w *watcher) logProblems() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := map[string]string{}
	for _, p := range w.cur.problems {
		now[p.File] = p.Err.Error()
		if w.reported[p.File] != now[p.File] {
			w.log.Warn("CNI configuration not usable", "file", filepath.Join(w.dir, p.File), "err", p.Err)
		}
	}
	w.reported = now
}

func (w *watcher) close() error {
	w.mu.Lock()
	w.closed = true
	if w.report != nil {
		w.report.Stop()
	}
	w.mu.Unlock()
	err := w.in.Close()
	w.done.Wait()
	return err
}

// drain reads all events and reports whether there were any. Which they are does
// not matter, as the directory is read anew, with one exception: another
// directory can have the inode of one that is gone.
//
// Preconditions: w.mu is held.
func (w *watcher) drain(fd int) (any bool) {
	var buf [16 << 10]byte
	for {
		n, err := unix.Read(fd, buf[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil || n <= 0:
			return any
		}
		any = true
		// struct inotify_event: wd, mask, cookie, the length of the name, the name.
		for ev := buf[:n]; len(ev) >= unix.SizeofInotifyEvent; {
			if binary.NativeEndian.Uint32(ev[4:])&(unix.IN_IGNORED|unix.IN_DELETE_SELF) != 0 {
				w.watched = nil
			}
			ev = ev[min(len(ev), unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(ev[12:]))):]
		}
	}
}

func isDir(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.IsDir()
}
