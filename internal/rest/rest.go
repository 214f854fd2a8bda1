// Package rest gives the memory that calls have used back to the system when
// there has been none for a while: a node's daemon is at rest nearly always.
package rest

import (
	"runtime/debug"
	"time"
)

// after is how long after the last call that is.
const after = 2 * time.Second

// Timer waits for the daemon to be at rest. It is safe for concurrent use.
type Timer struct{ t *time.Timer }

// NewTimer returns a timer that begins now, for what has come before. The caller
// stops it.
func NewTimer() *Timer { return &Timer{time.AfterFunc(after, debug.FreeOSMemory)} }

// Called says that a call has just ended.
func (t *Timer) Called() { t.t.Reset(after) }

// Stop ends the wait. It is the last call of t's methods.
func (t *Timer) Stop() { t.t.Stop() }
