package main

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/sandbox"
)

// A start that fails is introduced by what failed, and not by who found out.
func TestStartErrorNamesTheStep(t *testing.T) {
	err := startError(&launch.StepError{Step: "make mount point /x", Errno: unix.EROFS})
	if se, ok := errors.AsType[*sandbox.StepError](err); !ok || se.Step != "make mount point /x" || !errors.Is(err, unix.EROFS) {
		t.Errorf("%#v", err)
	}
	err = startError(&launch.StepError{Step: "execute /x", Command: true, Errno: unix.ENOENT})
	se, ok := errors.AsType[*sandbox.StepError](err)
	start, isStart := errors.AsType[*sandbox.StartError](err)
	if !ok || se.Step != "" || !isStart || start.Errno != unix.ENOENT {
		t.Errorf("%#v", err)
	}
	if other := errors.New("other"); startError(other) != other {
		t.Error("another error has changed")
	}
}
