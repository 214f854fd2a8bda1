package sandbox

import (
	"context"
	"errors"
	"log/slog"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Options are the parts of a [Manager] that have a sensible default.
type Options struct {
	Log          *slog.Logger     // default: discard
	Now          func() time.Time // default: time.Now
	CgroupParent string           // default: /sandboxd
	NewID        func() string    // 16 hex digits; default: from crypto/rand
	LogDir       string           // a member's log is LogDir/SANDBOX/MEMBER/log by default; default: /var/lib/sandboxd/sandboxes
}

// Manager owns the sandboxes of one state directory.
type Manager struct{}

// StatusReader is the part of a [MemberNode] that [Dir] needs.
type StatusReader interface {
	MonitorStatus(m *MemberRecord, dir string) (MonitorStatus, error)
}

// Dir reads a state directory, with or without a daemon that owns it.
type Dir struct{}

var errTODO = errors.New("not written yet")

func Open(ctx context.Context, state string, node Node, o Options) (*Manager, error) {
	return nil, errTODO
}
func (m *Manager) Close() error                                                      { return errTODO }
func (m *Manager) Create(ctx context.Context, c Config) (Info, error)                { return Info{}, errTODO }
func (m *Manager) Stop(ctx context.Context, ref string, timeout time.Duration) error { return errTODO }
func (m *Manager) Remove(ctx context.Context, ref string, force bool) error          { return errTODO }
func (m *Manager) Add(ctx context.Context, sandboxRef string, c MemberConfig) (MemberInfo, error) {
	return MemberInfo{}, errTODO
}
func (m *Manager) Start(ctx context.Context, ref string) (MemberInfo, error) {
	return MemberInfo{}, errTODO
}
func (m *Manager) StopMember(ctx context.Context, ref string, timeout time.Duration) error {
	return errTODO
}
func (m *Manager) Kill(ctx context.Context, ref string, sig unix.Signal) error    { return errTODO }
func (m *Manager) RemoveMember(ctx context.Context, ref string, force bool) error { return errTODO }
func (m *Manager) Wait(ctx context.Context, ref string) (Exit, error)             { return Exit{}, errTODO }
func (m *Manager) ReopenLog(ctx context.Context, ref string) error                { return errTODO }
func (m *Manager) List() []Info                                                   { return nil }
func (m *Manager) Inspect(ref string) (Info, error)                               { return Info{}, errTODO }
func (m *Manager) InspectMember(ref string) (MemberInfo, error)                   { return MemberInfo{}, errTODO }

func OpenDir(state string, r StatusReader) (*Dir, error)        { return nil, errTODO }
func (d *Dir) List() ([]Info, error)                            { return nil, errTODO }
func (d *Dir) Sandbox(ref string) (Info, error)                 { return Info{}, errTODO }
func (d *Dir) Member(ref string) (MemberInfo, error)            { return MemberInfo{}, errTODO }
func (d *Dir) MemberConfigFile(ref string) (*specs.Spec, error) { return nil, errTODO }
func (d *Dir) MemberDir(ref string) (string, error)             { return "", errTODO }
func (d *Dir) Records(ref string) (r *Record, m *MemberRecord, dir string, siblings []*MemberRecord, err error) {
	return nil, nil, "", nil, errTODO
}
