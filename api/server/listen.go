package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen listens on a unix socket at path, mode 0600. A socket that is there
// already is replaced if nobody answers on it; anything else at path is left
// alone and is an error. Closing the listener removes the socket.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{
		// The mode of an unbound socket becomes that of the file that bind makes
		// (unix_bind_bsd in net/unix/af_unix.c), so that there is no moment at
		// which the file has another one.
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
				return cerr
			}
			return os.NewSyscallError("fchmod", err)
		},
	}
	return lc.Listen(ctx, "unix", path)
}

func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("socket %s: there is something else of that name, which is not a socket", path)
	}
	c, err := net.Dial("unix", path)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("socket %s is taken: another process answers on it", path)
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, os.ErrNotExist):
		return nil
	}
	return fmt.Errorf("socket %s: %w", path, err)
}
