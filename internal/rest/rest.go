// Package rest gives the memory that calls have used back to the system when
// there has been none for a while: a node's daemon is at rest nearly always.
//
// Since it is given back, more of it may be used until then: while calls come,
// garbage is collected half as often as otherwise. With a few megabytes of heap that
// is a tenth of the processor time that sandboxes and members take to be made.
package rest

import (
	"runtime/debug"
	"sync"
	"time"
)

// after is how long after the last call that is.
const after = 2 * time.Second

// usual is the percentage that garbage is collected by at rest: $GOGC, or Go's own.
var usual = sync.OnceValue(func() int {
	p := debug.SetGCPercent(100)
	debug.SetGCPercent(p)
	return p
})

// Timer waits for the daemon to be at rest. It is safe for concurrent use.
type Timer struct{ t *time.Timer }

// NewTimer returns a timer that begins now, for what has come before. The caller
// stops it.
func NewTimer() *Timer {
	busy()
	return &Timer{time.AfterFunc(after, func() {
		debug.SetGCPercent(usual())
		debug.FreeOSMemory()
	})}
}

// Called says that a call has just ended.
func (t *Timer) Called() {
	if !t.t.Reset(after) {
		go busy() // it stops all goroutines for a moment, which the call need not wait for
	}
}

func busy() { debug.SetGCPercent(2 * usual()) } // no collection at all, -1, stays that

// Stop ends the wait. It is the last call of t's methods.
func (t *Timer) Stop() {
	t.t.Stop()
	debug.SetGCPercent(usual())
}
