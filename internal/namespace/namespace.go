// Package namespace names the kinds of Linux namespaces and says, for each kind,
// where a process gets it from.
package namespace

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Kind is a kind of namespace, by the name it has in /proc/PID/ns
// (namespaces(7)).
type Kind string

// The kinds, in the order in which [Kinds] lists them.
const (
	Net    Kind = "net"
	IPC    Kind = "ipc"
	UTS    Kind = "uts"
	PID    Kind = "pid"
	Mnt    Kind = "mnt"
	User   Kind = "user"
	Cgroup Kind = "cgroup"
	Time   Kind = "time"
)

// Kinds lists every kind. The index of a kind is part of the monitor's
// protocol (its custody descriptors are numbered by it): append only.
var kinds = [...]Kind{Net, IPC, UTS, PID, Mnt, User, Cgroup, Time}

// Kinds returns every kind in protocol order.
func Kinds() []Kind { return slices.Clone(kinds[:]) }

// Index returns k's place in [Kinds], or -1 if k is not a kind.
func (k Kind) Index() int { return slices.Index(kinds[:], k) }

// Flag returns the CLONE_NEW* flag of k, or 0 if k is not a kind.
func (k Kind) Flag() uintptr {
	switch k {
	case Net:
		return unix.CLONE_NEWNET
	case IPC:
		return unix.CLONE_NEWIPC
	case UTS:
		return unix.CLONE_NEWUTS
	case PID:
		return unix.CLONE_NEWPID
	case Mnt:
		return unix.CLONE_NEWNS
	case User:
		return unix.CLONE_NEWUSER
	case Cgroup:
		return unix.CLONE_NEWCGROUP
	case Time:
		return unix.CLONE_NEWTIME
	}
	return 0
}

// Supported reports whether the running kernel has namespaces of kind k.
func (k Kind) Supported() bool { return slices.Contains(supported(), k) }

// supported are the kinds that the running kernel has, which stay the same: every
// start of a sandbox asks for them.
var supported = sync.OnceValue(func() (ks []Kind) {
	for _, k := range kinds {
		if _, err := os.Stat("/proc/self/ns/" + string(k)); !errors.Is(err, os.ErrNotExist) {
			ks = append(ks, k)
		}
	}
	return ks
})

// ParseKind returns the kind called s. Besides the names in /proc it takes the
// runtime-spec's "network" and "mount".
func ParseKind(s string) (Kind, error) {
	switch s {
	case "network":
		return Net, nil
	case "mount":
		return Mnt, nil
	}
	if k := Kind(s); k.Index() >= 0 {
		return k, nil
	}
	return "", fmt.Errorf("unknown namespace type %q (one of %s)", s, list(kinds[:]))
}

// ParseKinds parses a comma-separated list such as "net,ipc,uts". The empty
// string is the empty list; a kind that is named twice is an error.
func ParseKinds(s string) ([]Kind, error) {
	if s == "" {
		return nil, nil
	}
	var ks []Kind
	for f := range strings.SplitSeq(s, ",") {
		k, err := ParseKind(f)
		if err != nil {
			return nil, err
		}
		if slices.Contains(ks, k) {
			return nil, fmt.Errorf("namespace type %q is named twice", f)
		}
		ks = append(ks, k)
	}
	return ks, nil
}

// From is the part of a [Source] before the colon.
type From string

// The places that a namespace can come from.
const (
	Sandbox From = "sandbox" // the one that the sandbox's pause holds
	Private From = "private" // a new one
	Host    From = "host"    // the daemon's own
	Member  From = "member"  // that of another member, running or exited
)

// Source says where a process gets one namespace from.
type Source struct {
	From   From
	Member string // name or id; only if From is [Member]
}

// ParseSource parses "sandbox", "private", "host" or "member:NAME".
func ParseSource(s string) (Source, error) {
	if name, ok := strings.CutPrefix(s, string(Member)+":"); ok {
		if name == "" {
			return Source{}, errors.New(`namespace source "member:" lacks the member's name`)
		}
		return Source{Member, name}, nil
	}
	switch f := From(s); f {
	case Sandbox, Private, Host:
		return Source{From: f}, nil
	}
	return Source{}, fmt.Errorf("unknown namespace source %q (one of sandbox, private, host, member:NAME)", s)
}

// String is the inverse of [ParseSource].
func (s Source) String() string {
	if s.From == Member {
		return string(Member) + ":" + s.Member
	}
	return string(s.From)
}

// MarshalText writes what [ParseSource] reads.
func (s Source) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is [ParseSource].
func (s *Source) UnmarshalText(b []byte) (err error) {
	*s, err = ParseSource(string(b))
	return err
}

// Selection says for some kinds where they come from. A kind that is absent is
// left to the default of whoever uses the selection.
type Selection map[Kind]Source

// ParseSelection parses "net=sandbox,pid=member:web". "all=SOURCE" stands for
// every kind that is not named itself, wherever in the list it is.
func ParseSelection(s string) (Selection, error) {
	sel := Selection{}
	if s == "" {
		return sel, nil
	}
	var all *Source
	for f := range strings.SplitSeq(s, ",") {
		key, val, ok := strings.Cut(f, "=")
		if !ok {
			return nil, fmt.Errorf("namespace selection %q is not TYPE=SOURCE", f)
		}
		src, err := ParseSource(val)
		if err != nil {
			return nil, err
		}
		if key == "all" {
			if all != nil {
				return nil, errors.New(`namespace type "all" is named twice`)
			}
			all = &src
			continue
		}
		k, err := ParseKind(key)
		if err != nil {
			return nil, err
		}
		if _, ok := sel[k]; ok {
			return nil, fmt.Errorf("namespace type %q is named twice", key)
		}
		sel[k] = src
	}
	if all != nil {
		for _, k := range kinds {
			if _, ok := sel[k]; !ok {
				sel[k] = *all
			}
		}
	}
	return sel, nil
}

// String lists the selection in protocol order; [ParseSelection] reads it.
func (s Selection) String() string {
	var parts []string
	for _, k := range kinds {
		if src, ok := s[k]; ok {
			parts = append(parts, string(k)+"="+src.String())
		}
	}
	return strings.Join(parts, ",")
}

// Clone returns a copy.
func (s Selection) Clone() Selection { return maps.Clone(s) }

func list(ks []Kind) string {
	s := make([]string, len(ks))
	for i, k := range ks {
		s[i] = string(k)
	}
	return strings.Join(s, ", ")
}
