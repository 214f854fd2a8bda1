package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

// takenWait bounds the wait for a socket that outlives the daemon that listened
// on it.
const takenWait = 5 * time.Second

// Listen listens on a unix socket at path, mode 0600. A socket that is there
// already is replaced if nobody answers on it; anything else at path is left
// alone and is an error. Closing the listener removes the socket.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	stale, err := look(path)
	if err != nil {
		return nil, err
	}
	if stale {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
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

// Free reports why [Listen] would not take path, and changes nothing. It is for
// those who have much to do before they can listen, such as to make the directories
// that made names.
func Free(path string, made ...string) error {
	if _, err := look(path); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if slices.Contains(made, dir) {
		return nil
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return fmt.Errorf("socket %s: directory %s: %w", path, dir, err)
	}
	return nil
}

// look fails if path cannot be listened on. stale means that a socket is there
// on which nobody answers.
func look(path string) (stale bool, err error) {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return false, fmt.Errorf("socket %s: there is something else of that name, which is not a socket", path)
	}
	c, err := net.Dial("unix", path)
	for deadline := time.Now().Add(takenWait); err == nil; c, err = net.Dial("unix", path) {
		// A daemon that was killed while it started a process leaves the socket to
		// that child, until its execve closes the descriptor.
		alive := listenerAlive(c.(*net.UnixConn))
		c.Close()
		if alive || time.Now().After(deadline) {
			return false, fmt.Errorf("socket %s is taken: another process answers on it", path)
		}
		time.Sleep(5 * time.Millisecond)
	}
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return true, nil
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	}
	return false, fmt.Errorf("socket %s: %w", path, err)
}

// listenerAlive reports whether the process that began to listen is alive, or is
// not known.
func listenerAlive(c *net.UnixConn) bool {
	rc, err := c.SyscallConn()
	if err != nil {
		return true
	}
	var cred *unix.Ucred
	cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if cerr != nil || err != nil || cred.Pid == 0 {
		return true
	}
	id, err := procid.Of(int(cred.Pid))
	if errors.Is(err, procid.ErrGone) {
		return false
	}
	return err != nil || id.Alive()
}
