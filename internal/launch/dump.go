package launch

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// Dump writes the program as text for people and golden files, one line for
// each call, much as strace(1) would show it: the call's number, its name and
// arguments, the errnos that are ignored and the calls then passed over, and the
// step. A result of call 12 as an argument is "$12", a file of the program is
// its number in the child. What data is passed by address is shown by content;
// there are no addresses. The text is the same on every architecture.
func (p *Program) Dump(w io.Writer) error {
	var b bytes.Buffer
	for i := range p.ops {
		o := &p.ops[i]
		c, ok := calls[uintptr(o.nr)]
		if o.nr == nrFork {
			c, ok = call{"fork", "fd"}, true
		}
		if !ok {
			c = call{fmt.Sprintf("call %d", o.nr), "xxxxxx"}
		}
		fmt.Fprintf(&b, "%3d %s(", i, c.name)
		for k := range len(c.args) {
			if k > 0 {
				b.WriteString(", ")
			}
			b.WriteString(p.dumpArg(o, c.args[k], k))
		}
		b.WriteString(")")
		var ignored []string
		for _, e := range o.ignore {
			if e != 0 {
				ignored = append(ignored, unix.ErrnoName(unix.Errno(e)))
			}
		}
		if len(ignored) > 0 {
			fmt.Fprintf(&b, " !%s", strings.Join(ignored, "|"))
		}
		if o.okSkip > 0 {
			fmt.Fprintf(&b, " ok>%d", i+1+int(o.okSkip))
		}
		if o.errSkip > 0 {
			fmt.Fprintf(&b, " err>%d", i+1+int(o.errSkip))
		}
		fmt.Fprintf(&b, "  # %s\n", o.step)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// call says how a system call is shown: a letter for each argument.
//
//	d descriptor   s string     v vector of strings   n number     o octal
//	x hexadecimal  f clone flags  t open_tree flags   p openat flags
//	h open_how     a mount_attr m mount attributes    c fsconfig command
//	b data, of the length in the next argument        q eight bytes of data
//	r seccomp program
type call struct{ name, args string }

var calls = map[uintptr]call{
	unix.SYS_CAPSET:         {"capset", "qw"},
	unix.SYS_CHDIR:          {"chdir", "s"},
	unix.SYS_CHROOT:         {"chroot", "s"},
	unix.SYS_CLOSE:          {"close", "d"},
	unix.SYS_CLOSE_RANGE:    {"close_range", "nxx"},
	unix.SYS_DUP3:           {"dup3", "ddp"},
	unix.SYS_EXECVE:         {"execve", "svv"},
	unix.SYS_FACCESSAT2:     {"faccessat2", "dsnx"},
	unix.SYS_FCHDIR:         {"fchdir", "d"},
	unix.SYS_FCHOWN:         {"fchown", "dnN"},
	unix.SYS_FCHOWNAT:       {"fchownat", "dsnnx"},
	unix.SYS_FSCONFIG:       {"fsconfig", "dcssn"},
	unix.SYS_FSMOUNT:        {"fsmount", "dxm"},
	unix.SYS_FSOPEN:         {"fsopen", "sx"},
	unix.SYS_IOCTL:          {"ioctl", "dxx"},
	unix.SYS_IOPRIO_SET:     {"ioprio_set", "nnx"},
	unix.SYS_KEYCTL:         {"keyctl", "nn"},
	unix.SYS_MKDIRAT:        {"mkdirat", "dso"},
	unix.SYS_MKNODAT:        {"mknodat", "dsox"},
	unix.SYS_MOUNT_SETATTR:  {"mount_setattr", "dsta"},
	unix.SYS_MOVE_MOUNT:     {"move_mount", "dsdsx"},
	unix.SYS_OPENAT:         {"openat", "dspo"},
	unix.SYS_OPENAT2:        {"openat2", "dsh"},
	unix.SYS_OPEN_TREE:      {"open_tree", "dst"},
	unix.SYS_PERSONALITY:    {"personality", "x"},
	unix.SYS_PIVOT_ROOT:     {"pivot_root", "ss"},
	unix.SYS_PRCTL:          {"prctl", "nn"},
	unix.SYS_PRLIMIT64:      {"prlimit64", "nn"},
	unix.SYS_READ:           {"read", "d"},
	unix.SYS_RT_SIGACTION:   {"rt_sigaction", "n"},
	unix.SYS_RT_SIGPROCMASK: {"rt_sigprocmask", "nq"},
	unix.SYS_SCHED_SETATTR:  {"sched_setattr", "n"},
	unix.SYS_SECCOMP:        {"seccomp", "nxr"},
	unix.SYS_SETDOMAINNAME:  {"setdomainname", "sn"},
	unix.SYS_SETFSGID:       {"setfsgid", "n"},
	unix.SYS_SETFSUID:       {"setfsuid", "n"},
	unix.SYS_SETGROUPS:      {"setgroups", "n"},
	unix.SYS_SETHOSTNAME:    {"sethostname", "sn"},
	unix.SYS_SETNS:          {"setns", "df"},
	unix.SYS_SETRESGID:      {"setresgid", "nnn"},
	unix.SYS_SETRESUID:      {"setresuid", "nnn"},
	unix.SYS_SETSID:         {"setsid", ""},
	unix.SYS_SOCKET:         {"socket", "nxn"},
	unix.SYS_SYMLINKAT:      {"symlinkat", "sds"},
	unix.SYS_UMASK:          {"umask", "o"},
	unix.SYS_UMOUNT2:        {"umount2", "sx"},
	unix.SYS_UNLINKAT:       {"unlinkat", "dsx"},
	unix.SYS_UNSHARE:        {"unshare", "f"},
	unix.SYS_WRITE:          {"write", "db"},
}

func (p *Program) dumpArg(o *op, how byte, k int) string {
	a := Arg{o.kind[k], o.arg[k]}
	if a.kind == argResult {
		return fmt.Sprintf("$%d", a.val)
	}
	if a.kind == argInt && a.val == 0 && strings.IndexByte("svbhaqw", how) >= 0 {
		return "NULL"
	}
	word := func(i int) uint64 { return binary.NativeEndian.Uint64(p.data[a.val+uint64(8*i):]) }
	switch how {
	case 'd':
		if int32(a.val) == unix.AT_FDCWD {
			return "AT_FDCWD"
		}
	case 's':
		return fmt.Sprintf("%q", p.stringAt(a.val))
	case 'v':
		return fmt.Sprintf("%q", p.vectorAt(a.val))
	case 'N':
		return fmt.Sprint(int32(a.val))
	case 'o':
		return fmt.Sprintf("%#o", a.val)
	case 'x':
		return fmt.Sprintf("%#x", uint32(a.val))
	case 'f':
		return flags(a.val, cloneFlags)
	case 't':
		return flags(a.val, treeFlags)
	case 'p':
		return flags(a.val, openFlags)
	case 'm':
		return flags(a.val, attrFlags)
	case 'c':
		if a.val < uint64(len(fsconfigCommands)) {
			return fsconfigCommands[a.val]
		}
	case 'h':
		return fmt.Sprintf("{%s, %s}", flags(word(0), openFlags), flags(word(2), resolveFlags))
	case 'a':
		s := fmt.Sprintf("{+%s -%s", flags(word(0), attrFlags), flags(word(1), attrFlags))
		if word(2) != 0 {
			s += " " + flags(word(2), propagationFlags)
		}
		if word(3) != 0 {
			s += fmt.Sprintf(" userns %d", word(3))
		}
		return s + "}"
	case 'q':
		return fmt.Sprintf("%#x", word(0))
	case 'w':
		return fmt.Sprintf("[%#x %#x %#x]", word(0), word(1), word(2))
	case 'b':
		if n := o.arg[k+1]; a.val+n <= uint64(len(p.data)) {
			return fmt.Sprintf("%q", p.data[a.val:a.val+n])
		}
	case 'r':
		return fmt.Sprintf("%d instructions", binary.NativeEndian.Uint16(p.data[a.val:]))
	}
	return fmt.Sprint(int64(a.val))
}

func (p *Program) stringAt(off uint64) []byte {
	s, _, _ := bytes.Cut(p.data[off:], []byte{0})
	return s
}

func (p *Program) vectorAt(off uint64) []string {
	ss := []string{}
	for _, r := range p.relocs { // in the order of the vector, from one Strings
		if uint64(r.at) == off+uint64(8*len(ss)) {
			ss = append(ss, string(p.stringAt(uint64(r.target))))
		}
	}
	return ss
}

type flag struct {
	bit  uint64
	name string
}

// flags shows n as names; what has none is shown as a number.
func flags(n uint64, names []flag) string {
	var s []string
	for _, f := range names {
		if n&f.bit == f.bit {
			s = append(s, f.name)
			n &^= f.bit
		}
	}
	if n != 0 || len(s) == 0 {
		s = append(s, fmt.Sprintf("%#x", n))
	}
	return strings.Join(s, "|")
}

var (
	cloneFlags = []flag{
		{unix.CLONE_NEWNET, "NEWNET"}, {unix.CLONE_NEWIPC, "NEWIPC"}, {unix.CLONE_NEWUTS, "NEWUTS"}, {unix.CLONE_NEWPID, "NEWPID"},
		{unix.CLONE_NEWNS, "NEWNS"}, {unix.CLONE_NEWUSER, "NEWUSER"}, {unix.CLONE_NEWCGROUP, "NEWCGROUP"}, {unix.CLONE_NEWTIME, "NEWTIME"},
		{unix.CLONE_PARENT, "PARENT"},
	}
	treeFlags = []flag{
		{unix.OPEN_TREE_CLONE, "CLONE"}, {unix.AT_RECURSIVE, "RECURSIVE"}, {unix.AT_EMPTY_PATH, "EMPTY_PATH"}, {unix.O_CLOEXEC, "CLOEXEC"},
	}
	openFlags = []flag{
		{unix.O_PATH, "PATH"}, {unix.O_DIRECTORY, "DIRECTORY"}, {unix.O_CREAT, "CREAT"}, {unix.O_EXCL, "EXCL"}, {unix.O_WRONLY, "WRONLY"},
		{unix.O_RDWR, "RDWR"}, {unix.O_NOCTTY, "NOCTTY"}, {unix.O_NOFOLLOW, "NOFOLLOW"}, {unix.O_CLOEXEC, "CLOEXEC"},
	}
	resolveFlags = []flag{
		{unix.RESOLVE_IN_ROOT, "IN_ROOT"}, {unix.RESOLVE_BENEATH, "BENEATH"}, {unix.RESOLVE_NO_MAGICLINKS, "NO_MAGICLINKS"}, {unix.RESOLVE_NO_SYMLINKS, "NO_SYMLINKS"},
	}
	attrFlags = []flag{
		{unix.MOUNT_ATTR__ATIME, "ATIME"}, {unix.MOUNT_ATTR_RDONLY, "RDONLY"}, {unix.MOUNT_ATTR_NOSUID, "NOSUID"}, {unix.MOUNT_ATTR_NODEV, "NODEV"},
		{unix.MOUNT_ATTR_NOEXEC, "NOEXEC"}, {unix.MOUNT_ATTR_NOATIME, "NOATIME"}, {unix.MOUNT_ATTR_STRICTATIME, "STRICTATIME"},
		{unix.MOUNT_ATTR_NODIRATIME, "NODIRATIME"}, {unix.MOUNT_ATTR_NOSYMFOLLOW, "NOSYMFOLLOW"}, {unix.MOUNT_ATTR_IDMAP, "IDMAP"},
	}
	propagationFlags = []flag{
		{unix.MS_PRIVATE, "PRIVATE"}, {unix.MS_SLAVE, "SLAVE"}, {unix.MS_SHARED, "SHARED"}, {unix.MS_UNBINDABLE, "UNBINDABLE"},
	}
	fsconfigCommands = []string{"SET_FLAG", "SET_STRING", "SET_BINARY", "SET_PATH", "SET_PATH_EMPTY", "SET_FD", "CMD_CREATE", "CMD_RECONFIGURE"}
)
