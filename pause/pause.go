package pause

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/poller"
	"github.com/sandboxd/sandboxd/internal/procid"
)

// Pause is a pause process, alive or dead, and the namespaces it has or had.
type Pause struct {
	id    procid.ID
	pidfd *os.File
	ns    []held                    // the mount namespace among them
	ino   map[namespace.Kind]uint64 // without the mount namespace; complete before p is anybody else's
	done  chan struct{}
	watch *poller.Watch
	end   sync.WaitGroup

	mu   sync.Mutex
	died func() // called after done is closed; guarded by mu
}

// held is a namespace that is held.
type held struct {
	kind namespace.Kind
	file *os.File
}

// ID identifies the process.
func (p *Pause) ID() procid.ID { return p.id }

// Namespaces returns the namespaces, the mount namespace among them. The files
// belong to p; they are good until Close, whether or not the process lives.
func (p *Pause) Namespaces() map[namespace.Kind]*os.File {
	m := make(map[namespace.Kind]*os.File, len(p.ns))
	for _, n := range p.ns {
		m[n.kind] = n.file
	}
	return m
}

// Duplicates returns [Pause.Namespaces] for one whom Close does not wait for: the
// files belong to the caller. It fails with [os.ErrClosed] after Close.
func (p *Pause) Duplicates() (_ map[namespace.Kind]*os.File, err error) {
	m := make(map[namespace.Kind]*os.File, len(p.ns))
	defer func() {
		if err != nil {
			for _, f := range m {
				f.Close()
			}
		}
	}()
	for _, n := range p.ns {
		rc, err := n.file.SyscallConn()
		if err != nil {
			return nil, err
		}
		var fd int
		// Control keeps the file open meanwhile: its number alone may be another's by then.
		cerr := rc.Control(func(nr uintptr) { fd, err = unix.FcntlInt(nr, unix.F_DUPFD_CLOEXEC, 0) })
		if cerr != nil {
			return nil, os.ErrClosed
		}
		if err != nil {
			return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
		}
		m[n.kind] = os.NewFile(uintptr(fd), n.file.Name())
	}
	return m, nil
}

// Namespace returns one of [Pause.Namespaces], or nil.
func (p *Pause) Namespace(k namespace.Kind) *os.File {
	for _, n := range p.ns {
		if n.kind == k {
			return n.file
		}
	}
	return nil
}

// Inodes returns the inode numbers by which the namespaces are known
// (namespaces(7)), without the mount namespace's. They are shown, not given.
func (p *Pause) Inodes() map[namespace.Kind]uint64 { return p.ino }

// Done is closed when the process has died. It is not closed by Close.
func (p *Pause) Done() <-chan struct{} { return p.done }

// OnDeath has died called, in a goroutine of its own, when the process has died,
// unless Close comes before. There is one such function: the last one.
func (p *Pause) OnDeath(died func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.done:
		go died()
	default:
		p.died = died
	}
}

// Kill kills the process and waits until it is gone, or ctx ends. It succeeds
// if the process is gone already. It must not be called after Close.
func (p *Pause) Kill(ctx context.Context) error {
	err := p.signal(unix.SIGKILL)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill pause %v: %w", p.id, err)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of pause %v: %w", p.id, context.Cause(ctx))
	}
}

// Close lets go of the process, which goes on, and of the namespaces. A second
// call does nothing.
func (p *Pause) Close() error {
	p.watch.Stop()
	err := p.pidfd.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	p.end.Wait()
	for _, n := range p.ns {
		err = errors.Join(err, n.file.Close())
	}
	return err
}

// Adopt returns the pause with the given identity, which an earlier process has
// started with the shared kinds. It fails with [procid.ErrGone] if it is gone.
func (pr *Pauser) Adopt(_ context.Context, id procid.ID, kinds []namespace.Kind) (*Pause, error) {
	pidfd, err := id.Open()
	if err != nil {
		return nil, fmt.Errorf("adopt pause %v: %w", id, err)
	}
	p, err := pr.newPause(pidfd)
	if err != nil {
		pidfd.Close()
		return nil, err
	}
	p.id = id
	err = p.open(id.PID, kinds)
	// What was opened by pid belongs to this process if it still is there. One that
	// exits gives its namespaces up a moment before it becomes a zombie.
	if errors.Is(err, fs.ErrNotExist) || !id.Alive() {
		err = procid.ErrGone
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("adopt pause %v: %w", id, err), p.Close())
	}
	return p, nil
}

// newPause makes a Pause that owns pidfd and watches the process.
func (pr *Pauser) newPause(pidfd *os.File) (*Pause, error) {
	p := &Pause{pidfd: pidfd, ino: make(map[namespace.Kind]uint64), done: make(chan struct{})}
	var err error
	p.watch, err = pr.poller.Watch(pidfd, func() bool {
		p.end.Go(p.ended) // it may have to wait: for a debugger, which reaps before the parent does
		return false
	})
	return p, err
}

// ended reaps the process, which is dead, if it was a child of this one, and tells.
func (p *Pause) ended() {
	if waitPidfd(p.pidfd) != nil {
		return // Close came before
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.done)
	if p.died != nil {
		go p.died()
	}
}

// waitPidfd waits for the end of a process, and reaps it if it is a child of this
// one. It fails if the file is closed.
func waitPidfd(pidfd *os.File) error {
	rc, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Control(func(fd uintptr) {
		// By pidfd, so that another child of this process is never meant. ECHILD
		// says that somebody else is the parent, and reaps it.
		for unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED, nil) == unix.EINTR {
		}
	})
}

func (p *Pause) signal(sig unix.Signal) error {
	rc, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	return errors.Join(err, serr)
}

// finish sets the namespaces up and waits until the process is ready. It is in
// its namespaces already, so the two go on at the same time.
func (p *Pause) finish(ctx context.Context, s *Spec, pid int, ready *os.File) error {
	deadline := time.Now().Add(startTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := ready.SetReadDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err := p.take(s, pid)
	if rerr := readReady(ready); rerr != nil {
		return errors.Join(rerr, context.Cause(ctx)) // what else went wrong came of it
	}
	return err
}

// take identifies process pid, opens its namespaces and sets them up.
func (p *Pause) take(s *Spec, pid int) error {
	var err error
	if p.id, err = procid.Of(pid); err != nil {
		return err
	}
	for _, path := range s.CgroupProcs {
		if err := os.WriteFile(path, strconv.AppendInt(nil, int64(pid), 10), 0); err != nil {
			return fmt.Errorf("put pause into its cgroup: %w", err)
		}
	}
	if err := p.open(pid, s.Kinds); err != nil {
		return err
	}
	if s.From != nil || s.ahead() {
		return nil
	}
	return p.setUp(s)
}

// open opens the namespaces of process pid.
func (p *Pause) open(pid int, kinds []namespace.Kind) error {
	all := withMnt(kinds)
	p.ns = make([]held, 0, len(all))
	for _, k := range all {
		name := string(k)
		if k == namespace.Time {
			// Before Linux 6.3 a process that was made by vfork enters its new
			// time namespace only for its children.
			name = "time_for_children"
		}
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
		if err != nil {
			return err
		}
		p.ns = append(p.ns, held{k, f})
		if k == namespace.Mnt {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		p.ino[k] = st.Ino
	}
	return nil
}

// setUp sets the namespaces of a process up that was made with a user namespace.
func (p *Pause) setUp(s *Spec) error {
	if !s.settings() {
		return nil
	}
	if err := s.checkSettings(); err != nil {
		return err
	}
	files := make(map[namespace.Kind]*os.File)
	for _, k := range []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS} {
		if f := p.Namespace(k); f != nil {
			files[k] = f
		}
	}
	return nsthread.Do(files, s.configure)
}

// settings reports whether anything of the namespaces is to be set.
func (s *Spec) settings() bool {
	return s.Hostname != "" || s.Domainname != "" || len(s.Sysctls) > 0 || s.Loopback
}

// checkSettings refuses what is not the sandbox's, and would be changed for the host.
func (s *Spec) checkSettings() error {
	switch {
	case (s.Hostname != "" || s.Domainname != "") && !slices.Contains(s.Kinds, namespace.UTS):
		return errors.New("set host name: the sandbox holds no uts namespace")
	case s.Loopback && !slices.Contains(s.Kinds, namespace.Net):
		return errors.New("bring lo up: the sandbox holds no net namespace")
	}
	for name := range s.Sysctls {
		if k, ok := SysctlKind(name); !ok || !slices.Contains(s.Kinds, k) {
			return fmt.Errorf("set sysctl %s: it is not of a namespace that the sandbox holds", name)
		}
	}
	return nil
}

// configure sets host name, sysctls and lo in the namespaces of the calling thread.
func (s *Spec) configure() error {
	if s.Hostname != "" {
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return fmt.Errorf("set host name %q: %w", s.Hostname, err)
		}
	}
	if s.Domainname != "" {
		if err := unix.Setdomainname([]byte(s.Domainname)); err != nil {
			return fmt.Errorf("set domain name %q: %w", s.Domainname, err)
		}
	}
	if s.Loopback {
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("bring lo up: %w", err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Sysctls)) {
		if err := setSysctl(name, s.Sysctls[name], s); err != nil {
			return fmt.Errorf("set sysctl %s to %q: %w", name, s.Sysctls[name], err)
		}
	}
	return nil
}

// loopbackUp brings lo up in the network namespace of the calling thread
// (netdevice(7)).
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("ioctl SIOCSIFFLAGS", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
}
