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
	processConfig
	filter []unix.SockFilter // made of the seccomp profile, which is let go; nil: none
	flags  uintptr
}

// processConfig is the part of a [specs.Spec] that it is made of.
type processConfig struct {
	Process *specs.Process `json:"process"`
	Mounts  []specs.Mount  `json:"mounts"`
	Linux   struct {
		Seccomp       *specs.LinuxSeccomp `json:"seccomp"`
		MaskedPaths   []string            `json:"maskedPaths"`
		ReadonlyPaths []string            `json:"readonlyPaths"`
	} `json:"linux"`
}

// newMemberProcess takes it from a resolved configuration, which stays as it is.
// filter is [seccomp.Compile], or that of a cache.
func newMemberProcess(s *specs.Spec, filter compileFunc) (*memberProcess, error) {
	c := processConfig{Process: s.Process, Mounts: s.Mounts}
	if l := s.Linux; l != nil {
		c.Linux.Seccomp, c.Linux.MaskedPaths, c.Linux.ReadonlyPaths = l.Seccomp, l.MaskedPaths, l.ReadonlyPaths
	}
	return c.compile(filter)
}

type compileFunc func(*specs.LinuxSeccomp) ([]unix.SockFilter, error)

func (c processConfig) compile(filter compileFunc) (*memberProcess, error) {
	p := &memberProcess{processConfig: c}
	if c.Linux.Seccomp == nil {
		return p, nil
	}
	var err error
	if p.filter, err = filter(c.Linux.Seccomp); err != nil {
		return nil, err
	}
	if p.flags, err = seccomp.Flags(c.Linux.Seccomp); err != nil {
		return nil, err
	}
	p.Linux.Seccomp = nil // it is large
	return p, nil
}

// readProcess reads it from the state directory.
func readProcess(d *sandbox.Dir, m *sandbox.MemberRecord) (*memberProcess, error) {
	var c processConfig
	if err := d.MemberConfig(m, &c); err != nil {
		return nil, err
	}
	return c.compile(seccomp.Compile)
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
