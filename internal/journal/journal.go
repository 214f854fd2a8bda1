package journal

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
)

const (
	// DefaultMax is how many bytes the segments may have together. An event has about 300.
	DefaultMax = 64 << 20
	// segmentMax is when a segment is full. [Open] reads one.
	segmentMax = 1 << 20
	// bootGap is more than the events of the half minute that a power cut can cost.
	bootGap = 1_000_000
	// pendingMax bounds the events that wait for space on the disk.
	pendingMax = 10_000
	// retryAfter is how long events wait for space on the disk before they are tried again.
	retryAfter = time.Second
)

// Options are the parts of a [Journal] that have a sensible default.
type Options struct {
	Max  int64  // bytes of all segments together, at least two segments; default: DefaultMax
	Boot string // of the host; default: what the kernel says

	segment int64 // bytes of a segment; default: segmentMax
}

// Journal is the writing side. One process has a directory open; it is safe for
// concurrent use. A nil Journal keeps nothing.
type Journal struct {
	o    Options
	dir  *os.Root
	full atomic.Bool  // the next Hold begins a segment
	held sync.RWMutex // for reading by those in Hold; before mu

	mu      sync.Mutex
	f       *os.File      // the last segment; nil if one has to be begun; guarded by mu, as is all that follows
	off     int64         // where its next line goes
	last    atomic.Uint64 // number of the last event; written with mu
	sizes   []size        // of the other segments, the oldest first
	first   uint64        // of the last segment
	jump    bool          // numbers may have been given out that the files do not show
	pending []Event       // that could not be written
	behind  atomic.Bool   // there are such; written with mu
	lost    int           // events that there was no room for in pending
	retry   *time.Timer
	closed  bool
	changed chan struct{} // closed when there is a new event; nil if nobody waits

	tail      map[string]Tail // of what was in the last segment when the journal was opened
	tailFirst uint64          // the first event of that one
	begun     bool            // there is an event of a daemon that began in it
}

type size struct {
	first uint64
	bytes int64
}

// Tail is what the last segment says of a sandbox or member.
type Tail struct {
	Sandbox, SandboxName, Member, MemberName string

	Rev     uint64 // of the last event that has one
	State   string // what the last change of state led to
	Removed bool
}

// Open opens the journal in the directory dir, which is made if need be. The
// caller makes sure that no other process has it open.
func Open(dir string, o Options) (*Journal, error) {
	o.segment = cmp.Or(o.segment, segmentMax)
	o.Max = max(cmp.Or(o.Max, DefaultMax), 2*o.segment)
	if o.Boot == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, err
		}
		o.Boot = strings.TrimSpace(string(b))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	j := &Journal{o: o, dir: root, tail: map[string]Tail{}}
	if err := j.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("journal: %w", err), j.Close())
	}
	return j, nil
}

// load finds out where the journal ends.
func (j *Journal) load() error {
	firsts, err := segments(j.dir)
	if err != nil {
		return err
	}
	for _, first := range firsts {
		fi, err := j.dir.Lstat(segmentName(first))
		if err != nil {
			return err
		}
		j.sizes = append(j.sizes, size{first, fi.Size()})
	}
	all := slices.Clone(j.sizes)
	for len(j.sizes) > 0 {
		s := j.sizes[len(j.sizes)-1]
		j.sizes = j.sizes[:len(j.sizes)-1]
		f, err := openSegment(j.dir, s.first, os.O_RDWR)
		if err != nil {
			return err
		}
		sc, err := scan(f, s.first, j.note)
		if err != nil {
			f.Close()
			return err
		}
		if sc.end == 0 { // damaged from the first line to the last
			j.jump = true
			j.last.Store(s.first - 1)
			f.Close()
			if err := j.dir.Remove(segmentName(s.first)); err != nil {
				return err
			}
			continue
		}
		if err := f.Truncate(sc.end); err != nil {
			f.Close()
			return err
		}
		j.first, j.off = s.first, sc.end
		j.last.Store(sc.last)
		j.tailFirst = s.first
		if sc.header.Boot != j.o.Boot || !j.begun && j.firstOfBoot() {
			// What was there before the boot may be there no longer, and has not been told of.
			if err := j.noteAll(all); err != nil {
				f.Close()
				return err
			}
		}
		if j.jump = j.jump || sc.lost || sc.header.Boot != j.o.Boot; j.jump {
			j.sizes = append(j.sizes, size{s.first, sc.end})
			return f.Close()
		}
		j.f = f
		j.full.Store(j.off >= j.o.segment)
		return nil
	}
	return nil
}

// firstOfBoot reports whether the segment before the last one, which is no longer
// in sizes, is of another boot, or there is none.
func (j *Journal) firstOfBoot() bool {
	if len(j.sizes) == 0 {
		return true
	}
	first := j.sizes[len(j.sizes)-1].first
	f, err := openSegment(j.dir, first, os.O_RDONLY)
	if err != nil {
		return true
	}
	defer f.Close()
	return readHeader(f, first).Boot != j.o.Boot
}

// noteAll reads segments from the first to the last.
func (j *Journal) noteAll(all []size) error {
	clear(j.tail)
	for _, s := range all {
		f, err := openSegment(j.dir, s.first, os.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was damaged
		}
		if err != nil {
			return err
		}
		_, err = scan(f, s.first, j.note)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// note keeps what an event says about what it is about.
func (j *Journal) note(e *Event) {
	j.begun = j.begun || e.Type == Daemon
	if e.Rev == 0 && e.Type != Removed {
		return
	}
	t := j.tail[e.Object()]
	t.Sandbox, t.SandboxName, t.Member, t.MemberName = e.Sandbox, e.SandboxName, e.Member, e.MemberName
	t.Rev = max(t.Rev, e.Rev)
	switch e.Type {
	case State, Exit:
		t.State = e.To
	case Removed:
		t.State, t.Removed = "", true
	}
	j.tail[e.Object()] = t
}

// Tail returns what the last segment, as it was when the journal was opened,
// says of the sandbox or member with that id.
func (j *Journal) Tail(id string) (t Tail, ok bool) {
	if j == nil {
		return Tail{}, false
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	t, ok = j.tail[id]
	return t, ok
}

// Tails returns the same for all of which the last segment says something. If
// the host was started since, and no daemon has told that it began, that is all of
// which the journal says something.
func (j *Journal) Tails() map[string]Tail {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return maps.Clone(j.tail)
}

// Written reports whether an earlier process has written the event rev of the
// sandbox or member with that id. It was to do so under a [Journal.Hold] that
// returned after.
func (j *Journal) Written(id string, rev, after uint64) bool {
	if j == nil {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if after > j.last.Load() {
		// The journal's end is lost, or all of it. Its numbers were given out.
		if j.f != nil {
			j.sizes = append(j.sizes, size{j.first, j.off})
			j.f.Close()
			j.f = nil
		}
		j.jump = true
		j.last.Store(after)
	}
	return after+1 < j.tailFirst || j.tail[id].Rev >= rev
}

// Recovered says that [Journal.Tail] and [Journal.Written] will not be called any more.
func (j *Journal) Recovered() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.tail, j.tailFirst = nil, 0
}

// Close makes the journal durable and closes it. Events that found no space are lost.
func (j *Journal) Close() error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	if j.retry != nil {
		j.retry.Stop()
	}
	var err error
	if j.f != nil {
		err = errors.Join(j.f.Sync(), j.f.Close())
		j.f = nil
	}
	return errors.Join(err, j.dir.Close())
}

// Hold keeps the segment from being changed for another until release is
// called, and returns the number of the last event.
func (j *Journal) Hold() (after uint64, release func()) {
	if j == nil {
		return 0, func() {}
	}
	if j.full.Load() {
		j.held.Lock() // those who hold it do so for a moment
		j.mu.Lock()
		// What waits belongs to the segment that it was to be written to.
		if j.full.Load() && len(j.pending) == 0 {
			j.begin() // if it cannot be, the segment grows
		}
		j.mu.Unlock()
		j.held.Unlock()
	}
	j.held.RLock()
	return j.Last(), j.held.RUnlock
}

// Append gives events their numbers and writes them, in one write.
// Preconditions: the caller is between Hold and its release.
//
// If that cannot be done they are the journal's all the same, and are written as
// soon as it can; the error is only to be reported. [Journal.Behind] says when
// they have been.
func (j *Journal) Append(events ...Event) error {
	if j == nil || len(events) == 0 {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pending = append(j.pending, events...)
	if n := len(j.pending) - pendingMax; n > 0 {
		j.lost += n
		j.pending = j.pending[n:]
	}
	if err := j.flush(); err != nil {
		return fmt.Errorf("journal: %d events wait for being written, %d are lost: %w", len(j.pending), j.lost, err)
	}
	return nil
}

// Behind reports whether events wait for being written, of those whose Append has returned.
func (j *Journal) Behind() bool {
	return j != nil && j.behind.Load() // not waiting for somebody who writes
}

// flush writes what is pending, now or later. Preconditions: j.mu is held.
func (j *Journal) flush() error {
	last, err := j.write(j.pending)
	j.behind.Store(err != nil && len(j.pending) > 0)
	if err != nil {
		if j.retry == nil {
			j.retry = time.AfterFunc(retryAfter, j.tryAgain)
		} else {
			j.retry.Reset(retryAfter)
		}
		return err
	}
	j.pending = nil
	j.last.Store(last)
	if j.changed != nil {
		close(j.changed)
		j.changed = nil
	}
	return nil
}

func (j *Journal) tryAgain() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.closed && len(j.pending) > 0 {
		j.flush() // it has been reported
	}
}

// write writes events behind the last one and returns the number of the last.
func (j *Journal) write(events []Event) (last uint64, err error) {
	if j.f == nil {
		if err := j.makeRoom(j.begin); err != nil {
			return 0, err
		}
	}
	var b bytes.Buffer
	last = j.last.Load()
	for i := range events {
		last++
		events[i].Seq = last
		line, err := encode(&events[i])
		if err != nil {
			return 0, err
		}
		b.Write(line)
	}
	err = j.makeRoom(func() error {
		_, err := j.f.WriteAt(b.Bytes(), j.off)
		return err
	})
	if err != nil {
		return 0, errors.Join(err, j.f.Truncate(j.off))
	}
	j.off += int64(b.Len())
	if j.off >= j.o.segment {
		j.full.Store(true)
	}
	return last, nil
}

// makeRoom does what needs room on the disk. The past makes room for the present;
// of the segments one stays, which knows the numbers.
func (j *Journal) makeRoom(do func() error) error {
	keep := 0
	if j.f == nil {
		keep = 1
	}
	err := do()
	for (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) && len(j.sizes) > keep {
		if j.drop() != nil {
			break
		}
		err = do()
	}
	return err
}

// encode returns e's line. What is too long loses the parts that can be long.
func encode(e *Event) ([]byte, error) {
	b, err := json.Marshal(e)
	if err == nil && len(b) >= maxLine {
		short := *e
		short.Attrs = map[string]string{"truncated": "true"}
		short.Reason = strings.ToValidUTF8(short.Reason[:min(len(short.Reason), 1024)], "")
		b, err = json.Marshal(&short)
	}
	return append(b, '\n'), err
}

// begin begins a segment, and drops the oldest while there is too much.
// Preconditions: j.mu is held; nobody holds the journal, or there is no segment
// that anybody could hold.
func (j *Journal) begin() error {
	h := header{Version: formatVersion, First: j.last.Load() + 1, Prev: j.last.Load(), Boot: j.o.Boot}
	if j.jump {
		h.First += bootGap
	}
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	f, err := j.dir.OpenFile(tempName, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(line, 0); err == nil {
		crash.Point("journal segment before")
		err = j.dir.Rename(tempName, segmentName(h.First))
	}
	if err != nil {
		f.Close()
		return err
	}
	if j.f != nil {
		j.sizes = append(j.sizes, size{j.first, j.off})
		j.f.Close() // nothing is in it that could still be lost
	}
	j.f, j.first, j.off = f, h.First, int64(len(line))
	j.last.Store(h.First - 1)
	j.jump = false
	j.full.Store(false)
	crash.Point("journal segment after")
	total := j.o.segment // the new one will have that
	for _, s := range j.sizes {
		total += s.bytes
	}
	for total > j.o.Max && len(j.sizes) > 0 {
		total -= j.sizes[0].bytes
		if err := j.drop(); err != nil {
			return err
		}
	}
	return nil
}

// drop removes the oldest segment.
func (j *Journal) drop() error {
	err := j.dir.Remove(segmentName(j.sizes[0].first))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	j.sizes = j.sizes[1:]
	crash.Point("journal drop after")
	return nil
}

// Last is the number of the last event; 0 if there has been none.
func (j *Journal) Last() uint64 {
	if j == nil {
		return 0
	}
	return j.last.Load() // not waiting for somebody who writes
}

// Wait waits until there is an event with a number above after, or ctx ends.
func (j *Journal) Wait(ctx context.Context, after uint64) error {
	for {
		j.mu.Lock()
		if j.last.Load() > after {
			j.mu.Unlock()
			return nil
		}
		if j.changed == nil {
			j.changed = make(chan struct{})
		}
		changed := j.changed
		j.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Path is the directory.
func (j *Journal) Path() string { return j.dir.Name() }
