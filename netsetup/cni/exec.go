package cni

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
)

// markEnv is the variable by which plugins are found that a killed daemon has
// left: MARK.DRIVER.NUMBER, of the installation, the driver and the call.
const markEnv = "SANDBOXD_CNI_CALL"

// What is kept of a plugin's output.
const (
	maxStdout = 1 << 20
	maxStderr = 4 << 10
)

// drain is how long the output of a plugin that has ended is waited for, if a
// process that it left holds the pipe open.
const drain = 500 * time.Millisecond

// A PluginError is the failure of one plugin.
type PluginError struct {
	Plugin  string // its name
	Command string // ADD, DEL, …
	Code    uint   // of the specification or the plugin's own, from 100; 0 if it did not say
	Msg     string
	Details string
	Stderr  string // the end of it
	Err     error  // how it ended; nil if it exited with 0
}

func (e *PluginError) Error() string {
	var parts []string
	if e.Code != 0 {
		parts = append(parts, "CNI error "+strconv.Itoa(int(e.Code)))
	}
	if e.Err != nil && e.Code == 0 {
		parts = append(parts, e.Err.Error())
	}
	for _, s := range []string{e.Msg, e.Details} {
		if s != "" {
			parts = append(parts, oneLine(s))
		}
	}
	if e.Stderr != "" {
		parts = append(parts, "stderr: "+oneLine(e.Stderr))
	}
	return strings.Join(parts, ": ")
}

// Unwrap returns how the plugin ended.
func (e *PluginError) Unwrap() error { return e.Err }

// oneLine makes text of a plugin fit for an error: one line, nothing that a terminal would obey.
func oneLine(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// runner starts plugins for libcni.
type runner struct {
	version.PluginDecoder
	mark    string
	timeout time.Duration
	driver  string // unlike that of any other driver
	calls   atomic.Uint64
	ran     func(plugin, command string, took time.Duration, err error)
}

var _ invoke.Exec = (*runner)(nil)

func newRunner(mark string, timeout time.Duration) *runner {
	return &runner{mark: mark, timeout: timeout, driver: rand.Text()}
}

// FindInPath looks for a plugin's program.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	file, err := invoke.FindInPath(plugin, dirs)
	if err != nil {
		return "", fmt.Errorf("there is no plugin %q in %s", plugin, strings.Join(dirs, ", "))
	}
	if fi, err := os.Stat(file); err == nil && fi.Mode()&0o111 == 0 {
		return "", fmt.Errorf("plugin %s is not executable", file)
	}
	return file, nil
}

// ExecPlugin runs one plugin and returns what it printed. Its errors are PluginErrors.
func (r *runner) ExecPlugin(ctx context.Context, file string, stdin []byte, env []string) ([]byte, error) {
	begin := time.Now()
	out, err := r.run(ctx, file, stdin, env)
	if r.ran != nil {
		r.ran(filepath.Base(file), commandOf(env), time.Since(begin), err)
	}
	return out, err
}

func (r *runner) run(ctx context.Context, file string, stdin []byte, env []string) ([]byte, error) {
	pe := &PluginError{Plugin: filepath.Base(file), Command: commandOf(env)}
	if err := ctx.Err(); err != nil {
		pe.Err = fmt.Errorf("not started: %w", err)
		return nil, pe
	}
	crash.Point("cni " + pe.Command + " before")
	limited, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	call := fmt.Sprintf("%s.%s.%d", r.mark, r.driver, r.calls.Add(1))
	var stdout, stderr output
	stdout.max, stderr.max = maxStdout, maxStderr
	stderr.tail = true
	var cmd *exec.Cmd
	var err error
	for range 50 {
		cmd = exec.CommandContext(limited, file)
		cmd.Env = append(env, markEnv+"="+call)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
		cmd.WaitDelay = drain
		// A program that is being replaced may be busy for a moment.
		if err = cmd.Run(); !errors.Is(err, unix.ETXTBSY) || limited.Err() != nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if limited.Err() != nil || cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == -1 {
		// What it started may still be at work, and would allocate after the DEL.
		killCall(call)
	}
	crash.Point("cni " + pe.Command + " after")
	if errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success() {
		err = nil // a process that it left holds its output open
	}
	pe.Stderr = stderr.String()
	switch {
	case err == nil && pe.Command == "ADD" && !json.Valid(stdout.buf):
		pe.Msg = "printed no result: " + excerpt(stdout.buf)
		return nil, pe
	case err == nil:
		return stdout.buf, nil
	case ctx.Err() != nil:
		pe.Err = fmt.Errorf("killed: %w", ctx.Err())
	case limited.Err() != nil:
		pe.Err = fmt.Errorf("killed, since it took longer than %s: %w", r.timeout, limited.Err())
	case stdout.over:
		pe.Err = fmt.Errorf("printed more than %d bytes", maxStdout)
		return nil, pe
	default:
		pe.Err = err
	}
	var said types.Error
	if json.Unmarshal(stdout.buf, &said) == nil {
		pe.Code, pe.Msg, pe.Details = said.Code, said.Msg, said.Details
	} else if len(stdout.buf) > 0 {
		pe.Msg = "printed no error: " + excerpt(stdout.buf)
	}
	if limited.Err() != nil {
		pe.Code = 0 // how it ended says more
	}
	return nil, pe
}

func commandOf(env []string) string {
	for _, e := range env {
		if c, ok := strings.CutPrefix(e, "CNI_COMMAND="); ok {
			return c
		}
	}
	return ""
}

func excerpt(b []byte) string {
	const most = 200
	if len(b) > most {
		return strconv.Quote(string(b[:most])) + "…"
	}
	return strconv.Quote(string(b))
}

// output keeps a bounded part of what is written to it.
type output struct {
	buf  []byte
	max  int
	tail bool // keep the end and drop the beginning; else more than max is an error
	over bool
}

func (o *output) Write(p []byte) (int, error) {
	if !o.tail && len(o.buf)+len(p) > o.max {
		o.over = true
		return 0, errors.New("too much output")
	}
	o.buf = append(o.buf, p...)
	if n := len(o.buf) - o.max; n > 0 {
		o.over = true
		o.buf = append(o.buf[:0], o.buf[n:]...)
	}
	return len(p), nil
}

func (o *output) String() string {
	s := strings.TrimSpace(strings.ToValidUTF8(string(o.buf), "?"))
	if o.over {
		return "…" + s
	}
	return s
}
