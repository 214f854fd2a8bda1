// Package exit holds the exit record: how a member's init ended.
package exit

import "time"

// Record is a member's exit record. Nothing in it is guessed: what cannot be
// known makes Known false, and Reason says why.
type Record struct {
	Known      bool      `json:"known"`
	Code       int       `json:"code"`      // exit code, or 128+signal; -1 if not known
	Signal     int       `json:"signal"`    // that ended init; 0 if it exited
	OOMKilled  bool      `json:"oomKilled"` // the kernel killed init or another process of the member for memory
	FinishedAt time.Time `json:"finishedAt"`
	Reason     string    `json:"reason"` // Completed, Error, Signal, OOMKilled, StartError: TEXT, Unknown: WHY
	Rusage     Rusage    `json:"rusage"`
}

// Rusage is the part of getrusage(2) that [Record] keeps: of init and of the
// children that it waited for.
type Rusage struct {
	UserMicros   int64 `json:"userMicros"`
	SystemMicros int64 `json:"systemMicros"`
	MaxRSSKiB    int64 `json:"maxRssKiB"`
}
