// Package collect takes down what is known of a member at its exit, and files
// out of its root, before anything of it is gone.
//
// # Ownership
//
// A [Store] owns the collection directory. A collection is the directory
// SANDBOX/MEMBER-N in it, by the names that the two had, with
//
//	manifest.json   what is known ([Manifest])
//	files.tar.zst   the files that collectors have named; absent if there are none
//
// It is made as .tmp-ID, under a lock, and gets its name when it is complete: what
// has a name is whole. What has none and no lock was left by a crash, and is
// garbage ([Store.Sweep]). A member has at most one collection, however often
// [Store.Collect] is called for it.
//
// # What may go wrong
//
// The manifest is written before the files are looked at, and has room of its own
// on the disk (.reserve), so that a disk that is full costs the files and not the
// manifest. Files belong to somebody who is not trusted: see package
// internal/tarstream for how they are read. How much is taken is bounded by each
// collector and by the directory's own limit, for which the oldest collections
// make room, those of successes before those of failures. What is being made is
// bounded by the same limit once more; there the largest makes room. A file system
// that does not answer keeps nobody else's collection waiting, and in the end costs
// the archive.
//
// # Concurrency
//
// A Store is safe for concurrent use. Several processes may use one directory;
// each then counts what it was when it looked last.
package collect
