package member

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/procid"
)

// Phase is how far a member has come, as its monitor sees it. The numbers are
// part of the monitor's protocol: append only.
type Phase uint32

// The phases.
const (
	PhaseNone    Phase = 0 // init is being made
	PhaseCreated Phase = 1 // init waits before its execve
	PhaseRunning Phase = 2
	PhaseExited  Phase = 3 // init has ended and the exit record is durable
	PhaseFailed  Phase = 4 // init could not be created; no process is left
)

// String returns a word.
func (p Phase) String() string {
	switch p {
	case PhaseNone:
		return "none"
	case PhaseCreated:
		return "created"
	case PhaseRunning:
		return "running"
	case PhaseExited:
		return "exited"
	case PhaseFailed:
		return "failed"
	}
	return fmt.Sprintf("phase %d", uint32(p))
}

// Names and sizes in a member's directory.
const (
	statusName = "status"
	exitName   = "exit.json"
	statusSize = 4096
)

const (
	statusMagic   = 0x534d4253
	statusVersion = 1

	statusExecFailed  = 1
	statusCustody     = 2
	statusUnknownExit = 4
	statusStdinClosed = 8
)

// What Status.FailOp is if none of the launch program's calls failed, as in
// monitor.h.
const (
	failKilled  = -1
	failLog     = -2
	failConfig  = -3
	failSetup   = -4
	failCustody = -5
)

// Status is what a monitor says of its member, in a page that it shares. It
// stays readable when the monitor is gone.
type Status struct {
	Phase          Phase
	ExecFailed     bool // the execve failed; FailOp and FailErrno say how
	Custody        bool // the monitor holds root and namespaces, if it lives
	UnknownExit    bool // init has ended, and nobody can know how
	StdinClosed    bool // the monitor has been told to close stdin
	MonitorPID     int
	Init           procid.ID // zero if there was none yet
	CreatedAt      time.Time // the zero time if it has not happened; so are the next two
	StartedAt      time.Time
	FinishedAt     time.Time
	FailOp         int // index of a call of the launch program, or below zero
	FailErrno      unix.Errno
	WaitStatus     unix.WaitStatus
	OOMKills       uint32
	Stdout         uint64 // bytes, a terminal's too
	Stderr         uint64
	LogErrors      uint64 // lines that could not be written to the log, or would have exceeded its limit
	ClientsDropped uint64 // attached clients that did not read fast enough
}

// ReadStatus reads the status page in a member's directory. If the page has not
// been filled by a monitor yet, the result is the zero Status.
func ReadStatus(dir string) (Status, error) {
	// A longer page is told from a whole one by parseStatus.
	b, err := readAtMost(filepath.Join(dir, statusName), statusSize+1)
	if err != nil {
		return Status{}, err
	}
	s, err := parseStatus(b)
	if err != nil {
		return Status{}, fmt.Errorf("status of member in %s: %w", dir, err)
	}
	return s, nil
}

// StatusPage is an open status page. It can be read after its name is gone.
type StatusPage struct{ f *os.File }

// OpenStatus opens the status page in a member's directory. The caller closes it.
func OpenStatus(dir string) (*StatusPage, error) {
	f, err := openRegular(filepath.Join(dir, statusName))
	if err != nil {
		return nil, err
	}
	return &StatusPage{f}, nil
}

// Read is [ReadStatus] for the open page.
func (p *StatusPage) Read() (Status, error) {
	b, err := io.ReadAll(io.NewSectionReader(p.f, 0, statusSize+1))
	if err != nil {
		return Status{}, err
	}
	return parseStatus(b)
}

// Close closes the page.
func (p *StatusPage) Close() error { return p.f.Close() }

func parseStatus(b []byte) (Status, error) {
	if len(b) != statusSize {
		return Status{}, fmt.Errorf("status page has not %d bytes", statusSize)
	}
	le := binary.LittleEndian
	u32 := func(at int) uint32 { return le.Uint32(b[at:]) }
	u64 := func(at int) uint64 { return le.Uint64(b[at:]) }
	if u32(0) == 0 && u32(8) == 0 {
		return Status{}, nil
	}
	if u32(0) != statusMagic || u32(4) != statusVersion {
		return Status{}, fmt.Errorf("magic %#x, version %d, want %#x, %d", u32(0), u32(4), uint32(statusMagic), statusVersion)
	}
	flags := u32(12)
	s := Status{
		Phase:          Phase(u32(8)),
		ExecFailed:     flags&statusExecFailed != 0,
		Custody:        flags&statusCustody != 0,
		UnknownExit:    flags&statusUnknownExit != 0,
		StdinClosed:    flags&statusStdinClosed != 0,
		MonitorPID:     int(int32(u32(16))),
		CreatedAt:      fromNanos(u64(32)),
		StartedAt:      fromNanos(u64(40)),
		FinishedAt:     fromNanos(u64(48)),
		FailOp:         int(int32(u32(56))),
		FailErrno:      unix.Errno(u32(60)),
		WaitStatus:     unix.WaitStatus(u32(64)),
		OOMKills:       u32(68),
		Stdout:         u64(72),
		Stderr:         u64(80),
		LogErrors:      u64(88),
		ClientsDropped: u64(96),
	}
	if s.Phase > PhaseFailed {
		return Status{}, fmt.Errorf("unknown %v", s.Phase)
	}
	if pid := int(int32(u32(20))); pid > 0 {
		s.Init = procid.ID{PID: pid, Start: u64(24)}
	}
	return s, nil
}

func fromNanos(ns uint64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(ns)).UTC()
}

// record is exit.json.
type record struct {
	Version      int    `json:"version"`
	Known        bool   `json:"known"`
	WaitStatus   uint32 `json:"waitStatus"`
	OOMKills     uint32 `json:"oomKills"`
	FinishedAtNs int64  `json:"finishedAtNs"`
	UserMicros   int64  `json:"userMicros"`
	SystemMicros int64  `json:"systemMicros"`
	MaxRSSKiB    int64  `json:"maxRssKiB"`
	Why          string `json:"why"`
}

const recordVersion = 1

// ReadExit reads the exit record in a member's directory. It returns nil and no
// error while there is none.
//
// A monitor whose state directory is full cannot write the record; it still
// tells the status page, which is then read instead. Only rusage is lost.
func ReadExit(dir string) (*exit.Record, error) {
	b, err := readLimited(filepath.Join(dir, exitName), 64<<10)
	missing := errors.Is(err, os.ErrNotExist)
	if err != nil && !missing {
		return nil, err
	}
	s, serr := ReadStatus(dir)
	if missing {
		if serr != nil && !errors.Is(serr, os.ErrNotExist) {
			return nil, serr
		}
		if s.Phase != PhaseExited {
			return nil, nil
		}
		return recordFromStatus(s).exit(s), nil
	}
	// The page only adds why an execve failed; a record is worth having without.
	r, err := parseRecord(b)
	if err != nil {
		return nil, fmt.Errorf("exit record in %s: %w", dir, err)
	}
	return r.exit(s), nil
}

func readLimited(name string, limit int64) ([]byte, error) {
	b, err := readAtMost(name, limit+1)
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", name, limit)
	}
	return b, err
}

// readAtMost reads the first limit bytes of a regular file.
func readAtMost(name string, limit int64) ([]byte, error) {
	f, err := openRegular(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, limit) // most are about as long, and none is long
	n, err := io.ReadFull(f, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return b[:n], err
}

func openRegular(name string) (*os.File, error) {
	// A FIFO in its place must not block the daemon.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func parseRecord(b []byte) (record, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var r record
	if err := d.Decode(&r); err != nil {
		return record{}, err
	}
	if _, err := d.Token(); err != io.EOF {
		return record{}, errors.New("something follows the record")
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("version %d, want %d", r.Version, recordVersion)
	}
	if st := unix.WaitStatus(r.WaitStatus); r.Known && !st.Exited() && !st.Signaled() {
		return record{}, fmt.Errorf("wait status %#x is not that of an ended process", r.WaitStatus)
	}
	if r.Known == (r.Why != "") {
		return record{}, errors.New("why is given just when the status is not known")
	}
	return r, nil
}

func recordFromStatus(s Status) record {
	r := record{
		Version:      recordVersion,
		Known:        !s.UnknownExit,
		WaitStatus:   uint32(s.WaitStatus),
		OOMKills:     s.OOMKills,
		FinishedAtNs: s.FinishedAt.UnixNano(),
	}
	if s.UnknownExit {
		r.Why = "monitor was killed and could not write why"
	}
	return r
}

// exit makes of r what people are shown.
func (r record) exit(s Status) *exit.Record {
	e := &exit.Record{
		Known:      r.Known,
		Code:       -1,
		OOMKilled:  r.OOMKills > 0,
		FinishedAt: time.Unix(0, r.FinishedAtNs).UTC(),
		Rusage:     exit.Rusage{UserMicros: r.UserMicros, SystemMicros: r.SystemMicros, MaxRSSKiB: r.MaxRSSKiB},
	}
	if !r.Known {
		e.Reason = "Unknown: " + r.Why
		return e
	}
	st := unix.WaitStatus(r.WaitStatus)
	if st.Signaled() {
		e.Signal = int(st.Signal())
		e.Code = 128 + e.Signal
	} else {
		e.Code = st.ExitStatus()
	}
	switch {
	case s.ExecFailed:
		e.Reason = "StartError: " + s.FailErrno.Error()
	case e.Code == 0:
		e.Reason = "Completed"
	case e.OOMKilled:
		e.Reason = "OOMKilled"
	case e.Signal != 0:
		e.Reason = "Signal"
	default:
		e.Reason = "Error"
	}
	return e
}

// WriteExit writes the exit record of an init that this process has waited for,
// in place of a monitor that was killed. Whoever writes first is believed: if
// there is a record already, it stays, and the error is nil.
func WriteExit(dir string, status unix.WaitStatus, oomKills uint32, ru *unix.Rusage) error {
	r := record{
		Version:      recordVersion,
		Known:        true,
		WaitStatus:   uint32(status),
		OOMKills:     oomKills,
		FinishedAtNs: time.Now().UnixNano(),
	}
	if ru != nil {
		r.UserMicros, r.SystemMicros, r.MaxRSSKiB = ru.Utime.Nano()/1000, ru.Stime.Nano()/1000, ru.Maxrss
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	f, err := os.CreateTemp(dir, exitName+".*.tmp") // not the monitor's name: both may be at it
	if err != nil {
		return fmt.Errorf("exit record: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Link(f.Name(), filepath.Join(dir, exitName)) // unlike rename it replaces nothing
	}
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err == nil {
		err = d.Sync()
	}
	if err != nil {
		return fmt.Errorf("exit record: %w", err)
	}
	return nil
}
