// Package procid identifies a process for longer than its pid does.
//
// A pid alone names nothing once its process has been reaped. A pid together
// with the start time that the kernel shows for it does, until the next boot;
// and a pidfd made from such a pair names the process for as long as it is open.
package procid

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrGone means that the process has been reaped, whether or not its pid is in
// use again.
var ErrGone = errors.New("process is gone")

// ID is a pid in the daemon's pid namespace and the start time of the process,
// in clock ticks since boot (field 22 of /proc/PID/stat, proc_pid_stat(5)).
type ID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// IsZero reports whether id names no process.
func (id ID) IsZero() bool { return id.PID == 0 }

// String returns PID@START, for messages.
func (id ID) String() string { return fmt.Sprintf("%d@%d", id.PID, id.Start) }

// Of returns the identity of the process that has pid now.
func Of(pid int) (ID, error) {
	st, err := readStat(pid)
	if err != nil {
		return ID{}, err
	}
	return ID{pid, st.start}, nil
}

// Open returns a pidfd of the process (pidfd_open(2)); the caller closes it.
// It fails with [ErrGone] if the process has been reaped. A zombie is not gone.
func (id ID) Open() (*os.File, error) {
	if id.PID <= 0 {
		return nil, ErrGone
	}
	fd, err := Pidfd(id.PID)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "pidfd:"+id.String())
	// The pid may have been recycled before pidfd_open; it cannot be while the
	// pidfd is open and the process is not reaped, so this reading decides.
	now, err := Of(id.PID)
	if err == nil && now != id {
		err = ErrGone
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Pidfd returns a pidfd of the process that has pid now, for the caller to close. It
// fails with [ErrGone] if none has: the pid may be that of a thread by now, which
// pidfd_open answers with EINVAL, and newer kernels with ENOENT.
func Pidfd(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	switch err {
	case nil:
		return fd, nil
	case unix.ESRCH, unix.EINVAL, unix.ENOENT:
		return -1, ErrGone
	}
	return -1, os.NewSyscallError("pidfd_open", err)
}

// Alive reports whether the process runs: it has neither been reaped nor is it
// a zombie.
func (id ID) Alive() bool {
	st, err := readStat(id.PID)
	return err == nil && st.start == id.Start && st.state != 'Z' && st.state != 'X'
}

// Parent returns the pid of the process's parent. It fails with [ErrGone] if there
// is no such process.
func (id ID) Parent() (int, error) {
	st, err := readStat(id.PID)
	if err == nil && st.start != id.Start {
		err = ErrGone
	}
	return st.parent, err
}

// Signal sends sig to the process. It fails with [ErrGone] if there is none.
func (id ID) Signal(sig unix.Signal) error {
	f, err := id.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.PidfdSendSignal(int(f.Fd()), sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return ErrGone
		}
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return nil
}

type stat struct {
	state  byte
	parent int
	start  uint64
}

// maxStat is more than the fields up to the start time have: 21 numbers of at most
// 20 digits, and a name of at most 64 bytes.
const maxStat = 640

// readStat makes little garbage: it is asked for every process of ours whenever
// somebody looks at all of them.
func readStat(pid int) (stat, error) {
	path := "/proc/" + strconv.Itoa(pid) + "/stat"
	fd, err := openRead(path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return stat{}, ErrGone
	}
	if err != nil {
		return stat{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var b [maxStat]byte
	n, err := read(fd, b[:])
	if errors.Is(err, unix.ESRCH) {
		return stat{}, ErrGone
	}
	if err != nil {
		return stat{}, &os.PathError{Op: "read", Path: path, Err: err}
	}
	return parseStat(b[:n])
}

func openRead(path string) (fd int, err error) {
	for {
		if fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != unix.EINTR {
			return fd, err
		}
	}
}

func read(fd int, b []byte) (n int, err error) {
	for {
		if n, err = unix.Read(fd, b); err != unix.EINTR {
			return n, err
		}
	}
}

// parseStat reads the three fields of proc_pid_stat(5) that matter here. The
// command name may hold blanks and parentheses, so fields count from the last
// closing one.
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return stat{}, errors.New("process status without a command name")
	}
	const stateField, parentField, startField = 3, 4, 22
	var st stat
	n := 2 // the pid and the name come before
	for f := range bytes.FieldsSeq(b[i+1:]) {
		n++
		var err error
		switch n {
		case stateField:
			if len(f) != 1 {
				return stat{}, fmt.Errorf("process state %q", string(f))
			}
			st.state = f[0]
		case parentField:
			if st.parent, err = strconv.Atoi(string(f)); err != nil {
				return stat{}, fmt.Errorf("process parent: %w", err)
			}
		case startField:
			if st.start, err = strconv.ParseUint(string(f), 10, 64); err != nil {
				return stat{}, fmt.Errorf("process start time: %w", err)
			}
			return st, nil
		}
	}
	return stat{}, fmt.Errorf("process status with %d fields", n)
}
