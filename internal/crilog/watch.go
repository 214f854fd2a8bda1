package crilog

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// watcher says when a log may have something new: its directory got a file, or
// the file was written to (inotify(7)).
type watcher struct {
	in      *os.File
	events  chan error // nil: something happened; another error: the end
	watched os.FileInfo
	wd      int // of the file; -1 if none is watched
}

func newWatcher(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	const mask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	// Non-blocking, so the runtime's poller waits, not a thread, and Close ends
	// a Read.
	w := &watcher{in: os.NewFile(uintptr(fd), "inotify"), events: make(chan error, 1), wd: -1}
	go w.read()
	return w, nil
}

func (w *watcher) close() { w.in.Close() }

// watch makes writes to f events, and those to the file before it no longer.
func (w *watcher) watch(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if w.watched != nil && os.SameFile(w.watched, fi) {
		return nil
	}
	rc, err := w.in.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(in uintptr) {
		if w.wd >= 0 {
			unix.InotifyRmWatch(int(in), uint32(w.wd)) // gone by itself if the file is
		}
		// By descriptor: the path may lead to another file already.
		w.wd, err = unix.InotifyAddWatch(int(in), fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.IN_MODIFY)
	})
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("watch %s: %w", f.Name(), err)
	}
	w.watched = fi
	return nil
}

func (w *watcher) read() {
	defer close(w.events)
	// What happened is seen by looking, so events are only drained. Lost ones
	// (IN_Q_OVERFLOW) are an event too.
	buf := make([]byte, 4096)
	for {
		if _, err := w.in.Read(buf); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.events <- fmt.Errorf("read inotify events: %w", err)
			}
			return
		}
		select {
		case w.events <- nil:
		default: // the reader has not looked since the last one
		}
	}
}
