package member

import (
	"encoding/binary"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
)

// The three functions below are the end of every launch program: of a member's
// init, of an exec, of a join. They are called in this order, and what belongs
// between them is said at each.

// addLimits adds what proc says and only a process of the host's user namespace
// may do: rlimits, scheduling policy, I/O priority. It comes before a user
// namespace is joined.
//
// A limit that the host does not let be raised (CAP_SYS_RESOURCE) makes the
// program fail with a step that names it: a process that was promised a million
// files and gets a thousand fails later, where nobody knows why.
func addLimits(p *launch.Program, proc *specs.Process) error {
	for _, l := range proc.Rlimits {
		res, ok := rlimits[l.Type]
		if !ok {
			return fmt.Errorf("process.rlimits: unknown type %q", l.Type)
		}
		if l.Soft > l.Hard {
			return fmt.Errorf("process.rlimits: %s has soft limit %d above hard limit %d", l.Type, l.Soft, l.Hard)
		}
		b := binary.NativeEndian.AppendUint64(nil, l.Soft)
		b = binary.NativeEndian.AppendUint64(b, l.Hard)
		p.Call(fmt.Sprintf("set %s to %s:%s", l.Type, limit(l.Soft), limit(l.Hard)),
			unix.SYS_PRLIMIT64, launch.Int(0), launch.Int(res), p.Bytes(b), launch.Int(0))
	}
	if s := proc.Scheduler; s != nil {
		attr, err := schedAttr(s)
		if err != nil {
			return err
		}
		p.Call("set scheduling policy "+string(s.Policy), unix.SYS_SCHED_SETATTR, launch.Int(0), p.Bytes(attr), launch.Int(0))
	}
	if io := proc.IOPriority; io != nil {
		class, ok := map[specs.IOPriorityClass]int{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}[io.Class]
		if !ok || io.Priority < 0 || io.Priority > 7 {
			return fmt.Errorf("process.ioPriority: class %q with priority %d does not exist", io.Class, io.Priority)
		}
		const whoProcess, classShift = 1, 13 // ioprio_set(2)
		p.Call(fmt.Sprintf("set I/O priority %s %d", io.Class, io.Priority),
			unix.SYS_IOPRIO_SET, launch.Int(whoProcess), launch.Int(0), launch.Int(class<<classShift|io.Priority))
	}
	return nil
}

// addProcess adds everything that makes the launched process the one that proc
// describes, short of the execve: umask, signals, ids, working directory,
// capabilities, no_new_privs, and the seccomp filter, which may be nil (flags
// are the SECCOMP_FILTER_FLAG_* that it is loaded with). It closes every
// descriptor but 0 to 4 and, with a terminal, [launch.MasterFD]; results of
// earlier calls that are descriptors are of no use after it.
//
// It comes after the process's namespaces have been entered and its root is in
// place; the process must have all capabilities in its user namespace that proc
// is to have, and CAP_SETUID, CAP_SETGID, CAP_SETPCAP. [launch.Program.Created],
// if wanted, comes after it.
func addProcess(p *launch.Program, proc *specs.Process, filter []unix.SockFilter, flags uintptr) error {
	switch {
	case proc.ApparmorProfile != "":
		return fmt.Errorf("process.apparmorProfile %q: AppArmor profiles are not supported", proc.ApparmorProfile)
	case proc.SelinuxLabel != "":
		return fmt.Errorf("process.selinuxLabel %q: SELinux labels are not supported", proc.SelinuxLabel)
	case proc.ExecCPUAffinity != nil:
		return fmt.Errorf("process.execCPUAffinity: CPU affinity is not supported")
	case len(proc.Args) == 0:
		return fmt.Errorf("process.args is empty")
	case proc.Args[0] == "":
		return fmt.Errorf("no command: the first argument is empty")
	case !path.IsAbs(proc.Cwd):
		return fmt.Errorf("process.cwd %q is not an absolute path", proc.Cwd)
	}
	if err := checkStrings(proc); err != nil {
		return err
	}
	caps, err := capabilitySets(proc.Capabilities)
	if err != nil {
		return err
	}
	if len(filter) > math.MaxUint16 {
		return fmt.Errorf("seccomp filter has %d instructions; %d are possible", len(filter), math.MaxUint16)
	}

	// Before the working directory is entered: a path such as /proc/self/fd/N
	// must not lead to a directory of the host that is still open here.
	const all = ^uint32(0)
	if proc.Terminal {
		p.Call("close descriptor 5", unix.SYS_CLOSE_RANGE, launch.Int(5), launch.Int(5), launch.Int(0))
		p.Call("close descriptors", unix.SYS_CLOSE_RANGE, launch.Int(launch.MasterFD+1), launch.Int(all), launch.Int(0))
	} else {
		p.Call("close descriptors", unix.SYS_CLOSE_RANGE, launch.Int(5), launch.Int(all), launch.Int(0))
	}
	// The keys of whoever started the daemon are not the member's.
	const joinSessionKeyring = 1
	p.Call("make a session keyring", unix.SYS_KEYCTL, launch.Int(joinSessionKeyring), launch.Int(0)).
		Ignore(unix.ENOSYS, unix.EDQUOT)

	umask := uint32(0o022)
	if proc.User.Umask != nil {
		umask = *proc.User.Umask
	}
	p.Call("set umask", unix.SYS_UMASK, launch.Int(umask&0o777))

	// Go's runtime leaves these ignored if they were when it was started: by
	// nohup, in the background of a shell, without job control, and, numbers 32
	// to 34, by posix_spawn(3), for which they are the C library's own.
	sigaction := p.Bytes(make([]byte, 32))
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, 32, 33, 34} {
		p.Call(fmt.Sprintf("reset signal %d", int(sig)), unix.SYS_RT_SIGACTION, launch.Int(sig), sigaction, launch.Int(0), launch.Int(8))
	}
	p.Call("unblock signals", unix.SYS_RT_SIGPROCMASK, launch.Int(unix.SIG_SETMASK), p.Bytes(make([]byte, 8)), launch.Int(0), launch.Int(8))

	addBounding(p, caps.bounding)

	// With SECBIT_NO_SETUID_FIXUP a change of ids leaves the capability sets
	// alone (capabilities(7)), so that what follows may still be done.
	const noSetuidFixup = 1 << 2
	p.Call("keep capabilities", unix.SYS_PRCTL, launch.Int(unix.PR_SET_SECUREBITS), launch.Int(noSetuidFixup), launch.Int(0), launch.Int(0), launch.Int(0))
	uid, gid := proc.User.UID, proc.User.GID
	var groups []byte
	for _, g := range proc.User.AdditionalGids {
		groups = binary.NativeEndian.AppendUint32(groups, g)
	}
	p.Call(fmt.Sprintf("set additional groups %v", proc.User.AdditionalGids), unix.SYS_SETGROUPS, launch.Int(len(groups)/4), p.Bytes(groups))
	p.Call(fmt.Sprintf("set group id %d", gid), unix.SYS_SETRESGID, launch.Int(gid), launch.Int(gid), launch.Int(gid))
	p.Call(fmt.Sprintf("set user id %d", uid), unix.SYS_SETRESUID, launch.Int(uid), launch.Int(uid), launch.Int(uid))
	p.Call("reset securebits", unix.SYS_PRCTL, launch.Int(unix.PR_SET_SECUREBITS), launch.Int(0), launch.Int(0), launch.Int(0), launch.Int(0))

	p.Call("change to working directory "+proc.Cwd, unix.SYS_CHDIR, p.String(proc.Cwd))
	addProbe(p, proc)

	// Without no_new_privs the filter needs CAP_SYS_ADMIN. With it, the filter
	// comes as late as possible, so that it has to allow little of what is ours.
	if !proc.NoNewPrivileges {
		addFilter(p, filter, flags)
	}
	addCapabilities(p, caps)
	if proc.NoNewPrivileges {
		p.Call("set no_new_privs", unix.SYS_PRCTL, launch.Int(unix.PR_SET_NO_NEW_PRIVS), launch.Int(1), launch.Int(0), launch.Int(0), launch.Int(0))
		addFilter(p, filter, flags)
	}
	return nil
}

// addOOMScoreAdj adds the setting of oom_score_adj. It uses the host's /proc.
// A value that is lower than the host lets it be (CAP_SYS_RESOURCE) is not set.
func addOOMScoreAdj(p *launch.Program, n int) {
	step := fmt.Sprintf("set oom_score_adj to %d", n)
	val := fmt.Sprint(n)
	fd := p.Call(step, unix.SYS_OPENAT, launch.Int(unix.AT_FDCWD), p.String("/proc/self/oom_score_adj"), launch.Int(unix.O_WRONLY|unix.O_CLOEXEC))
	p.Call(step, unix.SYS_WRITE, fd.Result(), p.String(val), launch.Int(len(val))).Ignore(unix.EACCES)
	p.Call(step, unix.SYS_CLOSE, fd.Result())
}

// defaultPath is what $PATH is for a process without one.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// commandPaths are the places where proc's command may be, in order. Elements
// of $PATH that are not absolute are passed over, as Go's os/exec does.
func commandPaths(proc *specs.Process) []string {
	cmd := proc.Args[0]
	if strings.Contains(cmd, "/") {
		return []string{cmd}
	}
	search := defaultPath
	for _, e := range proc.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	var paths []string
	for dir := range strings.SplitSeq(search, ":") {
		if cand := path.Join(dir, cmd); path.IsAbs(dir) && !slices.Contains(paths, cand) {
			paths = append(paths, cand)
		}
	}
	if len(paths) == 0 {
		return []string{path.Join("/", cmd)}
	}
	return paths
}

// addProbe adds a look for the command, so that one that is missing fails the
// creation and not only the start.
func addProbe(p *launch.Program, proc *specs.Process) {
	paths := commandPaths(proc)
	step := fmt.Sprintf("command %q not found in $PATH", proc.Args[0])
	if len(paths) == 1 {
		step = fmt.Sprintf("command %q", proc.Args[0])
	}
	var probe func(i int)
	probe = func(i int) {
		o := p.Call(step, unix.SYS_FACCESSAT2, launch.Int(unix.AT_FDCWD), p.String(paths[i]), launch.Int(unix.X_OK), launch.Int(unix.AT_EACCESS))
		if i < len(paths)-1 {
			o.Else(func() { probe(i + 1) }, unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.ELOOP)
		} else {
			o.Command()
		}
	}
	probe(0)
}

func addFilter(p *launch.Program, filter []unix.SockFilter, flags uintptr) {
	if len(filter) == 0 {
		return
	}
	var code []byte
	for _, ins := range filter {
		code = binary.NativeEndian.AppendUint16(code, ins.Code)
		code = append(code, ins.Jt, ins.Jf)
		code = binary.NativeEndian.AppendUint32(code, ins.K)
	}
	prog := binary.NativeEndian.AppendUint64(nil, 0) // struct sock_fprog: len, padding, pointer
	binary.NativeEndian.PutUint16(prog, uint16(len(filter)))
	prog = append(prog, make([]byte, 8)...)
	at := p.Bytes(prog)
	p.SetPointer(at, 8, p.Bytes(code))
	const setModeFilter = 1
	p.Call("load the seccomp filter", unix.SYS_SECCOMP, launch.Int(setModeFilter), launch.Int(flags), at)
}

// dropSteps are what is said of each capability that is dropped: half of the texts
// of a program, and the same in all.
var dropSteps = sync.OnceValue(func() (steps [64]string) {
	for c := range steps {
		name := fmt.Sprintf("capability %d", c)
		if c < len(capNames) {
			name = capNames[c]
		}
		steps[c] = "drop " + name + " from the bounding set"
	}
	return steps
})

// addBounding drops all capabilities but keep from the bounding set.
func addBounding(p *launch.Program, keep uint64) {
	steps := dropSteps()
	drop := func(c int) launch.Op {
		return p.Call(steps[c],
			unix.SYS_PRCTL, launch.Int(unix.PR_CAPBSET_DROP), launch.Int(c), launch.Int(0), launch.Int(0), launch.Int(0))
	}
	for c := range capNames {
		if keep&(1<<c) == 0 {
			drop(c)
		}
	}
	// A kernel that is newer than the list may have more. EINVAL: it has not.
	var unknown func(c int)
	unknown = func(c int) {
		if c < len(steps) {
			drop(c).Then(func() { unknown(c + 1) }, unix.EINVAL)
		}
	}
	unknown(len(capNames))
}

func addCapabilities(p *launch.Program, s capSets) {
	// struct __user_cap_header_struct: version 3, pid 0; two
	// __user_cap_data_struct: effective, permitted, inheritable (capget(2)).
	hdr := binary.NativeEndian.AppendUint32(nil, unix.LINUX_CAPABILITY_VERSION_3)
	hdr = binary.NativeEndian.AppendUint32(hdr, 0)
	var data []byte
	for _, shift := range []int{0, 32} {
		for _, set := range []uint64{s.effective, s.permitted, s.inheritable} {
			data = binary.NativeEndian.AppendUint32(data, uint32(set>>shift))
		}
	}
	ambient := func(step string, op, c int) {
		p.Call(step, unix.SYS_PRCTL, launch.Int(unix.PR_CAP_AMBIENT), launch.Int(op), launch.Int(c), launch.Int(0), launch.Int(0))
	}
	ambient("clear ambient capabilities", unix.PR_CAP_AMBIENT_CLEAR_ALL, 0)
	p.Call("set capabilities", unix.SYS_CAPSET, p.Bytes(hdr), p.Bytes(data))
	for c, name := range capNames {
		if s.ambient&(1<<c) != 0 {
			ambient("raise ambient "+name, unix.PR_CAP_AMBIENT_RAISE, c)
		}
	}
}

// capSets are the five sets of capabilities(7), a bit for each capability.
type capSets struct{ bounding, effective, permitted, inheritable, ambient uint64 }

// capabilitySets turns names into sets and refuses what the kernel would.
func capabilitySets(c *specs.LinuxCapabilities) (s capSets, err error) {
	if c == nil {
		return s, nil
	}
	for _, set := range []struct {
		name string
		caps []string
		to   *uint64
	}{
		{"bounding", c.Bounding, &s.bounding},
		{"effective", c.Effective, &s.effective},
		{"permitted", c.Permitted, &s.permitted},
		{"inheritable", c.Inheritable, &s.inheritable},
		{"ambient", c.Ambient, &s.ambient},
	} {
		for _, name := range set.caps {
			i := slices.Index(capNames, name)
			if i < 0 {
				return s, fmt.Errorf("process.capabilities.%s: unknown capability %q", set.name, name)
			}
			*set.to |= 1 << i
		}
	}
	for i, name := range capNames {
		bit := uint64(1) << i
		switch {
		case s.effective&bit != 0 && s.permitted&bit == 0:
			return s, fmt.Errorf("process.capabilities: %s is effective but not permitted", name)
		case s.ambient&bit != 0 && s.permitted&s.inheritable&bit == 0:
			return s, fmt.Errorf("process.capabilities: %s is ambient but not permitted and inheritable", name)
		}
	}
	return s, nil
}

// capNames are the capabilities by number (linux/capability.h, Linux 5.9).
var capNames = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW",
	"CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
	"CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD",
	"CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
	"CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// CapabilityNames returns the names of all capabilities.
func CapabilityNames() []string { return slices.Clone(capNames) }

// rlimits are the resources of getrlimit(2).
var rlimits = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_STACK": unix.RLIMIT_STACK,
	"RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
	"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

func limit(n uint64) string {
	if n == math.MaxUint64 {
		return "unlimited"
	}
	return fmt.Sprint(n)
}

// schedAttr is the struct sched_attr of sched_setattr(2), first version.
func schedAttr(s *specs.Scheduler) ([]byte, error) {
	policy, ok := map[specs.LinuxSchedulerPolicy]uint32{
		specs.SchedOther: 0, specs.SchedFIFO: 1, specs.SchedRR: 2, specs.SchedBatch: 3, specs.SchedIdle: 5, specs.SchedDeadline: 6,
	}[s.Policy]
	if !ok {
		return nil, fmt.Errorf("process.scheduler.policy %q is not supported", s.Policy)
	}
	var flags uint64
	for _, f := range s.Flags {
		bit, ok := map[specs.LinuxSchedulerFlag]uint64{
			specs.SchedFlagResetOnFork: 1, specs.SchedFlagReclaim: 2, specs.SchedFlagDLOverrun: 4,
			specs.SchedFlagKeepPolicy: 8, specs.SchedFlagKeepParams: 0x10,
		}[f]
		if !ok {
			return nil, fmt.Errorf("process.scheduler.flags: %q is not supported", f)
		}
		flags |= bit
	}
	const size = 48
	b := binary.NativeEndian.AppendUint32(nil, size)
	b = binary.NativeEndian.AppendUint32(b, policy)
	b = binary.NativeEndian.AppendUint64(b, flags)
	b = binary.NativeEndian.AppendUint32(b, uint32(s.Nice))
	b = binary.NativeEndian.AppendUint32(b, uint32(s.Priority))
	b = binary.NativeEndian.AppendUint64(b, s.Runtime)
	b = binary.NativeEndian.AppendUint64(b, s.Deadline)
	return binary.NativeEndian.AppendUint64(b, s.Period), nil
}

// checkStrings refuses what execve(2) cannot take.
func checkStrings(proc *specs.Process) error {
	for i, s := range proc.Args {
		if strings.Contains(s, "\x00") {
			return fmt.Errorf("process.args[%d] %q holds a NUL byte", i, s)
		}
	}
	for i, s := range proc.Env {
		if strings.Contains(s, "\x00") {
			return fmt.Errorf("process.env[%d] %q holds a NUL byte", i, s)
		}
	}
	if strings.Contains(proc.Cwd, "\x00") {
		return fmt.Errorf("process.cwd %q holds a NUL byte", proc.Cwd)
	}
	return nil
}
