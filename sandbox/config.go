package sandbox

import (
	"time"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/request"
)

// The words of a request are shared with the packages that carry it out.
type (
	Config       = request.Sandbox
	MemberConfig = request.Member
	NetworkMode  = request.NetworkMode
	Custody      = request.Custody
	Exit         = exit.Record
)

// DefaultStopTimeout is what the CLI and the API use if nothing is said.
const DefaultStopTimeout = 10 * time.Second

// ExecRequest is a command to run in a running member.
type ExecRequest struct {
	Args  []string
	Env   []string // K=V; added to the member's
	Cwd   string   // default: the member's
	User  string   // UID[:GID] or names; default: the member's
	Stdin []byte
}

// ExecResult is how such a command ended and what it wrote.
type ExecResult struct {
	Code           int // exit code, or 128+signal
	Stdout, Stderr []byte
	Truncated      bool // there was more than [ExecOutputMax] of either
}

// ExecOutputMax is how many bytes of each output of a command are kept.
const ExecOutputMax = 1 << 20
