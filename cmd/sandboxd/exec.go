package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// execer runs commands in members for clients of the API, as exec does for
// those of the CLI, but from what the daemon knows. It is safe for concurrent use.
type execer struct {
	m        *sandbox.Manager
	dir      *sandbox.Dir // for what is not in memory
	node     *node
	launcher *launch.Launcher
}

// newExecer returns an execer for m, which it does not own, and n, which m has.
// The caller closes it.
func newExecer(m *sandbox.Manager, n *node) (*execer, error) {
	dir, err := sandbox.OpenDir(n.State, statusReader{})
	if err != nil {
		return nil, err
	}
	l, err := launch.Open(n.Root)
	if err != nil {
		return nil, err
	}
	return &execer{m: m, dir: dir, node: n, launcher: l}, nil
}

func (x *execer) close() error { return x.launcher.Close() }

// target implements [joinSource].
func (x *execer) target(ref string) (*target, error) {
	t := new(target)
	var err error
	t.sandbox, t.member, t.dir, t.siblings, err = x.m.Target(ref)
	return t, err
}

// process implements [joinSource].
func (x *execer) process(m *sandbox.MemberRecord) (*memberProcess, error) {
	if p := x.node.recent.get(m.ID); p != nil {
		return p, nil
	}
	p, err := readProcess(x.dir, m)
	if err == nil {
		x.node.recent.put(m.ID, p)
	}
	return p, err
}

// cgroups implements [joinSource].
func (x *execer) cgroups() (*cgroup.Host, error) { return x.node.cg, nil }

// stateDir implements [joinSource].
func (x *execer) stateDir() string { return x.node.State }

// Exec implements [server.Execer].
func (x *execer) Exec(ctx context.Context, ref string, r sandbox.ExecRequest) (sandbox.ExecResult, error) {
	if len(r.Args) == 0 {
		return sandbox.ExecResult{}, invalid(fmt.Errorf("exec %s: no command", ref))
	}
	j, err := execJoiner(x, ref)
	if err != nil {
		return sandbox.ExecResult{}, err
	}
	defer j.close()
	prog, err := j.program(r.Args, r.Env, r.Cwd, r.User, false)
	if err != nil {
		return sandbox.ExecResult{}, fmt.Errorf("exec %s: %w", ref, err)
	}
	var stdout, stderr cappedBuffer
	c := &member.Command{Program: prog, Dir: x.node.Root, Launcher: x.launcher, Argv: j.argv(), Stdout: &stdout, Stderr: &stderr}
	if len(r.Stdin) > 0 {
		c.Stdin = bytes.NewReader(r.Stdin)
	}
	code, err := c.Run(ctx)
	if errors.Is(err, procid.ErrGone) {
		err = errNotRunning
	}
	if err != nil {
		return sandbox.ExecResult{}, fmt.Errorf("exec %s: %w", ref, startError(err))
	}
	return sandbox.ExecResult{
		Code: code, Stdout: stdout.b, Stderr: stderr.b, Truncated: stdout.more || stderr.more,
	}, nil
}

// cappedBuffer keeps the first [sandbox.ExecOutputMax] bytes and takes the rest,
// so that the writer is never blocked.
type cappedBuffer struct {
	b    []byte
	more bool
}

// ReadFrom is for [io.Copy], whose buffer is 32 KiB at once: most commands say
// little.
func (c *cappedBuffer) ReadFrom(r io.Reader) (n int64, err error) {
	for buf := make([]byte, 512); ; {
		m, err := r.Read(buf)
		c.Write(buf[:m])
		n += int64(m)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		if m == len(buf) && m < 32<<10 {
			buf = make([]byte, 4*m)
		}
	}
}

func (c *cappedBuffer) Write(p []byte) (int, error) {
	n := min(len(p), sandbox.ExecOutputMax-len(c.b))
	c.b = append(c.b, p[:n]...)
	c.more = c.more || n < len(p)
	return len(p), nil
}
