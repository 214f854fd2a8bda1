package main

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// errReaderGone ends what follows something, as SIGPIPE would at its next write.
var errReaderGone = exitCode(exitSignal + int(unix.SIGPIPE))

// whileRead returns a context that also ends, because of errReaderGone, when nobody
// reads stdout any more: what follows may have nothing to write for hours. It looks
// for as long as the process lives.
func (a *app) whileRead(ctx context.Context) context.Context {
	out := asFile(a.out)
	if out == nil {
		return ctx
	}
	fd := int32(out.Fd())
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		// Without events asked for, only what is always told: POLLERR of a pipe,
		// POLLHUP of a socket or terminal. A regular file has neither.
		for p := []unix.PollFd{{Fd: fd}}; ; {
			n, err := unix.Poll(p, -1)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if n > 0 && p[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
				cancel(errReaderGone)
			}
			return
		}
	}()
	return ctx
}

// readerGone returns errReaderGone if that is why ctx has ended, otherwise err.
func readerGone(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errReaderGone) {
		return errReaderGone
	}
	return err
}
