package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// processFlags are the flags that exec and join share.
type processFlags struct {
	stdin, tty bool
	env        []string
	cwd        string
	user       string
}

func (o *processFlags) declare(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVarP(&o.stdin, "interactive", "i", false, "pass on stdin")
	f.BoolVarP(&o.tty, "tty", "t", false, "give it a terminal")
	f.StringArrayVarP(&o.env, "env", "e", nil, "environment variable, `K=V`; K alone takes this program's")
	f.StringVarP(&o.cwd, "workdir", "w", "", "working `directory`")
	f.StringVarP(&o.user, "user", "u", "", "user, `UID[:GID]` or names of the root it runs in")
}

func (a *app) execCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec [OPTION]… SANDBOX/MEMBER -- CMD ARG…",
		Short: "Run a command in a running member, with everything that is the member's",
		Long: `Run a command in a running member: in its namespaces, root and cgroup, with its
user, capabilities, seccomp filter and environment. This program is its parent;
the daemon is not needed.

To look into a member that has exited use join.`,
		Example: `  sandboxd exec web/redis -- redis-cli ping
  sandboxd exec -i -t -u 1000 -e TERM web/shell -- sh`,
		Args:              nameAndCommand(2),
		ValidArgsFunction: a.completeIn(sandbox.MemberRunning),
	}
	var o processFlags
	o.declare(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		j, err := execJoiner(a, args[0])
		if err != nil {
			return err
		}
		defer j.close()
		err = a.runJoined(cmd.Context(), j, &o, args[1:])
		if errors.Is(err, procid.ErrGone) {
			err = fmt.Errorf("exec %s: %w", args[0], errNotRunning)
		}
		return err
	}
	return cmd
}

var errNotRunning = wrongState(errors.New("it does not run (join can enter what it left)"))

// execJoiner prepares the running of commands in the member ref. The caller
// closes it.
func execJoiner(src joinSource, ref string) (_ *joiner, err error) {
	t, err := src.target(ref)
	if err != nil {
		return nil, err
	}
	if t.member == nil {
		return nil, invalid(fmt.Errorf("exec %s: not a member (want SANDBOX/MEMBER)", ref))
	}
	j := &joiner{src: src, target: t}
	defer func() {
		if err != nil {
			j.close()
			err = fmt.Errorf("exec %s: %w", ref, err)
		}
	}()
	if _, err := j.living(t.member.Init); errors.Is(err, procid.ErrGone) {
		return nil, errNotRunning
	}
	if err := j.enter(nil, false); err != nil {
		return nil, err
	}
	if err := j.memberProcess(t.member); err != nil {
		return nil, err
	}
	host, err := src.cgroups()
	if err != nil {
		return nil, err
	}
	j.spec.CgroupTasks = host.Tasks(t.member.Cgroup)
	return j, j.inCgroup(host, t.member.Cgroup)
}

func (a *app) joinCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "join [OPTION]… SANDBOX[/MEMBER] -- CMD ARG…",
		Short: "Run a command in any namespaces, of the living and the dead",
		Long: `Run a command in namespaces that exist already. Without --ns,

  join SANDBOX          joins all that the sandbox holds and runs a program of the
                        host there, with the host's files: tcpdump, ss, gdb;
  join SANDBOX/MEMBER   joins everything of that member, running or exited.

--ns says for single types where they come from instead; "all=host,net=sandbox"
is net and nothing else. In a root of a member the command has that member's
user, capabilities and seccomp filter; with the host's root it has this
program's.

A pid namespace dies with its first process. In the root of an exited member the
command gets a new one. Where /proc would show another pid namespace than the
command's, the command gets a new /proc, which only it sees.

--rootfs DIR is for tools that neither the member nor the host has: DIR becomes
the root, as it is, in a mount namespace that is the command's own, with a /proc of
the pid namespace that it joins, /sys, and the host's /dev. A member's files are
then below /proc/PID/root.`,
		Example: `  sandboxd join web -- ss -tlnp
  sandboxd join web/crashed -- ls -l /tmp
  sandboxd join --ns mnt=member:crashed,pid=member:redis web -i -t -- sh
  sandboxd join --rootfs /srv/debug web/redis -- gdb -p 1`,
		Args:              nameAndCommand(2),
		ValidArgsFunction: a.completeRefs(1, true, true),
	}
	var (
		o      processFlags
		sel    namespace.Selection
		rootfs string
	)
	o.declare(cmd)
	nsFlag(cmd, &sel, "default: see above")
	cmd.Flags().StringVar(&rootfs, "rootfs", "", "root: a `directory` of the host, or the word host for the host's own")
	cmd.MarkFlagDirname("rootfs")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, mntNamed := sel[namespace.Mnt]
		if rootfs != "" && mntNamed {
			return usageError(cmd, "--rootfs and --ns mnt=… exclude each other")
		}
		t, err := a.target(args[0])
		if err != nil {
			return err
		}
		j := &joiner{src: a, target: t}
		defer j.close()
		sel = sel.Clone()
		if rootfs != "" {
			if sel == nil {
				sel = namespace.Selection{}
			}
			sel[namespace.Mnt] = namespace.Source{From: namespace.Host}
		}
		if err := j.enter(sel, namesPID(cmd.Flag("ns").Value.String())); err != nil {
			return fmt.Errorf("join %s: %w", args[0], err)
		}
		if j.root != nil {
			err = j.memberProcess(j.root)
		} else {
			err = j.hostProcess(rootfs)
		}
		if err != nil {
			return fmt.Errorf("join %s: %w", args[0], err)
		}
		host, err := cgroup.Detect()
		if err != nil {
			return err
		}
		leaf := t.sandbox.Cgroup + "/join"
		if err := host.MakeLeaf(leaf); err != nil {
			return fmt.Errorf("join %s: %w", args[0], err)
		}
		if host.V2Mount() == "" {
			j.spec.CgroupTasks = []string{host.LeafTasks(leaf)}
		}
		if err := j.inCgroup(host, leaf); err != nil {
			return fmt.Errorf("join %s: %w", args[0], err)
		}
		return a.runJoined(cmd.Context(), j, &o, args[1:])
	}
	return cmd
}

// namesPID reports whether a selection's text names pid itself rather than
// under "all".
func namesPID(text string) bool {
	return slices.ContainsFunc(strings.Split(text, ","), func(f string) bool { return strings.HasPrefix(f, "pid=") })
}

// joiner puts together what a joining process is. close must be called.
type joiner struct {
	src    joinSource
	target *target
	spec   member.JoinSpec
	root   *sandbox.MemberRecord // whose mnt namespace is entered; nil if it is not a member's
	opened []*os.File
	alive  map[procid.ID]*livingProcess
	pid    uint64 // inode of the pid namespace that is joined; 0: none is
}

// livingProcess is a process whose namespaces are joined.
type livingProcess struct {
	pidfd  *os.File
	inodes map[namespace.Kind]uint64
}

// joinSource is where a joiner learns about what it joins: the state directory,
// or in the daemon its memory.
type joinSource interface {
	target(ref string) (*target, error)
	process(m *sandbox.MemberRecord) (*memberProcess, error)
	cgroups() (*cgroup.Host, error)
	stateDir() string
}

// process implements [joinSource].
func (a *app) process(m *sandbox.MemberRecord) (*memberProcess, error) {
	d, err := a.dir()
	if err != nil {
		return nil, err
	}
	return readProcess(d, m)
}

// cgroups implements [joinSource].
func (a *app) cgroups() (*cgroup.Host, error) { return cgroup.Detect() }

func (j *joiner) close() {
	for _, f := range j.opened {
		f.Close()
	}
}

// inCgroup puts the command into the cgroup at path of the v2 hierarchy, if
// there is one.
func (j *joiner) inCgroup(host *cgroup.Host, path string) error {
	dir, err := host.TrackingDir(path)
	if dir != nil {
		j.opened = append(j.opened, dir)
		j.spec.CgroupDir = dir
	}
	return err
}

// selection returns where each kind comes from if sel is what was asked for.
func (j *joiner) selection(sel namespace.Selection) namespace.Selection {
	full := namespace.Selection{}
	for _, k := range namespace.Kinds() {
		switch src, ok := sel[k]; {
		case ok:
			full[k] = src
		case j.target.member != nil:
			full[k] = namespace.Source{From: namespace.Member, Member: j.target.member.ID}
		case j.target.sandbox.Holds(k):
			full[k] = namespace.Source{From: namespace.Sandbox}
		default:
			full[k] = namespace.Source{From: namespace.Host}
		}
	}
	// A member's /proc shows its pid namespace, so the two go together.
	if _, ok := sel[namespace.PID]; !ok && full[namespace.PID].From == namespace.Host && full[namespace.Mnt].From == namespace.Member {
		full[namespace.PID] = full[namespace.Mnt]
	}
	return full
}

// enter opens the namespaces that sel, completed by the defaults for the
// target, says. pidNamed says that the pid namespace was asked for by name, so
// that a dead one is an error.
func (j *joiner) enter(sel namespace.Selection, pidNamed bool) error {
	j.spec.Namespaces = map[namespace.Kind]*os.File{}
	full := j.selection(sel)
	if src := full[namespace.Mnt]; src.From == namespace.Member {
		m, err := j.sibling(src.Member)
		if err != nil {
			return err
		}
		j.root = m
	}
	for _, k := range namespace.Kinds() {
		var f *os.File
		var ino uint64
		var err error
		switch src := full[k]; src.From {
		case namespace.Host:
			continue
		case namespace.Private:
			if k == namespace.User {
				return invalid(errors.New("user=private: a join cannot have a private user namespace"))
			}
			j.spec.Private = append(j.spec.Private, k)
			continue
		case namespace.Sandbox:
			f, ino, err = j.ofSandbox(k)
		case namespace.Member:
			var m *sandbox.MemberRecord
			if m, err = j.sibling(src.Member); err == nil {
				f, ino, err = j.ofMember(m, k)
			}
		}
		if k == namespace.PID && errors.Is(err, member.ErrDeadPID) && !pidNamed {
			if j.root != nil { // with the host's root, the host's pid namespace is right
				j.spec.Private = append(j.spec.Private, k)
			}
			continue
		}
		if errors.Is(err, os.ErrNotExist) && !k.Supported() {
			continue
		}
		if err != nil {
			return err
		}
		if err := j.use(k, f, ino); err != nil {
			return err
		}
		if ids := j.target.sandbox.IDs; k == namespace.User && j.spec.Namespaces[k] != nil && ids != nil { // there is no other
			j.spec.UIDs = []specs.LinuxIDMapping{{HostID: ids.Start, Size: ids.Size}}
		}
	}
	if err := j.proc(); err != nil {
		return err
	}
	if j.root == nil || j.spec.Namespaces[namespace.Mnt] == nil {
		return nil
	}
	root, err := openRoot(j.root)
	if err != nil {
		return err
	}
	j.spec.Root = root
	j.opened = append(j.opened, root)
	return nil
}

// proc asks for a new /proc if the one under the root shows another pid namespace
// than that of the process.
func (j *joiner) proc() error {
	var is, shown uint64 // inodes; 0 is a new namespace
	all, err := ownNamespaces()
	if err != nil {
		return err
	}
	own := all[namespace.PID]
	if is = j.pid; is == 0 && !slices.Contains(j.spec.Private, namespace.PID) {
		is = own
	}
	if shown = own; j.root != nil {
		shown = j.root.Inodes[namespace.PID]
	}
	if is == shown {
		return nil
	}
	pm := &member.ProcMount{}
	j.spec.Proc = pm
	if j.root == nil {
		return nil
	}
	// Whose mounts they are: a member may have another's.
	m := j.root
	for range j.target.siblings {
		src := m.Namespaces[namespace.Mnt]
		if src.From != namespace.Member {
			break
		}
		next, err := j.sibling(src.Member)
		if err != nil {
			break // removed meanwhile
		}
		m = next
	}
	if m.Namespaces[namespace.Mnt].From == namespace.Host {
		return nil
	}
	pm.Options = []string{"nosuid", "nodev", "noexec", "subset=pid"} // unless more is known to be right
	if m.Namespaces[namespace.Mnt].From != namespace.Private {
		return nil
	}
	p, err := j.src.process(m)
	if err != nil {
		return err
	}
	for _, mnt := range p.Mounts {
		if filepath.Clean(mnt.Destination) == "/proc" && mnt.Type == "proc" {
			pm.Options = mnt.Options
		}
	}
	pm.Masked, pm.ReadOnly = p.Linux.MaskedPaths, p.Linux.ReadonlyPaths
	return nil
}

// siblings returns all members of the target's sandbox.
func (j *joiner) siblings() []*sandbox.MemberRecord {
	all := j.target.siblings
	if j.target.member != nil {
		all = append(slices.Clone(all), j.target.member)
	}
	return all
}

// sibling finds a member of the target's sandbox.
func (j *joiner) sibling(ref string) (*sandbox.MemberRecord, error) {
	for _, m := range j.siblings() {
		if m.ID == ref || m.Config.Name == ref {
			return m, nil
		}
	}
	return nil, notFound(fmt.Errorf("no member %q in sandbox %s", ref, j.target.sandbox.Config.Name))
}

func (j *joiner) ofSandbox(k namespace.Kind) (*os.File, uint64, error) {
	r := j.target.sandbox
	if k == namespace.Mnt {
		return nil, 0, invalid(errors.New("mnt=sandbox: a sandbox has no mnt namespace to join: use host or member:NAME"))
	}
	if !r.Holds(k) {
		return nil, 0, invalid(fmt.Errorf("%[2]s=sandbox: sandbox %[1]s holds no %[2]s namespace: create it with --share %[2]s, or use %[2]s=host", r.Config.Name, k))
	}
	p, err := j.living(r.Pause)
	if errors.Is(err, procid.ErrGone) {
		// The daemon will start another pause in what members still hold.
		for _, m := range j.siblings() {
			if m.Namespaces[k].From != namespace.Sandbox {
				continue
			}
			if f, ino, err := j.ofMember(m, k); err == nil {
				return f, ino, nil
			}
		}
		return nil, 0, wrongState(fmt.Errorf("the pause of sandbox %s was killed, and no member holds its %s namespace", r.Config.Name, k))
	}
	if err != nil {
		return nil, 0, err
	}
	return p.namespace(k)
}

// ofMember opens a namespace of m: init's while it lives, and what the monitor
// holds afterwards.
func (j *joiner) ofMember(m *sandbox.MemberRecord, k namespace.Kind) (*os.File, uint64, error) {
	p, err := j.living(m.Init)
	if err == nil {
		return p.namespace(k)
	}
	if !errors.Is(err, procid.ErrGone) {
		return nil, 0, err
	}
	if k == namespace.PID && m.Namespaces[k].From == namespace.Private {
		return nil, 0, fmt.Errorf("%w: that of member %s, which has exited; use pid=private", member.ErrDeadPID, m.Config.Name)
	}
	f, err := member.OpenNamespace(m.Monitor, k)
	if errors.Is(err, procid.ErrGone) || errors.Is(err, os.ErrNotExist) && k.Supported() {
		return nil, 0, notHeld(m)
	}
	if err != nil {
		return nil, 0, err
	}
	j.opened = append(j.opened, f)
	ino, err := inode(f)
	return f, ino, err
}

// living opens a process, once: it is being certain which it is that takes time.
func (j *joiner) living(id procid.ID) (*livingProcess, error) {
	if p := j.alive[id]; p != nil {
		return p, nil
	}
	pidfd, inodes, err := member.OpenNamespaces(id)
	if err != nil {
		return nil, err
	}
	j.opened = append(j.opened, pidfd)
	if j.alive == nil {
		j.alive = make(map[procid.ID]*livingProcess)
	}
	p := &livingProcess{pidfd, inodes}
	j.alive[id] = p
	return p, nil
}

// namespace returns what one of the process's is joined by.
func (p *livingProcess) namespace(k namespace.Kind) (*os.File, uint64, error) {
	ino, ok := p.inodes[k]
	if !ok {
		return nil, 0, os.ErrNotExist
	}
	return p.pidfd, ino, nil
}

// use has the namespace joined that f stands for, unless it is this process's own:
// one's own user namespace cannot be joined (setns(2)).
func (j *joiner) use(k namespace.Kind, f *os.File, ino uint64) error {
	own, err := ownNamespaces()
	if err != nil || own[k] == ino {
		return err
	}
	j.spec.Namespaces[k] = f
	if k == namespace.PID {
		j.pid = ino
	}
	return nil
}

func openRoot(m *sandbox.MemberRecord) (*os.File, error) {
	root, err := member.OpenRoot(m.Monitor)
	if errors.Is(err, procid.ErrGone) && m.Init.Alive() { // the daemon will start another monitor
		root, err = member.OpenInitRoot(m.Init)
	}
	if errors.Is(err, procid.ErrGone) || errors.Is(err, os.ErrNotExist) {
		return nil, notHeld(m)
	}
	return root, err
}

func notHeld(m *sandbox.MemberRecord) error {
	return wrongState(fmt.Errorf("member %s has exited and nothing of it is held (%s)", m.Config.Name, whyNotHeld(m)))
}

// whyNotHeld says why nothing is held of a member that has exited.
func whyNotHeld(m *sandbox.MemberRecord) string {
	failed := m.Exit == nil || !m.Exit.Known || m.Exit.Code != 0
	switch policy := m.MonitorPolicy(); {
	case m.Released != nil:
		return "custody has ended, " + m.Released.Reason
	case policy == request.CustodyAlways, policy == request.CustodyFailure && failed:
		return "its monitor was killed"
	default:
		return "its custody is " + string(policy)
	}
}

// ownNamespaces returns the inodes of this process's own, which stay the same.
var ownNamespaces = sync.OnceValues(func() (map[namespace.Kind]uint64, error) {
	own := make(map[namespace.Kind]uint64)
	for _, k := range namespace.Kinds() {
		var st unix.Stat_t
		path := "/proc/self/ns/" + string(k)
		if err := unix.Stat(path, &st); err == nil {
			own[k] = st.Ino
		} else if k.Supported() {
			return nil, &os.PathError{Op: "stat", Path: path, Err: err}
		}
	}
	return own, nil
})

// memberProcess makes the process one of m's kind.
func (j *joiner) memberProcess(m *sandbox.MemberRecord) error {
	of, err := j.src.process(m)
	if err != nil {
		return err
	}
	p := *of.Process
	p.Env = slices.Clone(p.Env)
	j.spec.Process, j.spec.Seccomp, j.spec.SeccompFlag = &p, of.filter, of.flags
	return nil
}

// hostProcess makes the process one like this, with the host's root or, if
// rootfs names a directory, in that.
func (j *joiner) hostProcess(rootfs string) error {
	caps, err := member.OwnCapabilities()
	if err != nil {
		return err
	}
	cwd, err := os.Getwd()
	if err != nil {
		cwd = "/"
	}
	if rootfs != "" && rootfs != "host" {
		dir, err := filepath.Abs(rootfs)
		if err != nil {
			return err
		}
		root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return invalid(fmt.Errorf("rootfs: %w", err))
		}
		root.Close()
		cwd = "/"
		j.spec.RootDir, j.spec.Proc = dir, &member.ProcMount{}
	}
	j.spec.Process = &specs.Process{
		Env: os.Environ(), Cwd: cwd,
		Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
	}
	return nil
}

// program makes the launch program that runs args; env, cwd and user are what
// was asked for beside what the process has by its place.
func (j *joiner) program(args, env []string, cwd, user string, tty bool) (*launch.Program, error) {
	p := j.spec.Process
	p.Args, p.Terminal, p.ConsoleSize = args, tty, nil
	p.Env = mergeEnv(p.Env, env)
	if cwd != "" {
		if !filepath.IsAbs(cwd) {
			return nil, invalid(fmt.Errorf("working directory %q is not an absolute path", cwd))
		}
		p.Cwd = cwd
	}
	if user != "" {
		root := "/"
		if j.spec.Root != nil {
			root = fmt.Sprintf("/proc/self/fd/%d", j.spec.Root.Fd())
		} else if j.spec.RootDir != "" {
			root = j.spec.RootDir
		}
		var err error
		if p.User, err = member.LookupUser(root, user); err != nil {
			return nil, err
		}
	}
	return member.CompileJoin(&j.spec)
}

// runJoined runs args as o says, and returns an [exitCode].
func (a *app) runJoined(ctx context.Context, j *joiner, o *processFlags, args []string) error {
	env, err := a.environment(o.env)
	if err != nil {
		return err
	}
	prog, err := j.program(args, env, o.cwd, o.user, o.tty)
	if err != nil {
		return err
	}
	signals, stop := forward()
	defer stop()
	stdin, stdout, stderr := a.in, a.out, a.err
	if !j.onHost() && !o.tty {
		if !canLend(stdin) {
			stdin = struct{ io.Reader }{stdin}
		}
		if !canLend(stdout) {
			stdout = struct{ io.Writer }{stdout}
		}
		if !canLend(stderr) {
			stderr = struct{ io.Writer }{stderr}
		}
	}
	c := &member.Command{Program: prog, Dir: a.stateDir(), Argv: j.argv(), Stdout: stdout, Stderr: stderr, TTY: o.tty, Signals: signals}
	if o.stdin {
		c.Stdin = stdin
		if o.tty {
			t, err := openTerminal(a.in)
			if err != nil {
				return err
			}
			defer t.restore()
			c.Sizes = t.sizes
		}
	}
	code, err := c.Run(ctx)
	if err != nil {
		return &failure{code, err}
	}
	return asExit(code)
}

// onHost reports whether the process has the host's root, and so is the user's own.
func (j *joiner) onHost() bool {
	return j.spec.Root == nil && j.spec.RootDir == "" && j.spec.Namespaces[namespace.Mnt] == nil
}

// canLend reports whether f may be a descriptor of a process in a member, and so of every
// process there that has the same user: whoever has a descriptor of a file can open the
// file anew, for more than it was opened for (proc_pid_fd(5)); of a terminal too. What
// cannot be lent is copied.
func canLend(f any) bool {
	file, ok := f.(*os.File)
	if !ok {
		return true // it is copied anyway
	}
	fi, err := file.Stat()
	if err != nil {
		return false
	}
	if fi.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 {
		return true
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && fi.Mode()&os.ModeCharDevice != 0 && uint64(st.Rdev) == unix.Mkdev(1, 3) // /dev/null
}

// argv is the launcher's, with the mark that everything of a sandbox bears.
func (j *joiner) argv() []string {
	mark := installationMark(j.src.stateDir()) + "." + j.target.sandbox.ID
	if m := j.target.member; m != nil {
		mark += "/" + m.ID
	}
	return []string{"sandboxd-launch", mark}
}

// mergeEnv adds the variables of more to base, in place of those of the same
// name.
func mergeEnv(base, more []string) []string {
	out := slices.Clone(base)
	for _, kv := range more {
		name, _, _ := strings.Cut(kv, "=")
		i := slices.IndexFunc(out, func(e string) bool { return strings.HasPrefix(e, name+"=") })
		if i >= 0 {
			out[i] = kv
		} else {
			out = append(out, kv)
		}
	}
	return out
}
