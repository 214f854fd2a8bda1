package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// The words of events.
type (
	Event       = journal.Event
	EventType   = journal.Type
	EventQuery  = journal.Query
	EventFilter = journal.Filter
	EventGap    = journal.GapError
)

// ErrEventGap is what an [*EventGap] matches.
var ErrEventGap = journal.ErrGap

// Events yields events from the journal as package journal's Read does. It ends
// when ctx does, and when the Manager is closed.
func (m *Manager) Events(ctx context.Context, q EventQuery) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		if m.o.Journal == nil {
			yield(Event{}, statef("no journal of events is kept"))
			return
		}
		if err := q.Filter.Check(); err != nil {
			yield(Event{}, invalidf("%v", err))
			return
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(m.ctx, cancel)()
		for e, err := range journal.Read(ctx, m.o.Journal.Path(), q, m.o.Journal.Wait) {
			if err != nil && m.ctx.Err() != nil {
				err = errClosed
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// Telling is the part of a record that ties events to it, so that each change
// is told of exactly once: a record is written with the events that tell of it,
// and these go to the journal then. A daemon that is killed between the two leaves
// a record whose events the next one finds missing in the journal, and writes.
type Telling struct {
	Rev    uint64  `json:"rev,omitempty"` // of the last event, in the outbox or before; counts from 1
	Outbox *Outbox `json:"outbox,omitempty"`
}

// Outbox holds events that were not known to be in the journal when the record
// was written.
type Outbox struct {
	After  uint64  `json:"after"` // the journal's last number before the first of them
	Events []Event `json:"events"`
}

// Tell ties an event to the change of the record that is being made. It is for
// the functions that are given to Manager.write and its like. What and when are filled in;
// changes of state, exits, custody and processes that were replaced are told of anyway.
func (t *Telling) Tell(typ EventType, reason string, attrs map[string]string) {
	o := new(Outbox)
	if t.Outbox != nil {
		o.Events = append(o.Events, t.Outbox.Events...)
	}
	o.Events = append(o.Events, Event{Type: typ, Reason: reason, Attrs: attrs})
	t.Outbox = o
}

// told is what has been told of a sandbox or member. It is guarded by the
// operation lock.
type told struct {
	state  string  // that was told last; "" if none was
	rev    uint64  // of the last event; 0 if none was or, if lost is set, not known
	lost   bool    // its record could not be read, so that its events are not counted
	gone   bool    // that it was removed has been told
	outbox *Outbox // in the journal's hands, and not known to be in its files
}

// events completes what happened to one sandbox or member: base names it.
func (t *told) events(base Event, es []Event) []Event {
	for i := range es {
		e := &es[i]
		e.Sandbox, e.SandboxName, e.Member, e.MemberName = base.Sandbox, base.SandboxName, base.Member, base.MemberName
		if e.Time.IsZero() {
			e.Time = base.Time
		}
		if !t.lost {
			t.rev++
			e.Rev = t.rev
		}
		if len(e.Reason) > reasonMax {
			e.Reason = e.Reason[:reasonMax] + "…"
		}
	}
	return es
}

// reasonMax bounds the reason of an event: an error can quote a program's output.
const reasonMax = 1024

// changed is the event of a change of state to a state, or none.
func (t *told) changed(to, reason string) []Event {
	if t.state == to {
		return nil
	}
	from := t.state
	t.state = to
	return []Event{{Type: journal.State, From: from, To: to, Reason: reason}}
}

func (m *Manager) eventOf(r *Record) Event {
	return Event{Time: m.now(), Sandbox: r.ID, SandboxName: r.Config.Name}
}

func (m *Manager) memberEventOf(sandboxName string, r *MemberRecord) Event {
	return Event{Time: m.now(), Sandbox: r.Sandbox, SandboxName: sandboxName, Member: r.ID, MemberName: r.Config.Name}
}

// sandboxEvents are those that tell of the change from old to r.
func sandboxEvents(t *told, old, r *Record) []Event {
	es := t.changed(r.State.String(), r.Reason)
	if !old.Pause.IsZero() && !r.Pause.IsZero() && old.Pause != r.Pause {
		es = append(es, Event{Type: journal.Pause, Reason: "pause was killed and replaced", Attrs: pids(old.Pause, r.Pause)})
	}
	return append(es, r.taken()...)
}

// memberEvents is sandboxEvents for a member.
func memberEvents(t *told, old, r *MemberRecord) []Event {
	var es []Event
	if old.State == MemberCreating && r.State == MemberRunning { // in one step; it has been created all the same
		es = t.changed(MemberCreated.String(), "")
	}
	es = append(es, t.changed(r.State.String(), r.Reason)...)
	// An exit that could not be recorded has been told of all the same.
	if len(es) == 1 && old.Exit == nil && r.Exit != nil {
		es[0].Type, es[0].Exit, es[0].Reason = journal.Exit, r.Exit, r.Exit.Reason
		if r.Exit.OOMKilled {
			es = append(es, Event{Type: journal.OOM, Reason: "the kernel killed a process of the member for want of memory"})
		}
		if !r.HeldSince.IsZero() {
			es = append(es, custodyEvent("taken", string(r.Config.Custody)))
		}
	}
	if !old.Monitor.IsZero() && !r.Monitor.IsZero() && old.Monitor != r.Monitor {
		es = append(es, Event{Type: journal.Monitor, Reason: "monitor was killed and replaced", Attrs: pids(old.Monitor, r.Monitor)})
	}
	if old.Released == nil && r.Released != nil {
		es = append(es, custodyEvent("released", r.Released.Reason))
	}
	if !old.CollectDone && r.CollectDone && (r.Collection != "" || r.CollectError != "") {
		es = append(es, Event{Type: journal.Collection, Reason: r.CollectError, Attrs: map[string]string{"collection": r.Collection}})
	}
	return append(es, r.taken()...)
}

// custodyEvent tells that custody was taken or released.
func custodyEvent(action, reason string) Event {
	return Event{Type: journal.Custody, Reason: reason, Attrs: map[string]string{"action": action}}
}

func pids(old, now procid.ID) map[string]string {
	return map[string]string{"oldPid": strconv.Itoa(old.PID), "pid": strconv.Itoa(now.PID)}
}

// taken takes out what Tell has put into the record.
func (t *Telling) taken() []Event {
	if t.Outbox == nil {
		return nil
	}
	es := t.Outbox.Events
	t.Outbox = nil
	return es
}

// tell makes a change of a record together with the events es that tell of it,
// after which next is what has been told. write writes the record, with what it is given.
// If it fails, nothing has been told, unless the change is a fact: then the record
// is behind the journal until the next time.
func (m *Manager) tell(have *told, next told, es []Event, fact bool, write func(Telling) error) error {
	after, release := m.o.Journal.Hold()
	defer release()
	if !m.o.Journal.Behind() {
		next.outbox = nil
	}
	if len(es) > 0 {
		o := &Outbox{After: after, Events: es}
		if next.outbox != nil {
			o = &Outbox{After: next.outbox.After, Events: slices.Concat(next.outbox.Events, es)}
		}
		next.outbox = o
	}
	err := write(Telling{next.rev, next.outbox})
	if err != nil && !fact {
		return err
	}
	if len(es) > 0 {
		m.append(es...)
		if !m.o.Journal.Behind() {
			next.outbox = nil // it would be kept until the next change
		}
	}
	*have = next
	return err
}

// append gives events to the journal, which is held. One that it cannot write
// now it writes later.
func (m *Manager) append(es ...Event) {
	crash.Point("event before")
	if err := m.o.Journal.Append(es...); err != nil {
		m.o.Log.Warn("Event not written yet", "err", err)
	}
	crash.Point("event after")
}

// emit tells of something that no record tells of. If the daemon is killed just
// then, it may not be told.
func (m *Manager) emit(e Event) {
	if e.Time.IsZero() {
		e.Time = m.now()
	}
	_, release := m.o.Journal.Hold()
	defer release()
	m.append(e)
}

// Emit is for those who do something for the Manager and have something to
// tell, such as that a network was taken down at last.
func (m *Manager) Emit(e Event) { m.emit(e) }

// recall finds out what an earlier daemon has told of what is on record as id,
// in a state that users see as state, and tells what it did not come to.
func (m *Manager) recall(id, state string, r *Telling) told {
	t := told{state: state, rev: r.Rev}
	if r.Rev == 0 {
		t.state = "" // that daemon told nothing
	}
	m.makeUpOutbox(id, r.Outbox)
	r.Outbox = nil
	// The journal is ahead if the record could not be written when something happened.
	if tail, ok := m.o.Journal.Tail(id); ok && tail.Rev > t.rev {
		t.rev, t.state, t.gone = tail.Rev, tail.State, tail.Removed
	}
	return t
}

// recallLost is recall for a record that cannot be read.
func (m *Manager) recallLost(id string) told {
	tail, _ := m.o.Journal.Tail(id)
	return told{lost: true, state: tail.State, gone: tail.Removed}
}

// removedDir holds what has been removed and perhaps not been told of yet. What
// is in there is named by a [removedName].
const removedDir = "removed"

// removedName is what has to be known to tell of a removal.
type removedName struct {
	after   uint64 // the journal's last number before
	rev     uint64 // of the last event before
	state   string // that was told last
	sandbox string
	member  string // empty if it is the sandbox
}

func (n removedName) String() string {
	s := fmt.Sprintf("%d.%d.%s.%s", n.after, n.rev, n.state, n.sandbox)
	if n.member != "" {
		s += "." + n.member
	}
	return s
}

func parseRemovedName(s string) (n removedName, ok bool) {
	f := strings.Split(s, ".")
	if len(f) == 5 {
		n.member = f[4]
		f = f[:4]
	}
	if len(f) != 4 {
		return n, false
	}
	var aerr, rerr error
	n.after, aerr = strconv.ParseUint(f[0], 10, 64)
	n.rev, rerr = strconv.ParseUint(f[1], 10, 64)
	n.state, n.sandbox = f[2], f[3]
	return n, aerr == nil && rerr == nil && isID(n.sandbox) && (n.member == "" || isID(n.member))
}

// retire removes the record in dir, of which nothing else is left, and tells of
// it. That dir is not there any more is what makes it a fact. n names what it is of.
func (m *Manager) retire(dir string, n removedName, t *told, es []Event) error {
	if t.rev == 0 {
		return m.removeDir(dir) // nobody has heard of it
	}
	after, release := m.o.Journal.Hold()
	defer release()
	n.after, n.rev, n.state = after, t.rev, t.state
	to := removedDir + "/" + n.String()
	err := m.root.Rename(dir, to)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range []string{path.Dir(dir), removedDir} {
		if err := statefile.SyncDir(m.root, d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	crash.Point("removal before told")
	m.append(es...)
	crash.Point("removal after told")
	t.state, t.gone, t.outbox = "", true, nil
	if m.o.Journal.Behind() {
		return nil // the next start will see whether it was told
	}
	if err := m.root.RemoveAll(to); err != nil {
		m.o.Log.Warn("Directory not cleared", "path", to, "err", err)
	}
	return nil
}

// tellVanished tells that what was there, as far as the journal says, is on
// record no longer: the state directory does not outlive a boot. Those with the
// ids in told have been told of.
func (m *Manager) tellVanished(told []string) {
	known := map[string]bool{}
	for _, id := range told {
		known[id] = true
	}
	for id, b := range m.boxes {
		known[id] = true
		for id := range b.members {
			known[id] = true
		}
	}
	var es []Event
	for id, tail := range m.o.Journal.Tails() {
		if known[id] || tail.Removed || tail.State == "" {
			continue
		}
		es = append(es, Event{
			Type: journal.Removed, Sandbox: tail.Sandbox, SandboxName: tail.SandboxName, Member: tail.Member, MemberName: tail.MemberName,
			Rev: tail.Rev + 1, From: tail.State, Reason: "it is not on record any more",
		})
	}
	slices.SortFunc(es, func(a, b Event) int { // members before their sandboxes
		return cmp.Or(cmp.Compare(a.Sandbox, b.Sandbox), -cmp.Compare(a.Member, b.Member))
	})
	for _, e := range es {
		m.emit(e)
	}
}

// tellLost tells that something is removed whose record could not be read. It
// does so before, since nothing would be left to know it from.
func (m *Manager) tellLost(t *told, base Event) {
	if t.gone {
		return
	}
	for _, e := range t.events(base, []Event{t.removal("the record could not be read; it was set aside")}) {
		m.emit(e)
	}
	t.state, t.gone = "", true
}

// removal is the event that tells of a removal.
func (t *told) removal(reason string) Event {
	return Event{Type: journal.Removed, From: t.state, Reason: reason}
}

// recallRemoved tells of what an earlier daemon has removed, as far as that one
// did not come to it, and returns the ids.
func (m *Manager) recallRemoved() (ids []string, err error) {
	ents, err := fs.ReadDir(m.root.FS(), removedDir)
	if err != nil {
		return nil, err
	}
	names := map[string]string{} // of sandboxes
	for id, b := range m.boxes {
		names[id] = b.name()
	}
	// Members before their sandboxes, but those have the names.
	var boxes, members []removedName
	for _, e := range ents {
		dir := removedDir + "/" + e.Name()
		switch n, ok := parseRemovedName(e.Name()); {
		case !ok || !e.IsDir():
			m.clear("Foreign file set aside", dir, m.setAside)
		case n.member != "":
			members = append(members, n)
		default:
			boxes = append(boxes, n)
			var r Record
			if statefile.Read(m.root, dir+"/"+sandboxFile, &r) == nil {
				names[n.sandbox] = r.Config.Name
			}
		}
	}
	for _, n := range append(members, boxes...) {
		dir := removedDir + "/" + n.String()
		t := told{rev: n.rev, state: n.state}
		var r Record
		var mr MemberRecord
		switch {
		case n.member != "" && statefile.Read(m.root, dir+"/"+memberFile, &mr) == nil && checkMemberRecord(&mr, n.sandbox, n.member) == nil:
			ids = append(ids, n.member)
			m.makeUpOutbox(n.member, mr.Outbox)
			m.makeUp(n.member, n.after, t.events(m.memberEventOf(names[n.sandbox], &mr), memberRemoval(&t, &mr)))
		case n.member == "" && statefile.Read(m.root, dir+"/"+sandboxFile, &r) == nil && checkRecord(&r, n.sandbox) == nil:
			ids = append(ids, n.sandbox)
			m.makeUpOutbox(n.sandbox, r.Outbox)
			m.makeUp(n.sandbox, n.after, t.events(m.eventOf(&r), []Event{t.removal("")}))
		default: // it was about to go, record and all
		}
		if err := m.root.RemoveAll(dir); err != nil {
			return nil, err
		}
	}
	return ids, nil
}

// makeUpOutbox is makeUp for what is in a record.
func (m *Manager) makeUpOutbox(id string, o *Outbox) {
	if o != nil {
		m.makeUp(id, o.After, o.Events)
	}
}

// makeUp writes those events that are not in the journal.
func (m *Manager) makeUp(id string, after uint64, es []Event) {
	for _, e := range es {
		if !m.o.Journal.Written(id, e.Rev, after) {
			m.emit(e)
		}
	}
}

// memberRemoval are the events of a member's removal.
func memberRemoval(t *told, r *MemberRecord) []Event {
	var es []Event
	if !r.HeldSince.IsZero() && r.Released == nil {
		es = append(es, custodyEvent("released", "removed"))
	}
	return append(es, t.removal(""))
}
