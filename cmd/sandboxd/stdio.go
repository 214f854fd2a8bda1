package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/member"
)

// forwarded are the signals that a foreground command passes on to the process
// that it stands for. SIGINT and SIGQUIT come from the terminal to this process
// only: what it stands for is in a session of its own.
var forwarded = []os.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2}

// forward returns the signals that this process gets until stop is called.
func forward() (signals <-chan unix.Signal, stop func()) {
	in := make(chan os.Signal, 16)
	out := make(chan unix.Signal)
	done := make(chan struct{})
	signal.Notify(in, forwarded...)
	go func() {
		for {
			select {
			case s := <-in:
				select {
				case out <- s.(unix.Signal):
				case <-done:
					return
				}
			case <-done:
				return
			}
		}
	}()
	return out, sync.OnceFunc(func() { signal.Stop(in); close(done) })
}

// terminal is the user's terminal in raw mode.
type terminal struct {
	f     *os.File
	old   *term.State
	sizes chan unix.Winsize
	stop  func()
}

// openTerminal puts the terminal that in is into raw mode. The caller must call
// restore on every way out.
func openTerminal(in io.Reader) (*terminal, error) {
	f := asFile(in)
	if f == nil || !term.IsTerminal(int(f.Fd())) {
		return nil, errors.New("-t: stdin is not a terminal")
	}
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	t := &terminal{f: f, old: old, sizes: make(chan unix.Winsize, 1)}
	winch, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(winch, unix.SIGWINCH)
	t.stop = sync.OnceFunc(func() { signal.Stop(winch); close(done) })
	if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		t.sizes <- *ws
	}
	go func() {
		for {
			select {
			case <-winch:
			case <-done:
				return
			}
			ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
			if err != nil {
				continue
			}
			select {
			case t.sizes <- *ws:
			case <-done:
				return
			}
		}
	}()
	return t, nil
}

// restore gives the terminal back as it was. It may be called again.
func (t *terminal) restore() {
	t.stop()
	term.Restore(int(t.f.Fd()), t.old)
}

// errDetached means that the user asked to leave without ending anything.
var errDetached = errors.New("detached")

// detachKeys leave an attached terminal: ctrl-p ctrl-q.
var detachKeys = []byte{'p' & 0x1f, 'q' & 0x1f}

// detachReader returns [errDetached] in place of [detachKeys]. A first key that
// no second follows is passed on with what comes next.
type detachReader struct {
	r    io.Reader
	held bool // the first key has been read and not been passed on
}

func (d *detachReader) Read(p []byte) (int, error) {
	if len(p) < 2 {
		return 0, io.ErrShortBuffer
	}
	at := 0
	if d.held {
		p[0], at = detachKeys[0], 1
	}
	n, err := d.r.Read(p[at:])
	n += at
	if err != nil {
		d.held = false
		return n, err
	}
	if i := bytes.Index(p[:n], detachKeys); i >= 0 {
		return i, errDetached
	}
	if d.held = n > at && p[n-1] == detachKeys[0]; d.held {
		n--
	}
	return n, nil
}

// backlog is how much output is kept in memory for a stdout that is slow. A
// monitor does not wait for a client, and cuts off one that does not read.
const backlog = 64 << 20

// queue hands output from the goroutine that receives it to the one that writes
// it, so that receiving does not wait for writing.
type queue struct {
	mu     sync.Mutex
	cond   *sync.Cond
	items  []chunk // guarded by mu
	size   int     // guarded by mu
	closed bool    // guarded by mu
}

type chunk struct {
	stream int // 1 or 2
	data   []byte
}

func newQueue() *queue {
	q := new(queue)
	q.cond = sync.NewCond(&q.mu)
	return q
}

// put adds a copy of data. It waits only if the backlog is full.
func (q *queue) put(stream int, data []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.size > backlog && !q.closed {
		q.cond.Wait()
	}
	q.items = append(q.items, chunk{stream, bytes.Clone(data)})
	q.size += len(data)
	q.cond.Broadcast()
}

// close says that nothing more will be put.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.cond.Broadcast()
}

// writeTo writes what is put, until close, and returns the first error. After
// an error the rest is dropped.
func (q *queue) writeTo(stdout, stderr io.Writer) (first error) {
	for {
		q.mu.Lock()
		for len(q.items) == 0 && !q.closed {
			q.cond.Wait()
		}
		items := q.items
		q.items, q.size = nil, 0
		q.cond.Broadcast()
		q.mu.Unlock()
		if items == nil {
			return first
		}
		for _, c := range items {
			w := stdout
			if c.stream == 2 {
				w = stderr
			}
			if first == nil {
				_, first = w.Write(c.data)
			}
		}
	}
}

// attached is a running foreground session with a member: its output goes to
// ours, our stdin to its.
type attached struct {
	att      *member.Attachment
	phase    member.Phase
	out, err io.Writer
	gone     chan error // errDetached, or why input ended; buffered
	behind   *catchUp   // what goes on if we are cut off, or nil
}

// input copies in to the member's stdin, or to its terminal's master. At the end
// of a plain stdin the member's is closed too.
func (s *attached) input(in io.Reader, to *os.File, tty bool) {
	if tty {
		in = &detachReader{r: in}
	}
	_, err := io.Copy(to, in)
	if errors.Is(err, errDetached) {
		s.gone <- errDetached
		return
	}
	if !tty {
		to.Close()
		s.att.CloseStdin() // ErrGone: it has exited
	}
}

// output copies the member's output until it has exited. It reports whether
// everything came: not if the monitor went away or cut us off.
func (s *attached) output(ctx context.Context) (complete bool, err error) {
	q := newQueue()
	var seen [2]uint64
	written := make(chan error, 1)
	go func() { written <- q.writeTo(s.out, s.err) }()
	for {
		ev, nerr := s.att.Next()
		if nerr != nil {
			if nerr != io.EOF && !errors.Is(nerr, os.ErrClosed) {
				err = nerr
			}
			break
		}
		if ev.Stream != 0 {
			q.put(ev.Stream, ev.Data)
			seen[ev.Stream-1] += uint64(len(ev.Data))
			continue
		}
		s.phase = ev.Phase
		if ev.Phase == member.PhaseExited || ev.Phase == member.PhaseFailed {
			complete = true
			break
		}
	}
	if !complete && err == nil && s.behind != nil {
		complete, err = s.behind.run(ctx, seen, q.put)
	}
	q.close()
	return complete, errors.Join(err, <-written)
}

// session attaches this process to the member in dir until that has exited or
// the user leaves ([errDetached]). start, if not nil, is called once everything
// is connected; the member is not running yet then. behind, if not nil, shows what
// the connection does not bring. signals are passed on to the member.
func (a *app) session(ctx context.Context, ref, dir string, init, monitor procid.ID, tty, stdin bool, signals <-chan unix.Signal, behind *catchUp, start func() error) error {
	att, err := member.Attach(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", ref, err)
	}
	defer att.Close()
	if behind != nil && !behind.begin(att.Begin()) {
		behind = nil
	}
	s := &attached{att: att, out: a.out, err: a.err, gone: make(chan error, 1), behind: behind}

	raw := tty && stdin // ctrl-c and the like are bytes of the input
	var sizes <-chan unix.Winsize
	var master *os.File
	if tty {
		if master, err = member.Master(monitor); err != nil {
			return err
		}
		defer master.Close()
		if raw {
			t, err := openTerminal(a.in)
			if err != nil {
				return err
			}
			defer t.restore()
			sizes = t.sizes
			select {
			case ws := <-sizes:
				setWinsize(master, ws)
			default:
			}
		}
	}
	if stdin {
		to := master
		if !tty {
			if to, err = member.OpenStdin(dir); err != nil {
				return fmt.Errorf("%s: %w", ref, err)
			}
		}
		go s.input(a.in, to, tty)
	}
	type result struct {
		complete bool
		err      error
	}
	done := make(chan result, 1)
	go func() {
		complete, err := s.output(ctx)
		done <- result{complete, err}
	}()
	// Only now: a member that writes much at once must find somebody who reads.
	if start != nil {
		if err := start(); err != nil {
			return err
		}
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-s.gone:
			return err
		case ws := <-sizes:
			setWinsize(master, ws)
		case sig := <-signals:
			if raw { // it comes from outside, and the terminal has to be given back
				return exitCode(exitSignal + int(sig))
			}
			if err := init.Signal(sig); err != nil && !errors.Is(err, procid.ErrGone) {
				a.report(err)
			}
		case r := <-done:
			if r.err == nil && !r.complete {
				return fmt.Errorf("the connection to %s's output is cut; the whole of it is in its log (sandboxd logs)", ref)
			}
			return r.err
		}
	}
}

func setWinsize(f *os.File, ws unix.Winsize) {
	rc, err := f.SyscallConn()
	if err == nil {
		// The terminal works with a wrong size too.
		rc.Control(func(fd uintptr) { unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &ws) })
	}
}
