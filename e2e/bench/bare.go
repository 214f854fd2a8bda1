package main

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/sandbox"
)

// bareC does what an exec cannot do without, and nothing else.
//
//go:embed bare.c
var bareC []byte

func (b *bench) bare() string { return filepath.Join(b.dir, "bare") }

// compile makes a freestanding program of a C source that is embedded here.
func (b *bench) compile(source []byte, to string) error {
	src := filepath.Join(b.dir, filepath.Base(to)+".c")
	if err := os.WriteFile(src, source, 0o644); err != nil {
		return err
	}
	return b.command("gcc", "-O2", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-I", "internal/launch", "-o", to, src)
}

// bareOnce is the bare cost that an exec in m cannot go below: a process that joins all
// that m's is in, a fork, and the same command. And what of that the command takes by
// itself: half a millisecond in a virtual machine where CPUID is a trap, by which the C
// library looks at the processor.
func (b *bench) bareOnce(m sandbox.MemberInfo) error {
	args, err := bareArgs(m)
	if err != nil {
		return err
	}
	return errors.Join(b.spawn("bare exec", b.bare(), args), b.spawn("bare true", filepath.Join(b.bundle, "rootfs/bin/true"), []string{"true"}))
}

// spawn measures a process from its beginning to its end, which is to be a good one.
func (b *bench) spawn(name, path string, args []string) error {
	var ws syscall.WaitStatus
	err := b.measure(name, func() error {
		child, err := syscall.ForkExec(path, args, &syscall.ProcAttr{})
		if err != nil {
			return err
		}
		for {
			if _, err = syscall.Wait4(child, &ws, 0, nil); err != syscall.EINTR {
				return err
			}
		}
	})
	if err == nil && (!ws.Exited() || ws.ExitStatus() != 0) {
		err = fmt.Errorf("%s: wait status %#x", name, uint32(ws))
	}
	return err
}

func bareArgs(m sandbox.MemberInfo) ([]string, error) {
	proc := "/proc/" + strconv.Itoa(m.PID)
	flags := 0
	for name, flag := range map[string]int{
		"net": unix.CLONE_NEWNET, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS, "pid": unix.CLONE_NEWPID,
		"mnt": unix.CLONE_NEWNS, "cgroup": unix.CLONE_NEWCGROUP, "time": unix.CLONE_NEWTIME,
	} {
		theirs, err := os.Readlink(proc + "/ns/" + name)
		if err != nil {
			return nil, err
		}
		ours, err := os.Readlink("/proc/self/ns/" + name)
		if err != nil {
			return nil, err
		}
		if theirs != ours {
			flags |= flag
		}
	}
	// As everybody mounts them: v1 hierarchies side by side, v2 beside them or alone.
	const mounts = "/sys/fs/cgroup"
	v2, tasks := "", []string(nil)
	for _, dir := range []string{mounts, mounts + "/*"} {
		found, _ := filepath.Glob(dir + m.Cgroup)
		for _, cg := range found {
			cg, err := filepath.EvalSymlinks(cg) // cpu is often one to cpu,cpuacct
			if err != nil {
				return nil, err
			}
			file := filepath.Join(cg, "tasks")
			if _, err := os.Stat(file); err != nil {
				v2 = cg
			} else if !slices.Contains(tasks, file) {
				tasks = append(tasks, file)
			}
		}
	}
	return append([]string{"bare", strconv.Itoa(m.PID), strconv.Itoa(flags), v2}, tasks...), nil
}
