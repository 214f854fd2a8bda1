package journal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"time"
)

// ErrGap is what every [*GapError] matches.
var ErrGap = errors.New("events are not there")

// GapError says that events after a number were asked for that are not there
// any more, or that the number has never been given out.
type GapError struct {
	After uint64 // what was asked for
	First uint64 // the first event that is there; 0 if there is none
	Last  uint64 // the last one
}

func (e *GapError) Error() string {
	if e.After > e.Last {
		return fmt.Sprintf("no event has had the number %d yet: the last one is %d", e.After, e.Last)
	}
	return fmt.Sprintf("the events from %d to %d are gone: ask for those since %d", e.After+1, e.First-1, e.First-1)
}

// Is makes a GapError match [ErrGap].
func (e *GapError) Is(target error) bool { return target == ErrGap }

// Query says which events are wanted. The zero value means all that are there.
type Query struct {
	After  *uint64   // those with a higher number; not together with Since
	Since  time.Time // those of that time and later
	New    bool      // those that come
	Filter Filter
	Follow bool // the reading does not end with the last event there is
}

// Read yields the events of the journal in the directory dir, in order. It ends
// with an error, or, unless q.Follow is set, after the last event. It fails with a
// [*GapError] if what q.After asks for is not there, or is dropped before it
// could be read. wait is called when there is no event yet, to wait for one with
// a number above after: [Journal.Wait], or [Watcher.Wait] in another process.
func Read(ctx context.Context, dir string, q Query, wait func(ctx context.Context, after uint64) error) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		root, err := os.OpenRoot(dir)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer root.Close()
		r := &reader{dir: root, any: q.After == nil && !q.Follow}
		defer r.close()
		if err := r.seek(q); err != nil {
			yield(Event{}, err)
			return
		}
		for {
			e, err := r.next()
			if err == io.EOF {
				if !q.Follow {
					return
				}
				if err = wait(ctx, r.last); err == nil {
					continue
				}
			}
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(Event{}, err)
				return
			}
			if e.Time.Before(q.Since) || !q.Filter.Match(&e) {
				continue
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// reader reads events from segments.
type reader struct {
	dir   *os.Root
	any   bool   // what is there is wanted, and no more
	first uint64 // of the segment that is open
	f     *os.File
	l     lines
	last  uint64 // the number of the last event that was read or is not wanted
}

func (r *reader) close() {
	if r.f != nil {
		r.f.Close()
	}
}

// seek goes to where q begins.
func (r *reader) seek(q Query) error {
	for {
		err := r.trySeek(q)
		if !errors.Is(err, fs.ErrNotExist) { // the oldest may be dropped meanwhile
			return err
		}
	}
}

func (r *reader) trySeek(q Query) error {
	firsts, err := segments(r.dir)
	if err != nil {
		return err
	}
	if len(firsts) == 0 {
		if q.After != nil && *q.After > 0 {
			return &GapError{After: *q.After}
		}
		return nil
	}
	at := firsts[0]
	switch {
	case q.New:
		at = firsts[len(firsts)-1]
	case q.After != nil:
		for _, f := range firsts {
			if f <= *q.After {
				at = f
			}
		}
	case !q.Since.IsZero():
		at = r.changedSince(firsts, q.Since)
	}
	if err := r.open(at); err != nil {
		return err
	}
	if q.New {
		sc, err := scan(r.f, at, nil)
		r.last = sc.last
		return err
	}
	if q.After == nil {
		return nil
	}
	if *q.After < r.last {
		return r.gap(*q.After)
	}
	if *q.After > r.last {
		last, err := r.newest()
		if err != nil {
			return err
		}
		if *q.After > last {
			return &GapError{After: *q.After, First: firsts[0], Last: last}
		}
		r.last = *q.After
	}
	return nil
}

// sinceSlack is more than what an event's time and that of the file it was written
// to a moment later can differ by.
const sinceSlack = time.Minute

// changedSince returns the first segment that was written to since a time, or the
// last one: what is in those before it has happened before.
func (r *reader) changedSince(firsts []uint64, since time.Time) uint64 {
	for _, first := range firsts[:len(firsts)-1] {
		fi, err := r.dir.Lstat(segmentName(first))
		if err != nil || !fi.ModTime().Before(since.Add(-sinceSlack)) {
			return first
		}
	}
	return firsts[len(firsts)-1]
}

// gap makes the error of one who wants what comes after a number that is no
// longer there.
func (r *reader) gap(after uint64) error {
	last, err := r.newest()
	if err != nil {
		return err
	}
	return &GapError{After: after, First: r.first, Last: last}
}

// newest returns the number of the last event in the journal.
func (r *reader) newest() (uint64, error) {
	firsts, err := segments(r.dir)
	if err != nil || len(firsts) == 0 {
		return 0, err
	}
	first := firsts[len(firsts)-1]
	f, err := openSegment(r.dir, first, os.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sc, err := scan(f, first, nil)
	return sc.last, err
}

// open begins to read a segment. last becomes what its header says.
func (r *reader) open(first uint64) error {
	f, err := openSegment(r.dir, first, os.O_RDONLY)
	if err != nil {
		return err
	}
	r.close()
	r.f, r.first, r.l = f, first, lines{f: f}
	r.last = readHeader(f, first).Prev // that line is no event for nextHere
	return nil
}

// next returns the next event, or io.EOF if there is none for now.
func (r *reader) next() (Event, error) {
	for {
		if r.f == nil {
			firsts, err := segments(r.dir)
			if err != nil {
				return Event{}, err
			}
			if len(firsts) == 0 {
				return Event{}, io.EOF
			}
			if err := r.open(firsts[0]); err != nil {
				return Event{}, err
			}
		}
		e, err := r.nextHere()
		if err != io.EOF {
			return e, err
		}
		// The next segment is begun when this one is complete, so what is still
		// read here after it was seen is all.
		following, err := r.following()
		if err != nil || following == 0 {
			return Event{}, orEOF(err)
		}
		if e, err := r.nextHere(); err != io.EOF {
			return e, err
		}
		after := r.last
		if err := r.open(following); errors.Is(err, fs.ErrNotExist) {
			continue // dropped meanwhile
		} else if err != nil {
			return Event{}, err
		}
		if r.last > after && !r.any {
			return Event{}, r.gap(after)
		}
		r.last = after
	}
}

func orEOF(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// following returns the first event's number of the segment after this one; 0 if
// there is none.
func (r *reader) following() (uint64, error) {
	firsts, err := segments(r.dir)
	for _, f := range firsts {
		if f > r.first {
			return f, err
		}
	}
	return 0, err
}

// nextHere is next in one segment.
func (r *reader) nextHere() (Event, error) {
	for {
		line, err := r.l.next()
		if err != nil {
			return Event{}, err
		}
		var e Event
		if json.Unmarshal(line, &e) != nil || e.Seq <= r.last {
			continue
		}
		r.last = e.Seq
		return e, nil
	}
}
