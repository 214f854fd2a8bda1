package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// recoverAtOnce bounds how many sandboxes are recovered at the same time. What
// takes long is waiting for processes and cgroups, not computing.
const recoverAtOnce = 16

// errVersion means that a record was written by another version of the daemon.
var errVersion = errors.New("unknown record version")

// recover brings the state directory and the host back in step: every sandbox
// and member is complete, or is taken down.
func (m *Manager) recover(ctx context.Context) error {
	begin := time.Now()
	for _, dir := range []string{sandboxesDir, quarantineDir, removedDir} {
		if err := m.root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	ents, err := fs.ReadDir(m.root.FS(), sandboxesDir)
	if err != nil {
		return err
	}
	var boxes []*box
	for _, e := range ents {
		if b := m.load(e); b != nil {
			boxes = append(boxes, b)
			m.enter(b)
		}
	}
	told, err := m.recallRemoved()
	if err != nil {
		return err
	}
	m.tellVanished(told)
	m.emit(Event{Type: journal.Daemon, Reason: "a daemon has begun", Attrs: map[string]string{"pid": strconv.Itoa(os.Getpid())}})
	var wg sync.WaitGroup
	slots := make(chan struct{}, recoverAtOnce)
	for _, b := range boxes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			m.recoverBox(ctx, b)
		})
	}
	wg.Wait()
	m.o.Journal.Recovered()
	m.node.SettleNetworks(func(id string) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.boxes[id] != nil
	}, m.networkTried)
	m.o.Observer.Recovered(time.Since(begin))
	return ctx.Err()
}

// load makes the entry of what is at e, or clears e away and returns nil.
func (m *Manager) load(e fs.DirEntry) *box {
	dir := sandboxesDir + "/" + e.Name()
	if !e.IsDir() || !isID(e.Name()) {
		m.clear("Foreign file set aside", dir, m.setAside)
		return nil
	}
	var b *box
	switch r, err := readRecord(m.root, dir); {
	case errors.Is(err, fs.ErrNotExist) && m.empty(dir+"/"+membersDir):
		// Killed before the record was written, or after all was taken down.
		m.clear("Directory without a record removed", dir, m.removeDir)
		return nil
	case err != nil:
		m.o.Log.Warn("Record cannot be read", "sandbox", e.Name(), "err", err)
		b = newBox(m.ctx, m.placeholder(e.Name(), err))
		b.broken = true
		b.told = m.recallLost(e.Name())
	default:
		t := m.recall(r.ID, r.State.String(), &r.Telling)
		b = newBox(m.ctx, r)
		b.told = t
	}
	close(b.created)
	m.removeTemp(dir + "/" + sandboxFile)
	m.removeTemp(dir + "/" + outputsFile)
	ents, err := fs.ReadDir(m.root.FS(), dir+"/"+membersDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.broken = true
	}
	for _, e := range ents {
		if mb := m.loadMember(b, e); mb != nil {
			b.members[mb.id()] = mb
		}
	}
	return b
}

// clear does away with what stands for nothing. If that does not work, it stays
// for the next start: it does no harm.
func (m *Manager) clear(msg, name string, how func(string) error) {
	if err := how(name); err != nil {
		m.o.Log.Warn("Directory not cleared", "path", name, "err", err)
		return
	}
	m.o.Log.Info(msg, "path", name)
}

func (m *Manager) loadMember(b *box, e fs.DirEntry) *memb {
	dir := b.dir() + "/" + membersDir + "/" + e.Name()
	if !e.IsDir() || !isID(e.Name()) {
		m.clear("Foreign file set aside", dir, m.setAside)
		return nil
	}
	m.removeTemp(dir + "/" + memberFile)
	m.removeTemp(dir + "/" + specFile)
	m.removeTemp(dir + "/" + outputsFile)
	r, err := readMemberRecord(m.root, dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Nothing is done for a member before its record is there, and the
		// record goes after everything else.
		m.clear("Directory without a record removed", dir, m.removeDir)
		return nil
	case err != nil:
		m.o.Log.Warn("Record cannot be read", "sandbox", b.id(), "member", e.Name(), "err", err)
		mb := newMemb(b.name(), placeholderMember(b.rec.Load(), e.Name(), err))
		mb.broken = true
		mb.told = m.recallLost(e.Name())
		return mb
	}
	t := m.recall(r.ID, r.State.String(), &r.Telling)
	mb := newMemb(b.name(), r)
	mb.told = t
	if r.Exit != nil {
		mb.setOver()
	}
	return mb
}

// placeholder stands for a record that cannot be read. It names what an id
// names, which suffices to take it down.
func (m *Manager) placeholder(id string, why error) *Record {
	return &Record{
		Version: recordVersion, ID: id, State: Unclean, Config: Config{Name: id},
		Cgroup: path.Join(m.o.CgroupParent, id), Reason: fmt.Sprintf("the record cannot be read: %v", why),
	}
}

func placeholderMember(r *Record, id string, why error) *MemberRecord {
	return &MemberRecord{
		Version: recordVersion, ID: id, Sandbox: r.ID, State: MemberUnclean, Config: MemberConfig{Name: id},
		Cgroup: path.Join(r.Cgroup, id), Reason: fmt.Sprintf("the record cannot be read: %v", why),
	}
}

// empty reports whether there is nothing in dir, or no such directory.
func (m *Manager) empty(dir string) bool {
	ents, err := fs.ReadDir(m.root.FS(), dir)
	return len(ents) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist))
}

// removeTemp removes what a crash while name was written has left.
func (m *Manager) removeTemp(name string) {
	if err := m.root.Remove(name + statefile.TempSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.o.Log.Warn("Temporary file not removed", "path", name+statefile.TempSuffix, "err", err)
	}
}

// recoverBox deals with one sandbox that an earlier daemon has left.
func (m *Manager) recoverBox(ctx context.Context, b *box) {
	if err := b.op.acquire(ctx); err != nil {
		return
	}
	defer b.op.release()
	m.endCutOff(ctx, subject{b: b})
	for _, mb := range b.list() {
		m.endCutOff(ctx, subject{b, mb})
	}
	if b.broken || !b.rec.Load().State.anchored() {
		// Creating, Deleting, Unclean: all end in the same way. If that does
		// not succeed the sandbox stays, unclean, for somebody to remove.
		m.adoptForNetwork(ctx, b)
		if b.lastWork() {
			m.wg.Go(func() {
				if err := b.op.acquire(m.ctx); err != nil {
					return
				}
				defer b.op.release()
				if !b.gone { // somebody may have removed it meanwhile
					m.takeDown(m.ctx, b, "recover")
				}
			})
			return
		}
		m.takeDown(ctx, b, "recover")
		return
	}
	m.recoverPause(ctx, b)
	m.restoreNetwork(ctx, b)
	var wg sync.WaitGroup
	for _, mb := range b.list() {
		wg.Go(func() { m.recoverMember(ctx, b, mb) })
	}
	wg.Wait()
	if b.rec.Load().State == Stopped && (subject{b: b}).pending(request.Poststop) {
		m.wg.Go(func() {
			if err := b.op.acquire(m.ctx); err != nil {
				return
			}
			defer b.op.release()
			if !b.gone && b.rec.Load().State == Stopped {
				m.stopped(m.ctx, b) // the next daemon goes on where it was cut off
			}
		})
	}
}

// adoptForNetwork has the node hold the namespaces of a sandbox that is about to be
// taken down, if they are there: some of what was done for its network can only be
// taken back with them. Preconditions: b.op is held.
func (m *Manager) adoptForNetwork(ctx context.Context, b *box) {
	r := b.rec.Load()
	if b.broken || !made(r.Config.Network) || r.Pause.IsZero() {
		return
	}
	if err := m.node.AdoptPause(ctx, r); err != nil && !errors.Is(err, procid.ErrGone) {
		m.o.Log.Warn("Network is taken down without its namespace", "sandbox", r.ID, "err", err)
	}
}

func (m *Manager) recoverPause(ctx context.Context, b *box) {
	crash.Point("recover pause before")
	err := m.node.AdoptPause(ctx, b.rec.Load())
	if err == nil {
		err = m.watchPause(b)
	}
	switch {
	case errors.Is(err, procid.ErrGone):
		m.reanchor(ctx, b)
	case err != nil:
		m.lost(b, fmt.Sprintf("pause cannot be reached: %v", err))
	case b.rec.Load().State == NotReady:
		// It only could not be reached before.
		m.note(b, func(r *Record) { r.State, r.Reason = Ready, "" })
	}
	crash.Point("recover pause after")
}

func (m *Manager) recoverMember(ctx context.Context, b *box, mb *memb) {
	if err := mb.op.acquire(ctx); err != nil {
		return
	}
	defer mb.op.release()
	crash.Point("recover member before")
	m.findRunning(mb)
	if mb.rec.Load().State.over() {
		m.settlePoststart(subject{b, mb})
	}
	switch s := mb.rec.Load().State; {
	case mb.broken, s == MemberCreating, s == MemberDeleting, s == MemberUnclean:
		if len(mb.rec.Load().Hooks) > 0 {
			m.later(b, mb)
			break
		}
		m.takeDownMember(ctx, b, mb, "recover")
	case s.alive():
		if err := m.settle(ctx, b, mb); err != nil {
			m.o.Log.Warn("Member is without a monitor", "sandbox", b.id(), "member", mb.id(), "err", err)
		}
		m.watch(b, mb)
		if mb.rec.Load().State == MemberRunning && (subject{b, mb}).pending(request.Poststart) {
			m.later(b, mb)
		}
	case m.unsettled(mb):
		m.later(b, mb)
	case mb.rec.Load().Config.AutoRemove:
		m.removeMember(ctx, b, mb, b.name()+"/"+mb.name())
	default:
		m.finishRelease(ctx, mb)
	}
	crash.Point("recover member after")
}

// findRunning notes that a member that was to run as soon as it was created has
// come to it, though the daemon that wanted that did not live to see it.
// Preconditions: mb.op is held.
func (m *Manager) findRunning(mb *memb) {
	if mb.broken || mb.rec.Load().State != MemberCreating {
		return
	}
	st, err := m.node.MonitorStatus(mb.rec.Load(), m.memberPath(mb))
	if err != nil || st.StartedAt == 0 {
		return
	}
	m.noteMember(mb, func(r *MemberRecord) { r.State, r.Init, r.Complete = MemberStarting, st.Init, true })
}

// checkRecord reports what makes a record that was decoded unusable.
func checkRecord(r *Record, id string) error {
	switch {
	case r.Version != recordVersion:
		return fmt.Errorf("%w %d", errVersion, r.Version)
	case r.ID != id:
		return fmt.Errorf("it is that of %s", quote(r.ID))
	case stateNames[r.State] == "":
		return fmt.Errorf("unknown state %d", uint8(r.State))
	case !strings.HasPrefix(r.Cgroup, "/") || path.Clean(r.Cgroup) != r.Cgroup || path.Base(r.Cgroup) != id:
		// The cgroup is killed and removed: it must be this sandbox's.
		return fmt.Errorf("cgroup %s is not the sandbox's", quote(r.Cgroup))
	case checkName("sandbox", r.Config.Name) != nil && r.Config.Name != id:
		return fmt.Errorf("name %s is not valid", quote(r.Config.Name))
	}
	return nil
}

// checkMemberRecord is checkRecord for a member.
func checkMemberRecord(r *MemberRecord, sandbox, id string) error {
	switch {
	case r.Version != recordVersion:
		return fmt.Errorf("%w %d", errVersion, r.Version)
	case r.ID != id || r.Sandbox != sandbox:
		return fmt.Errorf("it is that of %s/%s", quote(r.Sandbox), quote(r.ID))
	case memberStateNames[r.State] == "":
		return fmt.Errorf("unknown state %d", uint8(r.State))
	case !strings.HasPrefix(r.Cgroup, "/") || path.Clean(r.Cgroup) != r.Cgroup || !strings.HasSuffix(r.Cgroup, "/"+sandbox+"/"+id):
		return fmt.Errorf("cgroup %s is not the member's", quote(r.Cgroup))
	case checkName("member", r.Config.Name) != nil && r.Config.Name != id:
		return fmt.Errorf("name %s is not valid", quote(r.Config.Name))
	case (r.State == MemberExited || r.State == MemberCollected) && r.Exit == nil:
		return errors.New("it lacks the exit")
	}
	return nil
}
