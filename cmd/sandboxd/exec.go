package main

import (
	"bytes"
	"context"
	"fmt"

	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// execer runs commands in members for clients of the API, as exec does for
// those of the CLI: from the state directory.
type execer struct{ app *app }

// Exec implements [server.Execer].
func (x execer) Exec(ctx context.Context, ref string, r sandbox.ExecRequest) (sandbox.ExecResult, error) {
	if len(r.Args) == 0 {
		return sandbox.ExecResult{}, fmt.Errorf("exec %s: %w: no command", ref, sandbox.ErrInvalid)
	}
	j, err := x.app.execJoiner(ref)
	if err != nil {
		return sandbox.ExecResult{}, err
	}
	defer j.close()
	prog, err := j.program(r.Args, r.Env, r.Cwd, r.User, false)
	if err != nil {
		return sandbox.ExecResult{}, fmt.Errorf("exec %s: %w", ref, err)
	}
	var stdout, stderr cappedBuffer
	c := &member.Command{Program: prog, Dir: x.app.stateDir(), Argv: j.argv(), Stdout: &stdout, Stderr: &stderr}
	if len(r.Stdin) > 0 {
		c.Stdin = bytes.NewReader(r.Stdin)
	}
	code, err := c.Run(ctx)
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

func (c *cappedBuffer) Write(p []byte) (int, error) {
	n := min(len(p), sandbox.ExecOutputMax-len(c.b))
	c.b = append(c.b, p[:n]...)
	c.more = c.more || n < len(p)
	return len(p), nil
}
