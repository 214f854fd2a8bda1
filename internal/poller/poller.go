// Package poller waits for many descriptors with one goroutine. A goroutine for
// each, which is what the runtime's poller asks for, is 5 KiB of stack and
// bookkeeping that does nothing as long as a pause or monitor lives.
package poller

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Poller calls functions when descriptors are ready to be read. It is safe for
// concurrent use.
type Poller struct {
	ep   *os.File // epoll; non-blocking, so that the runtime's poller waits on it and no thread does
	done chan struct{}

	mu   sync.Mutex // held while functions run
	all  map[uint64]*Watch
	last uint64 // number that was given; none is given twice, as descriptors are
}

// Watch is a descriptor that a Poller waits for.
type Watch struct {
	p      *Poller
	number uint64
	f      *os.File
	ready  func() bool
}

// Open returns a Poller that waits for nothing yet.
func Open() (*Poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl O_NONBLOCK", err)
	}
	p := &Poller{ep: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{}), all: make(map[uint64]*Watch)}
	rc, err := p.ep.SyscallConn()
	if err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		rc.Read(func(fd uintptr) bool {
			for p.turn(int(fd)) {
			}
			return false // there is more to come, until the descriptor is closed
		})
	}()
	return p, nil
}

// Close ends the waiting: no function runs any more when it has returned. The
// files are still their owners'.
func (p *Poller) Close() error {
	err := p.ep.Close()
	<-p.done
	return err
}

// Watch has ready called whenever there is something to be read from f, or its
// end, until ready returns false or Stop is called. f is lent until then; it must
// not be one that the runtime's poller waits for. ready must neither wait nor call
// the Poller: it runs in the goroutine that all share.
func (p *Poller) Watch(f *os.File, ready func() bool) (*Watch, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	w := &Watch{p, p.last, f, ready}
	if err := w.control(unix.EPOLL_CTL_ADD); err != nil {
		return nil, err
	}
	p.all[w.number] = w
	return w, nil
}

// Stop ends the watch, and reports whether it had not ended before. The function
// does not run any more when Stop has returned. A nil Watch has ended.
func (w *Watch) Stop() bool {
	if w == nil {
		return false
	}
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	return w.stop()
}

// stop is Stop. Preconditions: p.mu is held.
func (w *Watch) stop() bool {
	if w.p.all[w.number] != w {
		return false
	}
	delete(w.p.all, w.number)
	// Before f is closed: a process that is just being started has it too, until
	// its execve, and the kernel would go on waiting.
	w.control(unix.EPOLL_CTL_DEL)
	return true
}

func (w *Watch) control(op int) error {
	ep, err := w.p.ep.SyscallConn()
	if err != nil {
		return err
	}
	f, err := w.f.SyscallConn()
	if err != nil {
		return err
	}
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(w.number), Pad: int32(w.number >> 32)}
	var cerr, eerr error
	err = ep.Control(func(ep uintptr) {
		cerr = f.Control(func(fd uintptr) { eerr = os.NewSyscallError("epoll_ctl", unix.EpollCtl(int(ep), op, int(fd), &e)) })
	})
	return errors.Join(err, cerr, eerr)
}

// turn calls the functions of what is ready, and reports whether there may be more.
func (p *Poller) turn(ep int) bool {
	var es [32]unix.EpollEvent
	n, err := unix.EpollWait(ep, es[:], 0)
	if err == unix.EINTR {
		return true
	}
	if n <= 0 {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range es[:n] {
		w := p.all[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]
		if w != nil && !w.ready() {
			w.stop()
		}
	}
	return true
}
