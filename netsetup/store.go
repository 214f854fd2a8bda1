package netsetup

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// Options are the parts of a [Store] that have a sensible default.
type Options struct {
	Log *slog.Logger     // default: discard
	Now func() time.Time // default: time.Now

	// DetachTimeout bounds [Store.Detach]: a plugin that hangs must not hold up
	// the removal of a sandbox. Default: 10 s.
	DetachTimeout time.Duration
	// Between attempts to take a network down; the pause doubles from the first
	// to the second. Defaults: 1 s, 5 min.
	RetryMin, RetryMax time.Duration

	// Tried is told of each attempt to take down a network that failed, and of
	// the one that succeeds at last, with nil. It is called from many goroutines.
	// Default: nobody is told.
	Tried func(t Tombstone, err error)
}

// retryTimeout bounds one attempt that nobody waits for.
const retryTimeout = 2 * time.Minute

// retryAtOnce bounds how many attempts are made at the same time: after a reboot
// there is one tombstone for every sandbox that was there before it.
const retryAtOnce = 8

const (
	attachmentsDir = "attachments"
	quarantineDir  = "quarantine"
	suffix         = ".json"
)

// attachmentVersion is written into every record.
const attachmentVersion = 1

// State says what an attachment is for. The words are on disk.
type state string

const (
	held      state = "held"      // a sandbox has, or is about to have, the network
	detaching state = "detaching" // the sandbox is gone, and its network is still to be taken down
)

// attachment is what is on disk about one sandbox's network, as
// DIR/attachments/ID.json. It is written before anything is done to the host,
// and removed when all of that has been taken back.
type attachment struct {
	Version   int             `json:"version"`
	ID        string          `json:"id"`
	Name      string          `json:"name"` // of the sandbox
	Mode      network.Mode    `json:"mode"`
	CreatedAt time.Time       `json:"createdAt"`
	Plan      json.RawMessage `json:"plan"`
	State     state           `json:"state"`

	// Of a tombstone.
	Since     time.Time `json:"since,omitzero"`
	Attempts  int       `json:"attempts,omitempty"`
	LastError string    `json:"lastError,omitempty"`
	NextTry   time.Time `json:"nextTry,omitzero"`
}

// Tombstone shows the network of a sandbox that is gone, which could not be taken
// down yet. Its addresses are not given to anybody else.
type Tombstone struct {
	ID        string // of the sandbox
	Name      string
	Mode      network.Mode
	CreatedAt time.Time // of the network
	Since     time.Time // the sandbox is gone
	Attempts  int
	LastError string
	NextTry   time.Time // the zero value: it is being tried
}

// Store keeps the attachments of one installation and carries requests out with
// its drivers. Its methods may be called from several goroutines, but not at the
// same time for one id.
type Store struct {
	o       Options
	dir     *os.Root
	drivers map[network.Mode]Driver

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	slots  chan struct{}

	mu      sync.Mutex
	entries map[string]*entry // by id; guarded by mu
}

// entry is one attachment. Records are replaced, never changed.
type entry struct {
	rec    *attachment        // guarded by Store.mu
	stop   context.CancelFunc // ends the attempt that is being made, nil if none is; guarded by Store.mu
	ending bool               // somebody forgets it: no attempt is to begin; guarded by Store.mu
	next   *attempt           // the one that begins next, if somebody waits for it; guarded by Store.mu
	now    chan struct{}      // has a buffer of one: try now
	gone   chan struct{}      // closed when the tombstone is forgotten

	busy sync.Mutex // held during an attempt, and while it is forgotten; before Store.mu
}

// attempt is one to take a tombstone's network down.
type attempt struct {
	done chan struct{} // closed when it is over
	err  error         // what came of it; to be read then
}

// Open returns a Store that keeps its records below dir, which is made if need
// be and is nobody else's. It takes the drivers over: Close closes them.
//
// Nothing is taken down before [Store.Settle] is called.
func Open(dir string, drivers map[network.Mode]Driver, o Options) (_ *Store, err error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Tried == nil {
		o.Tried = func(Tombstone, error) {}
	}
	o.DetachTimeout = cmp.Or(o.DetachTimeout, 10*time.Second)
	o.RetryMin = cmp.Or(o.RetryMin, time.Second)
	o.RetryMax = cmp.Or(o.RetryMax, 5*time.Minute)
	s := &Store{o: o, drivers: drivers, slots: make(chan struct{}, retryAtOnce), entries: map[string]*entry{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	for _, sub := range []string{attachmentsDir, quarantineDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	if s.dir, err = os.OpenRoot(dir); err != nil {
		return nil, err
	}
	return s, s.load()
}

// Close stops trying and closes the drivers. Networks stay as they are.
func (s *Store) Close() error {
	s.cancel()
	s.wg.Wait()
	var errs []error
	for _, d := range s.drivers {
		errs = append(errs, d.Close())
	}
	if s.dir != nil {
		errs = append(errs, s.dir.Close())
	}
	return errors.Join(errs...)
}

// load reads what an earlier process has left. What cannot be read is set aside:
// what belonged to it belongs to nobody then, and is for GC to find.
func (s *Store) load() error {
	ents, err := fs.ReadDir(s.dir.FS(), attachmentsDir)
	if err != nil {
		return err
	}
	for _, e := range ents {
		name := attachmentsDir + "/" + e.Name()
		if strings.HasSuffix(name, statefile.TempSuffix) {
			if err := s.dir.Remove(name); err != nil {
				s.o.Log.Warn("Temporary file not removed", "path", name, "err", err)
			}
			continue
		}
		rec, err := s.read(name)
		if err != nil {
			s.o.Log.Warn("Network record set aside", "path", name, "err", err)
			if err := s.dir.Rename(name, quarantineDir+"/"+e.Name()); err != nil {
				return err
			}
			continue
		}
		s.entries[rec.ID] = newEntry(rec)
	}
	return nil
}

func (s *Store) read(name string) (*attachment, error) {
	var rec attachment
	if err := statefile.Read(s.dir, name, &rec); err != nil {
		return nil, err
	}
	switch {
	case rec.Version != attachmentVersion:
		return nil, fmt.Errorf("unknown version %d", rec.Version)
	case file(rec.ID) != name:
		return nil, fmt.Errorf("it is that of %.80q", rec.ID)
	case rec.State != held && rec.State != detaching:
		return nil, fmt.Errorf("unknown state %.80q", rec.State)
	case s.drivers[rec.Mode] == nil:
		return nil, fmt.Errorf("unknown mode %.80q", rec.Mode)
	}
	return &rec, nil
}

func newEntry(rec *attachment) *entry {
	return &entry{rec: rec, now: make(chan struct{}, 1), gone: make(chan struct{})}
}

func file(id string) string { return attachmentsDir + "/" + id + suffix }

// write puts a record on disk. A lease of the built-in network that a power cut
// leaves behind without a record is found by GC, as no sandbox outlives it; what
// plugins have made is known only from its record, which therefore must not get lost.
func (s *Store) write(rec *attachment) error {
	write := statefile.WriteFast
	if rec.Mode == network.ModeCNI {
		write = statefile.Write
	}
	return write(s.dir, file(rec.ID), rec) // which names the file
}

func (s *Store) remove(rec *attachment) error {
	if err := s.dir.Remove(file(rec.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network record: %w", err)
	}
	return nil
}

func (s *Store) driver(mode network.Mode) (Driver, error) {
	if d := s.drivers[mode]; d != nil {
		return d, nil
	}
	return nil, Invalid(fmt.Errorf("there is no network of kind %q", mode))
}

func (s *Store) entry(id string) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entries[id]
}

// Plan is [Driver.Plan] of the mode's driver.
func (s *Store) Plan(ctx context.Context, id string, mode network.Mode, req *network.Request) (json.RawMessage, error) {
	d, err := s.driver(mode)
	if err != nil {
		return nil, err
	}
	return d.Plan(ctx, id, req)
}

// Attach puts the plan on record and gives the namespace its network. If it
// fails, the caller calls Detach. name is the sandbox's, for people.
func (s *Store) Attach(ctx context.Context, id, name string, mode network.Mode, plan json.RawMessage, ns *os.File) (*network.Result, error) {
	d, err := s.driver(mode)
	if err != nil {
		return nil, err
	}
	rec := &attachment{
		Version: attachmentVersion, ID: id, Name: name, Mode: mode, CreatedAt: s.now(), Plan: plan, State: held,
	}
	crash.Point("network record before")
	s.mu.Lock()
	s.entries[id] = newEntry(rec)
	s.mu.Unlock()
	if err := s.write(rec); err != nil {
		return nil, err
	}
	crash.Point("network record after")
	return d.Attach(ctx, id, plan, ns)
}

// Detach takes the sandbox's network down. What does not succeed, or not in
// time, is tried again behind the answer, from a tombstone: then tomb is true.
// ns may be nil.
//
// It fails only if nothing could be done nor noted for later.
func (s *Store) Detach(ctx context.Context, id string, ns *os.File) (tomb bool, err error) {
	e := s.entry(id)
	if e == nil {
		return false, nil
	}
	s.mu.Lock()
	rec := *e.rec
	s.mu.Unlock()
	if rec.State == detaching {
		return true, nil // somebody is at it
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.o.DetachTimeout, fmt.Errorf("it took longer than %s", s.o.DetachTimeout))
	defer cancel()
	if err = s.detach(ctx, e, &rec, ns); err == nil {
		return false, nil
	}
	s.o.Log.Warn("Network not taken down, will be tried again", "sandbox", id, "mode", rec.Mode, "err", err)
	s.o.Tried(s.bury(e, &rec, err), err)
	s.work(e)
	return true, nil
}

// detach takes down what rec stands for, and rec itself.
func (s *Store) detach(ctx context.Context, e *entry, rec *attachment, ns *os.File) error {
	crash.Point("network down before")
	if err := s.drivers[rec.Mode].Detach(ctx, rec.ID, rec.Plan, ns); err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		return err
	}
	crash.Point("network down after")
	if err := s.remove(rec); err != nil {
		return err
	}
	s.mu.Lock()
	if s.entries[rec.ID] == e {
		delete(s.entries, rec.ID)
	}
	s.mu.Unlock()
	return nil
}

// bury makes a tombstone of an attachment, or notes that a further attempt
// failed with why. If that cannot be written down it is tried all the same, and
// the next process finds the attachment of a sandbox that is gone.
func (s *Store) bury(e *entry, old *attachment, why error) Tombstone {
	rec := *old
	if rec.State != detaching {
		rec.State, rec.Since = detaching, s.now()
	}
	if why != nil {
		rec.Attempts++
		rec.LastError = why.Error()
		rec.NextTry = s.now().Add(s.delay(rec.Attempts))
	}
	crash.Point("tombstone before")
	if err := s.write(&rec); err != nil {
		s.o.Log.Warn("Record not written", "sandbox", rec.ID, "err", err)
	}
	crash.Point("tombstone after")
	s.mu.Lock()
	defer s.mu.Unlock()
	e.rec, e.stop = &rec, nil
	return e.tombstone()
}

// delay is how long to wait after n failed attempts.
func (s *Store) delay(n int) time.Duration {
	d := s.o.RetryMin
	for range n - 1 {
		if d *= 2; d >= s.o.RetryMax {
			return s.o.RetryMax
		}
	}
	return d
}

// work starts the goroutine that tries to take a tombstone's network down.
func (s *Store) work(e *entry) {
	s.wg.Go(func() {
		for {
			s.mu.Lock()
			// The clock may have been set: never wait longer than the pause is.
			wait := min(e.rec.NextTry.Sub(s.o.Now()), s.delay(max(e.rec.Attempts, 1)))
			s.mu.Unlock()
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-e.now:
			case <-e.gone:
				t.Stop()
				return
			case <-s.ctx.Done():
				t.Stop()
				return
			}
			t.Stop()
			select {
			case s.slots <- struct{}{}:
			case <-e.gone:
				return
			case <-s.ctx.Done():
				return
			}
			done := s.retry(e)
			<-s.slots
			if done {
				return
			}
		}
	})
}

// tryNow makes a tombstone be tried now, and returns the attempt; nil if there is
// no such tombstone any more.
func (s *Store) tryNow(id string) *attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil || e.rec.State != detaching {
		return nil
	}
	if e.next == nil {
		e.next = &attempt{done: make(chan struct{})}
	}
	select {
	case e.now <- struct{}{}:
	default: // it has been told already
	}
	return e.next
}

// retry makes one attempt and reports whether it was the last one.
func (s *Store) retry(e *entry) bool {
	ctx, cancel := context.WithTimeout(s.ctx, retryTimeout)
	defer cancel()
	e.busy.Lock()
	defer e.busy.Unlock()
	s.mu.Lock()
	rec := *e.rec
	if e.ending {
		s.mu.Unlock()
		return false
	}
	e.stop = cancel
	a := e.next
	e.next = nil
	s.mu.Unlock()
	err := s.detach(ctx, e, &rec, nil)
	if a != nil {
		a.err = err
		defer close(a.done) // once what came of it is on record
	}
	if s.ctx.Err() != nil && err != nil {
		return true // the daemon ends; that says nothing about the network
	}
	s.mu.Lock()
	cut := e.ending
	if cut {
		e.stop = nil
	}
	s.mu.Unlock()
	if cut && err != nil {
		return false // by who forgets it
	}
	if err != nil {
		s.o.Log.Warn("Network not taken down", "sandbox", rec.ID, "attempts", rec.Attempts+1, "err", err)
		s.o.Tried(s.bury(e, &rec, err), err)
		return false
	}
	s.o.Log.Info("Network taken down", "sandbox", rec.ID, "attempts", rec.Attempts+1)
	s.mu.Lock()
	t := e.tombstone()
	s.mu.Unlock()
	t.Attempts, t.LastError = t.Attempts+1, ""
	s.o.Tried(t, nil)
	return true
}

// Forget gives a tombstone up, for good, and ends the attempt that is being made: what it
// stands for is not tried to be taken down again, and its record is removed. What the
// driver held back because something else failed it takes down now ([Driver.Forget]). It
// fails with [ErrNoTombstone] if there is none of that id.
func (s *Store) Forget(id string) (Tombstone, error) {
	s.mu.Lock()
	e := s.entries[id]
	if e == nil || e.rec.State != detaching {
		s.mu.Unlock()
		return Tombstone{}, ErrNoTombstone
	}
	e.ending = true
	if e.stop != nil {
		e.stop()
	}
	s.mu.Unlock()
	e.busy.Lock()
	defer e.busy.Unlock()
	s.mu.Lock()
	rec, t := e.rec, e.tombstone()
	still := s.entries[id] == e
	e.ending = true // who was here before may have failed
	s.mu.Unlock()
	if !still {
		return Tombstone{}, ErrNoTombstone // taken down, or forgotten, meanwhile
	}
	crash.Point("tombstone forget before")
	ctx, cancel := context.WithTimeout(s.ctx, s.o.DetachTimeout)
	defer cancel()
	left := s.drivers[rec.Mode].Forget(ctx, id, rec.Plan)
	crash.Point("tombstone forget after")
	if err := s.remove(rec); err != nil {
		s.mu.Lock()
		e.ending = false
		s.mu.Unlock()
		return Tombstone{}, err
	}
	crash.Point("tombstone forget removed")
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, id)
	close(e.gone)
	s.o.Log.Warn("Network given up: what is left of it stays", "sandbox", id, "name", t.Name, "mode", t.Mode, "attempts", t.Attempts, "err", left)
	return t, nil
}

// Settle makes tombstones of the attachments whose sandbox is not alive, and
// begins to take down what tombstones stand for. It is called once the owner
// knows its sandboxes, and Restore has been called for those that live.
func (s *Store) Settle(alive func(id string) bool) {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.entries))
	s.mu.Unlock()
	for _, e := range all {
		s.mu.Lock()
		rec := *e.rec
		s.mu.Unlock()
		if rec.State == held {
			if alive(rec.ID) {
				continue
			}
			s.bury(e, &rec, nil)
		}
		s.work(e)
	}
}

// Verify reports what is no longer as Attach made it.
func (s *Store) Verify(ctx context.Context, id string, ns *os.File) error {
	return s.with(id, func(d Driver, plan json.RawMessage) error { return d.Verify(ctx, id, plan, ns) })
}

// Restore repairs what can have been lost on the host.
func (s *Store) Restore(ctx context.Context, id string, ns *os.File) error {
	return s.with(id, func(d Driver, plan json.RawMessage) error { return d.Restore(ctx, id, plan, ns) })
}

func (s *Store) with(id string, fn func(Driver, json.RawMessage) error) error {
	s.mu.Lock()
	e := s.entries[id]
	var rec attachment
	if e != nil {
		rec = *e.rec
	}
	s.mu.Unlock()
	if e == nil || rec.State != held {
		return errors.New("its network is not on record")
	}
	return fn(s.drivers[rec.Mode], rec.Plan)
}

// Status reports why networks of that mode cannot be made now; nil if they can.
func (s *Store) Status(ctx context.Context, mode network.Mode) error {
	d, err := s.driver(mode)
	if err != nil {
		return err
	}
	return d.Status(ctx)
}

// Tombstones returns the networks that wait to be taken down, the oldest first.
func (s *Store) Tombstones() []Tombstone {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ts []Tombstone
	for _, e := range s.entries {
		if e.rec.State == detaching {
			ts = append(ts, e.tombstone())
		}
	}
	slices.SortFunc(ts, func(a, b Tombstone) int { return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID, b.ID)) })
	return ts
}

// tombstone shows e. Preconditions: the Store's mu is held.
func (e *entry) tombstone() Tombstone {
	r := e.rec
	t := Tombstone{
		ID: r.ID, Name: r.Name, Mode: r.Mode, CreatedAt: r.CreatedAt, Since: r.Since,
		Attempts: r.Attempts, LastError: r.LastError, NextTry: r.NextTry,
	}
	if e.stop != nil {
		t.NextTry = time.Time{}
	}
	return t
}

// Counts returns how many attachments there are of each mode, tombstones not among
// them, and how many tombstones.
func (s *Store) Counts() (attached, tombstones map[network.Mode]int) {
	attached, tombstones = map[network.Mode]int{}, map[network.Mode]int{}
	for mode := range s.drivers {
		attached[mode], tombstones[mode] = 0, 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries {
		if e.rec.State == detaching {
			tombstones[e.rec.Mode]++
		} else {
			attached[e.rec.Mode]++
		}
	}
	return attached, tombstones
}

// now is the time as it will be read back from a record.
func (s *Store) now() time.Time { return s.o.Now().Round(0).UTC() }
