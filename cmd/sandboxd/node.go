package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/hook"
	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/proctree"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/seccomp"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/metrics"
	"github.com/sandboxd/sandboxd/pause"
	"github.com/sandboxd/sandboxd/sandbox"
)

// pauseLeaf is the name of the cgroup, below a sandbox's, of its pause and its
// monitors.
const pauseLeaf = "pause"

// node does to this host what a [sandbox.Manager] decides, with the packages
// pause, member and cgroup.
type node struct {
	nodeOptions
	statusReader
	*networks
	mark     string // of this installation, see docs/ARCHITECTURE.md
	cg       *cgroup.Host
	pauser   *pause.Pauser
	monitors *member.Monitors
	hostMnt  *os.File
	reaper   *reaper
	recent   recentProcesses
	filters  seccomp.Cache
	store    *collect.Store
	sampler  *collect.Sampler

	targets sync.Map // []string by member: where those in custody have file systems in memory

	mu     sync.Mutex
	pauses map[string]*pause.Pause // by sandbox; guarded by mu
	// What a killed monitor must not take away from init, by member: a
	// duplicate of its terminal, the writing end of its stdin. Guarded by mu.
	masters, stdins map[string]*os.File
}

type nodeOptions struct {
	State        string
	Root         string
	CgroupParent string
	Networks     networkOptions
	HooksDirs    hook.Dirs // lets tools that configure hooks for podman and CRI-O do so here
	Metrics      *metrics.Metrics
	Log          *slog.Logger
	collectOptions
}

// newNode makes the process a child subreaper, so that an init whose monitor is
// killed becomes its child. The caller closes the node.
func newNode(o nodeOptions) (_ *node, err error) {
	n := &node{nodeOptions: o, mark: installationMark(o.State), pauses: map[string]*pause.Pause{}, masters: map[string]*os.File{}, stdins: map[string]*os.File{}}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if err := os.MkdirAll(o.Root, 0o700); err != nil {
		return nil, err
	}
	if n.cg, err = cgroup.Detect(); err != nil {
		return nil, err
	}
	if n.pauser, err = pause.Open(o.Root); err != nil {
		return nil, err
	}
	if n.monitors, err = member.OpenMonitors(o.Root); err != nil {
		return nil, err
	}
	if n.hostMnt, err = os.Open("/proc/self/ns/mnt"); err != nil {
		return nil, err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", err)
	}
	n.reaper = newReaper()
	n.store, err = collect.Open(o.collectDir, collect.Options{MaxTotal: o.collectMax, Keep: o.collectKeep, Log: o.Log, Host: n.cg})
	if err != nil {
		return nil, err
	}
	n.sampler = collect.NewSampler(n.cg, o.sampleInterval)
	if n.networks, err = openNetworks(o.Networks, o.Root, n.mark, o.Metrics, o.Log, n.pause); err != nil {
		return nil, err
	}
	return n, nil
}

// Close lets go of everything; what runs goes on.
func (n *node) Close() error {
	if n.reaper != nil {
		n.reaper.close()
	}
	errs := []error{n.networks.Close()}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.store != nil {
		errs = append(errs, n.store.Close())
	}
	for _, p := range n.pauses {
		errs = append(errs, p.Close())
	}
	for _, kept := range []map[string]*os.File{n.masters, n.stdins} {
		for _, f := range kept {
			errs = append(errs, f.Close())
		}
	}
	if n.hostMnt != nil {
		errs = append(errs, n.hostMnt.Close())
	}
	if n.monitors != nil {
		errs = append(errs, n.monitors.Close())
	}
	if n.pauser != nil {
		errs = append(errs, n.pauser.Close())
	}
	return errors.Join(errs...)
}

// installationMark is what tells the processes of one state directory from
// those of another, on their command lines.
func installationMark(state string) string {
	sum := sha256.Sum256([]byte(state))
	return hex.EncodeToString(sum[:8])
}

func (n *node) sandboxMark(id string) string { return n.mark + "." + id }

func (n *node) memberMark(m *sandbox.MemberRecord) string {
	return n.sandboxMark(m.Sandbox) + "/" + m.ID
}

// layerDir is a member's writable layer, in its data directory.
const layerDir = "rw/upper"

func (n *node) dataDir(m *sandbox.MemberRecord) string {
	return dataDir(n.Root, m)
}

// dataDir is a member's data directory, under the root directory.
func dataDir(root string, m *sandbox.MemberRecord) string {
	return filepath.Join(root, "sandboxes", m.Sandbox, m.ID)
}

// kindError makes an error match one of package sandbox without changing its text.
type kindError struct {
	error
	kind error
}

func (e kindError) Unwrap() error        { return e.error }
func (e kindError) Is(target error) bool { return target == e.kind }

func invalid(err error) error    { return kindError{err, sandbox.ErrInvalid} }
func wrongState(err error) error { return kindError{err, sandbox.ErrState} }
func notFound(err error) error   { return kindError{err, sandbox.ErrNotFound} }

// CheckSandbox implements [sandbox.PauseNode].
func (n *node) CheckSandbox(c *sandbox.Config) error {
	for key := range c.Sysctls {
		if err := member.CheckSysctl(key, c.Share); err != nil {
			return invalid(err)
		}
	}
	for _, k := range c.Share {
		if !k.Supported() {
			return invalid(fmt.Errorf("this kernel has no %s namespaces", k))
		}
	}
	return nil
}

// MakeCgroup implements [sandbox.PauseNode].
func (n *node) MakeCgroup(_ context.Context, r *sandbox.Record) error {
	if err := n.cg.MakeSandbox(r.Cgroup); err != nil {
		return err
	}
	if err := n.cg.Mark(r.Cgroup, n.mark); err != nil {
		return err
	}
	return n.cg.MakeLeaf(filepath.Join(r.Cgroup, pauseLeaf))
}

// RemoveCgroup implements [sandbox.PauseNode].
func (n *node) RemoveCgroup(ctx context.Context, r *sandbox.Record) error {
	err := n.cg.Remove(ctx, r.Cgroup)
	// Should the record be damaged, it is the id that counts.
	if own := filepath.Join(n.CgroupParent, r.ID); own != r.Cgroup {
		err = errors.Join(err, n.cg.Remove(ctx, own))
	}
	return err
}

// StartPause implements [sandbox.PauseNode].
func (n *node) StartPause(ctx context.Context, r *sandbox.Record, ready func() error) (sandbox.PauseFacts, error) {
	return n.startPause(ctx, r, ready, nil)
}

func (n *node) startPause(ctx context.Context, r *sandbox.Record, ready func() error, from map[namespace.Kind]*os.File) (sandbox.PauseFacts, error) {
	leaf := filepath.Join(r.Cgroup, pauseLeaf)
	spec := &pause.Spec{
		Mark: n.sandboxMark(r.ID), Kinds: r.Config.Share, ShmSize: r.Config.ShmSize, From: from,
		Sysctls: r.Config.Sysctls, Loopback: r.Holds(namespace.Net),
	}
	spec.Ready = func() (err error) {
		if err = ready(); err == nil {
			spec.CgroupDir, err = n.cg.TrackingDir(leaf)
		}
		return err
	}
	defer func() { spec.CgroupDir.Close() }() // closing a nil file does nothing
	if n.cg.V2Mount() == "" {
		spec.CgroupProcs = []string{n.cg.LeafProcs(leaf)}
	}
	spec.IDs = r.IDs
	if r.Holds(namespace.UTS) {
		spec.Hostname = r.Config.Hostname
	}
	p, err := n.pauser.Start(ctx, spec)
	if err != nil {
		return sandbox.PauseFacts{}, err
	}
	n.keepPause(r.ID, p)
	return sandbox.PauseFacts{Pause: p.ID(), Inodes: p.Inodes()}, nil
}

// keepPause makes p the sandbox's pause and lets go of the one before.
func (n *node) keepPause(id string, p *pause.Pause) {
	n.mu.Lock()
	old := n.pauses[id]
	n.pauses[id] = p
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

func (n *node) pause(id string) *pause.Pause {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pauses[id]
}

// ReanchorPause implements [sandbox.PauseNode].
func (n *node) ReanchorPause(ctx context.Context, r *sandbox.Record, ms []*sandbox.MemberRecord) (sandbox.PauseFacts, error) {
	if r.Holds(namespace.PID) {
		return sandbox.PauseFacts{}, errors.New("the sandbox's pid namespace died with its pause")
	}
	p, err := n.unrecordedPause(ctx, r)
	if err != nil {
		return sandbox.PauseFacts{}, err
	}
	if p != nil {
		n.keepPause(r.ID, p)
		return sandbox.PauseFacts{Pause: p.ID(), Inodes: p.Inodes()}, nil
	}
	// A new mount namespace, and an empty /dev/shm, if only members have the others.
	from := map[namespace.Kind]*os.File{}
	if p := n.pause(r.ID); p != nil {
		from = p.Namespaces()
	}
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	for _, k := range r.Config.Share {
		for _, m := range ms {
			if from[k] != nil {
				break
			}
			if m.Namespaces[k].From != namespace.Sandbox {
				continue
			}
			f, err := member.OpenNamespace(m.Monitor, k)
			if err != nil {
				continue
			}
			opened = append(opened, f)
			// Only the very namespace that the record knows will do.
			if ino, err := inode(f); err == nil && ino == r.Inodes[k] {
				from[k] = f
			}
		}
		if from[k] == nil {
			return sandbox.PauseFacts{}, fmt.Errorf("nobody holds the sandbox's %s namespace any more", k)
		}
	}
	return n.startPause(ctx, r, func() error { return nil }, from)
}

// unrecordedPause finds the pause that an earlier daemon started in place of
// one that had died, if it was killed before it could record that. What has the
// sandbox's mark and not its namespaces is of no use to anybody and is killed.
// It returns nil if there is none.
func (n *node) unrecordedPause(ctx context.Context, r *sandbox.Record) (*pause.Pause, error) {
	found, err := proctree.Find(n.sandboxMark(r.ID))
	if err != nil {
		return nil, err
	}
	var taken *pause.Pause
	for _, f := range found {
		if f.Mark != n.sandboxMark(r.ID) || f.Kind != proctree.Pause || f.ID == r.Pause {
			continue
		}
		if taken == nil {
			if taken, err = n.takePause(ctx, r, f.ID); err == nil {
				continue
			}
			n.Log.Warn("Pause without a record is of no use", "sandbox", r.ID, "pid", f.ID.PID, "err", err)
		}
		if err := killProcess(ctx, f.ID); err != nil {
			if taken != nil {
				err = errors.Join(err, taken.Close())
			}
			return nil, err
		}
	}
	return taken, nil
}

// takePause makes the process id the pause of r, if its namespaces are those
// that r knows.
func (n *node) takePause(ctx context.Context, r *sandbox.Record, id procid.ID) (*pause.Pause, error) {
	// A member can call itself anything, and has the right namespaces too; its root
	// would become the /dev/shm of others. It cannot leave its cgroup.
	paths, err := cgroupPaths(id)
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		if _, leaf, ok := strings.Cut(path, "/"+r.ID+"/"); ok && leaf != pauseLeaf {
			return nil, fmt.Errorf("it is in cgroup %s", path)
		}
	}
	p, err := n.pauser.Adopt(ctx, id, r.Config.Share)
	if err != nil {
		return nil, err
	}
	err = func() error {
		for k, ino := range p.Inodes() {
			if r.Inodes[k] != ino {
				return fmt.Errorf("its %s namespace is %d and not %d", k, ino, r.Inodes[k])
			}
		}
		// The daemon that started it may have been killed before it did this.
		procs := n.cg.LeafProcs(filepath.Join(r.Cgroup, pauseLeaf))
		return os.WriteFile(procs, strconv.AppendInt(nil, int64(id.PID), 10), 0)
	}()
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// AdoptPause implements [sandbox.PauseNode].
func (n *node) AdoptPause(ctx context.Context, r *sandbox.Record) error {
	if foreign(r.Pause, n.sandboxMark(r.ID)) {
		return procid.ErrGone
	}
	p, err := n.pauser.Adopt(ctx, r.Pause, r.Config.Share)
	if err != nil {
		return err
	}
	n.keepPause(r.ID, p)
	return nil
}

// WatchPause implements [sandbox.PauseNode].
func (n *node) WatchPause(r *sandbox.Record, died func()) error {
	p := n.pause(r.ID)
	if p == nil {
		return procid.ErrGone
	}
	p.OnDeath(died)
	return nil
}

// KillPause implements [sandbox.PauseNode].
func (n *node) KillPause(ctx context.Context, r *sandbox.Record) error {
	n.mu.Lock()
	p := n.pauses[r.ID]
	delete(n.pauses, r.ID)
	n.mu.Unlock()
	var err error
	if p != nil {
		err = errors.Join(p.Kill(ctx), p.Close())
	}
	switch {
	case r.Pause.IsZero(), foreign(r.Pause, n.sandboxMark(r.ID)):
		err = errors.Join(err, n.killMarked(ctx, n.sandboxMark(r.ID)))
	case p == nil || p.ID() != r.Pause:
		err = errors.Join(err, killProcess(ctx, r.Pause))
	}
	return err
}

// RemoveSandboxData implements [sandbox.PauseNode].
func (n *node) RemoveSandboxData(_ context.Context, r *sandbox.Record) error {
	n.hosted.forget(r.ID)
	return removeData(filepath.Join(n.Root, "sandboxes", r.ID))
}

// ResolveMember implements [sandbox.MemberNode].
func (n *node) ResolveMember(_ context.Context, r *sandbox.Record, m *sandbox.MemberRecord, siblings []*sandbox.MemberRecord) (*specs.Spec, namespace.Selection, error) {
	facts := &member.SandboxFacts{
		Hostname:    r.Config.Hostname,
		Holds:       r.Config.Share,
		HostNetwork: r.Config.Network == request.NetworkHost,
		UserNS:      r.Holds(namespace.User),
		Cgroup:      r.Cgroup,
		ShmShared:   r.Holds(namespace.IPC),
	}
	for _, s := range siblings {
		facts.Members = append(facts.Members, siblingFacts(r, s))
	}
	res, err := member.Resolve(&m.Config, facts)
	if err != nil {
		return nil, nil, invalid(err)
	}
	for _, w := range res.Warnings {
		n.Log.Warn("Not done as asked", "member", m.ID, "what", w)
	}
	return res.Spec, res.Namespaces, nil
}

// siblingFacts is what a member of the sandbox r looks like to others that want
// to join it.
func siblingFacts(r *sandbox.Record, s *sandbox.MemberRecord) member.SiblingFacts {
	alive := s.Init.Alive()
	f := member.SiblingFacts{
		Name: s.Config.Name, ID: s.ID, Namespaces: s.Namespaces,
		Alive: alive, Held: alive || s.Monitor.Alive(),
	}
	if f.Held {
		f.Root = member.RootPath(s.Monitor.PID)
	}
	switch s.Namespaces[namespace.PID].From {
	case namespace.Sandbox:
		f.PidNSAlive = r.Pause.Alive()
	case namespace.Host:
		f.PidNSAlive = true
	default:
		f.PidNSAlive = alive
	}
	return f
}

// MakeMembersCgroup implements [sandbox.MemberNode].
func (n *node) MakeMembersCgroup(_ context.Context, r *sandbox.Record) error {
	return n.cg.MakeParent(r.Cgroup)
}

// MakeMemberCgroup implements [sandbox.MemberNode].
func (n *node) MakeMemberCgroup(_ context.Context, m *sandbox.MemberRecord) error {
	return n.cg.MakeLeaf(m.Cgroup)
}

// LimitMember implements [sandbox.MemberNode].
func (n *node) LimitMember(_ context.Context, m *sandbox.MemberRecord, spec *specs.Spec) error {
	var res *specs.LinuxResources
	if spec.Linux != nil {
		res = spec.Linux.Resources
	}
	return n.cg.Limit(m.Cgroup, res)
}

// KillMemberCgroup implements [sandbox.MemberNode].
func (n *node) KillMemberCgroup(ctx context.Context, m *sandbox.MemberRecord) error {
	if proctree.Bears(m.Monitor, n.memberMark(m)) {
		m.Monitor.Signal(unix.SIGCONT) // that it is gone is no news
	}
	return n.cg.Kill(ctx, m.Cgroup)
}

// RemoveMemberCgroup implements [sandbox.MemberNode].
func (n *node) RemoveMemberCgroup(ctx context.Context, m *sandbox.MemberRecord) error {
	return n.cg.Remove(ctx, m.Cgroup)
}

// MakeMemberData implements [sandbox.MemberNode].
func (n *node) MakeMemberData(_ context.Context, m *sandbox.MemberRecord) error {
	dir := n.dataDir(m)
	for _, sub := range []string{layerDir, "rw/work", "lower", "rootfs"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return err
		}
	}
	if m.Config.Rootfs == "" {
		return nil
	}
	// The root of an overlay has the attributes of its upper layer.
	return copyAttributes(m.Config.Rootfs, filepath.Join(dir, "rw/upper"))
}

// copyAttributes gives the directory to the owner and mode of from.
func copyAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return &os.PathError{Op: "stat", Path: from, Err: err}
	}
	if err := os.Chown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return os.NewSyscallError("chmod", unix.Chmod(to, st.Mode&0o7777))
}

// RemoveMemberData implements [sandbox.MemberNode].
func (n *node) RemoveMemberData(_ context.Context, m *sandbox.MemberRecord) error {
	n.hosted.drop(m)
	return removeData(n.dataDir(m))
}

// adoptTimeout bounds the wait for the answer of a monitor. One that is stopped, or
// writes a log to a file system that hangs, must not keep the daemon from starting.
const adoptTimeout = 3 * time.Second

// AdoptMonitor implements [sandbox.MemberNode].
func (n *node) AdoptMonitor(ctx context.Context, m *sandbox.MemberRecord, dir string) (sandbox.Monitor, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, adoptTimeout, errors.New("the monitor does not answer"))
	defer cancel()
	mon, err := n.monitors.Connect(ctx, dir)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	// What the status page names must be what it was: it is killed some day.
	as := *m
	as.Monitor, as.Init = mon.Process(), mon.Init()
	if foreign(as.Monitor, n.memberMark(m)) || !n.isInit(&as) {
		err := fmt.Errorf("the status page in %s names processes %v and %v, which are not the member's", dir, as.Monitor, as.Init)
		return nil, errors.Join(err, mon.Close())
	}
	return n.watched(m, mon)
}

// isInit reports whether the process that m names as its init is one, or has
// ended. A record can be damaged, and init has no mark once it has executed its
// command.
func (n *node) isInit(m *sandbox.MemberRecord) bool {
	if !m.Init.Alive() || proctree.Bears(m.Init, n.memberMark(m)) {
		return true
	}
	// Privileged members can leave their cgroup, but not their parent, which is
	// the daemon if the monitor was killed.
	parent, err := m.Init.Parent()
	if err == nil && (parent == m.Monitor.PID || parent == os.Getpid()) {
		return true
	}
	paths, err := cgroupPaths(m.Init)
	for _, p := range paths {
		if strings.Contains(p+"/", "/"+m.Sandbox+"/"+m.ID+"/") {
			return true
		}
	}
	return err != nil // it has ended just now
}

// ReplaceMonitor implements [sandbox.MemberNode].
func (n *node) ReplaceMonitor(ctx context.Context, r *sandbox.Record, m *sandbox.MemberRecord, _ *specs.Spec, dir string) (sandbox.Monitor, error) {
	if !n.isInit(m) {
		return nil, procid.ErrGone
	}
	spec, done, err := n.monitorSpec(r, m, dir)
	if err != nil {
		return nil, err
	}
	defer done()
	n.mu.Lock()
	master := n.masters[m.ID]
	n.mu.Unlock()
	mon, err := n.monitors.Adopt(ctx, member.AdoptSpec{MonitorSpec: *spec, Init: m.Init, Master: master})
	if err != nil {
		return nil, err
	}
	if m.Config.TTY && master == nil {
		n.Log.Warn("Terminal is lost, and what the member writes there: its monitor and a daemon were killed", "sandbox", m.Sandbox, "member", m.ID)
	}
	return n.watched(m, mon)
}

// monitorSpec is what every monitor of m is given. done closes its files.
func (n *node) monitorSpec(r *sandbox.Record, m *sandbox.MemberRecord, dir string) (_ *member.MonitorSpec, done func(), err error) {
	leaf := filepath.Join(r.Cgroup, pauseLeaf)
	tracking, err := n.cg.TrackingDir(leaf)
	if err != nil {
		return nil, nil, err
	}
	s := &member.MonitorSpec{
		Mark: n.memberMark(m), Dir: dir, LogPath: m.LogPath, LogMaxBytes: m.Config.LogMax, TTY: m.Config.TTY, Stdin: m.Config.Stdin,
		Custody: m.MonitorPolicy(), OOMFile: n.cg.OOMFile(m.Cgroup), CgroupDir: tracking,
	}
	if tracking == nil {
		s.CgroupProcs = []string{n.cg.LeafProcs(leaf)}
	}
	return s, func() { tracking.Close() }, nil // closing a nil file does nothing
}

// watched makes a monitor's connection the manager's, and keeps what must
// outlive the monitor.
func (n *node) watched(m *sandbox.MemberRecord, mon *member.Monitor) (sandbox.Monitor, error) {
	n.reaper.expect(mon.Init())
	n.sampler.Add(m.ID, m.Cgroup)
	if m.Config.TTY {
		// Absent if the monitor has ended already; then there is nothing to keep.
		if f, err := member.Master(mon.Process()); err == nil {
			n.keep(n.masters, m.ID, f)
		}
	}
	if m.Config.Stdin && !m.Config.TTY {
		n.holdStdin(m.ID, mon)
	}
	// By path, and checked once: this is on the way of every start.
	inodes := make(map[namespace.Kind]uint64)
	for _, k := range namespace.Kinds() {
		var st unix.Stat_t
		if unix.Stat(member.NamespacePath(mon.Process().PID, k), &st) == nil {
			inodes[k] = st.Ino
		}
	}
	if !mon.Process().Alive() {
		clear(inodes) // perhaps of another process with its pid
	}
	return &monitor{mon, inodes}, nil
}

// holdStdin keeps the writing end of a member's stdin until the monitor is told
// to close it or init has ended.
func (n *node) holdStdin(id string, mon *member.Monitor) {
	f, err := mon.HoldStdin()
	if err != nil {
		n.Log.Warn("Stdin would end with the monitor", "member", id, "err", err)
	}
	n.keep(n.stdins, id, f)
	if f == nil {
		return
	}
	go func() {
		select {
		case <-mon.StdinClosed():
		case <-mon.Done():
			if !mon.InitEnded() {
				return // a new monitor is about to take its place
			}
		}
		n.letGo(n.stdins, id, f)
	}()
}

// keep puts f in the place of what kept has for the member id, which is closed.
func (n *node) keep(kept map[string]*os.File, id string, f *os.File) {
	n.mu.Lock()
	old := kept[id]
	if kept[id] = f; f == nil {
		delete(kept, id)
	}
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// letGo closes f, unless another has taken its place and it is closed already.
func (n *node) letGo(kept map[string]*os.File, id string, f *os.File) {
	n.mu.Lock()
	is := kept[id] == f
	if is {
		delete(kept, id)
	}
	n.mu.Unlock()
	if is {
		f.Close()
	}
}

// KillMonitor implements [sandbox.MemberNode].
func (n *node) KillMonitor(ctx context.Context, m *sandbox.MemberRecord) error {
	n.keep(n.masters, m.ID, nil)
	n.keep(n.stdins, m.ID, nil)
	n.targets.Delete(m.ID)
	n.sampler.Remove(m.ID)
	unknown := m.Monitor.IsZero() || foreign(m.Monitor, n.memberMark(m))
	isInit := n.isInit(m) // asked while its parent lives
	var err error
	if !unknown {
		err = killProcess(ctx, m.Monitor)
	}
	if isInit && m.State != sandbox.MemberRunning {
		err = errors.Join(err, killProcess(ctx, m.Init))
	}
	if unknown {
		// The child of a monitor has the same mark until its execve.
		err = errors.Join(err, n.killMarked(ctx, n.memberMark(m)))
	}
	n.reaper.forget(m.Init)
	return err
}

// foreign reports whether id names a living process without that mark, as a
// damaged record or status page can.
func foreign(id procid.ID, mark string) bool { return id.Alive() && !proctree.Bears(id, mark) }

// killMarked kills every process with that mark.
func (n *node) killMarked(ctx context.Context, mark string) error {
	for {
		found, err := proctree.Find(mark)
		if err != nil {
			return err
		}
		found = slices.DeleteFunc(found, func(f proctree.Found) bool { return f.Mark != mark || !f.ID.Alive() })
		if len(found) == 0 {
			return nil
		}
		for _, f := range found {
			if err := killProcess(ctx, f.ID); err != nil {
				return err
			}
		}
	}
}

// cgroupPaths returns the cgroups that the process is in (cgroups(7)).
func cgroupPaths(id procid.ID) ([]string, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(id.PID) + "/cgroup")
	var paths []string
	for line := range strings.Lines(string(text)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			paths = append(paths, f[2])
		}
	}
	return paths, err
}

// SignalInit implements [sandbox.MemberNode].
func (n *node) SignalInit(m *sandbox.MemberRecord, sig unix.Signal) error {
	if !n.isInit(m) {
		return procid.ErrGone
	}
	return m.Init.Signal(sig)
}

// Orphaned implements [sandbox.MemberNode].
func (n *node) Orphaned(m *sandbox.MemberRecord, dir string) {
	init, oomFile := m.Init, n.cg.OOMFile(m.Cgroup)
	pidfd, err := init.Open()
	if err != nil {
		return
	}
	go func() {
		defer pidfd.Close()
		var st unix.WaitStatus
		var ru unix.Rusage
		if err := waitPidfd(pidfd, &st, &ru); err != nil {
			return // somebody else's child: ECHILD
		}
		n.reaper.forget(init)
		if err := member.WriteExit(dir, st, oomKills(oomFile), &ru); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
			n.Log.Warn("Exit record not written", "member", filepath.Base(dir), "err", err)
		}
	}()
}

// monitor is a member's monitor as the manager sees it.
type monitor struct {
	*member.Monitor
	inodes map[namespace.Kind]uint64
}

func (m *monitor) Facts() sandbox.MonitorFacts {
	return sandbox.MonitorFacts{Monitor: m.Process(), Init: m.Init(), Inodes: m.inodes}
}

func (m *monitor) Start(ctx context.Context) error { return startError(m.Monitor.Start(ctx)) }

func inode(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	return st.Ino, nil
}
