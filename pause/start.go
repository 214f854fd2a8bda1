package pause

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/idrange"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/memexec"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/poller"
)

//go:generate ../internal/launch/build.sh pause.c pause

// Name is the argv[0] of every pause; argv[1] is its mark.
const Name = "sandboxd-pause"

// DefaultShmSize is the size of /dev/shm, in bytes, that container users know.
const DefaultShmSize = 64 << 20

// readyFD is where a pause says that it is ready, as in pause.c.
const readyFD = 3

// startTimeout bounds the wait for a pause that says nothing. It takes a
// millisecond; on a host that thrashes, seconds.
const startTimeout = 30 * time.Second

// Pauser starts pauses. It is safe for concurrent use.
type Pauser struct {
	exe    *memexec.Program
	dir    string
	poller *poller.Poller // of the pauses' ends
}

// Open prepares the starting of pauses. dir is where an executable file is put
// if the host forbids executable memfds; it may be empty.
func Open(dir string) (*Pauser, error) {
	exe, err := memexec.Open(Name, elf, dir)
	if err != nil {
		return nil, err
	}
	po, err := poller.Open()
	if err != nil {
		return nil, errors.Join(err, exe.Close())
	}
	return &Pauser{exe: exe, dir: dir, poller: po}, nil
}

// Close releases the Pauser, after every [Pause] that it made has been closed.
// Pauses that it started go on.
func (p *Pauser) Close() error { return errors.Join(p.poller.Close(), p.exe.Close()) }

// Spec says what a pause is to hold. Files are lent.
type Spec struct {
	Mark  string           // argv[1], by which the process is recognised
	Kinds []namespace.Kind // what to hold; a mount namespace is held beside them
	IDs   *idrange.Range   // maps the ids of a new user namespace; required with [namespace.User]

	ShmSize int64 // bytes; 0 is [DefaultShmSize]

	// CgroupDir is a directory of cgroup v2 in which the process is born. Where
	// there is none, CgroupProcs names the cgroup.procs files to put it into.
	CgroupDir   *os.File
	CgroupProcs []string

	// From are namespaces to join in place of new ones: those of a pause that has
	// died. It must then hold every kind of Kinds; the settings below are there
	// already and are not made again. With mnt among them the sandbox's /dev/shm
	// stays; without, it is a new and empty one, and who has mounted the old one
	// keeps that.
	From map[namespace.Kind]*os.File

	// Ready is called before the process is started, which it is not if that fails, and
	// may set CgroupDir. It is called while nothing is made yet but namespaces that this
	// process alone holds. It may be nil.
	Ready func() error

	Hostname, Domainname string            // of a new uts namespace; empty: as the host's
	Sysctls              map[string]string // of the new namespaces, by dotted name
	Loopback             bool              // bring lo up in a new net namespace
}

// Start starts a pause and returns when it holds its namespaces and these are
// set up. On error nothing is left of it.
func (p *Pauser) Start(ctx context.Context, s *Spec) (*Pause, error) {
	if err := check(s); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()
	start := p.create
	switch {
	case s.From != nil:
		start = p.reanchor
	case s.ahead():
		start = p.createAhead
	}
	pid, pidfd, err := start(s, w)
	if err != nil {
		return nil, err
	}
	w.Close()
	pause, err := p.newPause(pidfd)
	if err != nil {
		return nil, errors.Join(err, abandon(pidfd))
	}
	err = pause.finish(ctx, s, pid, r)
	if err != nil {
		// The caller's context may be what ended it; the process must go anyway.
		kctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
		defer cancel()
		return nil, errors.Join(err, pause.Kill(kctx), pause.Close())
	}
	return pause, nil
}

func check(s *Spec) error {
	switch {
	case s.Mark == "" || strings.ContainsRune(s.Mark, 0):
		return fmt.Errorf("pause: illegal mark %q", s.Mark)
	case s.ShmSize < 0:
		return fmt.Errorf("pause: size of /dev/shm is %d bytes", s.ShmSize)
	case slices.Contains(s.Kinds, namespace.Mnt):
		return errors.New("pause: the mount namespace is not for sharing")
	case s.From == nil && slices.Contains(s.Kinds, namespace.User) && (s.IDs == nil || s.IDs.Size <= 65534):
		return errors.New("pause: a user namespace needs at least 65535 ids")
	}
	for _, k := range s.Kinds {
		if k.Flag() == 0 {
			return fmt.Errorf("pause: unknown namespace type %q", k)
		}
		if s.From != nil && k == namespace.PID {
			return errors.New("pause: a pid namespace cannot outlive its pause")
		}
	}
	if s.From != nil {
		for _, k := range s.Kinds {
			if s.From[k] == nil {
				return fmt.Errorf("pause: no %s namespace to join", k)
			}
		}
	}
	return nil
}

// withMnt are the kinds that a pause with the shared kinds ks has open.
func withMnt(ks []namespace.Kind) []namespace.Kind { return append(slices.Clone(ks), namespace.Mnt) }

// ahead reports whether there are namespaces that can be made before the process
// is. With a user namespace they have to belong to that.
func (s *Spec) ahead() bool { return !slices.Contains(s.Kinds, namespace.User) }

// createAhead makes and sets up the namespaces that a thread can have, then calls
// Ready, and starts the process in them and new ones of the other kinds: they are
// most of what a sandbox costs, and the caller has other things to do meanwhile.
func (p *Pauser) createAhead(s *Spec, ready *os.File) (pid int, pidfd *os.File, err error) {
	if err := s.checkSettings(); err != nil {
		return 0, nil, err
	}
	first, rest := make([]namespace.Kind, 0, 3), []namespace.Kind{namespace.Mnt}
	for _, k := range s.Kinds {
		switch k {
		case namespace.Net, namespace.IPC, namespace.UTS:
			first = append(first, k)
		default:
			rest = append(rest, k)
		}
	}
	err = nsthread.Make(first, func() (err error) {
		err = s.configure()
		if err == nil {
			err = s.ready()
		}
		if err == nil {
			pid, pidfd, err = p.spawn(s, rest, ready)
		}
		return err
	})
	if err != nil && pidfd != nil { // the thread has not come back
		err = errors.Join(err, abandon(pidfd))
		pid, pidfd = 0, nil
	}
	return pid, pidfd, err
}

// abandon kills and reaps a process that was just started, and closes its pidfd.
func abandon(pidfd *os.File) error {
	return errors.Join(unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0), waitPidfd(pidfd), pidfd.Close())
}

func (s *Spec) ready() error {
	if s.Ready == nil {
		return nil
	}
	return s.Ready()
}

// create starts the process in new namespaces.
func (p *Pauser) create(s *Spec, ready *os.File) (int, *os.File, error) {
	if err := s.ready(); err != nil {
		return 0, nil, err
	}
	return p.spawn(s, withMnt(s.Kinds), ready)
}

// spawn starts the process in new namespaces of the kinds.
func (p *Pauser) spawn(s *Spec, kinds []namespace.Kind, ready *os.File) (int, *os.File, error) {
	fd := -1
	sys := &syscall.SysProcAttr{PidFD: &fd, Setsid: true}
	for _, k := range kinds {
		sys.Cloneflags |= k.Flag()
	}
	if slices.Contains(s.Kinds, namespace.User) {
		m := []syscall.SysProcIDMap{{HostID: int(s.IDs.Start), Size: int(s.IDs.Size)}}
		sys.UidMappings, sys.GidMappings = m, m
		sys.GidMappingsEnableSetgroups = true
		sys.Credential = &syscall.Credential{} // root in there, or execve takes its capabilities
	}
	if s.CgroupDir != nil {
		sys.UseCgroupFD = true
		sys.CgroupFD = int(s.CgroupDir.Fd())
	}
	pid, err := p.exe.Start([]string{Name, s.Mark, s.shmOptions()}, nil, memexec.Files{readyFD: ready}, &syscall.ProcAttr{Dir: "/", Sys: sys})
	if err != nil {
		return 0, nil, err
	}
	if fd < 0 { // what syscall does where clone has no CLONE_PIDFD; not on our kernels
		if fd, err = unix.PidfdOpen(pid, 0); err != nil {
			return 0, nil, os.NewSyscallError("pidfd_open", err)
		}
	}
	return pid, os.NewFile(uintptr(fd), "pidfd"), nil
}

// shmOptions are the options of the tmpfs that is /dev/shm.
func (s *Spec) shmOptions() string {
	size := s.ShmSize
	if size == 0 {
		size = DefaultShmSize
	}
	return "mode=1777,size=" + strconv.FormatInt(size, 10)
}

// reanchor starts the process in the namespaces of s.From. A launch program
// does it: this process has threads and cannot join a mnt, user or time namespace.
func (p *Pauser) reanchor(s *Spec, ready *os.File) (int, *os.File, error) {
	if err := s.ready(); err != nil {
		return 0, nil, err
	}
	proc, err := launch.Start(reanchorProgram(s, p.exe.File(), ready), launch.Options{Dir: p.dir, Argv: []string{Name, s.Mark}, Setsid: true})
	if err != nil {
		return 0, nil, fmt.Errorf("join the sandbox's namespaces: %w", err)
	}
	defer proc.Pidfd.Close()
	fd, err := unix.FcntlInt(proc.Pidfd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		if s.CgroupDir != nil {
			err = writePID(s.CgroupDir, proc.PID)
		}
		if err == nil {
			return proc.PID, os.NewFile(uintptr(fd), "pidfd"), nil
		}
		unix.Close(fd)
	}
	err = errors.Join(err, proc.Signal(unix.SIGKILL))
	_, _, werr := proc.Wait()
	return 0, nil, errors.Join(err, werr)
}

func reanchorProgram(s *Spec, exe, ready *os.File) *launch.Program {
	p := new(launch.Program)
	// The user namespace comes last: before, this is root of the host's, and
	// may join whatever it holds.
	for _, k := range []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS, namespace.Cgroup, namespace.Time, namespace.Mnt, namespace.User} {
		if f := s.From[k]; f != nil && slices.Contains(withMnt(s.Kinds), k) {
			p.Call("join the "+string(k)+" namespace", unix.SYS_SETNS, p.File(f), launch.Int(k.Flag()))
		}
	}
	if slices.Contains(s.Kinds, namespace.User) {
		// The ids of the host mean nothing in there, and execve would take the
		// capabilities of an id that is not root's.
		p.Call("leave the host's groups", unix.SYS_SETGROUPS, launch.Int(0), launch.Int(0))
		p.Call("become root's group", unix.SYS_SETRESGID, launch.Int(0), launch.Int(0), launch.Int(0))
		p.Call("become root", unix.SYS_SETRESUID, launch.Int(0), launch.Int(0), launch.Int(0))
	}
	opts := "" // the root of the mount namespace is /dev/shm already
	if s.From[namespace.Mnt] == nil {
		p.Call("make a mount namespace", unix.SYS_UNSHARE, launch.Int(unix.CLONE_NEWNS))
		opts = s.shmOptions()
	}
	// The launcher's status pipe is closed by this, which says that all went well
	// so far; a failing execveat is reported into the pipe that takes its place.
	p.Call("pass the readiness pipe", unix.SYS_DUP3, p.File(ready), launch.Int(readyFD), launch.Int(0))
	p.Call("execute "+Name, unix.SYS_EXECVEAT, p.File(exe), p.String(""),
		p.Strings([]string{Name, s.Mark, opts}), p.Strings(nil), launch.Int(unix.AT_EMPTY_PATH))
	return p
}

func writePID(dir *os.File, pid int) error {
	fd, err := unix.Openat(int(dir.Fd()), "cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir.Name() + "/cgroup.procs", Err: err}
	}
	f := os.NewFile(uintptr(fd), dir.Name()+"/cgroup.procs")
	defer f.Close()
	_, err = f.WriteString(strconv.Itoa(pid))
	return err
}

// steps are what pause.c reports as failed, by number.
var steps = [...]string{
	1:  "make the mounts private",
	2:  "mount tmpfs for /dev/shm",
	3:  "change the directory",
	4:  "pivot_root to /dev/shm",
	5:  "detach the host's mounts",
	6:  "drop the capability bounding set",
	7:  "drop the groups",
	8:  "change the group id",
	9:  "change the user id",
	10: "drop the capabilities",
	11: "set no_new_privs",
	12: "become non-dumpable",
	13: "ignore signals",
}

// failureSize is the size of struct failure in pause.c.
const failureSize = 8

// readReady reads what a pause says of its start.
func readReady(r io.Reader) error {
	b := make([]byte, launch.ReportSize)
	n, err := io.ReadFull(r, b)
	switch {
	case n == 1:
		return nil
	case n == failureSize:
		step, errno := binary.LittleEndian.Uint32(b), unix.Errno(binary.LittleEndian.Uint32(b[4:]))
		if int(step) < len(steps) && steps[step] != "" {
			return fmt.Errorf("pause: %s: %w", steps[step], errno)
		}
		return fmt.Errorf("pause: step %d: %w", step, errno)
	case n == launch.ReportSize:
		return fmt.Errorf("execute %s: %w", Name, unix.Errno(binary.LittleEndian.Uint32(b[8:])))
	case n == 0 && err == io.EOF:
		return errors.New("pause: ended before it was ready")
	case err == nil || err == io.ErrUnexpectedEOF:
		return fmt.Errorf("pause: said %d bytes at its start", n)
	}
	return fmt.Errorf("pause: wait for it: %w", err)
}
