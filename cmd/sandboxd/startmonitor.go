package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/pause"
	"github.com/sandboxd/sandboxd/sandbox"
)

// StartMonitor implements [sandbox.MemberNode].
func (n *node) StartMonitor(ctx context.Context, r *sandbox.Record, m *sandbox.MemberRecord, siblings []*sandbox.MemberRecord, spec *specs.Spec, dir string, limited func() error, made func(init procid.ID) error, run bool) (sandbox.Monitor, error) {
	in, closeInput, err := n.compilerInput(r, m, siblings, spec)
	defer closeInput()
	if err != nil {
		return nil, err
	}
	ms, done, err := n.monitorSpec(r, m, dir)
	if err != nil {
		return nil, err
	}
	defer done()
	ms.Program = func(stdin, stdout, stderr *os.File) (*launch.Program, error) {
		in.Stdin, in.Stdout, in.Stderr = stdin, stdout, stderr
		return member.Compile(in)
	}
	ms.Ready, ms.Run = limited, run
	if made == nil {
		mon, err := n.monitors.Start(ctx, *ms)
		if err != nil {
			return nil, startError(err)
		}
		return n.watched(m, mon)
	}
	return n.startMade(ctx, m, in, ms, made)
}

// startMade starts a monitor whose init waits, when it is made, until made has returned.
func (n *node) startMade(ctx context.Context, m *sandbox.MemberRecord, in *member.Input, ms *member.MonitorSpec, made func(init procid.ID) error) (sandbox.Monitor, error) {
	v, err := newRendezvous()
	if err != nil {
		return nil, err
	}
	defer v.theirs.Close()
	in.Made = v.theirs
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	met := make(chan error, 1)
	go func() {
		err := v.meet(made)
		if err != nil {
			cancel() // of no use any more
		}
		met <- err
	}()
	mon, err := n.monitors.Start(ctx, *ms)
	v.ours.Close()
	if merr := <-met; merr != nil {
		if mon != nil {
			mon.Close() // the caller kills it
		}
		return nil, merr
	}
	if err != nil {
		return nil, startError(err)
	}
	return n.watched(m, mon)
}

// startError makes a [sandbox.StartError] of a command that cannot be executed, and
// names the step of another start that failed.
func startError(err error) error {
	var step *launch.StepError
	switch {
	case !errors.As(err, &step):
		return err
	case step.Command:
		return &sandbox.StepError{Err: &sandbox.StartError{Text: step.Error(), Errno: step.Errno}}
	}
	return &sandbox.StepError{Step: step.Step, Err: step.Errno}
}

// heldNamespaces returns files of a sandbox's namespaces that belong to the caller; none
// if its pause is gone. The pause may be replaced meanwhile, and is asked anew then.
func (n *node) heldNamespaces(id string) (map[namespace.Kind]*os.File, error) {
	var last *pause.Pause
	for {
		p := n.pause(id)
		if p == nil {
			return nil, nil
		}
		files, err := p.Duplicates()
		if p == last || !errors.Is(err, os.ErrClosed) {
			return files, err
		}
		last = p
	}
}

// compilerInput gathers what the member's launch program is made of. The
// returned function closes the files that it opened; it is never nil.
func (n *node) compilerInput(r *sandbox.Record, m *sandbox.MemberRecord, siblings []*sandbox.MemberRecord, spec *specs.Spec) (_ *member.Input, closeAll func(), err error) {
	var opened []*os.File
	closeAll = func() {
		for _, f := range opened {
			f.Close()
		}
	}
	in := &member.Input{
		Spec:        spec,
		Namespaces:  make(map[namespace.Kind]member.Join),
		DataDir:     n.dataDir(m),
		CgroupTasks: n.cg.Tasks(m.Cgroup),
	}
	if in.CgroupDir, err = n.cg.TrackingDir(m.Cgroup); err != nil {
		return nil, closeAll, err
	}
	if in.CgroupDir != nil {
		opened = append(opened, in.CgroupDir)
	}
	for _, h := range n.cg.Hierarchies() {
		in.Cgroups = append(in.Cgroups, hierarchy(h, m.Cgroup))
	}
	if len(in.Cgroups) == 1 && in.Cgroups[0].Unified {
		in.Cgroups[0].Dir = ""
	}

	held, err := n.heldNamespaces(r.ID)
	if err != nil {
		return nil, closeAll, fmt.Errorf("the sandbox's namespaces: %w", err)
	}
	for _, f := range held {
		opened = append(opened, f)
	}
	sibling := func(src namespace.Source) (*sandbox.MemberRecord, error) {
		for _, s := range siblings {
			if s.ID == src.Member || s.Config.Name == src.Member {
				return s, nil
			}
		}
		return nil, fmt.Errorf("member %s is gone", src.Member)
	}
	for k, src := range m.Namespaces {
		switch src.From {
		case namespace.Private:
			in.Namespaces[k] = member.Join{Private: true}
		case namespace.Sandbox:
			if held[k] == nil {
				return nil, closeAll, fmt.Errorf("the sandbox's %s namespace is not held: its pause is gone", k)
			}
			in.Namespaces[k] = member.Join{File: held[k]}
		case namespace.Member:
			s, err := sibling(src)
			if err != nil {
				return nil, closeAll, err
			}
			f, err := member.OpenNamespace(s.Monitor, k)
			if err != nil {
				return nil, closeAll, fmt.Errorf("%s namespace of member %s: %w", k, s.Config.Name, err)
			}
			opened = append(opened, f)
			in.Namespaces[k] = member.Join{File: f}
			if k == namespace.Mnt {
				if in.RootFD, err = member.OpenRoot(s.Monitor); err != nil {
					return nil, closeAll, fmt.Errorf("root of member %s: %w", s.Config.Name, err)
				}
				opened = append(opened, in.RootFD)
			}
		}
	}
	if m.Namespaces[namespace.Mnt].From == namespace.Private {
		in.Root = &member.Root{Path: spec.Root.Path, Overlay: m.Config.Bundle == "", ReadOnly: spec.Root.Readonly}
		if root := in.Root; root.Overlay && root.ReadOnly {
			if root.Points, err = member.MakeMountPoints(root.Path, filepath.Join(in.DataDir, layerDir), spec.Mounts); err != nil {
				return nil, closeAll, err
			}
		}
		if in.Files, err = n.hosted.update(r, m, siblings); err != nil {
			return nil, closeAll, fmt.Errorf("names for the member: %w", err)
		}
	}
	if m.Namespaces[namespace.IPC].From == namespace.Sandbox && held[namespace.Mnt] != nil {
		in.Shm, in.HostMnt = held[namespace.Mnt], n.hostMnt
	}
	if r.IDs != nil && in.Namespaces[namespace.User].File != nil {
		ids := []specs.LinuxIDMapping{{HostID: r.IDs.Start, Size: r.IDs.Size}}
		in.UserNS, in.UIDs, in.GIDs = in.Namespaces[namespace.User].File, ids, ids
	}
	p, err := newMemberProcess(spec, n.filters.Compile)
	if err != nil {
		return nil, closeAll, err
	}
	in.Seccomp, in.SeccompFlags = p.filter, p.flags
	n.recent.put(m.ID, p)
	return in, closeAll, nil
}

// hierarchy is how a cgroup hierarchy of the host is shown to a member whose
// cgroup is at path.
func hierarchy(host cgroup.Hierarchy, path string) member.CgroupHierarchy {
	h := member.CgroupHierarchy{Dir: filepath.Base(host.Mount), Unified: host.V2, Own: filepath.Join(host.Mount, path)}
	if host.V2 {
		return h
	}
	h.Options = host.Controllers
	if len(host.Controllers) == 1 && strings.HasPrefix(host.Controllers[0], "name=") {
		h.Options = []string{"none", host.Controllers[0]}
	}
	return h
}

// oomKills reads the counter of kills for memory; 0 if there is none.
func oomKills(file string) uint32 {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		var kills uint32
		if _, err := fmt.Sscanf(line, "oom_kill %d", &kills); err == nil {
			return kills
		}
	}
	return 0
}

// killProcess kills the process and waits until it is dead, or ctx ends. It
// reaps it if it is a child of this one. A zero id is no process.
func killProcess(ctx context.Context, id procid.ID) error {
	pidfd, err := id.Open()
	if errors.Is(err, procid.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pidfd.Close()
	if err := unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %v: %w", id, err)
	}
	fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
	for {
		// A slice of time at once, so that the end of ctx is seen.
		n, err := unix.Poll(fds, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
		if n > 0 {
			unix.Waitid(unix.P_PIDFD, int(pidfd.Fd()), nil, unix.WEXITED|unix.WNOHANG, nil)
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("process %v does not end: %w", id, ctx.Err())
		}
	}
}
