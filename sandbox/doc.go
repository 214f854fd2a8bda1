// Package sandbox owns the lifecycle of pod sandboxes and their members.
//
// # Ownership
//
// A [Manager] owns a state directory and, through a [Node], what the records in
// it stand for. For a sandbox that is, in the order of creation: the record, the
// cgroup, the pause that holds the namespaces. For a member: the record, the
// cgroup, the data directory, the monitor with its init, and after init's exit
// the custody of its root and namespaces. It is taken down in the reverse order,
// members before their sandbox.
//
// Records are written before what they stand for is made, and removed after it
// is gone: intent, effect, fact. What has to be taken down follows from the record
// alone. One function per kind derives it, and serves a creation that failed, a
// removal, and the recovery after a crash.
//
// # States
//
//	sandbox   Creating ─▶ Ready ◀─▶ NotReady ─▶ Stopped ─▶ Deleting ─▶ (none)
//	member    Creating ─▶ Created ─▶ Starting ─▶ Running ─▶ Exited ─▶ Deleting ─▶ (none)
//
// Creating and Deleting go to Unclean if something cannot be taken down, and
// stay there until a removal, or the recovery at the next start, succeeds.
//
// # Concurrency
//
// All methods may be called from several goroutines. Operations on one member
// are serialised, as are those on a whole sandbox; members of one sandbox do not
// wait for each other. Whatever only looks, and Kill, waits for nobody. An
// operation whose context ends stops waiting; what it has to undo it still
// undoes.
//
// # Errors
//
// Operations return an [OpError], which wraps [ErrNotFound], [ErrExists],
// [ErrState] or [ErrInvalid] where the caller can act on it.
//
// [Dir] shows the same without a daemon.
package sandbox
