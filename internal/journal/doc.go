// Package journal keeps the events of an installation in files, with numbers
// that only ever grow.
//
// # Files
//
// A journal is a directory of segments. A segment is a text file whose name is
// the number of its first event; its first line is a [header], each other line
// one [Event] as JSON. Only the last segment is written to, one write for each
// event. When it is full another is begun, and the oldest are dropped as soon as
// all of them together are larger than they may be.
//
// # What a crash costs
//
// A process that is killed loses nothing: what was written is the kernel's. At
// most the last line is torn; the next [Open] cuts it off, and readers do not
// see a line before it has its end. Nothing is forced to disk while an operation
// waits, so that a power cut can cost the events of about the last half minute (the
// kernel's dirty_expire_centisecs). They may have been read and their numbers be
// known to somebody: at the first start after a boot the numbers jump ahead by
// [bootGap], so that no number ever stands for two events. So they do if the end of
// the journal is found damaged, or a record knows of numbers that it does not show.
//
// # Exactly once
//
// Whoever changes a record and tells of it does both under [Journal.Hold], the
// record first, with the event in it. Whoever finds such a record after a crash asks [Journal.Tail]
// whether its event has been written. Since no segment is begun while anybody
// holds the journal, a look at the last one suffices.
//
// # Readers
//
// [Read] reads the files and asks nobody. A reader holds up no writer, however
// slow it is; one that is slower than old segments are dropped gets a [*GapError].
package journal
