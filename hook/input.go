package hook

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/namespace"
)

// Input is what a hook reads from its stdin, as one JSON object: the state of
// runtime-spec (runtime.md, State) and more. docs/hooks/input.schema.json
// describes it.
type Input struct {
	// ID is the member's, or the sandbox's if the hook is the sandbox's. PID is that of
	// the member's init or the sandbox's pause as the host sees it, 0 once it
	// is gone. Bundle has the config.json that a member was made from.
	specs.State

	Exit     *exit.Record `json:"exit,omitempty"` // once the member has exited
	Sandboxd Details      `json:"sandboxd"`
}

// Details are what [Input] has beside the state of runtime-spec.
type Details struct {
	Stage   string  `json:"stage"`
	Attempt int     `json:"attempt"` // above 1 if it failed before, or was cut off
	Sandbox Sandbox `json:"sandbox"`
	Member  *Member `json:"member,omitempty"` // unless the hook is the sandbox's
}

// Sandbox describes the sandbox that a hook is about, or whose member is.
type Sandbox struct {
	ID          string                    `json:"id"`
	Name        string                    `json:"name"`
	Cgroup      string                    `json:"cgroup"` // below each hierarchy's mount point
	Labels      map[string]string         `json:"labels"`
	Annotations map[string]string         `json:"annotations"`
	Namespaces  map[namespace.Kind]string `json:"namespaces"` // those that it holds, as paths of the host's
	Addresses   []string                  `json:"addresses"`  // of its network, without the prefix length
}

// Member describes the member that a hook is about.
type Member struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	Labels     map[string]string `json:"labels"`
	Log        string            `json:"log"`    // path of its log
	Cgroup     string            `json:"cgroup"` // below each hierarchy's mount point
	MonitorPID int               `json:"monitorPid"`
	// Root is a path of the host's by which everything in the member's root is
	// reached, its mounts included; empty until it is created, and if nothing is held.
	// What the member wrote there it may have made a trap: follow no links.
	Root       string                    `json:"root"`
	Namespaces map[namespace.Kind]string `json:"namespaces"` // as paths of the host's, for nsenter(1); those that are gone are not there
}
