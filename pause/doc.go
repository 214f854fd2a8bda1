// Package pause starts, finds and replaces the process that holds a sandbox's
// namespaces.
//
// A pause is a freestanding program (pause.c) that is made in new namespaces,
// gives up everything it could do with them, and waits to be killed. It always
// has a mount namespace too, whose root is a tmpfs: the sandbox's /dev/shm. So
// nothing of the host's can be reached through it.
//
// # Ownership
//
// The namespaces belong to the process, and to whoever has one open. A [Pause]
// has all of them open, so they outlive the process until [Pause.Close]: that
// is what a new pause is started from when one has been killed ([Spec.From]).
// [Pause.Close] never ends the process; [Pause.Kill] does. A pid namespace is the
// exception: it dies with its pause and cannot be joined any more.
//
// # Concurrency
//
// A [Pauser] and a [Pause] may be used by several goroutines. A Pause costs one
// parked goroutine and no thread.
//
// # Errors
//
// A process that is not there is reported by [procid.ErrGone]. A step that
// fails inside the new process is named, with its errno.
package pause
