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
