package sandbox

import (
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/garbage"
)

// Observer is told what a [Manager] does, while it does it. Its methods are
// called from many goroutines, with operation locks held: they return at once
// and call nothing of the Manager's. Embed [Unobserved] to be told of some of it.
type Observer interface {
	// Operation is told that somebody has called one of the Manager's methods,
	// and the function it returns how that has ended.
	Operation(op string) (done func(error))
	// Step is Operation for one step of an operation, a recovery or an undo. An
	// operation that is in none waits for another one to end.
	Step(op, step string) (done func(error))
	// Exited is told of an exit once it is on record. dir is the member's
	// directory under the state directory.
	Exited(r *MemberRecord, dir string)
	// Reanchored is told that a pause was killed; err is nil if it was replaced.
	Reanchored(err error)
	// MonitorReplaced is told that a monitor was killed and init has a new one.
	MonitorReplaced()
	// Recovered is told how long it took to take up what an earlier daemon left.
	Recovered(took time.Duration)
	// Hook is told of one attempt to run a hook, Collection of one to collect
	// what a member left.
	Hook(stage string, took time.Duration, err error)
	Collection(took time.Duration, err error)
	// CustodyReleased is told that a member's root and namespaces were let go
	// without a removal. reason is one of few words.
	CustodyReleased(reason string)
	// Garbage is told what a garbage collection has found.
	Garbage(found []garbage.Finding)
}

// Unobserved is an [Observer] that looks away.
type Unobserved struct{}

// The methods of [Observer], which do nothing.
func (Unobserved) Operation(string) func(error)      { return nothing }
func (Unobserved) Step(string, string) func(error)   { return nothing }
func (Unobserved) Exited(*MemberRecord, string)      {}
func (Unobserved) Reanchored(error)                  {}
func (Unobserved) MonitorReplaced()                  {}
func (Unobserved) Recovered(time.Duration)           {}
func (Unobserved) Hook(string, time.Duration, error) {}
func (Unobserved) Collection(time.Duration, error)   {}
func (Unobserved) CustodyReleased(string)            {}
func (Unobserved) Garbage([]garbage.Finding)         {}

func nothing(error) {}

// operation tells the observer of a method's call and, when the function that it
// returns is called, of the error that *err is then.
func (m *Manager) operation(op string, err *error) func() {
	done := m.o.Observer.Operation(op)
	return func() { done(*err) }
}

// run does one step of an operation, between the points where a test may kill
// the daemon, and names the step in its error.
func (m *Manager) run(op, step string, fn func() error) error {
	crash.Point(op + " " + step + " before")
	done := m.o.Observer.Step(op, step)
	err := fn()
	done(err)
	if err != nil {
		return &StepError{step, err}
	}
	crash.Point(op + " " + step + " after")
	return nil
}

// opError makes an OpError of what an operation's steps returned.
func opError(op, ref string, err, undo error) error {
	if err == nil {
		return nil
	}
	e := &OpError{Op: op, Ref: ref, Err: err, Undo: undo}
	for {
		se, ok := e.Err.(*StepError)
		if !ok {
			return e
		}
		e.Step, e.Err = se.Step, se.Err
	}
}

// Records yields the record of every sandbox with those of its members, in no
// order and without waiting for anything. They are shown, not given: whoever
// looks changes nothing in them.
func (m *Manager) Records() iter.Seq2[*Record, []*MemberRecord] {
	return func(yield func(*Record, []*MemberRecord) bool) {
		m.mu.Lock()
		boxes := slices.AppendSeq(make([]*box, 0, len(m.boxes)), maps.Values(m.boxes))
		m.mu.Unlock()
		var ms []*MemberRecord
		for _, b := range boxes {
			ms = ms[:0]
			b.mu.Lock()
			for _, mb := range b.members {
				ms = append(ms, mb.rec.Load())
			}
			b.mu.Unlock()
			if !yield(b.rec.Load(), ms) {
				return
			}
		}
	}
}

// MemberDir is the directory under the state directory of the member with that
// record.
func (m *Manager) MemberDir(r *MemberRecord) string {
	return m.path + "/" + sandboxesDir + "/" + r.Sandbox + "/" + membersDir + "/" + r.ID
}
