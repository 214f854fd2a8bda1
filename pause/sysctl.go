package pause

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
)

// SysctlKind returns the kind of namespace that the sysctl called name, with
// dots or slashes, belongs to. It is false for one that belongs to none
// (namespaces(7), ipc_namespaces(7)), and for the host name, which is not set as a sysctl.
func SysctlKind(name string) (namespace.Kind, bool) {
	name = strings.ReplaceAll(sysctlPath(name), "/", ".")
	switch {
	case strings.HasPrefix(name, "net."):
		return namespace.Net, true
	case strings.HasPrefix(name, "fs.mqueue."), slices.Contains(ipcSysctls, name):
		return namespace.IPC, true
	case name == "kernel.domainname":
		return namespace.UTS, true
	}
	return "", false
}

var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
	"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// sysctlPath turns a sysctl's name into its path below /proc/sys. As sysctl(8)
// has it, the first separator says which of dot and slash is the separator; the other one
// then stands for a dot within a part, as in net/ipv4/conf/eth0.100/forwarding.
func sysctlPath(name string) string {
	i := strings.IndexAny(name, "./")
	if i < 0 || name[i] == '/' {
		return name
	}
	return strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
}

// setSysctl writes a sysctl of the namespaces of the calling thread, which must
// be locked.
func setSysctl(name, value string, s *Spec) (err error) {
	p := sysctlPath(name)
	if !filepath.IsLocal(p) {
		return errors.New("not the name of a sysctl")
	}
	if k, _ := SysctlKind(name); k == namespace.IPC && slices.Contains(s.Kinds, namespace.User) {
		// Those of an ipc namespace are its owner's root's to write, and no
		// capability stands in for that (ipc_permissions, Linux 5.19).
		if err := seteuid(int(s.IDs.Start)); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, seteuid(0)) }()
	}
	f, err := os.OpenFile("/proc/sys/"+p, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// seteuid changes the effective user id of the calling thread alone, which the
// function of that name in package unix would do for every thread.
func seteuid(uid int) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
		return fmt.Errorf("change the thread's user id to %d: %w", uid, errno)
	}
	return nil
}
