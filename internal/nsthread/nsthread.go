// Package nsthread runs code on an OS thread that sits in other namespaces, or
// makes files as somebody else.
//
// It is the only package that may call setns, unshare or
// [runtime.LockOSThread]; the linter enforces it.
package nsthread

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
)

// errExited is what is returned if fn left by runtime.Goexit (t.FailNow does).
var errExited = errors.New("function exited its goroutine")

// apart runs fn on a thread of its own and waits for it. The thread is locked, and
// fn unlocks it when others may use it again. It is never the first of the
// process: /proc/self shows the state of that one, and the runtime would park it
// rather than end it.
func apart(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errExited
		defer func() { done <- err }() // runs last, Goexit or not
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			err = apart(fn) // on another, since this one is taken
			return
		}
		err = fn()
	}()
	return <-done
}

// joinable are the kinds that a thread of a multi-threaded process can join and
// leave again. The file system root that setns(2) changes with mnt is shared by
// threads, and user and time want a single-threaded process; pid is about children.
var joinable = []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS, namespace.Cgroup}

// Do runs fn on a thread in the namespaces of files and waits for it. Kinds
// other than net, ipc, uts and cgroup are an error. The files are lent.
//
// Only the goroutine that fn runs on is in the namespaces. Goroutines that fn
// starts are not, so fn must not dial, resolve names or call anything that
// might: open sockets inside fn, and use them outside freely. Files under
// /proc/sys that fn opens are those of the namespaces.
//
// fn must not call runtime.UnlockOSThread, nor start a child with Pdeathsig set:
// the thread may end when Do returns, and the kernel would signal the child.
func Do(files map[namespace.Kind]*os.File, fn func() error) error {
	kinds := make([]namespace.Kind, 0, len(joinable))
	for _, k := range joinable {
		if files[k] != nil {
			kinds = append(kinds, k)
		}
	}
	if len(kinds) != len(files) {
		return fmt.Errorf("join %d namespaces: a thread can join only %v", len(files), joinable)
	}
	return away(fn, func() (joined uintptr, err error) {
		for _, k := range kinds {
			if err := setns(files[k], k); err != nil {
				return joined, fmt.Errorf("enter %s namespace %s: %w", k, files[k].Name(), err)
			}
			joined |= k.Flag()
		}
		return joined, nil
	})
}

// Make runs fn as [Do] does, in new namespaces of the kinds. They go when nobody
// holds them, by a file or as a child that fn has started.
func Make(kinds []namespace.Kind, fn func() error) error {
	var flags uintptr
	for _, k := range kinds {
		if !slices.Contains(joinable, k) {
			return fmt.Errorf("make a %s namespace: a thread can make only %v", k, joinable)
		}
		flags |= k.Flag()
	}
	return away(fn, func() (uintptr, error) {
		return flags, os.NewSyscallError("unshare", unix.Unshare(int(flags)))
	})
}

// away runs fn on a thread that has gone into other namespaces, and brings it back.
// leave says of which kinds they are, all that it changed if it fails.
func away(fn func() error, leave func() (kinds uintptr, err error)) error {
	return apart(func() (err error) {
		home, err := unix.PidfdOpen(unix.Getpid(), 0)
		if err != nil {
			runtime.UnlockOSThread() // nothing changed yet
			return os.NewSyscallError("pidfd_open", err)
		}
		defer unix.Close(home)
		left, err := leave()
		defer func() {
			if left != 0 {
				// The first thread, which the pidfd stands for, has never left.
				if rerr := unix.Setns(home, int(left)); rerr != nil {
					// Stay locked: the runtime ends the thread with the goroutine
					// instead of lending it, in the wrong namespace, to another.
					err = errors.Join(err, fmt.Errorf("leave namespaces: %w", os.NewSyscallError("setns", rerr)))
					return
				}
			}
			runtime.UnlockOSThread()
		}()
		if err != nil {
			return err
		}
		return fn()
	})
}

func setns(ns *os.File, k namespace.Kind) error {
	return os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), int(k.Flag())))
}

// NewNet makes a network namespace that lives as long as the file, or what is
// made in it by others, holds it.
func NewNet() (*os.File, error) {
	var f *os.File
	err := Make([]namespace.Kind{namespace.Net}, func() (err error) {
		// /proc/self/ns would name the first thread's namespace, not ours.
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil && f != nil {
		f.Close()
		f = nil
	}
	return f, err
}
