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
	fd, err := unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
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

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return stat{}, ErrGone
	}
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads the three fields of proc_pid_stat(5) that matter here. The
// command name may hold blanks and parentheses, so fields count from the last
// closing one.
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return stat{}, errors.New("process status without a command name")
	}
	f := bytes.Fields(b[i+1:])
	const stateField, parentField, startField = 0, 4 - 3, 22 - 3 // fields 3, 4 and 22
	if len(f) <= startField || len(f[stateField]) != 1 {
		return stat{}, fmt.Errorf("process status with %d fields", len(f)+2)
	}
	start, err := strconv.ParseUint(string(f[startField]), 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("process start time: %w", err)
	}
	parent, err := strconv.Atoi(string(f[parentField]))
	if err != nil {
		return stat{}, fmt.Errorf("process parent: %w", err)
	}
	return stat{f[stateField][0], parent, start}, nil
}
