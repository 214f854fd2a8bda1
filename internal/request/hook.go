package request

import "time"

// Stage is a moment in the life of a sandbox or a member at which programs of
// the host's, hooks, are run.
type Stage string

// The stages. Sandboxes have Postcreate, Prestop, Poststop and Predelete,
// members have all.
const (
	Postcreate Stage = "postcreate" // everything is there, nothing of the user's has run
	Prestart   Stage = "prestart"   // start has been called
	Poststart  Stage = "poststart"  // the command runs
	Prestop    Stage = "prestop"    // somebody has asked for a stop
	Poststop   Stage = "poststop"   // init has exited, for whatever reason, and everything is there still
	Predelete  Stage = "predelete"  // before resources go

	// Those of runtime-spec (config.md, POSIX-platform Hooks) that are at other
	// moments, two of which have names that are taken.
	OCIPrestart     Stage = "oci-prestart"    // with CreateRuntime, before those
	CreateRuntime   Stage = "createRuntime"   // namespaces and mounts are made, the root is not entered
	CreateContainer Stage = "createContainer" // the same moment, in the member's namespaces
	StartContainer  Stage = "startContainer"  // before the execve, in the member's namespaces and root
	OCIPoststop     Stage = "oci-poststop"    // the member is removed
)

// Hook is a program that is run at a stage.
type Hook struct {
	Stage   Stage         `json:"stage"`
	Path    string        `json:"path"`              // absolute, on the host; of a StartContainer hook, in the member
	Args    []string      `json:"args,omitempty"`    // with the name it is called by; default: Path alone
	Env     []string      `json:"env,omitempty"`     // K=V; all there is
	Timeout time.Duration `json:"timeout,omitempty"` // in nanoseconds, after which it is killed; default: [DefaultHookTimeout]
	Retries int           `json:"retries,omitempty"` // how often it is run again if it fails
}

// Bounds of a hook.
const (
	DefaultHookTimeout = 30 * time.Second
	MaxHookTimeout     = time.Hour
	MaxHookRetries     = 100
)

// SandboxStages are the stages of a sandbox, in the order of its life.
func SandboxStages() []Stage { return []Stage{Postcreate, Prestop, Poststop, Predelete} }

// MemberStages are the stages of a member, in the order of its life.
func MemberStages() []Stage {
	return []Stage{
		OCIPrestart, CreateRuntime, CreateContainer, Postcreate, Prestart, StartContainer, Poststart,
		Prestop, Poststop, Predelete, OCIPoststop,
	}
}
