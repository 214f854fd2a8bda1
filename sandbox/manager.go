package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// Names under the state directory; see docs/ARCHITECTURE.md.
const (
	lockFile      = "lock"
	sandboxesDir  = "sandboxes"
	quarantineDir = "quarantine"
	sandboxFile   = "sandbox.json"
	membersDir    = "m"
	memberFile    = "member.json"
	specFile      = "config.json"
)

// errClosed is what those get who wait for a member when the daemon ends.
var errClosed = errors.New("the daemon is shutting down")

// Options are the parts of a [Manager] that have a sensible default.
type Options struct {
	Log             *slog.Logger     // default: discard
	Now             func() time.Time // default: time.Now
	NewID           func() string    // 16 hex digits; default: random
	Observer        Observer         // default: Unobserved
	Journal         *journal.Journal // of events, which stays the caller's; nil keeps none
	CgroupParent    string           // default: /sandboxd
	LogDir          string           // a member's log is LogDir/SANDBOX/MEMBER/log unless it says where; default: /var/lib/sandboxd/sandboxes
	CustodyMax      int              // how many members are held after their exit at most; 0: no limit
	CustodyMaxTmpfs int64            // how many bytes they may hold in memory; 0: no limit

	// For tests, whose processes do not exist and whose time is short.
	alive        func(procid.ID) bool
	killTimeout  time.Duration // how long a killed init may take to be recorded as such
	orphanWait   time.Duration // how long an exit status may take that the node learns itself
	retryMin     time.Duration // between attempts to replace a monitor
	retryMax     time.Duration
	hookRetryMin time.Duration // before the first retry of a hook or collection
	collectGrace time.Duration // how long a forced removal waits for a collection
}

// Manager owns the sandboxes of one state directory: nobody else changes it
// while the Manager is open. Its methods may be called from several goroutines.
type Manager struct {
	node Node
	o    Options
	path string   // of the state directory, absolute
	root *os.Root // the same
	lock *os.File

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // the goroutines that watch pauses and monitors

	custody chan struct{} // wakes who sees to it that custody ends

	mu    sync.Mutex
	boxes map[string]*box // by id; guarded by mu
	names map[string]*box // the same, by name; guarded by mu
	past  past            // guarded by mu

	gc          lock                     // held for a whole garbage collection
	keptGarbage map[garbage.Finding]bool // what the last one did not remove; guarded by gc
}

// box is the entry of one sandbox.
//
// Lock order: box.op, memb.op, box.collecting, Manager.mu, box.mu; op locks are held
// for a whole operation, the mutexes never while something is waited for. Records are
// replaced, never changed, so that whoever shows them needs no lock at all.
type box struct {
	op     lock
	rec    atomic.Pointer[Record] // stored under op
	broken bool                   // its record could not be read; set before the box is shared
	gone   bool                   // guarded by op
	told   told                   // guarded by op

	// collecting is held while files of a member are collected: those of one sandbox
	// are taken one after the other, so that it cannot keep others' waiting.
	collecting lock

	created chan struct{} // closed when the creation has ended
	ctx     context.Context
	cancel  context.CancelFunc // ends the watch on the pause

	mu      sync.Mutex
	members map[string]*memb // by id; guarded by mu
	closing bool             // a stop or remove is under way: nothing may be added or started; guarded by mu
}

// memb is the entry of one member.
type memb struct {
	op     lock
	rec    atomic.Pointer[MemberRecord] // stored under op
	broken bool
	gone   bool          // guarded by op
	in     string        // the sandbox's name
	told   told          // guarded by op
	over   chan struct{} // closed when the exit is recorded, or the member is gone
	isOver sync.Once
	// forced is closed when somebody has asked for its removal by force.
	forced   chan struct{}
	isForced sync.Once
	// dismissed is set before the member is killed because it is removed.
	dismissed atomic.Bool
	mon       atomic.Pointer[Monitor] // stored under op; nil while there is no connection
}

func (b *box) id() string   { return b.rec.Load().ID }
func (b *box) name() string { return b.rec.Load().Config.Name }
func (b *box) dir() string  { return sandboxesDir + "/" + b.id() }

func (mb *memb) id() string   { return mb.rec.Load().ID }
func (mb *memb) name() string { return mb.rec.Load().Config.Name }
func (mb *memb) dir() string {
	r := mb.rec.Load()
	return sandboxesDir + "/" + r.Sandbox + "/" + membersDir + "/" + r.ID
}

func (mb *memb) force() { mb.isForced.Do(func() { close(mb.forced) }) }

func (mb *memb) setOver() { mb.isOver.Do(func() { close(mb.over) }) }

// monitor returns the connection to the monitor, or nil.
func (mb *memb) monitor() Monitor {
	if p := mb.mon.Load(); p != nil {
		return *p
	}
	return nil
}

// setMonitor replaces the connection. Preconditions: mb.op is held.
func (mb *memb) setMonitor(mon Monitor) {
	var p *Monitor
	if mon != nil {
		p = &mon
	}
	if old := mb.mon.Swap(p); old != nil {
		(*old).Close() // nothing is written on this connection that could be lost
	}
}

func newBox(ctx context.Context, r *Record) *box {
	b := &box{op: newLock(), collecting: newLock(), created: make(chan struct{}), members: map[string]*memb{}}
	b.ctx, b.cancel = context.WithCancel(ctx)
	b.rec.Store(r)
	return b
}

func newMemb(in string, r *MemberRecord) *memb {
	mb := &memb{op: newLock(), in: in, over: make(chan struct{}), forced: make(chan struct{})}
	mb.rec.Store(r)
	return mb
}

// list returns the members, ordered by id.
func (b *box) list() []*memb {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.members), func(x, y *memb) int { return strings.Compare(x.id(), y.id()) })
}

// records returns the records of all members but the one with the id except.
func (b *box) records(except string) []*MemberRecord {
	var rs []*MemberRecord
	for _, mb := range b.list() {
		if r := mb.rec.Load(); r.ID != except {
			rs = append(rs, r)
		}
	}
	return rs
}

// Open takes possession of the state directory, which is made if need be,
// brings what an earlier daemon left there into order, and returns a Manager
// of it. It fails if another process has the directory open. The Manager keeps
// node but does not own it.
func Open(ctx context.Context, state string, node Node, o Options) (*Manager, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NewID == nil {
		o.NewID = newID
	}
	if o.Observer == nil {
		o.Observer = Unobserved{}
	}
	o.CgroupParent = cmp.Or(o.CgroupParent, "/sandboxd")
	o.LogDir = cmp.Or(o.LogDir, "/var/lib/sandboxd/sandboxes")
	if o.alive == nil {
		o.alive = procid.ID.Alive
	}
	o.killTimeout = cmp.Or(o.killTimeout, 10*time.Second)
	o.orphanWait = cmp.Or(o.orphanWait, 500*time.Millisecond)
	o.retryMin = cmp.Or(o.retryMin, 10*time.Millisecond)
	o.retryMax = cmp.Or(o.retryMax, 30*time.Second)
	o.hookRetryMin = cmp.Or(o.hookRetryMin, time.Second)
	o.collectGrace = cmp.Or(o.collectGrace, 10*time.Second)
	path, err := filepath.Abs(state)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(path, 0o711); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	m := &Manager{node: node, o: o, path: path, root: root, boxes: map[string]*box{}, names: map[string]*box{}, gc: newLock(), custody: make(chan struct{}, 1)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.lock, err = Lock(root, "state directory "+path)
	if err == nil {
		err = m.recover(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	m.keepCustody()
	return m, nil
}

// Free fails, as [Open] would, if another process has the state directory open.
// It changes nothing.
func Free(state string) error {
	// A FIFO in its place must not block the daemon.
	f, err := os.OpenFile(filepath.Join(state, lockFile), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lock state directory: %w", err)
	}
	defer f.Close()
	return flock(f, unix.LOCK_SH, "state directory "+state)
}

// lockWait bounds the wait for a lock that outlives the daemon that took it.
const lockWait = 5 * time.Second

// flock takes a lock on f, which is in the directory that what names.
func flock(f *os.File, how int, what string) error {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("lock %s: %w", what, os.NewSyscallError("flock", err))
		}
		text := make([]byte, 32)
		n, _ := f.ReadAt(text, 0)
		holder := strings.TrimSpace(string(text[:n]))
		pid, _ := strconv.Atoi(holder)
		// A daemon that was killed while it started a process leaves the lock to
		// that child, until its execve closes the descriptor.
		if id, err := procid.Of(pid); err == nil && id.Alive() || time.Now().After(deadline) {
			return statef("%s is in use by the daemon with pid %s", what, holder)
		}
	}
}

// Lock makes this process the only one that uses the directory dir, which what
// names in errors, until the file that it returns is closed.
func Lock(dir *os.Root, what string) (*os.File, error) {
	f, err := dir.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", what, err)
	}
	if err := flock(f, unix.LOCK_EX, what); err != nil {
		f.Close()
		return nil, err
	}
	// The pid is for the message above; who holds the flock decides.
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", what, err)
	}
	return f, nil
}

// Close ends the daemon's part: it stops watching, answers those who wait, and
// lets go of the state directory. Sandboxes and members go on. Call it after
// every other call, except of Wait, has returned.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.cancel() // from here on nothing begins
	m.mu.Unlock()
	m.wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.boxes {
		b.cancel()
		for _, mb := range b.list() {
			mb.setMonitor(nil)
		}
	}
	var err error
	if m.lock != nil {
		err = m.lock.Close()
		m.lock = nil
	}
	return errors.Join(err, m.root.Close())
}

// all returns every entry, ordered by id.
func (m *Manager) all() []*box {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.boxes), func(x, y *box) int { return strings.Compare(x.id(), y.id()) })
}

// enter makes b one of the Manager's. Preconditions: m.mu is held.
func (m *Manager) enter(b *box) {
	m.boxes[b.id()] = b
	m.names[b.name()] = b
}

// leave is the inverse of enter. Preconditions: m.mu is held.
func (m *Manager) leave(b *box) {
	delete(m.boxes, b.id())
	if m.names[b.name()] == b { // of records that could not be read, several may have no name
		delete(m.names, b.name())
	}
}

// box finds a sandbox by its name, its id, or the beginning of its id.
func (m *Manager) box(ref string) (*box, error) {
	m.mu.Lock()
	b := m.names[ref]
	if b == nil {
		b = m.boxes[ref]
	}
	m.mu.Unlock()
	if b != nil {
		return b, nil
	}
	return find("sandbox", ref, m.all(), "")
}

// member finds "SANDBOX/MEMBER".
func (m *Manager) member(ref string) (*box, *memb, error) {
	s, name, err := splitRef(ref)
	if err != nil {
		return nil, nil, err
	}
	b, err := m.box(s)
	if err != nil {
		return nil, nil, err
	}
	mb, err := findMember(name, b.list(), b.name())
	return b, mb, err
}

// Target returns the records behind ref, as [Dir.Records] does. They are shown,
// not given: whoever looks changes nothing in them.
func (m *Manager) Target(ref string) (r *Record, mr *MemberRecord, dir string, siblings []*MemberRecord, err error) {
	if _, _, serr := splitRef(ref); serr != nil {
		b, err := m.box(ref)
		if err != nil {
			return nil, nil, "", nil, err
		}
		return b.rec.Load(), nil, "", b.records(""), nil
	}
	b, mb, err := m.member(ref)
	if err != nil {
		return nil, nil, "", nil, err
	}
	return b.rec.Load(), mb.rec.Load(), m.memberPath(mb), b.records(mb.id()), nil
}

// lockBox finds a sandbox and takes its op lock.
func (m *Manager) lockBox(ctx context.Context, ref string) (*box, error) {
	b, err := m.box(ref)
	if err != nil {
		return nil, err
	}
	if err := b.op.acquire(ctx); err != nil {
		return nil, err
	}
	if b.gone {
		b.op.release()
		return nil, &kindError{fmt.Sprintf("no sandbox %s", quote(ref)), ErrNotFound}
	}
	return b, nil
}

// lockMember finds a member and takes its op lock.
func (m *Manager) lockMember(ctx context.Context, ref string) (*box, *memb, error) {
	b, mb, err := m.member(ref)
	if err != nil {
		return nil, nil, err
	}
	if err := mb.op.acquire(ctx); err != nil {
		return nil, nil, err
	}
	if mb.gone {
		mb.op.release()
		return nil, nil, &kindError{fmt.Sprintf("no member %s in sandbox %s", quote(mb.name()), b.name()), ErrNotFound}
	}
	return b, mb, nil
}

// write makes change to the record: on disk first, then in memory. If it fails,
// nothing has changed. Preconditions: b.op is held.
func (m *Manager) write(b *box, change func(*Record)) error { return m.change(b, false, change) }

// note makes a change that is true whether or not it can be written down.
// Recovery finds out the same from the kernel. Preconditions: b.op is held.
func (m *Manager) note(b *box, change func(*Record)) {
	if err := m.change(b, true, change); err != nil {
		m.o.Log.Warn("Record not written", "sandbox", b.id(), "err", err)
	}
}

// change is write, or if the change is a fact note, and tells of it.
func (m *Manager) change(b *box, fact bool, change func(*Record)) error {
	old := b.rec.Load()
	r := *old
	change(&r)
	next := b.told
	es := next.events(m.eventOf(&r), sandboxEvents(&next, old, &r))
	return m.tell(&b.told, next, es, fact, func(t Telling) error {
		var err error
		if !b.broken { // what could not be read is kept as it is
			r.Telling = t
			err = statefile.Write(m.root, b.dir()+"/"+sandboxFile, &r) // which names the file
		}
		if err == nil || fact {
			r.Telling = Telling{Rev: t.Rev}
			b.rec.Store(&r)
		}
		return err
	})
}

// writeMember is write for a member. Preconditions: mb.op is held.
func (m *Manager) writeMember(mb *memb, change func(*MemberRecord)) error {
	return m.changeMember(mb, false, change)
}

// noteMember is note for a member. Preconditions: mb.op is held.
func (m *Manager) noteMember(mb *memb, change func(*MemberRecord)) {
	if err := m.changeMember(mb, true, change); err != nil {
		m.o.Log.Warn("Record not written", "sandbox", mb.rec.Load().Sandbox, "member", mb.id(), "err", err)
	}
}

// changeMember is change for a member.
func (m *Manager) changeMember(mb *memb, fact bool, change func(*MemberRecord)) error {
	old := mb.rec.Load()
	r := *old
	change(&r)
	next := mb.told
	es := next.events(m.memberEventOf(mb.in, &r), memberEvents(&next, old, &r))
	return m.tell(&mb.told, next, es, fact, func(t Telling) error {
		var err error
		if !mb.broken {
			r.Telling = t
			err = statefile.Write(m.root, mb.dir()+"/"+memberFile, &r) // which names the file
		}
		if err == nil || fact {
			r.Telling = Telling{Rev: t.Rev}
			mb.rec.Store(&r)
		}
		return err
	})
}

func (m *Manager) memberPath(mb *memb) string { return m.path + "/" + mb.dir() }

// now is the time as it will be read back from a record.
func (m *Manager) now() time.Time { return m.o.Now().Round(0).UTC() }

func (m *Manager) view() view { return view{status: m.node, alive: m.o.alive, managed: true} }

func (m *Manager) info(b *box) Info {
	var ms []MemberInfo
	r := b.rec.Load()
	for _, mb := range b.list() {
		ms = append(ms, m.memberInfo(b, mb))
	}
	i := m.view().sandbox(r, ms)
	i.Hooks = withOutputs(r.HookRuns, m.path+"/"+b.dir())
	return i
}

// List returns all sandboxes, ordered by the time of their creation. It does
// not wait for operations under way.
func (m *Manager) List() []Info {
	infos := []Info{}
	for _, b := range m.all() {
		infos = append(infos, brief(m.info(b)))
	}
	sortInfos(infos)
	return infos
}

// Inspect returns what is known about a sandbox.
func (m *Manager) Inspect(ref string) (Info, error) {
	b, err := m.box(ref)
	if err != nil {
		return Info{}, err
	}
	i := m.info(b)
	describe(m.path, i.Members)
	return i, nil
}

// InspectMember returns what is known about a member.
func (m *Manager) InspectMember(ref string) (MemberInfo, error) {
	b, mb, err := m.member(ref)
	if err != nil {
		return MemberInfo{}, err
	}
	i := []MemberInfo{m.memberInfo(b, mb)}
	describe(m.path, i)
	return i[0], nil
}

func (m *Manager) memberInfo(b *box, mb *memb) MemberInfo {
	i := m.view().member(b.rec.Load(), mb.rec.Load(), m.memberPath(mb))
	i.Hooks = withOutputs(mb.rec.Load().HookRuns, m.memberPath(mb))
	return i
}

// Wait returns a member's exit record, as soon as there is one. It fails with
// [ErrNotFound] if the member is removed without ever having had one. That of a
// member that has removed itself can be asked for, by its ids, for some time after.
func (m *Manager) Wait(ctx context.Context, ref string) (Exit, error) {
	_, mb, err := m.member(ref)
	if err != nil {
		m.mu.Lock()
		e, ok := m.past.exits[ref]
		m.mu.Unlock()
		if ok {
			return e, nil
		}
		return Exit{}, &OpError{Op: "wait", Err: err}
	}
	select {
	case <-mb.over:
	case <-ctx.Done():
		return Exit{}, &OpError{Op: "wait", Ref: ref, Err: ctx.Err()}
	case <-m.ctx.Done():
		return Exit{}, &OpError{Op: "wait", Ref: ref, Err: errClosed}
	}
	if e := mb.rec.Load().Exit; e != nil {
		return *e, nil
	}
	return Exit{}, &OpError{Op: "wait", Ref: ref, Err: &kindError{"the member was removed", ErrNotFound}}
}

// maxSignal is the highest number of a signal (signal(7)).
const maxSignal = 64

// Kill sends sig to a member's init.
func (m *Manager) Kill(ctx context.Context, ref string, sig unix.Signal) (err error) {
	defer m.operation("kill", &err)()
	_, mb, err := m.member(ref)
	if err != nil {
		return &OpError{Op: "kill", Err: err}
	}
	if sig < 1 || sig > maxSignal {
		return &OpError{Op: "kill", Ref: ref, Err: invalidf("signal %d: want a number from 1 to %d", sig, maxSignal)}
	}
	// Without mb.op: a stop that waits for init must not keep others from
	// killing it. The record names init by more than its pid.
	r := mb.rec.Load()
	switch r.State {
	case MemberCreated, MemberStarting, MemberRunning:
		err = m.node.SignalInit(r, sig)
		if errors.Is(err, procid.ErrGone) {
			err = statef("the member has exited")
		}
	default:
		err = statef("the member is %s", r.State)
	}
	if err != nil {
		return &OpError{Op: "kill", Ref: ref, Err: err}
	}
	return nil
}

// ReopenLog makes a member's monitor open the log's path anew, after somebody
// has renamed the file.
func (m *Manager) ReopenLog(ctx context.Context, ref string) error {
	_, mb, err := m.member(ref)
	if err != nil {
		return &OpError{Op: "reopen log", Err: err}
	}
	mon := mb.monitor()
	if mon == nil {
		return &OpError{Op: "reopen log", Ref: ref, Err: statef("the member is %s", mb.rec.Load().State)}
	}
	if err := mon.ReopenLog(ctx); err != nil {
		return &OpError{Op: "reopen log", Ref: ref, Step: "monitor", Err: err}
	}
	return nil
}
