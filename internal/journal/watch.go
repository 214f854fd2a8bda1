package journal

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Watcher waits for events in a journal that another process writes
// (inotify(7)). The caller closes it. It is for one reader.
type Watcher struct {
	in     *os.File
	events chan error
}

// Watch begins to watch the directory of a journal.
func Watch(dir string) (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	// A segment is made under another name and moved.
	const mask = unix.IN_MODIFY | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_ONLYDIR
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	// Non-blocking, so the runtime's poller waits, not a thread, and Close ends
	// a Read.
	w := &Watcher{in: os.NewFile(uintptr(fd), "inotify"), events: make(chan error, 1)}
	go w.read()
	return w, nil
}

// Close stops the watch.
func (w *Watcher) Close() error { return w.in.Close() }

// Wait waits until something has happened in the directory since the watch
// began, or the last Wait returned.
func (w *Watcher) Wait(ctx context.Context, _ uint64) error {
	select {
	case err, ok := <-w.events:
		if !ok {
			return os.ErrClosed
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *Watcher) read() {
	defer close(w.events)
	// What happened is seen by looking, so that events are only drained. Lost
	// ones (IN_Q_OVERFLOW) are an event too.
	buf := make([]byte, 4096)
	for {
		if _, err := w.in.Read(buf); err != nil {
			return
		}
		select {
		case w.events <- nil:
		default: // the reader has not looked since the last one
		}
	}
}
