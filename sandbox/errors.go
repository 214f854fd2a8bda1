package sandbox

import "errors"

// Errors that callers are expected to test for with [errors.Is]. The API makes
// gRPC codes of them, the CLI exit codes.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	ErrState    = errors.New("not possible in this state")
	ErrInvalid  = errors.New("invalid") // the request can never succeed as it is
)

// OpError says which operation on what failed, and at which step. A [Manager]
// adds exactly one to an error on its way out.
type OpError struct {
	Op   string // create, stop, remove, add, start, ...
	Ref  string // what the caller named
	Step string // cgroup, pause, monitor, ...; empty for checks
	Err  error  // why the operation failed
	Undo error  // what could not be taken back; nil if nothing is left behind
}

// StepError says at which step of an operation something failed. A [Node] returns one
// of a step that consists of others: the innermost counts. Step is empty if Err
// names it.
type StepError struct {
	Step string
	Err  error
}

func (e *StepError) Error() string {
	if e.Step == "" {
		return e.Err.Error()
	}
	return e.Step + ": " + e.Err.Error()
}

func (e *StepError) Unwrap() error { return e.Err }

// maxRef is more than two names with a slash have.
const maxRef = 200

func (e *OpError) Error() string {
	s := e.Op
	switch ref := e.Ref; {
	case ref == "":
	case !printable(ref) || len(ref) > maxRef:
		s += " " + quote(ref) // it may be anything
	default:
		s += " " + ref
	}
	if e.Step != "" {
		s += ": " + e.Step
	}
	s += ": " + e.Err.Error()
	if e.Undo != nil {
		s += " (left behind: " + e.Undo.Error() + ")"
	}
	return s
}

// Unwrap returns the cause only. Undo is reported, not matched: whoever asks
// for [ErrNotFound] means the request, never the clean-up.
func (e *OpError) Unwrap() error { return e.Err }

// kindError gives err the text of its own and makes it match kind.
type kindError struct {
	text string
	kind error
}

func (e *kindError) Error() string        { return e.text }
func (e *kindError) Is(target error) bool { return target == e.kind }

// HookError is why a hook, or what the host configures of hooks, keeps an operation
// from succeeding. It matches [ErrState]; the request is not to blame.
type HookError struct{ Err error }

func (e *HookError) Error() string        { return e.Err.Error() }
func (e *HookError) Unwrap() error        { return e.Err }
func (e *HookError) Is(target error) bool { return target == ErrState }
