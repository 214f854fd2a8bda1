// Package proctree finds processes of ours that no record names.
//
// They are known by their command line: argv[0] is the name of one of the
// embedded programs, argv[1] the mark of what they belong to. Any process can
// call itself so; all it wins is to be found.
package proctree

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/procid"
)

// Kind says which program a process runs.
type Kind string

// The programs, by what their argv[0] has after "sandboxd-".
const (
	Pause   Kind = "pause"
	Monitor Kind = "monitor"
	Launch  Kind = "launch" // also a member's init that has not executed its command yet
)

// Found is a process of ours.
type Found struct {
	ID   procid.ID
	Kind Kind
	Mark string // argv[1]
}

// Find looks at every process once and returns those whose mark begins with
// markPrefix, by pid. One that starts or ends meanwhile may be missed; zombies are,
// because they have no command line any more.
func Find(markPrefix string) ([]Found, error) { return find("/proc", markPrefix) }

func find(proc, markPrefix string) ([]Found, error) {
	ents, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var found []Found
	for _, e := range ents {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		f, ok, err := look(proc, pid, markPrefix)
		if err != nil {
			return nil, fmt.Errorf("look at process %d: %w", pid, err)
		}
		if ok {
			found = append(found, f)
		}
	}
	return found, nil
}

// Bears reports whether the process has that mark. A zombie, which has no command
// line any more, might have had it.
func Bears(id procid.ID, mark string) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(id.PID) + "/cmdline")
	if err != nil {
		return false
	}
	_, has, ok := parse(b)
	return len(b) == 0 || ok && has == mark
}

func look(proc string, pid int, markPrefix string) (Found, bool, error) {
	cmdline := proc + "/" + strconv.Itoa(pid) + "/cmdline"
	match := func() (Found, bool, error) {
		b, err := os.ReadFile(cmdline)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return Found{}, false, nil
		}
		if err != nil {
			return Found{}, false, err
		}
		kind, mark, ok := parse(b)
		return Found{Kind: kind, Mark: mark}, ok && strings.HasPrefix(mark, markPrefix), nil
	}
	f, ok, err := match()
	if !ok || err != nil {
		return Found{}, false, err
	}
	if f.ID, err = procid.Of(pid); errors.Is(err, procid.ErrGone) {
		return Found{}, false, nil
	} else if err != nil {
		return Found{}, false, err
	}
	// The pid may have come to mean another process before it was identified:
	// what the command line says is true of the identity only if it still says so.
	again, ok, err := match()
	again.ID = f.ID
	return f, ok && again == f, err
}

// parse reads a command line (proc_pid_cmdline(5)).
func parse(b []byte) (kind Kind, mark string, ok bool) {
	argv := bytes.Split(b, []byte{0})
	if len(argv) < 3 { // two arguments and what follows the last NUL
		return "", "", false
	}
	name, ours := bytes.CutPrefix(argv[0], []byte("sandboxd-"))
	kind = Kind(name)
	if !ours || kind != Pause && kind != Monitor && kind != Launch || len(argv[1]) == 0 {
		return "", "", false
	}
	return kind, string(argv[1]), true
}
