package hook

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"
)

// Joined is one run of a program that somebody else starts, in namespaces that
// package os/exec cannot enter.
type Joined struct {
	Stdin   []byte
	Timeout time.Duration
	// Run starts the program with in as its stdin and out as its stdout and
	// stderr, and returns its exit code, or 128 and a signal, when it has ended. If
	// ctx ends it kills it. The error says why there is no code of its own.
	Run func(ctx context.Context, in, out *os.File) (int, error)
}

// Do is [Run] for such a program.
func (j *Joined) Do(ctx context.Context) Result {
	begin := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, j.Timeout, timeoutError(j.Timeout))
	defer cancel()
	in, err := inputFile(j.Stdin)
	if err != nil {
		return Result{Code: -1, Err: err}
	}
	defer in.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		return Result{Code: -1, Err: err}
	}
	defer outR.Close()
	var out Tail
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		io.Copy(&out, outR)
	}()
	code, err := j.Run(ctx, in, outW)
	outW.Close()
	outR.SetReadDeadline(time.Now().Add(drainTime)) // a child in the background may hold the other end
	<-copied
	r := Result{Code: code, Took: time.Since(begin)}
	r.Output, r.Truncated = out.Bytes()
	switch {
	case ctx.Err() != nil:
		r.Code, r.Err = -1, context.Cause(ctx)
	case err != nil:
		r.Code, r.Err = -1, fmt.Errorf("cannot be executed: %w", err)
	case code > 128:
		r.Err = fmt.Errorf("ended by signal %d, or exit code %d", code-128, code)
	case code != 0:
		r.Err = fmt.Errorf("exit code %d", code)
	}
	return r
}
