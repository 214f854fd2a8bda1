package seccomp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	mobyseccomp "github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// run executes a filter on one call, by an interpreter that is not ours. That
// one reads words in network order, so they are given in it.
func run(t testing.TB, filter []unix.SockFilter, audit, nr uint32, args ...uint64) uint32 {
	t.Helper()
	raw := make([]bpf.RawInstruction, len(filter))
	for i, f := range filter {
		raw[i] = bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K}
	}
	prog, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatalf("not all instructions are known: %v", prog)
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	b := binary.BigEndian.AppendUint32(nil, nr)
	b = binary.BigEndian.AppendUint32(b, audit)
	b = binary.BigEndian.AppendUint64(b, 0) // instruction pointer
	for i := range 6 {
		var a uint64
		if i < len(args) {
			a = args[i]
		}
		b = binary.BigEndian.AppendUint32(b, uint32(a))
		b = binary.BigEndian.AppendUint32(b, uint32(a>>32))
	}
	ret, err := vm.Run(b)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(ret)
}

func number(t testing.TB, goarch, name string) uint32 {
	t.Helper()
	ms, err := machines(goarch)
	if err != nil {
		t.Fatal(err)
	}
	n, ok := ms[0].calls[name]
	if !ok {
		t.Fatalf("no call %s on %s", name, goarch)
	}
	return uint32(n)
}

func errno(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }

func TestCompare(t *testing.T) {
	holds := map[specs.LinuxSeccompOperator]func(a, v, v2 uint64) bool{
		specs.OpEqualTo:      func(a, v, _ uint64) bool { return a == v },
		specs.OpNotEqual:     func(a, v, _ uint64) bool { return a != v },
		specs.OpLessThan:     func(a, v, _ uint64) bool { return a < v },
		specs.OpLessEqual:    func(a, v, _ uint64) bool { return a <= v },
		specs.OpGreaterThan:  func(a, v, _ uint64) bool { return a > v },
		specs.OpGreaterEqual: func(a, v, _ uint64) bool { return a >= v },
		specs.OpMaskedEqual:  func(a, v, v2 uint64) bool { return a&v == v2 },
	}
	// Numbers that agree in one half, in both or in none.
	values := []uint64{0, 1, 2, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1, 2 << 32, 2<<32 + 1, 1 << 63, 1<<64 - 1}
	nr := number(t, "amd64", "getpid")
	for op, want := range holds {
		for _, v := range values {
			for _, v2 := range values {
				if op != specs.OpMaskedEqual && v2 != 0 {
					continue
				}
				for index := range uint(6) {
					f, err := compile(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{
						Names: []string{"getpid"}, Action: specs.ActAllow,
						Args: []specs.LinuxSeccompArg{{Index: index, Op: op, Value: v, ValueTwo: v2}},
					}}}, "amd64")
					if err != nil {
						t.Fatal(err)
					}
					for _, a := range values {
						var args [6]uint64
						args[index] = a
						got := run(t, f, unix.AUDIT_ARCH_X86_64, nr, args[:]...) == unix.SECCOMP_RET_ALLOW
						if got != want(a, v, v2) {
							t.Fatalf("%#x %s %#x (%#x) holds: %v", a, op, v, v2, got)
						}
					}
				}
			}
		}
	}
}

func TestRules(t *testing.T) {
	ret := func(n uint) *uint { return &n }
	eq := func(i uint, v uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: i, Op: specs.OpEqualTo, Value: v}
	}
	s := &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: ret(uint(unix.EACCES)),
		Architectures:   []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "no_such_call"}, Action: specs.ActAllow},
			{Names: []string{"write"}, Action: specs.ActErrno, ErrnoRet: ret(uint(unix.EIO))},
			{Names: []string{"close"}, Action: specs.ActErrno},
			{Names: []string{"getpid"}, Action: specs.ActKill},
			{Names: []string{"getppid"}, Action: specs.ActKillProcess},
			{Names: []string{"gettid"}, Action: specs.ActTrap},
			{Names: []string{"getuid"}, Action: specs.ActTrace, ErrnoRet: ret(7)},
			{Names: []string{"getgid"}, Action: specs.ActLog},
			{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{eq(0, 1), eq(1, 2)}},
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{eq(0, 0), eq(0, 8)}},
			{Names: []string{"kill"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{eq(0, 1)}},
			{Names: []string{"kill"}, Action: specs.ActErrno, ErrnoRet: ret(uint(unix.ESRCH)), Args: []specs.LinuxSeccompArg{eq(1, 9)}},
			{Names: []string{"dup"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{eq(0, 1)}},
			{Names: []string{"dup"}, Action: specs.ActErrno, ErrnoRet: ret(uint(unix.EMFILE))},
			{Names: []string{"dup"}, Action: specs.ActAllow},
			{Names: []string{"openat2"}, Action: specs.ActAllow}, // the highest number
		},
	}
	tests := []struct {
		call string
		args []uint64
		want uint32
	}{
		{"read", nil, unix.SECCOMP_RET_ALLOW},
		{"write", nil, errno(unix.EIO)},
		{"close", nil, errno(unix.EPERM)},
		{"getpid", nil, unix.SECCOMP_RET_KILL_THREAD},
		{"getppid", nil, unix.SECCOMP_RET_KILL_PROCESS},
		{"gettid", nil, unix.SECCOMP_RET_TRAP},
		{"getuid", nil, unix.SECCOMP_RET_TRACE | 7},
		{"getgid", nil, unix.SECCOMP_RET_LOG},
		{"geteuid", nil, errno(unix.EACCES)},
		{"socket", []uint64{1, 2}, unix.SECCOMP_RET_ALLOW},
		{"socket", []uint64{1, 3}, errno(unix.EACCES)},
		{"socket", []uint64{3, 2}, errno(unix.EACCES)},
		{"personality", []uint64{0}, unix.SECCOMP_RET_ALLOW},
		{"personality", []uint64{8}, unix.SECCOMP_RET_ALLOW},
		{"personality", []uint64{4}, errno(unix.EACCES)},
		{"kill", []uint64{1, 9}, unix.SECCOMP_RET_ALLOW},
		{"kill", []uint64{2, 9}, errno(unix.ESRCH)},
		{"kill", []uint64{2, 8}, errno(unix.EACCES)},
		{"dup", []uint64{1}, errno(unix.EMFILE)},
		{"openat2", nil, unix.SECCOMP_RET_ALLOW},
		{"faccessat2", nil, errno(unix.ENOSYS)}, // above all
	}
	for _, m := range []struct {
		goarch         string
		native, second uint32
		read32         uint32
	}{
		{"amd64", unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, 3},
		{"arm64", unix.AUDIT_ARCH_AARCH64, unix.AUDIT_ARCH_ARM, 3},
	} {
		f, err := compile(s, m.goarch)
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range tests {
			if got := run(t, f, m.native, number(t, m.goarch, tt.call), tt.args...); got != tt.want {
				t.Errorf("%s: %s%x = %#x, want %#x", m.goarch, tt.call, tt.args, got, tt.want)
			}
		}
		if got := run(t, f, m.second, m.read32); got != unix.SECCOMP_RET_ALLOW {
			t.Errorf("%s: read of the 32-bit architecture = %#x", m.goarch, got)
		}
		if got := run(t, f, unix.AUDIT_ARCH_S390X, 3); got != unix.SECCOMP_RET_KILL_PROCESS {
			t.Errorf("%s: a call of s390x = %#x", m.goarch, got)
		}
		alone := *s
		alone.Architectures = nil
		if f, err = compile(&alone, m.goarch); err != nil {
			t.Fatal(err)
		}
		if got := run(t, f, m.second, m.read32); got != unix.SECCOMP_RET_KILL_PROCESS {
			t.Errorf("%s: read of the 32-bit architecture, not listed = %#x", m.goarch, got)
		}
	}
}

func TestX32(t *testing.T) {
	for _, tt := range []struct {
		archs []specs.Arch
		want  uint32
	}{
		{nil, unix.SECCOMP_RET_KILL_PROCESS},
		{[]specs.Arch{specs.ArchX32}, errno(unix.ENOSYS)},
	} {
		f, err := compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: tt.archs}, "amd64")
		if err != nil {
			t.Fatal(err)
		}
		for _, nr := range []uint32{x32Bit, x32Bit | 1, x32Bit | 512, 1<<32 - 1} {
			if got := run(t, f, unix.AUDIT_ARCH_X86_64, nr); got != tt.want {
				t.Errorf("%v: call %#x = %#x, want %#x", tt.archs, nr, got, tt.want)
			}
		}
		if got := run(t, f, unix.AUDIT_ARCH_X86_64, x32Bit-1); got != unix.SECCOMP_RET_ALLOW {
			t.Errorf("%v: call %#x = %#x, want it allowed", tt.archs, x32Bit-1, got)
		}
	}
}

// TestSearch compares the search for rules with a look into a table, for random
// sets of rules.
func TestSearch(t *testing.T) {
	ms, err := machines("amd64")
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		s := &specs.LinuxSeccomp{DefaultAction: specs.ActLog}
		want := map[uint32]uint32{}
		for name, nr := range ms[0].calls {
			if rnd.IntN(3) == 0 {
				continue
			}
			e := uint(rnd.IntN(3)) + 1
			s.Syscalls = append(s.Syscalls, specs.LinuxSyscall{Names: []string{name}, Action: specs.ActErrno, ErrnoRet: &e})
			want[uint32(nr)] = errno(unix.Errno(e))
		}
		f, err := compile(s, "amd64")
		if err != nil {
			t.Fatal(err)
		}
		for nr := range uint32(600) {
			w, ok := want[nr]
			if !ok {
				w = unix.SECCOMP_RET_LOG
			}
			if got := run(t, f, unix.AUDIT_ARCH_X86_64, nr); got != w {
				t.Fatalf("call %d = %#x, want %#x", nr, got, w)
			}
		}
	}
}

func TestErrors(t *testing.T) {
	big := uint(70000)
	one := uint(1)
	call := func(c specs.LinuxSyscall) specs.LinuxSeccomp {
		return specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{c}}
	}
	arg := func(a specs.LinuxSeccompArg) specs.LinuxSeccomp {
		return call(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{a}})
	}
	tests := []struct {
		name string
		s    specs.LinuxSeccomp
		want string
	}{
		{"no default", specs.LinuxSeccomp{}, `default action: unknown action ""`},
		{"notify by default", specs.LinuxSeccomp{DefaultAction: specs.ActNotify}, "SCMP_ACT_NOTIFY is not supported"},
		{"notify", call(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActNotify}), "rule of read: action SCMP_ACT_NOTIFY is not supported"},
		{"unknown action", call(specs.LinuxSyscall{Names: []string{"read"}, Action: "FOO"}), `rule of read: unknown action "FOO"`},
		{"no name", call(specs.LinuxSyscall{Action: specs.ActErrno}), "names no system call"},
		{"errno too high", call(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno, ErrnoRet: &big}), "errnoRet 70000 is above 65535"},
		{"errno of allow", call(specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActAllow, ErrnoRet: &one}), "errnoRet 1 has no meaning for action SCMP_ACT_ALLOW"},
		{"index", arg(specs.LinuxSeccompArg{Index: 6, Op: specs.OpEqualTo}), "argument index 6 is above 5"},
		{"operator", arg(specs.LinuxSeccompArg{Op: "FOO"}), `unknown operator "FOO"`},
		{"flag", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"FOO"}}, `flag "FOO" is not supported`},
		{"architecture", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"FOO"}}, `unknown seccomp architecture "FOO"`},
		{"architecture that might be one", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_FOO"}}, `unknown seccomp architecture "SCMP_ARCH_FOO"`},
		{"metadata for no listener", specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerMetadata: "x"}, "listenerMetadata is set without a listenerPath"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Compile(&tt.s); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// A listener is ignored without a call to be told of, and architectures that are
// not this one's are.
func TestIgnored(t *testing.T) {
	want, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow})
	if err != nil {
		t.Fatal(err)
	}
	got, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/x", ListenerMetadata: "y", Architectures: []specs.Arch{specs.ArchLOONGARCH64}})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("filter %v, %v, want %v", got, err, want)
	}
}

func defaultProfile(t testing.TB) *specs.LinuxSeccomp {
	t.Helper()
	s, err := mobyseccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The default profile must stay small: the kernel copies and translates it for
// every member.
func TestDefaultProfileIsSmall(t *testing.T) {
	f, err := Compile(defaultProfile(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(f) > 1000 {
		t.Errorf("%d instructions", len(f))
	}
}

const childVar = "SECCOMP_TEST_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childVar); what != "" {
		child(what)
	}
	os.Exit(m.Run())
}

// child installs a filter in its own thread, makes calls and prints what became
// of them.
func child(what string) {
	runtime.LockOSThread()
	s := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"sched_yield", "getpgid"}, Action: specs.ActErrno},
		{Names: []string{"getpgrp", "getsid"}, Action: specs.ActKillProcess},
	}}
	if what == "default" {
		var err error
		if s, err = mobyseccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	f, err := Compile(s)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	const setModeFilter = 1 // SECCOMP_SET_MODE_FILTER
	if _, _, e := unix.RawSyscall(unix.SYS_SECCOMP, setModeFilter, 0, uintptr(unsafe.Pointer(&prog))); e != 0 {
		fmt.Println("seccomp:", e)
		os.Exit(1)
	}
	call := func(name string, nr uintptr, args ...uintptr) {
		var a [3]uintptr
		copy(a[:], args)
		_, _, e := unix.RawSyscall(nr, a[0], a[1], a[2])
		fmt.Printf("%s %d\n", name, int(e))
	}
	switch what {
	case "kill":
		call("getsid", unix.SYS_GETSID)
	case "errno":
		call("getpgid", unix.SYS_GETPGID)
		call("getppid", unix.SYS_GETPPID)
	case "default":
		call("getppid", unix.SYS_GETPPID)
		call("mount", unix.SYS_MOUNT)
		call("unshare", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
		call("clone newuser", unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD))
		call("clone newns", unix.SYS_CLONE, unix.CLONE_NEWNS|uintptr(unix.SIGCHLD))
		// Allowed flags, but together they are none that the kernel takes: a
		// call that gets there fails with EINVAL and makes no process.
		call("clone sighand", unix.SYS_CLONE, unix.CLONE_SIGHAND)
		call("clone3", unix.SYS_CLONE3)
		call("personality query", unix.SYS_PERSONALITY, 0xffffffff)
		call("personality 0x1", unix.SYS_PERSONALITY, 1)
		call("socket vsock", unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM)
		call("socket unix", unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM)
		call("9999", 9999)
	}
	os.Exit(0)
}

func runChild(t *testing.T, what string) (string, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"="+what)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestKernel lets the kernel judge.
func TestKernel(t *testing.T) {
	out, err := runChild(t, "errno")
	if want := fmt.Sprintf("getpgid %d\ngetppid 0\n", unix.EPERM); err != nil || out != want {
		t.Errorf("errno: %v, %q, want %q", err, out, want)
	}
	out, err = runChild(t, "kill")
	var ee *exec.ExitError
	if !errors.As(err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS {
		t.Errorf("kill: %v, %q, want SIGSYS", err, out)
	}
	out, err = runChild(t, "default")
	want := fmt.Sprintf(`getppid 0
mount %[1]d
unshare %[1]d
clone newuser %[1]d
clone newns %[1]d
clone sighand %[2]d
clone3 %[3]d
personality query 0
personality 0x1 %[1]d
socket vsock %[1]d
socket unix 0
9999 %[3]d
`, unix.EPERM, unix.EINVAL, unix.ENOSYS)
	if err != nil || out != want {
		t.Errorf("default: %v, got\n%swant\n%s", err, out, want)
	}
}

func BenchmarkCompileDefault(b *testing.B) {
	s := defaultProfile(b)
	for b.Loop() {
		if _, err := Compile(s); err != nil {
			b.Fatal(err)
		}
	}
}
