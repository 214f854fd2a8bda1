package main

import (
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/seccomp"
	"github.com/sandboxd/sandboxd/sandbox"
)

// memberProcess is what of a member's configuration its other processes have too.
// It never changes: whoever needs something else copies it.
type memberProcess struct {
	spec   *specs.Spec       // without the seccomp profile
	filter []unix.SockFilter // made of that; nil: none
	flags  uintptr
}

// newMemberProcess takes it from a resolved configuration, which stays as it is.
func newMemberProcess(s *specs.Spec) (*memberProcess, error) {
	p := new(memberProcess)
	kept := *s
	p.spec = &kept
	if s.Linux == nil || s.Linux.Seccomp == nil {
		return p, nil
	}
	var err error
	if p.filter, err = seccomp.Compile(s.Linux.Seccomp); err != nil {
		return nil, err
	}
	if p.flags, err = seccomp.Flags(s.Linux.Seccomp); err != nil {
		return nil, err
	}
	l := *s.Linux
	l.Seccomp = nil // it is large
	kept.Linux = &l
	return p, nil
}

// readProcess reads it from the state directory.
func readProcess(d *sandbox.Dir, m *sandbox.MemberRecord) (*memberProcess, error) {
	s, err := d.MemberConfigFile(m.Sandbox + "/" + m.ID)
	if err != nil {
		return nil, err
	}
	return newMemberProcess(s)
}

// recentProcesses keeps those of the members that were made, or that commands
// were run in, last: probes come again. It is safe for concurrent use.
type recentProcesses struct {
	mu   sync.Mutex
	byID map[string]*memberProcess // guarded by mu
}

// recentMax is how many are kept, of some KiB each.
const recentMax = 32

func (r *recentProcesses) get(id string) *memberProcess {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byID[id]
}

func (r *recentProcesses) put(id string, p *memberProcess) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byID == nil || len(r.byID) >= recentMax {
		r.byID = map[string]*memberProcess{}
	}
	r.byID[id] = p
}
