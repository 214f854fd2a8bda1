// Package launch compiles the start of a process into a launch program: a flat
// list of system calls that a freestanding child executes one after the other,
// the last one being execve.
//
// A Go process cannot do that itself: it has threads, so it may not join a user
// or time namespace (setns(2)), and between fork and execve it must not run Go.
// And because the child knows nothing but the list, what it does can be read,
// compared and tested as text ([Program.Dump]), and a failure names its step:
// the child reports the index of the call and its errno, and [Program.Explain]
// makes "mount proc on /proc: operation not permitted" of them.
//
// The binary form is read by launch.h, in this directory, which is part of the
// programs that execute it: launch.c here and monitor.c in package member.
package launch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Descriptor numbers in the child. A program may rely on these and on those
// that [Program.File] hands out; everything else is closed.
const (
	StatusFD = 3  // the pipe that reports are written to; close-on-exec
	StartFD  = 4  // what a created child reads from before its execve; close-on-exec
	MasterFD = 6  // where a program puts a terminal's master for its starter to fetch
	FirstFD  = 32 // the first descriptor that belongs to the program
)

// Pseudo system calls, understood by the interpreter.
const nrFork = 0xf0000001

// Argument kinds, as in launch.h.
const (
	argInt    = 0
	argData   = 1
	argResult = 2
)

// Arg is one argument of a call.
type Arg struct {
	kind uint8
	val  uint64
}

// Int is a number as an argument.
func Int[T ~int | ~int8 | ~int16 | ~int32 | ~int64 | ~uint | ~uint8 | ~uint16 | ~uint32 | ~uint64 | ~uintptr](n T) Arg {
	return Arg{argInt, uint64(n)}
}

// Program is a launch program that is being put together. It is not safe for
// concurrent use. It keeps the files given to [Program.File] but does not own
// them.
type Program struct {
	ops      []op
	relocs   []reloc
	data     []byte
	interned map[string]Arg
	files    []*os.File
	created  int  // where Created was called
	waits    bool // it was
}

type op struct {
	nr      uint32
	kind    [6]uint8
	okSkip  uint16
	errSkip uint16
	ignore  [4]uint16
	arg     [6]uint64
	step    string
	command bool
}

type reloc struct{ at, target uint32 }

// Op is one call of a program.
type Op struct {
	p *Program
	i int
}

// Call adds a system call. step says for people what it does, as in "mount proc
// on /proc"; it is what a failure is reported as.
func (p *Program) Call(step string, nr uintptr, args ...Arg) Op {
	o := op{nr: uint32(nr), step: step}
	if len(args) > len(o.arg) {
		panic("launch: a system call has at most six arguments")
	}
	for i, a := range args {
		o.kind[i], o.arg[i] = a.kind, a.val
	}
	if p.ops == nil {
		p.ops = make([]op, 0, 128) // as many as an exec has
	}
	p.ops = append(p.ops, o)
	return Op{p, len(p.ops) - 1}
}

// Fork makes the rest of the program run in a new process, which has the same
// parent as the present one (CLONE_PARENT). It is how a pid namespace that was
// joined is entered, or with [unix.CLONE_NEWPID] in flags a new one, and how a
// cgroup is: the process is born in the cgroup v2 directory that cgroup is a
// descriptor of, if it is not nil.
//
// A monitor, which clones its child anyway, does what a fork at the beginning of
// the program says in one go.
func (p *Program) Fork(step string, flags uintptr, cgroup *Arg) Op {
	fd := Int(-1)
	if cgroup != nil {
		fd = *cgroup
	}
	return p.Call(step, nrFork, Int(flags), fd, Int(0))
}

// Result is what the call returned, as an argument of a later one: usually a
// descriptor. It is -1 if the call was passed over.
func (o Op) Result() Arg { return Arg{argResult, uint64(o.i)} }

// Ignore makes errs no failures of the call.
func (o Op) Ignore(errs ...unix.Errno) Op {
	ig := &o.p.ops[o.i].ignore
	for _, e := range errs {
		n := 0
		for n < len(ig) && ig[n] != 0 && ig[n] != uint16(e) {
			n++
		}
		if n == len(ig) {
			panic("launch: a call can ignore at most four errnos")
		}
		ig[n] = uint16(e)
	}
	return o
}

// Command marks a call as one that looks for the command: its failure means what
// a failure of the execve would.
func (o Op) Command() Op {
	o.p.ops[o.i].command = true
	return o
}

// Then adds, by calling body, the calls that are made only if this one
// succeeds. It fails without consequence with one of errs.
func (o Op) Then(body func(), errs ...unix.Errno) {
	o.mustBeLast()
	o.Ignore(errs...)
	o.p.ops[o.i].errSkip = o.skip(body)
}

// Else adds, by calling body, the calls that are made only if this one fails
// with one of errs.
func (o Op) Else(body func(), errs ...unix.Errno) {
	o.mustBeLast()
	o.Ignore(errs...)
	o.p.ops[o.i].okSkip = o.skip(body)
}

func (o Op) mustBeLast() {
	if o.i != len(o.p.ops)-1 {
		panic("launch: Then and Else follow the call at once")
	}
}

func (o Op) skip(body func()) uint16 {
	body()
	return uint16(len(o.p.ops) - 1 - o.i)
}

// String is a pointer to a NUL-terminated copy of s, which must not hold NUL
// itself (it would be cut there). Equal strings share their place.
func (p *Program) String(s string) Arg {
	if a, ok := p.interned[s]; ok {
		return a
	}
	a := p.place(append([]byte(s), 0), 1)
	if p.interned == nil {
		p.interned = make(map[string]Arg)
	}
	p.interned[s] = a
	return a
}

// Bytes is a pointer to a copy of b, aligned to 8. The child may write to it.
func (p *Program) Bytes(b []byte) Arg { return p.place(b, 8) }

// Strings is a NULL-terminated array of pointers to strings, as execve wants.
func (p *Program) Strings(ss []string) Arg {
	ptrs := make([]Arg, len(ss))
	for i, s := range ss {
		ptrs[i] = p.String(s)
	}
	a := p.place(make([]byte, 8*(len(ss)+1)), 8)
	for i, ptr := range ptrs {
		p.SetPointer(a, 8*i, ptr)
	}
	return a
}

// SetPointer puts the address of target at offset into the data of at, which
// comes from [Program.Bytes].
func (p *Program) SetPointer(at Arg, offset int, target Arg) {
	p.relocs = append(p.relocs, reloc{uint32(at.val) + uint32(offset), uint32(target.val)})
}

// File is the number that f will have in the child. A file that is given twice
// has one number.
func (p *Program) File(f *os.File) Arg { return Int(p.FileNumber(f)) }

// FileNumber is [Program.File] for a number that goes into the data of a call.
func (p *Program) FileNumber(f *os.File) int {
	for i, g := range p.files {
		if f == g {
			return FirstFD + i
		}
	}
	p.files = append(p.files, f)
	return FirstFD + len(p.files) - 1
}

// Files are the program's files; the one at index i is to be number FirstFD+i
// in the child.
func (p *Program) Files() []*os.File { return p.files }

// Len is the number of calls so far.
func (p *Program) Len() int { return len(p.ops) }

func (p *Program) place(b []byte, align int) Arg {
	for len(p.data)%align != 0 {
		p.data = append(p.data, 0)
	}
	a := Arg{argData, uint64(len(p.data))}
	p.data = append(p.data, b...)
	if len(b) == 0 { // a pointer to nothing must still be inside
		p.data = append(p.data, 0)
	}
	return a
}

// Limits of the binary form, as in launch.h.
const (
	magic      = 0x504c4253
	version    = 1
	maxOps     = 2048
	maxLen     = 8 << 20
	headerSize = 32
	opSize     = 72
	relocSize  = 8
)

// Size is the length of the binary form. It fails if there can be none.
func (p *Program) Size() (int, error) {
	if len(p.ops) == 0 || len(p.ops) > maxOps {
		return 0, fmt.Errorf("launch program has %d calls; 1 to %d are possible", len(p.ops), maxOps)
	}
	n := (headerSize+opSize*len(p.ops)+relocSize*len(p.relocs)+15)&^15 + len(p.data)
	if n > maxLen {
		return 0, fmt.Errorf("launch program is %d bytes long; %d are possible (arguments and environment count)", n, maxLen)
	}
	return n, nil
}

// Encode returns the binary form.
func (p *Program) Encode() ([]byte, error) { return p.encodeAfter(nil) }

// encodeAfter returns prefix and the binary form.
func (p *Program) encodeAfter(prefix []byte) ([]byte, error) {
	size, err := p.Size()
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	b := make([]byte, 0, len(prefix)+size)
	b = append(b, prefix...)
	for _, n := range []int{magic, version, len(p.ops), len(p.relocs), len(p.data), 0, 0, 0} {
		b = le.AppendUint32(b, uint32(n))
	}
	for i := range p.ops {
		o := &p.ops[i]
		b = le.AppendUint32(b, o.nr)
		b = append(b, o.kind[:]...)
		b = le.AppendUint16(b, o.okSkip)
		b = le.AppendUint16(b, o.errSkip)
		b = le.AppendUint16(b, 0)
		for _, e := range o.ignore {
			b = le.AppendUint16(b, e)
		}
		for _, a := range o.arg {
			b = le.AppendUint64(b, a)
		}
	}
	for _, r := range p.relocs {
		b = le.AppendUint32(b, r.at)
		b = le.AppendUint32(b, r.target)
	}
	for (len(b)-len(prefix))%16 != 0 {
		b = append(b, 0)
	}
	return append(b, p.data...), nil
}

// Memfd returns prefix and the binary form in a sealed memfd; the caller closes it.
func (p *Program) Memfd(prefix []byte) (*os.File, error) {
	b, err := p.encodeAfter(prefix)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("launch-program", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "launch-program")
	_, err = f.Write(b)
	if err == nil {
		const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write launch program: %w", err)
	}
	return f, nil
}

// Step returns what was said of call i when it was added.
func (p *Program) Step(i int) string {
	if i < 0 || i >= len(p.ops) {
		return "read the launch program"
	}
	return p.ops[i].step
}

// Explain makes an error of a reported failure. It is a [*StepError].
func (p *Program) Explain(i int, errno unix.Errno) error {
	e := &StepError{Step: p.Step(i), Errno: errno}
	if i >= 0 && i < len(p.ops) {
		e.Exec = p.ops[i].nr == unix.SYS_EXECVE
		e.Command = e.Exec || p.ops[i].command
	}
	return e
}

// ExplainStart returns an [Program.Explain] for the calls after
// [Program.Created] that keeps nothing else of the program alive: a program
// is 50 KB, and a member may wait long for its start.
func (p *Program) ExplainStart() func(i int, errno unix.Errno) error {
	tail := &Program{ops: make([]op, len(p.ops)-p.created)}
	for i := range tail.ops {
		o := &p.ops[p.created+i]
		tail.ops[i] = op{nr: o.nr, step: strings.Clone(o.step), command: o.command}
	}
	created := p.created
	return func(i int, errno unix.Errno) error { return tail.Explain(i-created, errno) }
}

// StepError says which call of a launch program failed.
type StepError struct {
	Step    string
	Exec    bool // it was the execve: everything before had succeeded
	Command bool // the command is missing or may not be executed, found out by the execve or before
	Errno   unix.Errno
}

func (e *StepError) Error() string { return e.Step + ": " + e.Errno.Error() }

// Unwrap returns the errno, so that errors.Is(err, unix.ENOENT) works.
func (e *StepError) Unwrap() error { return e.Errno }

// ErrLaunch is wrapped by errors about the launcher itself: it died, or what it
// said could not be understood.
var ErrLaunch = errors.New("launcher failed")
