package sandbox

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	errInjected = errors.New("injected")
	errCrashed  = errors.New("the daemon is dead")
)

// fault says how a method of fakeNode fails.
type fault int

const (
	works  fault = iota
	fails        // nothing is done
	halves       // everything is done, and an error returned
)

// fakeNode is a host with processes, cgroups and directories that are entries
// in maps. It fails where the test tells it to. It can stand for a daemon that
// dies in the middle of a call: from then on nothing that is asked of it has
// any effect, and the state directory as it was at that moment is in a copy.
type fakeNode struct {
	mu       sync.Mutex
	faults   map[string]fault
	pid      int
	procs    map[procid.ID]bool // alive
	pauses   map[string]procid.ID
	watches  map[procid.ID][]func()
	held     map[string]bool // sandboxes whose namespaces this daemon holds descriptors of
	inode    map[string]uint64
	cgroups  map[string]bool // SID and SID/MID
	data     map[string]bool // SID/MID
	monitors map[string]*fakeMonitor
	started  map[string]bool // members whose init ever ran its command
	truth    map[string]Exit // exits that somebody was there to see
	leftover map[string]bool // members with processes other than init
	network  NetworkMode     // the default
	networks map[string]bool // sandboxes with a network, those of tombstones not among them
	tombs    map[string]bool // networks that the node takes down by itself, sooner or later

	declared  map[string]MemberConfig // by SID/MID
	daemon    int                     // counts them
	wrong     string                  // what a manager must not do, and did
	hooks     map[string]*fakeHook    // by what they are called, see hooks_test.go
	collects  map[string]int          // how often a member was collected, SID/MID
	collected map[string]bool         // and that this succeeded

	collectsAll   bool             // there is something to collect after any exit
	onCollect     func()           // called at each collection; may wait
	hangCollect   bool             // each waits for the end of its context
	collectCut    error            // which had this cause
	onMakeCgroup  func()           // called before a sandbox's cgroup is made
	onStartPause  func()           // called before its record and cgroup are waited for
	collectedHeld bool             // the last one's monitor was alive
	tmpfs         map[string]int64 // bytes in memory, by member

	state      string // the state directory, for the copy
	countdown  int    // calls until the crash; 0: none is planned
	crashLate  bool   // the call in which it happens takes effect
	crashed    bool
	copy       string
	unkillable map[string]bool // members whose init ignores the stop signal
}

// fakeMonitor is a monitor process with its init, and what it has on disk.
type fakeMonitor struct {
	key        string
	policy     Custody
	proc, init procid.ID
	phase      MonitorPhase
	startErr   string
	exit       *Exit
	orphaned   bool
	conns      []*fakeConn
}

type fakeConn struct {
	n    *fakeNode
	mon  *fakeMonitor
	f    MonitorFacts
	done chan struct{}

	closed    chan struct{}
	closeOnce sync.Once
}

func newFakeNode() *fakeNode {
	return &fakeNode{
		faults: map[string]fault{}, procs: map[procid.ID]bool{}, pauses: map[string]procid.ID{},
		watches: map[procid.ID][]func(){}, held: map[string]bool{}, inode: map[string]uint64{},
		cgroups: map[string]bool{}, data: map[string]bool{}, monitors: map[string]*fakeMonitor{},
		started: map[string]bool{}, truth: map[string]Exit{}, leftover: map[string]bool{}, unkillable: map[string]bool{},
		declared: map[string]MemberConfig{}, hooks: map[string]*fakeHook{}, collects: map[string]int{}, collected: map[string]bool{},
		networks: map[string]bool{}, tombs: map[string]bool{},
	}
}

// call runs effect as the method name, with the fault that is set for it.
func (n *fakeNode) call(ctx context.Context, name string, effect func() error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.crashed {
		return errCrashed
	}
	if n.countdown > 0 {
		if n.countdown--; n.countdown == 0 {
			if n.crashLate {
				effect()
			}
			n.crashed = true
			copyTree(n.state, n.copy)
			return errCrashed
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	switch n.faults[name] {
	case fails:
		return errInjected
	case halves:
		if err := effect(); err != nil {
			return err
		}
		return errInjected
	}
	return effect()
}

// copyTree copies a state directory, with the journal in it, as it is at one
// moment, although it is being written to.
func copyTree(from, to string) {
	for {
		before := fingerprint(from)
		if err := os.RemoveAll(to); err != nil {
			panic(err)
		}
		copyOnce(from, to)
		if fingerprint(from) == before {
			return
		}
	}
}

// fingerprint changes with every file in dir.
func fingerprint(dir string) string {
	var b strings.Builder
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil {
			if fi, err := d.Info(); err == nil {
				fmt.Fprintln(&b, p, fi.Size(), fi.ModTime().UnixNano(), fi.Sys().(*syscall.Stat_t).Ctim)
			}
		}
		return nil
	})
	return b.String()
}

func copyOnce(from, to string) {
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		dst := to + strings.TrimPrefix(p, from)
		if d.IsDir() {
			return os.MkdirAll(dst, 0o700)
		}
		b, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return os.WriteFile(dst, b, 0o600)
	})
	if err != nil {
		panic(err)
	}
}

func (n *fakeNode) spawn() procid.ID {
	n.pid++
	id := procid.ID{PID: 1<<24 + n.pid, Start: uint64(n.pid)} // above any pid_max: no real process is ever meant
	n.procs[id] = true
	return id
}

func (n *fakeNode) alive(id procid.ID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.procs[id]
}

func key(m *MemberRecord) string { return m.Sandbox + "/" + m.ID }

func (n *fakeNode) CheckSandbox(c *Config) error {
	for k := range c.Sysctls {
		if !strings.HasPrefix(k, "net.") {
			return invalidf("sysctl %q", k)
		}
	}
	return nil
}

// GC removes what live does not name.
func (n *fakeNode) GC(ctx context.Context, live func() Live, dryRun bool) (found []garbage.Finding, err error) {
	err = n.call(ctx, "GC", func() error {
		var seen []string
		for k := range n.cgroups {
			seen = append(seen, k)
		}
		l := live()
		for _, k := range seen {
			if l.Sandboxes[k] || l.Members[k] {
				continue
			}
			found = append(found, garbage.Finding{Kind: garbage.Cgroup, Name: k, Reason: "nobody's", Action: garbage.Removed})
			if !dryRun {
				delete(n.cgroups, k)
			}
		}
		return nil
	})
	return found, err
}

func (n *fakeNode) MakeCgroup(ctx context.Context, r *Record) error {
	if n.onMakeCgroup != nil {
		n.onMakeCgroup()
	}
	return n.call(ctx, "MakeCgroup", func() error { n.cgroups[r.ID] = true; return nil })
}

func (n *fakeNode) RemoveCgroup(ctx context.Context, r *Record) error {
	return n.call(ctx, "RemoveCgroup", func() error {
		for k := range n.cgroups {
			if strings.HasPrefix(k, r.ID) {
				delete(n.cgroups, k)
			}
		}
		return nil
	})
}

func (n *fakeNode) StartPause(ctx context.Context, r *Record, ready func() error) (f PauseFacts, err error) {
	if n.onStartPause != nil {
		n.onStartPause()
	}
	if err := ready(); err != nil {
		return f, err
	}
	err = n.call(ctx, "StartPause", func() error {
		if !n.cgroups[r.ID] {
			return errors.New("no cgroup")
		}
		n.inode[r.ID] = uint64(n.pid) + 4026531840
		f = n.anchor(r)
		return nil
	})
	return f, err
}

func (n *fakeNode) anchor(r *Record) PauseFacts {
	p := n.spawn()
	n.pauses[r.ID] = p
	n.held[r.ID] = true
	return n.pauseFacts(r)
}

func (n *fakeNode) pauseFacts(r *Record) PauseFacts {
	ino := map[namespace.Kind]uint64{}
	for _, k := range r.Config.Share {
		ino[k] = n.inode[r.ID]
	}
	return PauseFacts{n.pauses[r.ID], ino}
}

func (n *fakeNode) ReanchorPause(ctx context.Context, r *Record, ms []*MemberRecord) (f PauseFacts, err error) {
	err = n.call(ctx, "ReanchorPause", func() error {
		if r.Holds(namespace.PID) {
			return errors.New("the pid namespace is dead")
		}
		if n.procs[n.pauses[r.ID]] {
			n.held[r.ID] = true
			f = n.pauseFacts(r)
			return nil
		}
		ok := n.held[r.ID]
		for _, m := range ms {
			ok = ok || n.procs[m.Init]
		}
		if !ok {
			return errors.New("nobody holds the namespaces")
		}
		f = n.anchor(r)
		return nil
	})
	return f, err
}

func (n *fakeNode) AdoptPause(ctx context.Context, r *Record) error {
	return n.call(ctx, "AdoptPause", func() error {
		if !n.procs[r.Pause] {
			return procid.ErrGone
		}
		n.held[r.ID] = true
		return nil
	})
}

func (n *fakeNode) WatchPause(r *Record, died func()) error {
	return n.call(context.Background(), "WatchPause", func() error {
		p := n.pauses[r.ID]
		if !n.procs[p] {
			go died()
			return nil
		}
		n.watches[p] = append(n.watches[p], died)
		return nil
	})
}

func (n *fakeNode) KillPause(ctx context.Context, r *Record) error {
	return n.call(ctx, "KillPause", func() error {
		n.killPause(r.ID)
		delete(n.held, r.ID)
		return nil
	})
}

// killPause ends a pause. Preconditions: n.mu is held.
func (n *fakeNode) killPause(sid string) {
	p, ok := n.pauses[sid]
	if !ok {
		return
	}
	delete(n.pauses, sid)
	delete(n.procs, p)
	for _, died := range n.watches[p] {
		go died()
	}
	delete(n.watches, p)
}

func (n *fakeNode) RemoveSandboxData(ctx context.Context, r *Record) error {
	return n.call(ctx, "RemoveSandboxData", func() error { return nil })
}

func (n *fakeNode) DefaultNetwork() NetworkMode { return cmp.Or(n.network, request.NetworkNone) }

func (n *fakeNode) PlanNetwork(ctx context.Context, r *Record) (plan json.RawMessage, err error) {
	err = n.call(ctx, "PlanNetwork", func() error {
		if r.Config.Net.Isolated {
			return invalidf("no isolation here")
		}
		plan = json.RawMessage(`"plan of ` + r.ID + `"`)
		return nil
	})
	return plan, err
}

func (n *fakeNode) AttachNetwork(ctx context.Context, r *Record, plan json.RawMessage) (as []network.Attachment, err error) {
	err = n.call(ctx, "AttachNetwork", func() error {
		if !n.procs[n.pauses[r.ID]] || n.pauses[r.ID] != r.Pause {
			return errors.New("no pause")
		}
		if string(plan) != `"plan of `+r.ID+`"` {
			return fmt.Errorf("plan %s", plan)
		}
		n.networks[r.ID] = true
		as = []network.Attachment{{Name: "net", Interface: "eth0"}}
		return nil
	})
	return as, err
}

// DetachNetwork goes on in the background if the fault is that it does not
// succeed: only writing that down can fail.
func (n *fakeNode) DetachNetwork(ctx context.Context, r *Record) error {
	return n.call(ctx, "DetachNetwork", func() error {
		if n.networks[r.ID] && n.faults["plugin"] == fails {
			n.tombs[r.ID] = true
		}
		delete(n.networks, r.ID)
		return nil
	})
}

func (n *fakeNode) RestoreNetwork(ctx context.Context, r *Record) error {
	return n.call(ctx, "RestoreNetwork", func() error {
		if !n.networks[r.ID] {
			return errors.New("no network")
		}
		return nil
	})
}

func (n *fakeNode) VerifyNetwork(ctx context.Context, r *Record) error {
	return n.call(ctx, "VerifyNetwork", func() error {
		if !n.networks[r.ID] {
			return errors.New("no network")
		}
		return nil
	})
}

func (n *fakeNode) SettleNetworks(alive func(id string) bool, _ func(Tombstone, error)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id := range n.networks {
		if !alive(id) && !n.crashed {
			delete(n.networks, id)
			n.tombs[id] = true
		}
	}
}

func (n *fakeNode) Tombstones() []Tombstone {
	n.mu.Lock()
	defer n.mu.Unlock()
	var ts []Tombstone
	for _, id := range names(n.tombs) {
		ts = append(ts, Tombstone{ID: id, Name: id, Mode: request.NetworkCNI, TombstoneInfo: TombstoneInfo{Attempts: 1, LastError: "no"}})
	}
	return ts
}

func (n *fakeNode) ForgetNetwork(id string) (Tombstone, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.tombs[id] {
		return Tombstone{}, ErrNotFound
	}
	delete(n.tombs, id)
	return Tombstone{ID: id, Name: id, Mode: request.NetworkCNI, TombstoneInfo: TombstoneInfo{Attempts: 3, LastError: "no"}}, nil
}

func (n *fakeNode) ResolveMember(ctx context.Context, r *Record, m *MemberRecord, siblings []*MemberRecord) (*specs.Spec, namespace.Selection, error) {
	sel := namespace.Selection{}
	for _, k := range namespace.Kinds() {
		sel[k] = namespace.Source{From: namespace.Private}
		if r.Holds(k) {
			sel[k] = namespace.Source{From: namespace.Sandbox}
		}
	}
	var err error
	if m.Config.Rootfs == "" {
		err = invalidf("no root")
	}
	return &specs.Spec{Process: &specs.Process{Args: m.Config.Args}}, sel, err
}

func (n *fakeNode) MakeMembersCgroup(ctx context.Context, r *Record) error {
	return n.call(ctx, "MakeMembersCgroup", func() error { return nil })
}

func (n *fakeNode) MakeMemberCgroup(ctx context.Context, m *MemberRecord) error {
	return n.call(ctx, "MakeMemberCgroup", func() error { n.cgroups[key(m)] = true; return nil })
}

func (n *fakeNode) LimitMember(ctx context.Context, m *MemberRecord, _ *specs.Spec) error {
	return n.call(ctx, "LimitMember", func() error {
		if !n.cgroups[key(m)] {
			return fmt.Errorf("member %s has no cgroup", m.ID)
		}
		return nil
	})
}

func (n *fakeNode) KillMemberCgroup(ctx context.Context, m *MemberRecord) error {
	return n.call(ctx, "KillMemberCgroup", func() error { n.killAll(m); return nil })
}

func (n *fakeNode) killAll(m *MemberRecord) {
	delete(n.leftover, key(m))
	n.exitInit(key(m), Exit{Known: true, Code: 137, Signal: 9, Reason: "Signal"})
}

func (n *fakeNode) RemoveMemberCgroup(ctx context.Context, m *MemberRecord) error {
	return n.call(ctx, "RemoveMemberCgroup", func() error {
		n.killAll(m)
		delete(n.cgroups, key(m))
		return nil
	})
}

func (n *fakeNode) MakeMemberData(ctx context.Context, m *MemberRecord) error {
	return n.call(ctx, "MakeMemberData", func() error { n.data[key(m)] = true; return nil })
}

func (n *fakeNode) RemoveMemberData(ctx context.Context, m *MemberRecord) error {
	return n.call(ctx, "RemoveMemberData", func() error {
		if m.Exit != nil && len(n.declared[key(m)].Hooks) > 0 && n.hooks[key(m)+" /poststop"] == nil {
			n.wrong = key(m) + " is removed without its poststop hook"
		}
		delete(n.data, key(m))
		return nil
	})
}

func (n *fakeNode) StartMonitor(ctx context.Context, r *Record, m *MemberRecord, _ []*MemberRecord, _ *specs.Spec, dir string, limited func() error, made func(procid.ID) error, run bool) (Monitor, error) {
	if err := limited(); err != nil {
		return nil, err
	}
	var c *fakeConn
	err := n.call(ctx, "StartMonitor", func() error {
		if !n.cgroups[key(m)] || !n.data[key(m)] {
			return errors.New("no cgroup or no data directory")
		}
		if _, err := os.Stat(dir); err != nil {
			return err
		}
		mon := &fakeMonitor{key: key(m), policy: m.MonitorPolicy(), proc: n.spawn(), init: n.spawn(), phase: PhaseCreated}
		n.monitors[key(m)] = mon
		c = n.connect(mon)
		return nil
	})
	if err == nil && made != nil {
		if err = made(c.f.Init); err != nil {
			n.KillMonitor(context.Background(), m)
		}
	}
	if err == nil && run {
		if err = c.Start(ctx); err != nil {
			n.KillMonitor(context.Background(), m)
		}
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (n *fakeNode) connect(mon *fakeMonitor) *fakeConn {
	c := &fakeConn{n: n, mon: mon, f: MonitorFacts{Monitor: mon.proc, Init: mon.init}, done: make(chan struct{}), closed: make(chan struct{})}
	if mon.phase == PhaseExited {
		close(c.done)
		return c
	}
	mon.conns = append(mon.conns, c)
	return c
}

func (n *fakeNode) AdoptMonitor(ctx context.Context, m *MemberRecord, _ string) (Monitor, error) {
	var c *fakeConn
	err := n.call(ctx, "AdoptMonitor", func() error {
		mon := n.monitors[key(m)]
		if mon == nil || !n.procs[mon.proc] {
			return procid.ErrGone
		}
		c = n.connect(mon)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (n *fakeNode) ReplaceMonitor(ctx context.Context, r *Record, m *MemberRecord, _ *specs.Spec, _ string) (Monitor, error) {
	var c *fakeConn
	err := n.call(ctx, "ReplaceMonitor", func() error {
		mon := n.monitors[key(m)]
		if mon == nil || !n.procs[mon.init] {
			return procid.ErrGone
		}
		mon.proc = n.spawn()
		c = n.connect(mon)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (n *fakeNode) KillMonitor(ctx context.Context, m *MemberRecord) error {
	return n.call(ctx, "KillMonitor", func() error {
		n.killMonitor(key(m))
		if mon := n.monitors[key(m)]; mon != nil && mon.phase < PhaseRunning {
			delete(n.procs, mon.init)
		}
		return nil
	})
}

// killMonitor ends a monitor, not its init. Preconditions: n.mu is held.
func (n *fakeNode) killMonitor(k string) {
	if mon := n.monitors[k]; mon != nil && n.procs[mon.proc] {
		delete(n.procs, mon.proc)
		mon.hangUp()
	}
}

func (mon *fakeMonitor) hangUp() {
	for _, c := range mon.conns {
		close(c.done)
	}
	mon.conns = nil
}

// exitInit ends a member's init. Preconditions: n.mu is held.
func (n *fakeNode) exitInit(k string, e Exit) {
	mon := n.monitors[k]
	if mon == nil || !n.procs[mon.init] {
		return
	}
	delete(n.procs, mon.init)
	if !n.procs[mon.proc] && !mon.orphaned {
		return // nobody is there to see it
	}
	n.truth[k] = e
	mon.exit = &e
	mon.phase = PhaseExited
	if !holds(mon.policy, e) {
		delete(n.procs, mon.proc)
	}
	mon.hangUp()
}

func (n *fakeNode) MonitorStatus(m *MemberRecord, _ string) (st MonitorStatus, err error) {
	err = n.call(context.Background(), "MonitorStatus", func() error {
		if mon := n.monitors[key(m)]; mon != nil {
			st = MonitorStatus{Phase: mon.phase, Init: mon.init, StartErr: mon.startErr, Exit: mon.exit, Custody: mon.exit == nil || holds(mon.policy, *mon.exit)}
			if n.started[key(m)] {
				st.StartedAt = 1
			}
		}
		return nil
	})
	return st, err
}

func (n *fakeNode) HeldTmpfs(m *MemberRecord, _ string) int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.tmpfs[key(m)]
}

func (n *fakeNode) SignalInit(m *MemberRecord, sig unix.Signal) error {
	return n.call(context.Background(), "SignalInit", func() error {
		mon := n.monitors[key(m)]
		if mon == nil || !n.procs[mon.init] {
			return procid.ErrGone
		}
		if !n.unkillable[key(m)] || sig == unix.SIGKILL {
			n.exitInit(key(m), Exit{Known: true, Code: 128 + int(sig), Signal: int(sig), Reason: "Signal"})
		}
		return nil
	})
}

func (n *fakeNode) Orphaned(m *MemberRecord, _ string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if mon := n.monitors[key(m)]; mon != nil && !n.crashed {
		mon.orphaned = true
	}
}

func (c *fakeConn) Facts() MonitorFacts   { return c.f }
func (c *fakeConn) Done() <-chan struct{} { return c.done }

func (c *fakeConn) OnDone(f func()) {
	go func() {
		select {
		case <-c.done:
		case <-c.closed:
		}
		f()
	}()
}

func (c *fakeConn) Close() error {
	c.closeOnce.Do(func() { close(c.closed) })
	return nil
}

func (c *fakeConn) Start(ctx context.Context) error {
	var bad *StartError
	err := c.n.call(ctx, "Start", func() error {
		switch {
		case !c.n.procs[c.mon.proc]:
			return errors.New("connection is closed")
		case c.mon.phase == PhaseRunning:
			return nil
		case c.n.faults["execve"] == fails:
			bad = &StartError{"no such program", unix.ENOENT}
			c.mon.startErr = bad.Text
			c.n.exitInit(c.mon.key, Exit{Known: true, Code: 127, Reason: "StartError: " + bad.Text})
			return nil
		}
		c.mon.phase = PhaseRunning
		c.n.started[c.mon.key] = true
		return nil
	})
	if err == nil && bad != nil {
		return bad
	}
	return err
}

func (c *fakeConn) ReopenLog(ctx context.Context) error {
	return c.n.call(ctx, "ReopenLog", func() error { return nil })
}

// empty describes what is left on the host; nil means nothing.
func (n *fakeNode) empty() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.procs)+len(n.pauses)+len(n.cgroups)+len(n.data)+len(n.held)+len(n.leftover)+len(n.networks) > 0 {
		return fmt.Errorf("left on the host: processes %v, pauses %v, cgroups %v, data %v, held %v, leftover %v, networks %v",
			n.procs, n.pauses, n.cgroups, n.data, n.held, n.leftover, n.networks)
	}
	return nil
}

func (n *fakeNode) with(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

// testOptions make time short and processes those of n.
func testOptions(n *fakeNode) Options {
	return Options{
		alive: n.alive, killTimeout: 30 * time.Millisecond, orphanWait: 5 * time.Millisecond,
		retryMin: 200 * time.Microsecond, retryMax: 2 * time.Millisecond, hookRetryMin: 200 * time.Microsecond,
	}
}

// open opens a Manager that is closed with the test.
func open(t *testing.T, state string, n *fakeNode) *Manager {
	t.Helper()
	n.state = state
	n.begin(state)
	m, err := Open(t.Context(), state, n, testOptions(n))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func member(name string) MemberConfig {
	return MemberConfig{Name: name, Rootfs: "/rootfs", Args: []string{"true"}}
}

// soon polls f until it returns nil.
func soon(t interface {
	Helper()
	Fatalf(string, ...any)
}, f func() error) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v", err)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

var policies = []Custody{request.CustodyAlways, request.CustodyFailure, request.CustodyNever}

func names[V any](m map[string]V) []string {
	var s []string
	for k := range m {
		s = append(s, k)
	}
	slices.Sort(s)
	return s
}
