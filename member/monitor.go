package member

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/memexec"
	"github.com/sandboxd/sandboxd/internal/poller"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
)

//go:generate ../internal/launch/build.sh monitor.c monitor

// Names in a member's directory.
const (
	stdinName  = "stdin"
	stdoutName = "stdout"
	stderrName = "stderr"
	socketName = "monitor.sock"
)

// Descriptor numbers in a monitor, as in monitor.c.
const (
	monitorConfig = 3
	monitorStatus = 4
	monitorDir    = 5
	monitorListen = 6
	monitorStdin  = 7
	monitorStdout = 8
	monitorStderr = 9
	monitorMemory = 10
	monitorInit   = 11
	monitorMaster = 12
	monitorRoot   = 16
	monitorNS     = 17 // plus the kind's index
)

// Monitors starts monitors. It is safe for concurrent use.
type Monitors struct {
	exe    *memexec.Program
	poller *poller.Poller // of the connections
}

// OpenMonitors makes the monitor program ready. fallbackDir is for hosts that
// forbid executable memfds; see [memexec.Open].
func OpenMonitors(fallbackDir string) (*Monitors, error) {
	exe, err := memexec.Open("sandboxd-monitor", monitorELF, fallbackDir)
	if err != nil {
		return nil, err
	}
	po, err := poller.Open()
	if err != nil {
		return nil, errors.Join(err, exe.Close())
	}
	return &Monitors{exe, po}, nil
}

// Close releases the program, after every [Monitor] has been closed. Monitors
// that run are not affected.
func (m *Monitors) Close() error { return errors.Join(m.poller.Close(), m.exe.Close()) }

// MonitorSpec says what a monitor is to do.
type MonitorSpec struct {
	Mark        string // argv[1], by which the process is recognised
	Dir         string // the member's state directory, which exists
	LogPath     string // absolute
	LogMaxBytes int64  // output beyond it is read and dropped; 0 means no limit
	TTY, Stdin  bool
	Run         bool            // init executes its command as soon as it is created; else it waits for [Monitor.Start]
	Custody     request.Custody // "" means always
	OOMFile     string          // memory.events or memory.oom_control of the member's cgroup, or ""

	// CgroupDir is the cgroup v2 directory that the monitor starts in, or nil.
	// CgroupProcs are files that its pid is written to, for cgroup v1.
	CgroupDir   *os.File
	CgroupProcs []string

	// Ready is called when all else is prepared, and nothing is started if it
	// fails. OOMFile need not be there before. It may be nil.
	Ready func() error

	// Program makes init's program. The files are init's ends of its standard
	// streams; they are nil for a terminal. They are lent until Start returns.
	Program func(stdin, stdout, stderr *os.File) (*launch.Program, error)
}

// AdoptSpec is what a monitor needs that takes the place of one that was
// killed. Program is not used.
type AdoptSpec struct {
	MonitorSpec
	Init   procid.ID
	Master *os.File // the terminal's master, if the member has a terminal; lent; nil if it is lost, and all output with it
}

// Start starts a monitor and returns when its init is created: all of its
// program is done but the execve. With Run it returns when that has succeeded.
//
// The error is a [*launch.StepError] if a call of the program failed. On error
// no process is left that the program had not moved into a session of its own
// before it was reported; those are in the member's cgroup, which the caller
// kills.
func (m *Monitors) Start(ctx context.Context, spec MonitorSpec) (*Monitor, error) {
	var fs files
	defer fs.close()
	inits, err := fs.streams(&spec, true)
	if err != nil {
		return nil, err
	}
	prog, err := spec.Program(inits[0], inits[1], inits[2])
	if err != nil {
		return nil, err
	}
	size, err := prog.Size()
	if err != nil {
		return nil, err
	}
	prefix, err := spec.config(0, procid.ID{}, size)
	if err != nil {
		return nil, err
	}
	config, err := prog.Memfd(prefix)
	fs.own(monitorConfig, config)
	if err != nil {
		return nil, err
	}
	for i, f := range prog.Files() {
		fs.child[launch.FirstFD+i] = f
	}
	mon, err := m.start(ctx, &spec, &fs, true)
	if err != nil {
		return nil, err
	}
	until := PhaseRunning
	if !spec.Run {
		until = PhaseCreated
		mon.mu.Lock()
		mon.explain = prog.ExplainStart()
		mon.mu.Unlock()
	}
	err = mon.await(ctx, func(p Phase) bool { return p >= until })
	if err == nil || errors.Is(err, procid.ErrGone) {
		var st Status
		if st, err = ReadStatus(spec.Dir); err == nil {
			err = explainFailure(st, prog, &spec)
		}
		if err == nil {
			// It may have ended already: that is the caller's to find.
			mon.init = st.Init
			return mon, nil
		}
	}
	mon.kill()
	return nil, err
}

// Adopt starts a monitor for an init whose monitor was killed. init goes on
// undisturbed, and its end is recorded if anybody can know it.
func (m *Monitors) Adopt(ctx context.Context, spec AdoptSpec) (*Monitor, error) {
	var fs files
	defer fs.close()
	before, err := ReadStatus(spec.Dir)
	if err != nil {
		return nil, fmt.Errorf("adopt init %v: %w", spec.Init, err)
	}
	spec.Stdin = spec.Stdin && !before.StdinClosed // else its end would be taken back
	if _, err := fs.streams(&spec.MonitorSpec, false); err != nil {
		return nil, err
	}
	pidfd, err := spec.Init.Open()
	if err != nil {
		return nil, fmt.Errorf("adopt init %v: %w", spec.Init, err)
	}
	fs.own(monitorInit, pidfd)
	if spec.TTY {
		fs.child[monitorMaster] = spec.Master
		if spec.Master == nil {
			// It cannot be had again: the terminal has hung up. The end of a pipe
			// that nobody writes to is as one of which nothing comes any more.
			end, other, err := os.Pipe()
			if err != nil {
				return nil, fmt.Errorf("adopt init %v: %w", spec.Init, err)
			}
			other.Close()
			fs.own(monitorMaster, end)
		}
	}
	prefix, err := spec.config(configAdopt, spec.Init, 0)
	if err != nil {
		return nil, err
	}
	config, err := configFile(prefix)
	fs.own(monitorConfig, config)
	if err != nil {
		return nil, err
	}
	mon, err := m.start(ctx, &spec.MonitorSpec, &fs, false)
	if err != nil {
		return nil, err
	}
	mon.init = spec.Init
	if err := mon.await(ctx, func(p Phase) bool { return p != PhaseNone && p != PhaseFailed }); err != nil {
		mon.killAlone()
		return nil, fmt.Errorf("adopt init %v: %w", spec.Init, err)
	}
	return mon, nil
}

// start starts the program with what fs holds and what each monitor has, and
// connects to it.
func (m *Monitors) start(ctx context.Context, spec *MonitorSpec, fs *files, fresh bool) (_ *Monitor, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := openDir(spec.Dir)
	fs.own(monitorDir, dir)
	if err != nil {
		return nil, err
	}
	flags := os.O_RDWR
	if fresh {
		flags |= os.O_CREATE | os.O_TRUNC
	}
	status, err := os.OpenFile(filepath.Join(spec.Dir, statusName), flags, 0o600)
	fs.own(monitorStatus, status)
	if err == nil && fresh {
		// Not by making it longer: the monitor maps it, and would be killed by
		// SIGBUS at its first store if the file system is full by then.
		_, err = status.Write(make([]byte, statusSize))
	}
	if err != nil {
		return nil, fmt.Errorf("make status page: %w", err)
	}
	listener, err := listen(dir)
	fs.own(monitorListen, listener)
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	fs.child[0], fs.child[1], fs.child[2] = null, null, null
	// The socket takes the connection and what is sent before anybody accepts it.
	conn, err := connect(dir, false)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte{'w'}); err != nil {
		conn.Close()
		return nil, fmt.Errorf("watch monitor: %w", err)
	}
	if spec.Ready != nil {
		err = spec.Ready()
	}
	if err == nil && spec.OOMFile != "" {
		var f *os.File
		f, err = os.Open(spec.OOMFile)
		fs.own(monitorMemory, f)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	sys := &syscall.SysProcAttr{Setsid: true}
	if spec.CgroupDir != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(spec.CgroupDir.Fd())
	}
	pid, err := m.exe.Start([]string{"sandboxd-monitor", spec.Mark}, nil, fs.child, &syscall.ProcAttr{Sys: sys})
	if err != nil {
		conn.Close()
		return nil, err
	}
	fs.close() // the socket's end is the monitor's end only if nobody else has it
	mon := &Monitor{dir: spec.Dir, child: true}
	if mon.id, err = procid.Of(pid); err != nil {
		mon.id = procid.ID{PID: pid} // enough to end it
	}
	if rerr := mon.run(m.poller, conn); err == nil {
		err = rerr
	}
	for _, path := range spec.CgroupProcs {
		if err == nil {
			err = os.WriteFile(path, []byte(strconv.Itoa(pid)), 0)
		}
	}
	if err != nil {
		if fresh {
			mon.kill()
		} else {
			mon.killAlone()
		}
		return nil, fmt.Errorf("start monitor: %w", err)
	}
	return mon, nil
}

// explainFailure makes an error of why init could not be created, or if it is to
// run why it does not; nil if that is so, or was.
func explainFailure(st Status, prog *launch.Program, spec *MonitorSpec) error {
	switch {
	case st.Phase == PhaseNone:
		return fmt.Errorf("%w: monitor ended in phase %v", launch.ErrLaunch, st.Phase)
	case st.Phase == PhaseFailed:
	case spec.Run && st.ExecFailed:
		return prog.Explain(st.FailOp, st.FailErrno)
	case spec.Run && st.StartedAt.IsZero():
		return fmt.Errorf("%w: init or its monitor was killed before it could execute its command", launch.ErrLaunch)
	default:
		return nil
	}
	switch st.FailOp {
	case failKilled:
		if st.OOMKills > 0 {
			return fmt.Errorf("%w: init was killed for memory before it could start: the memory limit is below what init needs to start", launch.ErrLaunch)
		}
		if sig := st.WaitStatus.Signal(); st.WaitStatus.Signaled() {
			why := ""
			if sig == unix.SIGSYS || sig == unix.SIGILL || sig == unix.SIGTRAP { // the latter two: sys_exit in sys.h
				why = ": does its seccomp filter allow what it takes to be executed, and to exit?"
			}
			return fmt.Errorf("%w: init was killed by signal %d before it could start%s", launch.ErrLaunch, sig, why)
		}
		return fmt.Errorf("%w: init exited with %d before it could start", launch.ErrLaunch, st.WaitStatus.ExitStatus())
	case failLog:
		return &launch.StepError{Step: "open log " + spec.LogPath, Errno: st.FailErrno}
	case failConfig:
		return &launch.StepError{Step: "read the monitor's configuration and launch program", Errno: st.FailErrno}
	case failSetup:
		return &launch.StepError{Step: "set up the monitor", Errno: st.FailErrno}
	case failCustody:
		return &launch.StepError{Step: "take custody of init's root, namespaces and terminal", Errno: st.FailErrno}
	}
	return prog.Explain(st.FailOp, st.FailErrno)
}

// files are the files that a monitor is given.
type files struct {
	child memexec.Files
	mine  []*os.File // closed at the end
}

func (fs *files) own(n int, f *os.File) {
	if fs.child == nil {
		fs.child = memexec.Files{}
	}
	if f != nil {
		fs.mine = append(fs.mine, f)
		if n >= 0 {
			fs.child[n] = f
		}
	}
}

func (fs *files) close() {
	for _, f := range fs.mine {
		f.Close()
	}
	fs.mine = nil
}

// streams makes, if fresh, and opens the FIFOs of spec's member. It returns
// init's ends.
func (fs *files) streams(spec *MonitorSpec, fresh bool) (inits [3]*os.File, err error) {
	open := func(n int, name string, flags int) *os.File {
		if err != nil {
			return nil
		}
		var fd int
		path := filepath.Join(spec.Dir, name)
		// As plain descriptors: os.OpenFile would put a FIFO into the poller
		// and make init's end non-blocking.
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err != nil {
			err = fmt.Errorf("open %s: %w", path, err)
			return nil
		}
		f := os.NewFile(uintptr(fd), path)
		fs.own(n, f)
		return f
	}
	fifo := func(name string) {
		if err == nil && fresh {
			err = makeFIFO(filepath.Join(spec.Dir, name))
		}
	}
	const reader, both = unix.O_RDONLY | unix.O_NONBLOCK, unix.O_RDWR
	if spec.Stdin {
		fifo(stdinName)
		open(monitorStdin, stdinName, both)
		if !spec.TTY && fresh {
			inits[0] = open(-1, stdinName, unix.O_RDONLY)
		}
	} else if !spec.TTY && fresh && err == nil {
		if inits[0], err = os.Open(os.DevNull); err == nil {
			fs.own(-1, inits[0])
		}
	}
	if !spec.TTY {
		fifo(stdoutName)
		fifo(stderrName)
		open(monitorStdout, stdoutName, reader)
		open(monitorStderr, stderrName, reader)
		if fresh {
			inits[1] = open(-1, stdoutName, both)
			inits[2] = open(-1, stderrName, both)
		}
	}
	return inits, err
}

// fifoMode lets a member that has changed its uid open /dev/stdout, which is
// the FIFO. Nobody else can reach it: the state directory is root's.
const fifoMode = 0o622

func makeFIFO(path string) error {
	if err := unix.Mkfifo(path, fifoMode); err != nil {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	return os.Chmod(path, fifoMode) // whatever the umask is
}

// Flags and layout of the configuration, as in monitor.h.
const (
	configMagic   = 0x434d4253
	configVersion = 1
	configSize    = 48
	configTTY     = 1
	configAdopt   = 2
	configStdin   = 4
	configRun     = 8
	logPathMax    = 4096
)

// config encodes what goes before the launch program.
func (s *MonitorSpec) config(flags uint32, init procid.ID, programLen int) ([]byte, error) {
	if !filepath.IsAbs(s.LogPath) || strings.ContainsRune(s.LogPath, 0) || len(s.LogPath) >= logPathMax {
		return nil, fmt.Errorf("log path %.100q is not an absolute path of less than %d bytes", s.LogPath, logPathMax)
	}
	if s.LogMaxBytes < 0 {
		return nil, fmt.Errorf("log limit of %d bytes", s.LogMaxBytes)
	}
	if s.TTY {
		flags |= configTTY
	}
	if s.Stdin {
		flags |= configStdin
	}
	if s.Run {
		flags |= configRun
	}
	var custody uint32
	switch s.Custody {
	case request.CustodyAlways, "":
	case request.CustodyFailure:
		custody = 1
	case request.CustodyNever:
		custody = 2
	default:
		return nil, fmt.Errorf("unknown custody policy %q", s.Custody)
	}
	size := (configSize + len(s.LogPath) + 1 + 15) &^ 15
	b := make([]byte, 0, size)
	for _, n := range []uint32{
		configMagic, configVersion, flags, custody,
		uint32(len(s.LogPath) + 1), uint32(size), uint32(programLen), uint32(init.PID),
	} {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(s.LogMaxBytes))
	b = binary.LittleEndian.AppendUint64(b, init.Start)
	b = append(b, s.LogPath...)
	return b[:size], nil
}

// configFile returns a file with b, which the caller closes.
func configFile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("monitor-config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "monitor-config")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func openDir(dir string) (*os.File, error) {
	return os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// socketAddr goes through /proc, because a path in a socket address has at most
// 107 bytes (unix(7)).
func socketAddr(dir *os.File) *unix.SockaddrUnix {
	return &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socketName)}
}

func listen(dir *os.File) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	l := os.NewFile(uintptr(fd), socketName)
	if err = unix.Unlinkat(int(dir.Fd()), socketName, 0); errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if err == nil {
		// The mode that the socket is made with is the descriptor's less umask.
		if err = unix.Fchmod(fd, 0o600); err == nil {
			err = unix.Bind(fd, socketAddr(dir))
		}
	}
	if err == nil {
		err = unix.Listen(fd, 16)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s/%s: %w", dir.Name(), socketName, err)
	}
	return l, nil
}

// connect fails with [procid.ErrGone] if nobody listens. Reading and writing wait,
// by the runtime's poller, if waits is set, and fail with EAGAIN otherwise.
func connect(dir *os.File, waits bool) (*os.File, error) {
	how := unix.SOCK_SEQPACKET | unix.SOCK_CLOEXEC
	if waits {
		how |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(unix.AF_UNIX, how, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	conn := os.NewFile(uintptr(fd), socketName) // has the poller if it does not block by now
	if !waits {
		err = unix.SetNonblock(fd, true)
	}
	if err == nil {
		err = unix.Connect(fd, socketAddr(dir))
	}
	if err != nil {
		conn.Close()
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
			err = procid.ErrGone
		}
		return nil, fmt.Errorf("connect to monitor in %s: %w", dir.Name(), err)
	}
	return conn, nil
}

// Monitor is a connection to a running monitor. It is safe for concurrent use.
type Monitor struct {
	dir      string
	child    bool // this process started it, and waits for it when it ends
	reapOnce sync.Once
	id       procid.ID
	init     procid.ID
	conn     *os.File
	watch    *poller.Watch // of conn

	done chan struct{} // closed when init has ended or the monitor has
	gone chan struct{} // closed when the monitor has, or Close was called
	eof  chan struct{} // closed when the monitor has closed stdin

	mu      sync.Mutex
	explain func(op int, errno unix.Errno) error // names the call of the launch program that failed; nil after a restart and after the start
	phase   Phase
	changed chan struct{} // closed and replaced when phase changes
	onDone  func()        // called after done is closed
	asked   []chan error  // answers that are due, in order
}

// Connect connects to the monitor of the member in dir. It fails with
// [procid.ErrGone] if there is none any more.
func (ms *Monitors) Connect(ctx context.Context, dir string) (*Monitor, error) {
	d, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	conn, err := connect(d, false)
	if err != nil {
		return nil, err
	}
	st, err := ReadStatus(dir)
	if err == nil {
		m := &Monitor{dir: dir, init: st.Init}
		if m.id, err = procid.Of(st.MonitorPID); err == nil {
			if err = m.run(ms.poller, conn); err == nil {
				err = m.send('w')
			}
			if err == nil {
				err = m.await(ctx, func(p Phase) bool { return p != PhaseNone })
			}
			if err == nil {
				return m, nil
			}
			m.Close()
		}
	}
	conn.Close()
	return nil, fmt.Errorf("connect to monitor in %s: %w", dir, err)
}

// Process is the monitor's identity.
func (m *Monitor) Process() procid.ID { return m.id }

// Init is the identity of the member's init.
func (m *Monitor) Init() procid.ID { return m.init }

// Done is closed when init has ended and its exit record is durable, or when
// the monitor is gone.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// OnDone has f called, in a goroutine of its own, when Done is closed, also if that
// was before. There is one such function: the last one.
func (m *Monitor) OnDone(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.done:
		go f()
	default:
		m.onDone = f
	}
}

// end closes done. Preconditions: m.mu is held.
func (m *Monitor) end() {
	select {
	case <-m.done:
		return
	default:
	}
	close(m.done)
	if m.onDone != nil {
		go m.onDone()
	}
}

// InitEnded reports whether the monitor has told that init has ended.
func (m *Monitor) InitEnded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.phase >= PhaseExited
}

// Gone is closed when the monitor is gone, or Close was called.
func (m *Monitor) Gone() <-chan struct{} { return m.gone }

// Close ends the connection. The monitor goes on. One that keeps no custody and
// ends by itself, since init has, is waited for in the background: nobody else
// would reap it at once.
func (m *Monitor) Close() error {
	if m.child && m.InitEnded() {
		if st, err := ReadStatus(m.dir); err == nil && !st.Custody {
			return nil // its end ends the connection
		}
	}
	if m.watch.Stop() {
		m.over()
	}
	return nil
}

// Start lets a created init execute. It returns when that has succeeded, also
// if somebody else has started it before. If the execve failed, the error is a
// [*launch.StepError].
func (m *Monitor) Start(ctx context.Context) error {
	if err := m.ask(ctx, 's'); err != nil && !errors.Is(err, unix.EALREADY) {
		if errors.Is(err, unix.ESRCH) {
			err = procid.ErrGone
		}
		return fmt.Errorf("start init: %w", err)
	}
	if err := m.await(ctx, func(p Phase) bool { return p >= PhaseRunning }); err != nil && !errors.Is(err, procid.ErrGone) {
		return fmt.Errorf("start init: %w", err)
	}
	m.mu.Lock()
	explain := m.explain
	m.explain = nil // nothing is left to fail
	m.mu.Unlock()
	st, err := ReadStatus(m.dir)
	switch {
	case err != nil:
		return fmt.Errorf("start init: %w", err)
	case st.ExecFailed && explain != nil:
		return explain(st.FailOp, st.FailErrno)
	case st.ExecFailed:
		return &launch.StepError{Step: "execute its command", Exec: true, Command: true, Errno: st.FailErrno}
	case st.StartedAt.IsZero():
		return fmt.Errorf("start init: it was killed before it could execute: %w", procid.ErrGone)
	}
	return nil
}

// CloseStdin closes the monitor's writing end of init's standard input: init
// reads an end of file once all other writers have closed theirs.
func (m *Monitor) CloseStdin(ctx context.Context) error { return m.ask(ctx, 'c') }

// StdinClosed is closed when the monitor closes its writing end of init's
// standard input, if it does so after the connection was made.
func (m *Monitor) StdinClosed() <-chan struct{} { return m.eof }

// HoldStdin opens the writing end of init's standard input, so that init reads
// no end of file should its monitor be killed. The caller closes it at the
// latest when [Monitor.StdinClosed] is. The file is nil if stdin has been closed
// already, or nobody can read it any more.
func (m *Monitor) HoldStdin() (*os.File, error) {
	f, err := OpenStdin(m.dir)
	if errors.Is(err, procid.ErrGone) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// Only now: had it been closed before, f would take that back.
	st, err := ReadStatus(m.dir)
	if err != nil || st.StdinClosed {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReopenLog makes the monitor open the log by its name again, after it was
// renamed. On error the old file is written on.
func (m *Monitor) ReopenLog(ctx context.Context) error {
	if err := m.ask(ctx, 'r'); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	return nil
}

// run has what comes on conn read.
func (m *Monitor) run(p *poller.Poller, conn *os.File) (err error) {
	m.conn = conn
	m.done, m.gone, m.eof, m.changed = make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
	if m.watch, err = p.Watch(conn, m.read); err != nil {
		m.over()
	}
	return err
}

// read takes a message from conn and reports whether there will be others.
func (m *Monitor) read() bool {
	b := make([]byte, 16)
	n, err := m.conn.Read(b)
	if errors.Is(err, unix.EAGAIN) {
		return true
	}
	if err != nil {
		go func() {
			if m.child {
				m.reap() // it ends or has ended: it never drops a watcher that reads
			}
			m.over()
		}()
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch kind, arg := b[0], b[1:n]; {
	case kind == 'p' && len(arg) == 4:
		m.phase = Phase(binary.LittleEndian.Uint32(arg))
		close(m.changed)
		m.changed = make(chan struct{})
		if m.phase >= PhaseExited {
			m.end()
		}
	case kind == 'c':
		select {
		case <-m.eof: // somebody has asked for it twice
		default:
			close(m.eof)
		}
	case len(m.asked) == 0:
	case kind == 'k':
		m.answer(nil)
	case kind == 'e' && len(arg) == 4:
		m.answer(unix.Errno(binary.LittleEndian.Uint32(arg)))
	}
	return true
}

// answer is given to who has asked first. Preconditions: m.mu is held; somebody has.
func (m *Monitor) answer(err error) {
	m.asked[0] <- err
	if m.asked = m.asked[1:]; len(m.asked) == 0 {
		m.asked = nil // nearly always
	}
}

// over lets go of the connection, on which nothing is read any more.
func (m *Monitor) over() {
	m.conn.Close()
	close(m.gone)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.end()
}

func (m *Monitor) send(kind byte) error {
	_, err := m.conn.Write([]byte{kind})
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, os.ErrClosed) {
		return procid.ErrGone
	}
	return err
}

// ask sends a request and waits for its answer.
func (m *Monitor) ask(ctx context.Context, kind byte) error {
	answer := make(chan error, 1) // if ctx ends first, the answer is still taken from the queue
	m.mu.Lock()
	err := m.send(kind)
	if err == nil {
		m.asked = append(m.asked, answer)
	}
	m.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-m.gone:
		select { // both may be there
		case err := <-answer:
			return err
		default:
			return procid.ErrGone
		}
	}
}

// await waits until ok accepts the phase that the monitor has told.
func (m *Monitor) await(ctx context.Context, ok func(Phase) bool) error {
	for {
		m.mu.Lock()
		phase, changed := m.phase, m.changed
		m.mu.Unlock()
		if ok(phase) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-m.gone:
			m.mu.Lock()
			phase = m.phase
			m.mu.Unlock()
			if ok(phase) {
				return nil
			}
			return procid.ErrGone
		}
	}
}

// kill ends a monitor that this process has just started, and its init. The
// process group is killed in one go, so no child is forked meanwhile; only an
// init that has a session of its own is outside, and it has been reported.
func (m *Monitor) kill() {
	unix.Kill(-m.id.PID, unix.SIGKILL)
	m.reap()
	m.Close()
	<-m.gone
	st, err := ReadStatus(m.dir)
	if err != nil || st.Init.IsZero() {
		return
	}
	pidfd, err := st.Init.Open()
	if err != nil {
		return
	}
	defer pidfd.Close()
	unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0)
	// It may be anybody's child now; it is reaped here only if it is this
	// process's, which then is a subreaper.
	fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, killWaitMillis); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	unix.Wait4(st.Init.PID, nil, unix.WNOHANG, nil)
}

// killWaitMillis bounds the wait for a process that was sent SIGKILL: one that
// is stuck in the kernel ends when it can.
const killWaitMillis = 5000

// killAlone ends a monitor that this process has just started, without init.
func (m *Monitor) killAlone() {
	unix.Kill(m.id.PID, unix.SIGKILL)
	m.reap()
	m.Close()
	<-m.gone
}

// reap waits for the monitor's process, once: after that its pid may be another's.
func (m *Monitor) reap() {
	m.reapOnce.Do(func() { wait(m.id.PID) })
}

func wait(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
