package sandbox

import (
	"context"
	"encoding/json"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
)

// Node does to the host what a [Manager] decides. Package cmd/sandboxd makes
// one of the packages pause, member and internal/cgroup; tests make one that
// fails on demand.
//
// Records are shown, not given: a Node neither changes nor keeps them. Every
// method that takes something down succeeds if it is not there, finds it from
// the ids in the record alone (a crash may have come before pids were noted),
// and may be called again after it failed.
type Node interface {
	PauseNode
	NetworkNode
	MemberNode
	GarbageNode
	HookNode
	CollectNode
}

// PauseNode is the part of a [Node] that concerns a whole sandbox.
type PauseNode interface {
	// CheckSandbox refuses what could not be created, before anything is
	// recorded: sysctls outside the sandbox's namespaces, kinds the kernel
	// does not have. Its errors wrap [ErrInvalid].
	CheckSandbox(c *Config) error
	// MakeCgroup makes the sandbox's cgroup in every hierarchy that needs it.
	MakeCgroup(ctx context.Context, r *Record) error
	// RemoveCgroup kills every process in the cgroup and removes it and what
	// is below it.
	RemoveCgroup(ctx context.Context, r *Record) error
	// StartPause starts pause with the namespaces of r.Config.Share, sets host
	// name and sysctls, and brings lo up.
	//
	// It starts nothing before ready has returned nil, and returns its error: until then
	// neither record nor cgroup need be there.
	StartPause(ctx context.Context, r *Record, ready func() error) (PauseFacts, error)
	// ReanchorPause starts a new pause in the namespaces of one that died. They
	// are taken from what the node still holds, or from a living member of ms.
	// If a pause of this sandbox runs that r does not name, because a crash came
	// before it was recorded, that one is taken. It fails if there is no source
	// for a namespace. It is not called if the sandbox holds a pid namespace,
	// which died with its pause.
	ReanchorPause(ctx context.Context, r *Record, ms []*MemberRecord) (PauseFacts, error)
	// AdoptPause makes the node hold the namespaces of a pause that an earlier
	// daemon started. It fails with [procid.ErrGone] if that pause is gone.
	AdoptPause(ctx context.Context, r *Record) error
	// WatchPause has died called, in a goroutine of its own, when the pause that the
	// node holds for r, which need not name it yet, has died, also if that was before.
	WatchPause(r *Record, died func()) error
	// KillPause kills the pause and drops what the node holds of it.
	KillPause(ctx context.Context, r *Record) error
	// RemoveSandboxData removes the sandbox's directory under the root directory.
	RemoveSandboxData(ctx context.Context, r *Record) error
}

// PauseFacts is what is known once a pause runs.
type PauseFacts struct {
	Pause  procid.ID
	Inodes map[namespace.Kind]uint64
}

// NetworkNode is the part of a [Node] that concerns the network of a sandbox. The
// network namespace is that of the sandbox's pause.
type NetworkNode interface {
	// DefaultNetwork is the mode of a sandbox whose request names none.
	DefaultNetwork() NetworkMode
	// PlanNetwork checks what r.Config asks of a network and returns all that
	// AttachNetwork needs to know. It changes nothing. What is wrong with the
	// request is reported here: errors wrap [ErrInvalid].
	PlanNetwork(ctx context.Context, r *Record) (json.RawMessage, error)
	// AttachNetwork makes the network. It keeps the plan, so that what was made
	// can be taken down whatever happens to the record.
	AttachNetwork(ctx context.Context, r *Record, plan json.RawMessage) ([]network.Attachment, error)
	// DetachNetwork takes the network down while the namespace is there, or if
	// that does not succeed in time notes that it is to be, and goes on trying.
	DetachNetwork(ctx context.Context, r *Record) error
	// RestoreNetwork repairs what was lost on the host while no daemon ran.
	RestoreNetwork(ctx context.Context, r *Record) error
	// VerifyNetwork reports what is no longer as AttachNetwork made it.
	VerifyNetwork(ctx context.Context, r *Record) error
	// SettleNetworks makes the node take down the networks of sandboxes that are
	// not alive. It is called once, after recovery. tried is to be told of each
	// attempt to take a network down that fails, and of one that succeeds after others
	// have failed, with nil. It may be called from any goroutine until the node is closed.
	SettleNetworks(alive func(id string) bool, tried func(t Tombstone, err error))
	// Tombstones returns the networks of sandboxes that are gone which could not
	// be taken down yet, the oldest first.
	Tombstones() []Tombstone
	// ForgetNetwork gives up one of them, by its id, for good. It fails with an
	// error that wraps [ErrNotFound] if there is none.
	ForgetNetwork(id string) (Tombstone, error)
}

// Tombstone is the network of a sandbox that is gone. It is tried to take it down
// until that succeeds; what it holds, such as addresses, is not free before.
type Tombstone struct {
	ID, Name  string
	Mode      NetworkMode
	CreatedAt time.Time
	TombstoneInfo
}

// MemberNode is the part of a [Node] that concerns one member. dir is the
// member's own directory under the state directory; it exists.
type MemberNode interface {
	// ResolveMember turns a request into the OCI configuration that will be
	// run, and the source of every namespace kind. It changes nothing. What is
	// wrong with the request is reported here: errors wrap [ErrInvalid].
	// siblings are the sandbox's other members, for member:NAME.
	ResolveMember(ctx context.Context, r *Record, m *MemberRecord, siblings []*MemberRecord) (*specs.Spec, namespace.Selection, error)
	// MakeMembersCgroup makes the sandbox's cgroup in the hierarchies that only
	// members need. It is called for each member, at the same time as
	// ResolveMember, whatever comes of that.
	MakeMembersCgroup(ctx context.Context, r *Record) error
	// MakeMemberCgroup makes the member's cgroup, so that it can be named.
	MakeMemberCgroup(ctx context.Context, m *MemberRecord) error
	// LimitMember makes that cgroup what the member will run in: in every
	// hierarchy, with its limits. It may be called while StartMonitor prepares.
	LimitMember(ctx context.Context, m *MemberRecord, spec *specs.Spec) error
	// KillMemberCgroup kills every process in the member's cgroup and returns
	// when none is left. A monitor that somebody has stopped is made to go on,
	// for it is to record the end of init.
	KillMemberCgroup(ctx context.Context, m *MemberRecord) error
	// RemoveMemberCgroup is KillMemberCgroup, and removes it.
	RemoveMemberCgroup(ctx context.Context, m *MemberRecord) error
	// MakeMemberData makes the member's directories under the root directory.
	MakeMemberData(ctx context.Context, m *MemberRecord) error
	// RemoveMemberData removes them.
	RemoveMemberData(ctx context.Context, m *MemberRecord) error
	// StartMonitor starts the monitor and returns when init is created: it has
	// done everything but its execve. On error nothing runs any more.
	//
	// It starts nothing before limited has returned nil, and returns its error.
	// Unless made is nil, it is called when init's namespaces and mounts are
	// there and its root is not entered yet; init waits for it. Its error is
	// StartMonitor's.
	//
	// With run, init executes its command at once, and StartMonitor returns when
	// that has succeeded. A [*StartError] says why it did not.
	StartMonitor(ctx context.Context, r *Record, m *MemberRecord, siblings []*MemberRecord, spec *specs.Spec, dir string, limited func() error, made func(init procid.ID) error, run bool) (Monitor, error)
	// AdoptMonitor connects to a monitor that an earlier daemon started. It
	// fails with [procid.ErrGone] if that monitor is gone.
	AdoptMonitor(ctx context.Context, m *MemberRecord, dir string) (Monitor, error)
	// ReplaceMonitor starts a monitor for an init whose monitor was killed. If
	// init is gone too, it fails with [procid.ErrGone].
	ReplaceMonitor(ctx context.Context, r *Record, m *MemberRecord, spec *specs.Spec, dir string) (Monitor, error)
	// KillMonitor ends the monitor, and with it the custody, and an init that
	// has not been started yet. It finds it without m.Monitor too.
	KillMonitor(ctx context.Context, m *MemberRecord) error
	// MonitorStatus reads what the monitor, alive or not, has left in dir.
	MonitorStatus(m *MemberRecord, dir string) (MonitorStatus, error)
	// HeldTmpfs returns how many bytes the file systems in memory of a member in
	// custody hold; 0 if that cannot be found out.
	HeldTmpfs(m *MemberRecord, dir string) int64
	// SignalInit sends sig to init. It fails with [procid.ErrGone].
	SignalInit(m *MemberRecord, sig unix.Signal) error
	// Orphaned is told of an init whose monitor died, to learn its wait status
	// if this process has become its parent. It returns at once, and may be told
	// of the same init again; a status that is learned is written to dir as the
	// exit record if there is none.
	Orphaned(m *MemberRecord, dir string)
}

// HookNode is the part of a [Node] that runs hooks.
type HookNode interface {
	// SandboxHooks returns the hooks of a sandbox in the order in which they are
	// run: those that the host is configured for, then those of the request. It
	// refuses what could not be run; errors wrap [ErrInvalid] if it is the
	// request's, and are a [HookError] if it is the host's configuration.
	SandboxHooks(c *Config) ([]request.Hook, error)
	// MemberHooks is SandboxHooks for a member that will be run with spec, the
	// hooks of which come between the two.
	MemberHooks(r *Record, m *MemberRecord, spec *specs.Spec) ([]request.Hook, error)
	// RunHook runs a hook once and returns when it has ended. If ctx ends or
	// the hook's time is over, it is killed. Attempts of the same hook that
	// were cut off with their daemon are ended before.
	RunHook(ctx context.Context, c *HookCall) HookOutcome
	// EndHook kills what an attempt that was cut off with its daemon has left.
	// Nothing of it being there is no error.
	EndHook(ctx context.Context, c *HookCall) error
}

// CollectNode is the part of a [Node] that keeps what members leave.
type CollectNode interface {
	// Collects reports whether Collect has anything to do after the exit that
	// is in m.
	Collects(m *MemberRecord) bool
	// Collect takes what m's collectors name, and a manifest, into the
	// collection directory. m has exited and everything of it is there still.
	// It may be called again after it failed, or was cut off by a crash or the
	// end of ctx; then there is one collection in the end. It returns its name,
	// or "" if there is nothing to keep of such an exit.
	Collect(ctx context.Context, r *Record, m *MemberRecord, dir string) (name string, err error)
}

// Monitor is the daemon's connection to one member's monitor. It is safe for
// concurrent use. Close drops the connection; the monitor goes on.
type Monitor interface {
	Facts() MonitorFacts
	// Start lets init run its execve and returns when that has succeeded. A
	// [*StartError] says why it did not; the member has exited then.
	Start(ctx context.Context) error
	// Done is closed when the exit record is on disk, or the monitor is gone.
	Done() <-chan struct{}
	// OnDone has f called, in a goroutine of its own, when Done is closed, also if
	// that was before, or when the connection is closed. It is called once.
	OnDone(f func())
	// ReopenLog makes the monitor open the log's path anew.
	ReopenLog(ctx context.Context) error
	Close() error
}

// MonitorFacts is what is known once init is created.
type MonitorFacts struct {
	Monitor procid.ID
	Init    procid.ID
	Inodes  map[namespace.Kind]uint64
}

// MonitorStatus is what a monitor leaves in a member's directory.
type MonitorStatus struct {
	Phase     MonitorPhase
	Init      procid.ID
	StartedAt int64 // Unix nanoseconds; 0 if it did not start
	StartErr  string
	Exit      *Exit  // nil if there is no exit record
	LogErrors uint64 // lines that could not be written to the log
	Custody   bool   // the monitor holds root and namespaces, if it lives
}

// MonitorPhase is how far a monitor has come. The numbers are on disk.
type MonitorPhase uint32

// The phases of a monitor.
const (
	PhaseNone    MonitorPhase = 0 // init is not created yet, or there never was a monitor
	PhaseCreated MonitorPhase = 1
	PhaseRunning MonitorPhase = 2
	PhaseExited  MonitorPhase = 3 // the exit record is on disk
	PhaseFailed  MonitorPhase = 4 // init could not be created
)

// StartError reports that a created init could not run its command.
type StartError struct {
	Text  string // names the command and the reason
	Errno unix.Errno
}

func (e *StartError) Error() string { return e.Text }

// Unwrap returns the errno, for errors.Is(err, os.ErrNotExist) and the like.
func (e *StartError) Unwrap() error { return e.Errno }
