// Package seccomp compiles the seccomp section of an OCI configuration into the
// classic BPF program that seccomp(2) takes.
//
// The names of system calls come from github.com/elastic/go-seccomp-bpf/arch.
// That module's own assembler is not used: it compiles for one architecture
// only, knows no return data (errnoRet) and no masked comparison, all of which
// the default profile of Docker needs, and it tests one system call after the
// other, where the program made here finds the rule by binary search.
//
// # Which rule decides
//
// As with libseccomp, the rules of one system call that have no arguments decide
// before those that have, and among equals the first one listed does. Names that
// are not known on an architecture are passed over. Calls whose number is above
// all of those named in the profile fail with ENOSYS if the default action is not
// permissive: libraries probe for new calls and fall back on ENOSYS, but not on
// the EPERM that profiles answer with (runc does the same).
//
// # Foreign architectures
//
// The kernel's native architecture is always in the filter; the 32-bit one of the
// same machine (i386, arm) if it is listed. Calls made by any other end the
// process. x32 calls fail with ENOSYS where x32 is listed, as on a kernel built
// without it, which nearly all are, and end the process otherwise.
package seccomp

import (
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data, on a little-endian machine.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16 // 8 bytes each, low half first
)

const (
	maxInsns = 4096       // BPF_MAXINSNS
	x32Bit   = 0x40000000 // __X32_SYSCALL_BIT: set in the numbers of x32 calls
	retData  = 0xffff     // SECCOMP_RET_DATA
)

var retENOSYS = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS)

// machine is one architecture that a filter may see calls of.
type machine struct {
	name  specs.Arch
	audit uint32
	calls map[string]int // name to number
}

// architectures are those that the runtime specification knows; they may be named
// anywhere.
var architectures = []specs.Arch{
	specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64,
	specs.ArchMIPS, specs.ArchMIPS64, specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32,
	specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X, specs.ArchPARISC, specs.ArchPARISC64,
	specs.ArchRISCV64, specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
}

// machines returns the native architecture and those that it also executes.
func machines(goarch string) ([]machine, error) {
	switch goarch {
	case "amd64":
		return []machine{
			{specs.ArchX86_64, unix.AUDIT_ARCH_X86_64, arch.X86_64.SyscallNames},
			{specs.ArchX86, unix.AUDIT_ARCH_I386, arch.I386.SyscallNames},
		}, nil
	case "arm64":
		return []machine{
			{specs.ArchAARCH64, unix.AUDIT_ARCH_AARCH64, arch.AARCH64.SyscallNames},
			{specs.ArchARM, unix.AUDIT_ARCH_ARM, arch.ARM.SyscallNames},
		}, nil
	}
	return nil, fmt.Errorf("seccomp is not supported on %s", goarch)
}

// Flags returns the SECCOMP_FILTER_FLAG_* bits that s asks for.
func Flags(s *specs.LinuxSeccomp) (uintptr, error) {
	var flags uintptr
	for _, f := range s.Flags {
		switch f {
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case "SECCOMP_FILTER_FLAG_TSYNC":
			// The filter is installed by a process with one thread.
		default:
			return 0, fmt.Errorf("seccomp flag %q is not supported", f)
		}
	}
	return flags, nil
}

// Compile returns the filter for s on this machine's architecture. It does no
// system call. The error names what in s is unknown or cannot be expressed.
func Compile(s *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	return compile(s, runtime.GOARCH)
}

func compile(s *specs.LinuxSeccomp, goarch string) ([]unix.SockFilter, error) {
	// A listener is for SCMP_ACT_NOTIFY alone, which is refused.
	if s.ListenerMetadata != "" && s.ListenerPath == "" {
		return nil, errors.New("seccomp listenerMetadata is set without a listenerPath")
	}
	if _, err := Flags(s); err != nil {
		return nil, err
	}
	ms, err := machines(goarch)
	if err != nil {
		return nil, err
	}
	for _, a := range s.Architectures {
		if !slices.Contains(architectures, a) {
			return nil, fmt.Errorf("unknown seccomp architecture %q", a)
		}
	}
	def, err := action(s.DefaultAction, s.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("seccomp default action: %w", err)
	}
	above := def
	switch s.DefaultAction {
	case specs.ActAllow, specs.ActLog:
	default:
		above = retENOSYS
	}

	p := []unix.SockFilter{load(offArch)}
	for i, m := range ms {
		if i > 0 && !slices.Contains(s.Architectures, m.name) {
			continue
		}
		rules, err := collect(s.Syscalls, m)
		if err != nil {
			return nil, err
		}
		var body []unix.SockFilter
		body = append(body, load(offNr))
		if m.name == specs.ArchX86_64 {
			x32 := uint32(unix.SECCOMP_RET_KILL_PROCESS)
			if slices.Contains(s.Architectures, specs.ArchX32) {
				x32 = retENOSYS
			}
			body = append(body, jump(unix.BPF_JGE, x32Bit, 0, 1), ret(x32))
		}
		body = append(body, search(ranges(rules, def, above))...)
		// A machine's part may be longer than a conditional jump.
		p = append(p, jump(unix.BPF_JEQ, m.audit, 1, 0), skip(len(body)))
		p = append(p, body...)
	}
	p = append(p, ret(unix.SECCOMP_RET_KILL_PROCESS))
	if len(p) > maxInsns {
		return nil, fmt.Errorf("seccomp filter has %d instructions, the kernel takes %d", len(p), maxInsns)
	}
	return p, nil
}

// rule is one rule of one system call; it applies if all of args hold.
type rule struct {
	args []specs.LinuxSeccompArg
	ret  uint32
}

// collect sorts the rules by the number of their system call on m.
func collect(list []specs.LinuxSyscall, m machine) (map[uint32][]rule, error) {
	rules := map[uint32][]rule{}
	for _, sc := range list {
		if len(sc.Names) == 0 {
			return nil, fmt.Errorf("seccomp rule with action %s names no system call", sc.Action)
		}
		what := sc.Names[0]
		r, err := action(sc.Action, sc.ErrnoRet)
		if err != nil {
			return nil, fmt.Errorf("seccomp rule of %s: %w", what, err)
		}
		seen := map[uint]bool{}
		twice := false
		for _, a := range sc.Args {
			if err := checkArg(a); err != nil {
				return nil, fmt.Errorf("seccomp rule of %s: %w", what, err)
			}
			twice = twice || seen[a.Index]
			seen[a.Index] = true
		}
		for _, name := range sc.Names {
			n, ok := m.calls[name]
			if !ok {
				continue
			}
			nr := uint32(n)
			if twice {
				// runc and crun: a list that tests one argument more than
				// once is a list of alternatives.
				for _, a := range sc.Args {
					rules[nr] = append(rules[nr], rule{[]specs.LinuxSeccompArg{a}, r})
				}
				continue
			}
			rules[nr] = append(rules[nr], rule{sc.Args, r})
		}
	}
	for nr, rs := range rules {
		if i := slices.IndexFunc(rs, func(r rule) bool { return len(r.args) == 0 }); i >= 0 {
			rules[nr] = rs[i : i+1]
		}
	}
	return rules, nil
}

func checkArg(a specs.LinuxSeccompArg) error {
	if a.Index > 5 {
		return fmt.Errorf("argument index %d is above 5", a.Index)
	}
	switch a.Op {
	case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual:
		return nil
	}
	return fmt.Errorf("unknown operator %q", a.Op)
}

// action returns the SECCOMP_RET_* value of a.
func action(a specs.LinuxSeccompAction, data *uint) (uint32, error) {
	d := uint32(unix.EPERM)
	if data != nil {
		if *data > retData {
			return 0, fmt.Errorf("errnoRet %d is above %d", *data, retData)
		}
		d = uint32(*data)
	}
	switch a {
	case specs.ActErrno:
		return uint32(unix.SECCOMP_RET_ERRNO) | d, nil
	case specs.ActTrace:
		return uint32(unix.SECCOMP_RET_TRACE) | d, nil
	}
	if data != nil && *data != 0 {
		return 0, fmt.Errorf("errnoRet %d has no meaning for action %s", *data, a)
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActNotify:
		return 0, fmt.Errorf("action %s is not supported", a)
	}
	return 0, fmt.Errorf("unknown action %q", a)
}

// span is the code for the calls from number lo up to the next span's lo.
type span struct {
	lo   uint32
	code []unix.SockFilter
}

// ranges covers all numbers by spans, in order; neighbours with the same
// code are one.
func ranges(rules map[uint32][]rule, def, above uint32) []span {
	nrs := make([]uint32, 0, len(rules))
	for nr := range rules {
		nrs = append(nrs, nr)
	}
	slices.Sort(nrs)
	var spans []span
	add := func(lo uint32, code []unix.SockFilter) {
		if n := len(spans); n > 0 && slices.Equal(spans[n-1].code, code) {
			return
		}
		spans = append(spans, span{lo, code})
	}
	next := uint32(0)
	for _, nr := range nrs {
		if nr > next {
			add(next, []unix.SockFilter{ret(def)})
		}
		add(nr, match(rules[nr], def))
		next = nr + 1
	}
	add(next, []unix.SockFilter{ret(above)})
	return spans
}

// search returns the code that finds the span of the number in the accumulator.
func search(spans []span) []unix.SockFilter {
	if len(spans) == 1 {
		return spans[0].code
	}
	mid := len(spans) / 2
	left, right := search(spans[:mid]), search(spans[mid:])
	var p []unix.SockFilter
	if len(left) <= 255 {
		p = append(p, jump(unix.BPF_JGE, spans[mid].lo, uint8(len(left)), 0))
	} else {
		p = append(p, jump(unix.BPF_JGE, spans[mid].lo, 0, 1), skip(len(left)))
	}
	return append(append(p, left...), right...)
}

// match returns the code that tries rules in order and ends with def.
func match(rules []rule, def uint32) []unix.SockFilter {
	var p []unix.SockFilter
	for _, r := range rules {
		// From the back, because each comparison must know how far the end of
		// the rule is.
		code := []unix.SockFilter{ret(r.ret)}
		for _, a := range slices.Backward(r.args) {
			code = append(compare(a, uint8(len(code))), code...)
		}
		p = append(p, code...)
		if len(r.args) == 0 {
			return p
		}
	}
	return append(p, ret(def))
}

// compare returns the code that goes on behind itself if a holds, and otherwise
// passes over the n instructions there. Arguments are compared as unsigned 64-bit
// numbers, of which the accumulator holds one half at a time.
func compare(a specs.LinuxSeccompArg, n uint8) []unix.SockFilter {
	lo := load(offArgs + 8*uint32(a.Index))
	hi := load(offArgs + 8*uint32(a.Index) + 4)
	vlo, vhi := uint32(a.Value), uint32(a.Value>>32)
	switch a.Op {
	case specs.OpEqualTo:
		return []unix.SockFilter{
			hi, jump(unix.BPF_JEQ, vhi, 0, n+2),
			lo, jump(unix.BPF_JEQ, vlo, 0, n),
		}
	case specs.OpNotEqual:
		return []unix.SockFilter{
			hi, jump(unix.BPF_JEQ, vhi, 0, 2),
			lo, jump(unix.BPF_JEQ, vlo, n, 0),
		}
	case specs.OpMaskedEqual:
		and := func(m uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: m}
		}
		return []unix.SockFilter{
			hi, and(vhi), jump(unix.BPF_JEQ, uint32(a.ValueTwo>>32), 0, n+3),
			lo, and(vlo), jump(unix.BPF_JEQ, uint32(a.ValueTwo), 0, n),
		}
	case specs.OpGreaterThan, specs.OpGreaterEqual:
		op := uint16(unix.BPF_JGT)
		if a.Op == specs.OpGreaterEqual {
			op = unix.BPF_JGE
		}
		return []unix.SockFilter{
			hi, jump(unix.BPF_JGT, vhi, 3, 0), jump(unix.BPF_JEQ, vhi, 0, n+2),
			lo, jump(op, vlo, 0, n),
		}
	default: // less than, less or equal: checkArg has seen to it
		op := uint16(unix.BPF_JGE)
		if a.Op == specs.OpLessEqual {
			op = unix.BPF_JGT
		}
		return []unix.SockFilter{
			hi, jump(unix.BPF_JGT, vhi, n+3, 0), jump(unix.BPF_JEQ, vhi, 0, 2),
			lo, jump(op, vlo, n, 0),
		}
	}
}

func load(off uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
}

func jump(op uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, Jt: yes, Jf: no, K: k}
}

func skip(n int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(n)}
}

func ret(v uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: v}
}
