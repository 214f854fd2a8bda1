// Package member starts members: containers in a sandbox, each with a monitor
// as the parent of its init.
//
// # Ownership
//
// A member's processes are its monitor and what descends from it. The monitor
// (monitor.c) writes the log, records how init ended, and then holds custody:
// the member's root and namespaces, as descriptors with fixed numbers. No other
// process is needed for any of that. This package starts monitors ([Monitors]),
// talks to them ([Monitor], [Attachment]) and reads what they leave behind
// ([ReadStatus], [ReadExit]); a monitor outlives the process that started it,
// and is ended by SIGKILL only.
//
// # Protocol
//
// docs/ARCHITECTURE.md has it: descriptors, configuration, status page,
// messages, exit.json.
//
// # Concurrency
//
// Everything may be used by several goroutines at once, except an [Attachment],
// which is one reader's.
//
// # Errors
//
// A call of a launch program that failed is a [launch.StepError]. A process
// that is not there any more is [procid.ErrGone].
package member
