package member

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/procid"
)

// The exit codes that are not the command's own.
const (
	ExitFailed        = 125 // the command was not reached
	ExitNotExecutable = 126
	ExitNotFound      = 127
)

// drainTime is how long output is waited for when its process has ended. It is
// the monitor's too.
const drainTime = 2 * time.Second

// Command runs a launch program in the foreground, as exec and join do.
type Command struct {
	Program *launch.Program // of [CompileJoin]
	Dir     string          // as in [launch.Options]
	Argv    []string        // likewise

	Launcher *launch.Launcher // likewise

	// Without a terminal these become the process's own. nil is /dev/null. A
	// value that is an [*os.File] is given to the process itself and nothing is
	// copied. With a terminal, Stdin is copied to it and it to Stdout; the
	// caller has put its own terminal into raw mode.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool

	// Signals are sent to the process as they come.
	Signals <-chan unix.Signal
	// Sizes of the terminal are set as they come, the first before the process
	// begins.
	Sizes <-chan unix.Winsize
}

// Run runs the command and returns its exit code, or 128 and the number of the
// signal that ended it. With an error, the code says how far it came:
// [ExitNotFound] and [ExitNotExecutable] are about the command, [ExitFailed] is
// about everything else. When ctx ends the process is killed.
//
// A Stdin that is no file is read until it ends or the next read after the
// process's end returns; Run does not wait for it.
func (c *Command) Run(ctx context.Context) (code int, err error) {
	if err := ctx.Err(); err != nil {
		return ExitFailed, err
	}
	var o launch.Options
	o.Dir, o.Argv, o.Launcher = c.Dir, c.Argv, c.Launcher
	var theirs []*os.File // the process's ends of pipes
	var ours []*os.File   // the other ends of those of its output
	var copying sync.WaitGroup
	defer func() { closeFiles(theirs) }()
	var master *os.File

	if c.TTY {
		o.Created = func(pid int) error {
			var err error
			if master, err = fetchMaster(pid); err != nil {
				return err
			}
			select {
			case ws, ok := <-c.Sizes:
				if ok {
					return setSize(master, ws)
				}
			default:
			}
			return nil
		}
	} else {
		if o.Stdin, err = c.input(&theirs); err != nil {
			return ExitFailed, err
		}
		for _, out := range []struct {
			w io.Writer
			f **os.File
		}{{c.Stdout, &o.Stdout}, {c.Stderr, &o.Stderr}} {
			if *out.f, err = output(out.w, &theirs, &ours, &copying); err != nil {
				return ExitFailed, err
			}
		}
	}

	proc, err := launch.Start(c.Program, o)
	closeFiles(theirs)
	theirs = nil
	if err != nil {
		if master != nil {
			master.Close()
		}
		copying.Wait()
		return explainStart(err)
	}
	if master != nil {
		defer master.Close()
		copying.Go(func() { io.Copy(discardIfNil(c.Stdout), master) }) // EIO at the end
		if c.Stdin != nil {
			go io.Copy(master, c.Stdin)
		}
	}

	ended, watching := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watching)
		c.watch(ctx, proc, master, ended)
	}()
	waitErr := waitUnreaped(proc.Pidfd)
	close(ended)
	<-watching
	st, _, err := proc.Wait()
	err = errors.Join(waitErr, err)
	// A child in the background may keep the pipes open for as long as it likes.
	for _, f := range ours {
		f.SetReadDeadline(time.Now().Add(drainTime))
	}
	copying.Wait()
	switch {
	case err != nil:
		return ExitFailed, err
	case ctx.Err() != nil:
		return ExitFailed, ctx.Err()
	case st.Signaled():
		return 128 + int(st.Signal()), nil
	}
	return st.ExitStatus(), nil
}

// waitUnreaped waits for the end of a child and leaves it to be reaped: what
// reaps it closes its pidfd, which signals are still being sent by.
func waitUnreaped(pidfd *os.File) error {
	fd := int(pidfd.Fd())
	for {
		err := unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("waitid", err)
		}
	}
}

// watch does what has to be done while proc runs.
func (c *Command) watch(ctx context.Context, proc *launch.Process, master *os.File, ended <-chan struct{}) {
	signals, sizes, cancelled := c.Signals, c.Sizes, ctx.Done()
	for {
		select {
		case <-ended:
			return
		case <-cancelled:
			cancelled = nil
			proc.Signal(unix.SIGKILL) // ESRCH: it has ended
		case sig, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			proc.Signal(sig)
		case ws, ok := <-sizes:
			if !ok {
				sizes = nil
			} else if master != nil {
				setSize(master, ws)
			}
		}
	}
}

func (c *Command) input(theirs *[]*os.File) (*os.File, error) {
	if f, ok := c.Stdin.(*os.File); ok || c.Stdin == nil {
		return f, nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	*theirs = append(*theirs, r)
	go func() {
		io.Copy(w, c.Stdin) // EPIPE when the process reads no more
		w.Close()
	}()
	return r, nil
}

func output(to io.Writer, theirs, ours *[]*os.File, copying *sync.WaitGroup) (*os.File, error) {
	if f, ok := to.(*os.File); ok || to == nil {
		return f, nil
	}
	// Only our end is for the runtime's poller.
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	if _, err := unix.FcntlInt(uintptr(fds[0]), unix.F_SETFL, unix.O_NONBLOCK); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, os.NewSyscallError("fcntl F_SETFL", err)
	}
	r, w := os.NewFile(uintptr(fds[0]), "|0"), os.NewFile(uintptr(fds[1]), "|1")
	*theirs, *ours = append(*theirs, w), append(*ours, r)
	copying.Go(func() {
		defer r.Close()
		io.Copy(to, r)
	})
	return w, nil
}

func discardIfNil(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

func closeFiles(fs []*os.File) {
	for _, f := range fs {
		f.Close()
	}
}

// fetchMaster takes the terminal's master from a created child.
func fetchMaster(pid int) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(pid, 0) // a child that is not reaped: the pid is its
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, launch.MasterFD, 0)
	if err != nil {
		return nil, fmt.Errorf("take the terminal of the process: %w", os.NewSyscallError("pidfd_getfd", err))
	}
	// Non-blocking, so that a read ends when the file is closed.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "terminal"), nil
}

func setSize(tty *os.File, ws unix.Winsize) error {
	rc, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &ws) })
	return errors.Join(cerr, os.NewSyscallError("ioctl TIOCSWINSZ", err))
}

// explainStart gives the exit code of a program that did not reach its command.
func explainStart(err error) (int, error) {
	var step *launch.StepError
	switch {
	case !errors.As(err, &step):
	case step.Step == enterPID && step.Errno == unix.ENOMEM:
		err = fmt.Errorf("%w: its first process has exited", ErrDeadPID)
	case strings.HasPrefix(step.Step, joinStep) && step.Errno == unix.ESRCH:
		err = procid.ErrGone
	case step.Command && (step.Errno == unix.ENOENT || step.Errno == unix.ENOTDIR):
		return ExitNotFound, err
	case step.Command:
		return ExitNotExecutable, err
	}
	return ExitFailed, err
}
