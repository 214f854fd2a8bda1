package nsthread

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// FilesAs runs fn on a thread whose new files belong to uid and gid, and waits
// for it. The thread keeps its capabilities. It is for idmapped mounts in which
// the caller's own ids have no place: making a file there is refused with
// EOVERFLOW (mount_setattr(2)).
//
// Goroutines that fn starts make files as the process does. fn must not call
// runtime.UnlockOSThread.
func FilesAs(uid, gid int, fn func() error) error {
	return apart(func() error {
		// Never unlocked: the thread ends with the goroutine.
		if err := becomeFilesOwner(uid, gid); err != nil {
			return err
		}
		return fn()
	})
}

func becomeFilesOwner(uid, gid int) error {
	// Without it, leaving fsuid 0 takes the capabilities about files away
	// (capabilities(7)).
	const noSetuidFixup = 1 << 2
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits|noSetuidFixup), 0, 0, 0)
	}
	if err != nil {
		return os.NewSyscallError("prctl PR_SET_SECUREBITS", err)
	}
	// They return what the id was before, and no error: ask again.
	unix.SetfsgidRetGid(gid)
	unix.SetfsuidRetUid(uid)
	g, _ := unix.SetfsgidRetGid(-1)
	u, _ := unix.SetfsuidRetUid(-1)
	if u != uid || g != gid {
		return fmt.Errorf("make files as %d:%d: %w", uid, gid, unix.EPERM)
	}
	return nil
}
