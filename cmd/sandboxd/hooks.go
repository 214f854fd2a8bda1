package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/hook"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/statefile"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// SandboxHooks implements [sandbox.HookNode].
func (n *node) SandboxHooks(c *sandbox.Config) ([]request.Hook, error) {
	if err := checkHooks(c.Hooks, request.SandboxStages()); err != nil {
		return nil, err
	}
	host, err := n.HooksDirs.Hooks(hook.Target{Sandbox: true, Annotations: c.Annotations})
	if err != nil {
		return nil, &sandbox.HookError{Err: err}
	}
	return slices.Concat(host, c.Hooks), nil
}

// MemberHooks implements [sandbox.HookNode].
func (n *node) MemberHooks(r *sandbox.Record, m *sandbox.MemberRecord, spec *specs.Spec) ([]request.Hook, error) {
	t := hook.Target{Annotations: memberAnnotations(r, spec), BindMounts: len(m.Config.Volumes) > 0}
	if spec.Process != nil && len(spec.Process.Args) > 0 {
		t.Command = spec.Process.Args[0]
	}
	if m.Config.Bundle != "" {
		for _, mnt := range spec.Mounts {
			t.BindMounts = t.BindMounts || slices.Contains(mnt.Options, "bind") || slices.Contains(mnt.Options, "rbind")
		}
	}
	host, err := n.HooksDirs.Hooks(t)
	if err != nil {
		return nil, &sandbox.HookError{Err: err}
	}
	bundle, err := hook.FromSpec(spec.Hooks)
	if err != nil {
		return nil, invalid(fmt.Errorf("bundle: %w", err))
	}
	asked := slices.Concat(bundle, m.Config.Hooks)
	return slices.Concat(host, asked), checkHooks(asked, request.MemberStages())
}

// memberAnnotations are those of the sandbox, and of the member's bundle in their place.
func memberAnnotations(r *sandbox.Record, spec *specs.Spec) map[string]string {
	all := maps.Clone(r.Config.Annotations)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, spec.Annotations)
	return all
}

// maxHooks bounds the hooks of one sandbox or member: they are in its record.
const maxHooks = 64

// checkHooks refuses hooks that could not be run at one of the stages.
func checkHooks(hs []request.Hook, stages []request.Stage) error {
	if len(hs) > maxHooks {
		return invalid(fmt.Errorf("%d hooks are more than %d", len(hs), maxHooks))
	}
	for _, h := range hs {
		err := hook.Check(h, stages)
		if err == nil {
			err = hook.CheckProgram(h)
		}
		if err != nil {
			return invalid(fmt.Errorf("hook: %w", err))
		}
	}
	return nil
}

// RunHook implements [sandbox.HookNode]. Each hook has a cgroup of its own below
// the sandbox's, by which what it has started is found again: what another has left
// running on purpose is not ended with it.
func (n *node) RunHook(ctx context.Context, c *sandbox.HookCall) sandbox.HookOutcome {
	begin := time.Now()
	out, err := n.runHook(ctx, c)
	if err != nil {
		return sandbox.HookOutcome{Code: -1, Took: time.Since(begin), Err: err}
	}
	return out
}

// hookCgroup is the cgroup of a hook. One out of the member's root is in the
// member's, whose limits and devices are its own too.
func hookCgroup(c *sandbox.HookCall) string {
	switch {
	case c.Member == nil:
		return fmt.Sprintf("%s/hook-%d", c.Sandbox.Cgroup, c.Index)
	case c.Hook.Stage == request.StartContainer:
		return fmt.Sprintf("%s/hook-%d", c.Member.Cgroup, c.Index)
	}
	return fmt.Sprintf("%s/hook-%s-%d", c.Sandbox.Cgroup, c.Member.ID, c.Index)
}

// EndHook implements [sandbox.HookNode].
func (n *node) EndHook(ctx context.Context, c *sandbox.HookCall) error {
	return n.cg.Remove(ctx, hookCgroup(c))
}

func (n *node) runHook(ctx context.Context, c *sandbox.HookCall) (sandbox.HookOutcome, error) {
	leaf := hookCgroup(c)
	if c.Attempt > 1 {
		// One that was cut off with its daemon may be at work. The cgroup goes too: Linux
		// 6.18 kills what is cloned into a cgroup that was killed before (cgroup_post_fork
		// compares its kill_seq with that of the parent's cgroup).
		if err := n.EndHook(ctx, c); err != nil {
			return sandbox.HookOutcome{}, err
		}
	}
	if err := n.cg.MakeLeaf(leaf); err != nil {
		return sandbox.HookOutcome{}, err
	}
	// It stays if the hook has left something running, until the sandbox goes.
	defer os.Remove(filepath.Dir(n.cg.LeafProcs(leaf)))
	dir, err := n.cg.TrackingDir(leaf)
	if err != nil {
		return sandbox.HookOutcome{}, err
	}
	if dir != nil {
		defer dir.Close()
	}
	in, err := n.hookInput(c)
	if err != nil {
		return sandbox.HookOutcome{}, err
	}
	stdin, err := json.Marshal(in)
	if err != nil {
		return sandbox.HookOutcome{}, err
	}
	timeout := c.Hook.Timeout
	if timeout == 0 {
		timeout = request.DefaultHookTimeout
	}
	var res hook.Result
	switch c.Hook.Stage {
	case request.CreateContainer, request.StartContainer:
		res = n.runInside(ctx, c, leaf, stdin, timeout, dir)
	default:
		res = hook.Run(ctx, &hook.Command{
			Path: c.Hook.Path, Args: c.Hook.Args, Env: c.Hook.Env, Stdin: stdin, Timeout: timeout, CgroupDir: dir,
			Started: func(pid int) {
				if dir == nil {
					os.WriteFile(n.cg.LeafProcs(leaf), strconv.AppendInt(nil, int64(pid), 10), 0) // gone if it has ended
				}
			},
		})
	}
	if res.Code < 0 {
		// Killed, perhaps; those of its children that had left its process group are not yet.
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := n.cg.Remove(bounded, leaf); err != nil {
			n.Log.Warn("Processes of a hook not killed", "hook", c.Hook.Path, "err", err)
		}
	}
	return sandbox.HookOutcome{Code: res.Code, Output: res.Output, Truncated: res.Truncated, Took: res.Took, Err: res.Err}, nil
}

// runInside runs a hook in the member's namespaces.
func (n *node) runInside(ctx context.Context, c *sandbox.HookCall, leaf string, stdin []byte, timeout time.Duration, cgroup *os.File) hook.Result {
	begin := time.Now()
	fail := func(err error) hook.Result { return hook.Result{Code: -1, Took: time.Since(begin), Err: err} }
	j := &joiner{src: &app{state: n.State}, target: &target{sandbox: c.Sandbox, member: c.Member, dir: c.Dir}}
	defer j.close()
	var err error
	if c.Hook.Stage == request.StartContainer {
		if err = j.enter(nil, false); err == nil {
			err = j.memberProcess(c.Member)
		}
	} else {
		err = j.enterMaking(c.Init)
	}
	if err != nil {
		return fail(err)
	}
	j.spec.CgroupDir = cgroup
	if c.Hook.Stage == request.StartContainer {
		j.spec.CgroupTasks = n.cg.Tasks(c.Member.Cgroup)
	}
	if cgroup == nil {
		j.spec.CgroupTasks = append(j.spec.CgroupTasks, n.cg.LeafTasks(leaf))
	}
	p := j.spec.Process
	p.Args, p.Env, p.Cwd, p.Terminal, p.ConsoleSize = c.Hook.Args, hook.Environment(c.Hook.Env), "/", false, nil
	if p.Args == nil {
		p.Args = []string{c.Hook.Path}
	}
	j.spec.Exe = c.Hook.Path
	prog, err := member.CompileJoin(&j.spec)
	if err != nil {
		return fail(err)
	}
	cmd := &hook.Joined{
		Stdin: stdin, Timeout: timeout,
		Run: func(ctx context.Context, in, out *os.File) (int, error) {
			return (&member.Command{Program: prog, Dir: n.State, Argv: j.argv(), Stdin: in, Stdout: out, Stderr: out}).Run(ctx)
		},
	}
	return cmd.Do(ctx)
}

// enterMaking opens the namespaces of a member that is being made. Its user
// namespace, if it has one, does not own the others yet, so that the hook keeps the
// host's.
func (j *joiner) enterMaking(init procid.ID) error {
	j.spec.Namespaces = map[namespace.Kind]*os.File{}
	p, err := j.living(init)
	if err != nil {
		return err
	}
	for k, ino := range p.inodes {
		if k == namespace.User {
			continue
		}
		if err := j.use(k, p.pidfd, ino); err != nil {
			return err
		}
	}
	return j.hostProcess("")
}

// hookInput is what a hook is told.
func (n *node) hookInput(c *sandbox.HookCall) (*hook.Input, error) {
	r, m := c.Sandbox, c.Member
	in := &hook.Input{
		State: specs.State{Version: specs.Version, ID: r.ID, Status: hookStatus(c.Hook.Stage), Bundle: c.Dir, Annotations: r.Config.Annotations},
		Sandboxd: hook.Details{
			Stage: strings.TrimPrefix(string(c.Hook.Stage), "oci-"), Attempt: c.Attempt,
			Sandbox: hook.Sandbox{
				ID: r.ID, Name: r.Config.Name, Cgroup: r.Cgroup, Addresses: []string{},
				Labels: orEmpty(r.Config.Labels), Annotations: orEmpty(r.Config.Annotations),
				Namespaces: map[namespace.Kind]string{},
			},
		},
	}
	for _, a := range r.Networks {
		for _, p := range a.Addresses {
			in.Sandboxd.Sandbox.Addresses = append(in.Sandboxd.Sandbox.Addresses, p.Addr().String())
		}
	}
	if r.Pause.Alive() {
		for _, k := range r.Config.Share {
			in.Sandboxd.Sandbox.Namespaces[k] = fmt.Sprintf("/proc/%d/ns/%s", r.Pause.PID, k)
		}
	}
	if m == nil {
		if r.Pause.Alive() {
			in.Pid = r.Pause.PID
		}
		return in, nil
	}
	in.ID = m.ID
	if m.Config.Bundle != "" {
		in.Bundle = m.Config.Bundle
	}
	if spec, err := memberSpec(c.Dir); err == nil { // gone with the member's files, at its end
		in.Annotations = memberAnnotations(r, spec)
	}
	in.Exit = m.Exit
	if in.Status == specs.StateRunning && !c.Init.Alive() {
		in.Status = specs.StateStopped // before anybody could record its exit
	}
	if c.Init.Alive() && m.Exit == nil {
		in.Pid = c.Init.PID
		if c.Hook.Stage == request.CreateContainer || c.Hook.Stage == request.StartContainer {
			// As the member sees it (runtime.md, State).
			if pid, err := innermostPID(c.Init); err == nil {
				in.Pid = pid
			}
		}
	}
	d := &hook.Member{
		ID: m.ID, Name: m.Config.Name, Labels: orEmpty(m.Config.Labels), Log: m.LogPath, Cgroup: m.Cgroup,
		Namespaces: map[namespace.Kind]string{},
	}
	in.Sandboxd.Member = d
	if m.Monitor.Alive() {
		d.MonitorPID, d.Root = m.Monitor.PID, member.RootPath(m.Monitor.PID)
	}
	for _, k := range namespace.Kinds() {
		p := member.NamespacePath(d.MonitorPID, k)
		_, err := os.Lstat(p)
		switch {
		case d.MonitorPID != 0 && err == nil:
			d.Namespaces[k] = p
		case in.Pid != 0 && k.Supported():
			d.Namespaces[k] = fmt.Sprintf("/proc/%d/ns/%s", c.Init.PID, k)
		case m.Namespaces[k].From == namespace.Sandbox && in.Sandboxd.Sandbox.Namespaces[k] != "":
			d.Namespaces[k] = in.Sandboxd.Sandbox.Namespaces[k]
		}
	}
	return in, nil
}

// hookStatus is the status of runtime-spec at a stage.
func hookStatus(stage request.Stage) specs.ContainerState {
	switch stage {
	case request.OCIPrestart, request.CreateRuntime, request.CreateContainer:
		return specs.StateCreating
	case request.Postcreate, request.Prestart, request.StartContainer:
		return specs.StateCreated
	case request.Poststart, request.Prestop:
		return specs.StateRunning
	}
	return specs.StateStopped
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// memberSpec reads the configuration that the member whose directory is dir was made from.
func memberSpec(dir string) (*specs.Spec, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var spec specs.Spec
	err = statefile.Read(root, "config.json", &spec)
	return &spec, err
}

// innermostPID is the pid that a process has in its own pid namespace.
func innermostPID(id procid.ID) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", id.PID))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" {
			return strconv.Atoi(f[len(f)-1])
		}
	}
	return 0, errors.New("no NSpid")
}

// rendezvous is where a process that is being made waits for others to look at
// it: a socket, which it can use without knowing more than two system calls.
type rendezvous struct {
	ours   *net.UnixConn
	theirs *os.File
}

func newRendezvous() (*rendezvous, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "rendezvous"), os.NewFile(uintptr(fds[1]), "rendezvous")
	defer ours.Close()
	// What comes from it then tells the pid that wrote it (unix(7)).
	err = unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	if err == nil {
		var c net.Conn
		if c, err = net.FileConn(ours); err == nil {
			return &rendezvous{c.(*net.UnixConn), theirs}, nil
		}
	}
	theirs.Close()
	return nil, err
}

// meet waits for the process and calls fn with it. It lets the process go on if
// that succeeds. It returns nil if the process does not come.
func (v *rendezvous) meet(fn func(procid.ID) error) error {
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	n, oobn, _, _, err := v.ours.ReadMsgUnix(b, oob)
	if err != nil || n == 0 {
		return nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return fmt.Errorf("process that is being made is not known: %d messages: %w", len(msgs), err)
	}
	cred, err := unix.ParseUnixCredentials(&msgs[0])
	if err != nil {
		return err
	}
	id, err := procid.Of(int(cred.Pid))
	if err != nil {
		return err
	}
	if err := fn(id); err != nil {
		return err
	}
	v.ours.Write(b) // it may have been killed
	return nil
}

// hookFlag declares --hook.
func hookFlag(cmd *cobra.Command, p *[]request.Hook) {
	cmd.Flags().Var(&list[request.Hook]{p: p, typ: "stage=program[,arg=…]…[,timeout=10s][,retries=3][,env=K=V]", parse: hook.Parse}, "hook",
		"run a program of the host's at a stage of its life")
}
