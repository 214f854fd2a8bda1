package member

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
)

// Attachment receives what a member's init writes from now on. It is one
// reader's. A reader that is too slow is cut off: init does not wait for it.
type Attachment struct {
	conn  *os.File
	buf   []byte
	first *Event // the next one, if it has been received already
	begin *Position
}

// Position is a place in a member's output, and in its log.
type Position struct {
	Bytes    [2]uint64 // of stdout, or the terminal, and of stderr that come before it
	Unlogged [2]uint64 // of these, what is not in the log yet: an unfinished line
	Log      int64     // the log's size
}

// Begin is where this attachment begins: the first output that it receives
// comes next. It is nil if the monitor is of a version that does not tell.
func (a *Attachment) Begin() *Position { return a.begin }

// Event is something that an [Attachment] receives: output, or a phase.
type Event struct {
	Stream int    // 1 stdout or the terminal, 2 stderr, 0 if it is a phase
	Data   []byte // as init wrote it, also half a line; valid until the next call of Next
	Phase  Phase  // if Stream is 0
}

// Attach attaches to the member in dir and returns when it is: what init writes
// in answer to something it is sent afterwards is received. It fails with
// [procid.ErrGone] if there is no monitor any more. The first event is the
// present phase. The caller closes the result.
func Attach(dir string) (*Attachment, error) {
	d, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	conn, err := connect(d, true)
	if err != nil {
		return nil, err
	}
	a := &Attachment{conn: conn, buf: make([]byte, 1+outputMax)}
	if err = a.send('a'); err == nil {
		// The monitor tells the phase when it has put this one on its list.
		var e Event
		if e, err = a.Next(); err == io.EOF {
			err = fmt.Errorf("attach: %w", procid.ErrGone)
		}
		a.first = &e
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return a, nil
}

// outputMax is the most that a monitor reads, and sends, at once.
const outputMax = 16 << 10

// Next waits for the next event. It returns io.EOF when the monitor has ended
// or has cut this attachment off, and [os.ErrClosed] after Close.
func (a *Attachment) Next() (Event, error) {
	if e := a.first; e != nil {
		a.first = nil
		return *e, nil
	}
	for {
		n, err := a.conn.Read(a.buf)
		if errors.Is(err, unix.ECONNRESET) {
			err = io.EOF
		}
		if err != nil {
			return Event{}, err
		}
		switch kind, arg := a.buf[0], a.buf[1:n]; {
		case kind == '1' || kind == '2':
			return Event{Stream: int(kind - '0'), Data: arg}, nil
		case kind == 'p' && len(arg) == 4:
			return Event{Phase: Phase(binary.LittleEndian.Uint32(arg))}, nil
		case kind == 'o' && len(arg) == 40:
			u64 := func(i int) uint64 { return binary.LittleEndian.Uint64(arg[8*i:]) }
			p := &Position{Bytes: [2]uint64{u64(0), u64(1)}, Unlogged: [2]uint64{u64(2), u64(3)}, Log: int64(u64(4))}
			if p.Log >= 0 { // else it has no log that has a size
				a.begin = p
			}
		}
	}
}

// CloseStdin is [Monitor.CloseStdin], but does not wait for it to be done.
func (a *Attachment) CloseStdin() error { return a.send('c') }

// Close ends the attachment, and a Next that waits.
func (a *Attachment) Close() error { return a.conn.Close() }

func (a *Attachment) send(kind byte) error {
	_, err := a.conn.Write([]byte{kind})
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("attach: %w", procid.ErrGone)
	}
	return err
}

// OpenStdin opens the standard input of the member in dir for writing. It fails
// with [procid.ErrGone] if nobody reads it.
func OpenStdin(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, stdinName), os.O_WRONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("open stdin: %w", procid.ErrGone)
	}
	return f, err
}

// Master returns a duplicate of the master of the member's terminal. It is
// non-blocking. The caller closes it.
func Master(monitor procid.ID) (*os.File, error) {
	pidfd, err := monitor.Open()
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()
	fd, err := unix.PidfdGetfd(int(pidfd.Fd()), monitorMaster, 0)
	if errors.Is(err, unix.ESRCH) {
		err = procid.ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("get terminal from monitor %v: %w", monitor, err)
	}
	return os.NewFile(uintptr(fd), "terminal"), nil
}

// RootPath is a path to the root of a member in custody. It means something as
// long as the monitor lives.
func RootPath(monitorPID int) string { return monitorFD(monitorPID, monitorRoot) }

// NamespacePath is a path to one of the namespaces of a member in custody.
func NamespacePath(monitorPID int, k namespace.Kind) string {
	return monitorFD(monitorPID, monitorNS+k.Index())
}

// OpenRoot opens the root of a member in custody, as O_PATH. It fails with
// [procid.ErrGone] if the monitor has ended. The caller closes the result.
func OpenRoot(monitor procid.ID) (*os.File, error) {
	return openHeld(monitor, RootPath(monitor.PID), unix.O_PATH|unix.O_DIRECTORY)
}

// OpenInitRoot opens the root of a running member without its monitor, as O_PATH. It
// fails with [procid.ErrGone] if init has ended. The caller closes the result.
func OpenInitRoot(init procid.ID) (*os.File, error) {
	return openHeld(init, fmt.Sprintf("/proc/%d/root", init.PID), unix.O_PATH|unix.O_DIRECTORY)
}

// RootHeld reports whether [OpenRoot] would open something.
func RootHeld(monitor procid.ID) bool {
	f, err := OpenRoot(monitor)
	if err == nil {
		f.Close()
	}
	return err == nil
}

// OpenNamespace opens one of the namespaces of a member in custody, for
// setns(2). It fails with [procid.ErrGone] if the monitor has ended, and with
// [os.ErrNotExist] if the kernel has no namespaces of that kind. The caller
// closes the result.
func OpenNamespace(monitor procid.ID, k namespace.Kind) (*os.File, error) {
	if k.Index() < 0 {
		return nil, fmt.Errorf("unknown namespace type %q", k)
	}
	return openHeld(monitor, NamespacePath(monitor.PID, k), unix.O_RDONLY)
}

// openHeld opens a path that leads through a process in /proc, and makes sure
// afterwards that it was that process.
func openHeld(by procid.ID, path string, flags int) (*os.File, error) {
	pidfd, err := by.Open()
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		if !by.Alive() { // a zombie has none
			return nil, fmt.Errorf("process %v: %w", by, procid.ErrGone)
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.PidfdSendSignal(int(pidfd.Fd()), 0, nil, 0); errors.Is(err, unix.ESRCH) {
		unix.Close(fd)
		return nil, fmt.Errorf("process %v: %w", by, procid.ErrGone)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func monitorFD(pid, fd int) string {
	return "/proc/" + strconv.Itoa(pid) + "/fd/" + strconv.Itoa(fd)
}
