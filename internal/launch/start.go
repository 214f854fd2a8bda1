package launch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/memexec"
)

//go:generate ./build.sh launch.c launch

// Report kinds, as in launch.h.
const (
	ReportPID     = 1
	ReportCreated = 2
	ReportFailed  = 3
)

// ReportSize is the size of one report on the status pipe.
const ReportSize = 12

// Created adds the report that everything but the execve is done, and the wait
// for one byte or more (an eventfd's eight) on [StartFD]. It is how a member is
// created now and started later.
func (p *Program) Created() {
	p.created, p.waits = len(p.ops), true
	for i := range p.ops { // who is told of it must know the process
		if o := &p.ops[i]; o.nr == nrFork {
			o.arg[2] = 1
		}
	}
	b := make([]byte, 16)
	binary.LittleEndian.PutUint32(b, ReportCreated)
	buf := p.Bytes(b)
	p.Call("report that the process is created", unix.SYS_WRITE, Int(StatusFD), buf, Int(ReportSize))
	p.Call("wait for the start", unix.SYS_READ, Int(StartFD), buf, Int(8))
}

// Exec adds the end of a program. paths are tried in order; the first that
// exists and may be executed is.
func (p *Program) Exec(paths, argv, env []string) {
	a, e := p.Strings(argv), p.Strings(env)
	for i, path := range paths {
		o := p.Call("execute "+path, unix.SYS_EXECVE, p.String(path), a, e)
		if i < len(paths)-1 {
			o.Ignore(unix.ENOENT, unix.ENOTDIR, unix.EACCES)
		} else if len(paths) > 1 {
			p.ops[o.i].step = fmt.Sprintf("execute %s from $PATH", argv[0])
		}
	}
}

// Process is a process that was started by a launch program and is a child of
// this process.
type Process struct {
	PID   int
	Pidfd *os.File // the caller closes it by calling Wait

	waitOnce sync.Once
	status   unix.WaitStatus
	rusage   unix.Rusage
	waitErr  error
}

// Options are what [Start] needs beside the program. The files are lent.
type Options struct {
	Stdin, Stdout, Stderr *os.File  // nil is /dev/null
	Dir                   string    // where an executable file is put if memfds cannot be executed
	Launcher              *Launcher // nil: one is made for this start
	Argv                  []string  // of the launcher, by which it is recognised; nil is "sandboxd-launch"
	Setsid                bool
	// Created, if not nil, is called when the program has reported that the
	// process is created and waits; it is then started. pid is the process's.
	Created func(pid int) error
}

// Launcher is the program that runs launch programs, kept ready for many starts.
type Launcher struct {
	exe  *memexec.Program
	null *os.File
}

// Open makes a Launcher. dir is where an executable file is put if memfds cannot
// be executed. The caller closes it.
func Open(dir string) (*Launcher, error) {
	exe, err := memexec.Open("sandboxd-launch", elf, dir)
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		exe.Close()
		return nil, err
	}
	return &Launcher{exe, null}, nil
}

// Close releases the program. Processes that run it are not affected.
func (l *Launcher) Close() error { return errors.Join(l.exe.Close(), l.null.Close()) }

// pipe is [os.Pipe] without what it takes to wait for either end in the runtime's
// poller: what is read here comes at once.
func pipe() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	return os.NewFile(uintptr(fds[0]), "|0"), os.NewFile(uintptr(fds[1]), "|1"), nil
}

// Start runs p and returns when its execve has succeeded. If a call fails, the
// error is a [*StepError] and no process is left.
func Start(p *Program, o Options) (*Process, error) {
	l := o.Launcher
	if l == nil {
		var err error
		if l, err = Open(o.Dir); err != nil {
			return nil, err
		}
		defer l.Close()
	}
	prog, err := p.Memfd(nil)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	statusR, statusW, err := pipe()
	if err != nil {
		return nil, err
	}
	defer statusR.Close()
	defer statusW.Close()
	files := memexec.Files{StatusFD: statusW, 5: prog}
	var startR, startW *os.File
	if p.waits {
		if startR, startW, err = pipe(); err != nil {
			return nil, err
		}
		defer startR.Close()
		defer startW.Close()
		files[StartFD] = startR
	}
	for i, f := range []*os.File{o.Stdin, o.Stdout, o.Stderr} {
		if files[i] = f; f == nil {
			files[i] = l.null
		}
	}
	for i, f := range p.files {
		files[FirstFD+i] = f
	}
	argv := o.Argv
	if argv == nil {
		argv = []string{"sandboxd-launch"}
	}
	pid, err := l.exe.Start(argv, nil, files, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: o.Setsid}})
	if err != nil {
		return nil, err
	}
	statusW.Close()
	startR.Close()

	first := pid
	fail := func(err error) (*Process, error) {
		for _, n := range []int{first, pid} {
			unix.Kill(n, unix.SIGKILL) // not reaped yet, so it is still ours
			if n == pid && first == pid {
				wait4(n, nil, nil)
				break
			}
			wait4(n, nil, nil)
		}
		return nil, err
	}
	var failed error // the pid of who failed may still be to come
	for {
		kind, op, value, err := ReadReport(statusR)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fail(fmt.Errorf("%w: %w", ErrLaunch, err))
		}
		switch kind {
		case ReportPID:
			pid = int(value)
		case ReportCreated:
			if o.Created != nil {
				if err := o.Created(pid); err != nil {
					return fail(err)
				}
			}
			if _, err := startW.Write(make([]byte, 8)); err != nil {
				return fail(fmt.Errorf("%w: %w", ErrLaunch, err))
			}
		case ReportFailed:
			failed = p.Explain(int(op), unix.Errno(value))
		}
	}
	if failed != nil {
		return fail(failed)
	}
	if first != pid { // the one that forked has said so and exits
		wait4(first, nil, nil)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fail(os.NewSyscallError("pidfd_open", err))
	}
	return &Process{PID: pid, Pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// ReadReport reads one report from a status pipe. It returns io.EOF when the
// child has executed its command, or is gone without a word.
func ReadReport(r io.Reader) (kind, op uint32, value int32, err error) {
	var b [ReportSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, 0, 0, err
	}
	le := binary.LittleEndian
	return le.Uint32(b[:]), le.Uint32(b[4:]), int32(le.Uint32(b[8:])), nil
}

// Wait waits for the process's end and returns its status. It may be called
// several times and from several goroutines.
func (p *Process) Wait() (unix.WaitStatus, unix.Rusage, error) {
	p.waitOnce.Do(func() {
		p.waitErr = wait4(p.PID, &p.status, &p.rusage)
		p.Pidfd.Close()
	})
	return p.status, p.rusage, p.waitErr
}

// Signal sends a signal to the process if it has not been waited for.
func (p *Process) Signal(sig unix.Signal) error {
	return os.NewSyscallError("pidfd_send_signal", unix.PidfdSendSignal(int(p.Pidfd.Fd()), sig, nil, 0))
}

func wait4(pid int, st *unix.WaitStatus, ru *unix.Rusage) error {
	for {
		_, err := unix.Wait4(pid, st, 0, ru)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("wait4", err)
		}
	}
}
