// Package memexec runs programs that are embedded in this one.
//
// A program is put into a sealed memfd, so that no file has to be on a file
// system that allows execution and nobody can write to it while it runs, root
// in a container included (the way of CVE-2019-5736). Where the host forbids
// executable memfds (sysctl vm.memfd_noexec), it is put into a file.
package memexec

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Program is an executable that needs no name. It is safe for concurrent use.
type Program struct {
	name string
	file *os.File
}

// Open makes a program of elf. fallbackDir is where a file is put if memfds
// cannot be executed; it must be on a file system mounted without noexec, and
// may be empty if that is not wanted. The caller closes the result.
func Open(name string, elf []byte, fallbackDir string) (*Program, error) {
	f, err := openMemfd(name, elf)
	if errors.Is(err, unix.EACCES) && fallbackDir != "" {
		f, err = openFile(name, elf, fallbackDir)
	}
	if err != nil {
		return nil, fmt.Errorf("make %s executable: %w", name, err)
	}
	return &Program{name, f}, nil
}

// Close releases the program. Processes that run it are not affected.
func (p *Program) Close() error { return p.file.Close() }

// File is the executable, for a launch program that ends in execveat(2). It
// belongs to p.
func (p *Program) File() *os.File { return p.file }

// Files says which file each descriptor number of a child is. Numbers that are
// absent are closed in the child.
type Files map[int]*os.File

// Start starts the program and returns its pid. The caller waits for it.
// attr.Files is set from files. The files are lent: the caller closes them.
func (p *Program) Start(argv, env []string, files Files, attr *syscall.ProcAttr) (pid int, err error) {
	fds := make([]uintptr, 3)
	for n := range files {
		fds = append(fds, make([]uintptr, max(0, n+1-len(fds)))...)
	}
	for i := range fds {
		fds[i] = ^uintptr(0)
		if f := files[i]; f != nil {
			fds[i] = f.Fd()
		}
	}
	a := *attr
	a.Files = fds
	a.Env = env
	if env == nil {
		a.Env = []string{}
	}
	// The child finds the program among this process's descriptors: its own are
	// being moved to the numbers that it is to have.
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.file.Fd())
	if a.Sys != nil && a.Sys.Cloneflags&unix.CLONE_NEWUSER != 0 {
		// Out of a new user namespace they cannot be reached.
		exe, err := dupAbove(p.file, fds)
		if err != nil {
			return 0, err
		}
		defer exe.Close()
		path = fmt.Sprintf("/proc/self/fd/%d", exe.Fd())
	}
	pid, err = syscall.ForkExec(path, argv, &a)
	runtime.KeepAlive(files)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", p.name, err)
	}
	return pid, nil
}

// dupAbove duplicates f to a number that [syscall.ForkExec] does not use in the
// child: while it moves fds there, it takes numbers right above the highest of them.
//
// A high number has a price: the kernel waits for an RCU grace period, about
// 10 ms, when the descriptor table of a process with threads has to grow.
func dupAbove(f *os.File, fds []uintptr) (*os.File, error) {
	high := len(fds)
	for _, fd := range fds {
		if fd != ^uintptr(0) {
			high = max(high, int(fd))
		}
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, high+len(fds)+2)
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// openMemfd fails with EACCES if the host forbids executable memfds.
func openMemfd(name string, elf []byte) (*os.File, error) {
	const mfdExec = 0x10 // MFD_EXEC, Linux 6.3; older kernels refuse the flag
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|mfdExec)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(elf); err != nil {
		f.Close()
		return nil, err
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, os.NewSyscallError("fcntl F_ADD_SEALS", err)
	}
	return f, nil
}

func openFile(name string, elf []byte, dir string) (*os.File, error) {
	// Written under a name of its own, then opened read-only: a file that is
	// open for writing cannot be executed.
	tmp, err := os.CreateTemp(dir, name+"-*")
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(elf)
	if err == nil {
		err = tmp.Chmod(0o755)
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, err
	}
	return os.Open(tmp.Name())
}
