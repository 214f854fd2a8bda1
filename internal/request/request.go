// Package request holds what callers ask of sandboxes and members. It is plain
// data, understood by the packages that carry a request out; it knows none of
// them.
package request

import (
	"time"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
)

// NetworkMode says what network a sandbox has.
type NetworkMode = network.Mode

// The network modes.
const (
	NetworkNone    = network.ModeNone
	NetworkHost    = network.ModeHost
	NetworkBuiltin = network.ModeBuiltin
	NetworkCNI     = network.ModeCNI
)

// Sandbox is what a caller asks of a new sandbox. The zero value of each field
// means its default.
type Sandbox struct {
	Name        string            `json:"name,omitempty"`     // default: derived from the id
	Hostname    string            `json:"hostname,omitempty"` // default: Name
	Network     NetworkMode       `json:"network,omitempty"`  // default: the daemon's, or none if the sandbox does not share net
	Net         network.Request   `json:"net,omitzero"`       // what the network is to be like
	Share       []namespace.Kind  `json:"share,omitempty"`    // nil: net, ipc, uts
	Sysctls     map[string]string `json:"sysctls,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	ShmSize     int64             `json:"shmSize,omitempty"` // bytes; default: 64 MiB
	Hooks       []Hook            `json:"hooks,omitempty"`   // run in this order, after the host's own
}

// Custody says after which exits a member's root and namespaces stay held.
type Custody string

// The custody policies.
const (
	CustodyAlways  Custody = "always"  // the default
	CustodyFailure Custody = "failure" // unless the exit code is 0
	CustodyNever   Custody = "never"   // everything is freed at exit; the record stays
)

// When says after which exits a collector takes what it is to take.
type When string

// The conditions of a collector.
const (
	OnAlways  When = "always"  // the default
	OnFailure When = "failure" // unless the exit code is known to be 0
	OnOOM     When = "oom"     // the kernel killed init or another process of the member for memory
	OnSignal  When = "signal"  // a signal ended init
)

// Collect is a file, a directory with all that is in it, or a glob of these,
// that is taken out of a member once it has exited.
type Collect struct {
	Path string `json:"path"`          // absolute path in the member; each element may be a pattern (path.Match)
	On   When   `json:"on,omitempty"`  // default: always
	Max  int64  `json:"max,omitempty"` // bytes that are taken at most; default: 64 MiB
}

// DefaultCollectMax is how many bytes a collector takes at most if it does not
// say.
const DefaultCollectMax = 64 << 20

// Volume is a bind mount from the host.
type Volume struct {
	Source   string `json:"source"` // absolute path on the host
	Target   string `json:"target"` // absolute path in the member
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Tmpfs is an empty file system in memory, mode 1777.
type Tmpfs struct {
	Target string `json:"target"`
	Size   int64  `json:"size,omitempty"` // bytes; 0 means the kernel's default, half of the memory
}

// Member is what a caller asks of a new member. Exactly one of Rootfs,
// Bundle, or a mnt namespace that is not private (Namespaces) gives its root.
type Member struct {
	Name       string              `json:"name,omitempty"` // default: derived from the id
	Rootfs     string              `json:"rootfs,omitempty"`
	Bundle     string              `json:"bundle,omitempty"`
	Args       []string            `json:"args,omitempty"` // replaces the bundle's if not empty
	Env        []string            `json:"env,omitempty"`  // K=V; added to the defaults or the bundle's
	Cwd        string              `json:"cwd,omitempty"`
	User       string              `json:"user,omitempty"` // UID[:GID], or names looked up in the root's /etc/passwd and group
	Volumes    []Volume            `json:"volumes,omitempty"`
	Tmpfs      []Tmpfs             `json:"tmpfs,omitempty"`
	Namespaces namespace.Selection `json:"namespaces,omitempty"`
	ReadOnly   bool                `json:"readOnly,omitempty"`
	Memory     int64               `json:"memory,omitempty"`   // bytes
	NanoCPUs   int64               `json:"nanoCPUs,omitempty"` // 1e9 is one CPU
	PidsLimit  int64               `json:"pidsLimit,omitempty"`
	CapAdd     []string            `json:"capAdd,omitempty"` // with or without CAP_; "ALL"
	CapDrop    []string            `json:"capDrop,omitempty"`
	Privileged bool                `json:"privileged,omitempty"`
	StopSignal string              `json:"stopSignal,omitempty"` // name or number; default SIGTERM
	Custody    Custody             `json:"custody,omitempty"`
	TTY        bool                `json:"tty,omitempty"`
	Stdin      bool                `json:"stdin,omitempty"`
	AutoRemove bool                `json:"autoRemove,omitempty"` // rm once init has exited
	Labels     map[string]string   `json:"labels,omitempty"`
	LogPath    string              `json:"logPath,omitempty"` // absolute; default: under the root directory
	LogMax     int64               `json:"logMax,omitempty"`  // bytes; what would make the log longer is dropped and counted; 0: no limit
	Collect    []Collect           `json:"collect,omitempty"`
	Hooks      []Hook              `json:"hooks,omitempty"`      // run in this order, after the host's own and the bundle's
	CustodyTTL time.Duration       `json:"custodyTTL,omitempty"` // how long after its exit it is held at most, in nanoseconds; 0: until it is removed
}
