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
