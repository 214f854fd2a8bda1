package hook

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// OutputMax is how many bytes of a hook's output are kept: the last ones.
const OutputMax = 64 << 10

// drainTime is how long output is waited for when the hook has ended: a child
// that it left in the background may hold it open.
const drainTime = time.Second

// defaultPath is a hook's search path if its environment has none.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Command is one run of a program.
type Command struct {
	Path    string   // absolute
	Args    []string // with the name it is called by; nil: Path alone
	Env     []string // all there is; a search path is added if there is none
	Stdin   []byte
	Timeout time.Duration
	// CgroupDir is the cgroup v2 directory to be in, or nil; lent.
	CgroupDir *os.File
	// Started, if not nil, is called with the process's pid before it can have
	// been waited for.
	Started func(pid int)
}

// Result is how a program has ended.
type Result struct {
	Code      int // exit code, or 128+signal; -1 if it was not run, or did not end in time
	Output    []byte
	Truncated bool // there was more before Output
	Took      time.Duration
	Err       error // nil if it exited with 0
}

// Run runs c, in a session of its own, with no descriptor but its stdio, and
// returns when it has ended. If its time is over, or ctx ends, it is killed with its
// process group.
func Run(ctx context.Context, c *Command) Result {
	begin := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, c.Timeout, timeoutError(c.Timeout))
	defer cancel()
	var out Tail
	cmd := exec.CommandContext(ctx, c.Path)
	if c.Args != nil {
		cmd.Args = c.Args
	}
	cmd.Env = Environment(c.Env)
	cmd.Dir = "/"
	in, err := inputFile(c.Stdin)
	if err != nil {
		return Result{Code: -1, Took: time.Since(begin), Err: err}
	}
	defer in.Close()
	cmd.Stdin = in
	cmd.Stdout, cmd.Stderr = &out, &out // one pipe: the order is kept
	cmd.WaitDelay = drainTime
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if c.CgroupDir != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.CgroupDir.Fd())
	}
	cmd.Cancel = func() error {
		// It leads its group, and is not reaped yet: the group is its own.
		return unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	if err := cmd.Start(); err != nil {
		return Result{Code: -1, Took: time.Since(begin), Err: startError(err)}
	}
	if c.Started != nil {
		c.Started(cmd.Process.Pid)
	}
	err = cmd.Wait()
	r := Result{Took: time.Since(begin)}
	r.Output, r.Truncated = out.Bytes()
	ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case cmd.ProcessState == nil:
		r.Code, r.Err = -1, err
	case ctx.Err() != nil && ws.Signaled():
		r.Code, r.Err = -1, context.Cause(ctx)
	case ws.Signaled():
		r.Code, r.Err = 128+int(ws.Signal()), fmt.Errorf("ended by signal %d (%s)", ws.Signal(), unix.SignalName(ws.Signal()))
	case ws.ExitStatus() != 0:
		r.Code, r.Err = ws.ExitStatus(), fmt.Errorf("exit code %d", ws.ExitStatus())
	}
	// Else it has ended well: that its output or input was left open is no failure.
	return r
}

// timeoutError is why a hook that has not ended in time was killed. It matches
// [context.DeadlineExceeded].
type timeoutError time.Duration

func (e timeoutError) Error() string {
	return fmt.Sprintf("killed after its timeout of %s", time.Duration(e))
}
func (e timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// inputFile returns a file in memory with what a hook reads from its stdin. A pipe
// would be empty if this process were killed before it had written to it, and the
// hook would run and know nothing. The caller closes it.
func inputFile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("sandboxd-hook-input", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "hook input")
	// With an offset: the hook begins to read at the descriptor's own, which is 0.
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("hook input: %w", err)
	}
	return f, nil
}

// Environment is what a hook's environment becomes.
func Environment(env []string) []string {
	if slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "PATH=") }) {
		return env
	}
	return append(slices.Clone(env), defaultPath)
}

// startError leaves of an error of exec what a reader has use for.
func startError(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	return fmt.Errorf("cannot be executed: %w", err)
}

// Tail keeps the last [OutputMax] bytes that are written to it. The zero value is
// ready. It is not safe for concurrent use.
type Tail struct {
	b    []byte // at most twice as much
	more bool
}

// Write implements [io.Writer]. It never fails.
func (t *Tail) Write(p []byte) (int, error) {
	n := len(p)
	if n > OutputMax {
		p, t.more = p[n-OutputMax:], true
	}
	t.b = append(t.b, p...)
	if len(t.b) >= 2*OutputMax {
		t.b, t.more = append(t.b[:0], t.b[len(t.b)-OutputMax:]...), true
	}
	return n, nil
}

// Bytes returns what is kept, and whether there was more before it.
func (t *Tail) Bytes() ([]byte, bool) {
	if n := len(t.b) - OutputMax; n > 0 {
		return t.b[n:], true
	}
	return t.b, t.more
}
