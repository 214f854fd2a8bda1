// Package wire translates between the words of package sandbox and the
// messages and statuses of the native API, in both directions. It decides
// nothing: what is wrong with a request is for package sandbox to say, except
// where a message cannot be expressed in its types at all.
package wire

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/idrange"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Window is how much either side sends before the other has taken it, of a
// call and of a connection.
const Window = 1 << 20

// FromConfig makes a message of what is asked of a sandbox.
func FromConfig(c sandbox.Config) *pb.SandboxConfig {
	out := &pb.SandboxConfig{
		Name: c.Name, Hostname: c.Hostname, Network: string(c.Network),
		Sysctls: c.Sysctls, Labels: c.Labels, Annotations: c.Annotations, ShmSize: c.ShmSize,
		Net:   fromNetworkRequest(c.Net),
		Hooks: fromHooks(c.Hooks),
	}
	if c.Share != nil {
		out.Share = &pb.NamespaceKinds{}
		for _, k := range c.Share {
			out.Share.Kinds = append(out.Share.Kinds, string(k))
		}
	}
	return out
}

// ToConfig is the inverse of [FromConfig]. Its errors wrap [sandbox.ErrInvalid].
func ToConfig(m *pb.SandboxConfig) (sandbox.Config, error) {
	c := sandbox.Config{
		Name: m.GetName(), Hostname: m.GetHostname(), Network: sandbox.NetworkMode(m.GetNetwork()),
		Sysctls: m.GetSysctls(), Labels: m.GetLabels(), Annotations: m.GetAnnotations(), ShmSize: m.GetShmSize(),
		Hooks: toHooks(m.GetHooks()),
	}
	if s := m.GetShare(); s != nil {
		c.Share = make([]namespace.Kind, 0, len(s.GetKinds()))
		for _, name := range s.GetKinds() {
			k, err := namespace.ParseKind(name)
			if err != nil {
				return sandbox.Config{}, fmt.Errorf("%w: %w", sandbox.ErrInvalid, err)
			}
			c.Share = append(c.Share, k)
		}
	}
	var err error
	if c.Net, err = toNetworkRequest(m.GetNet()); err != nil {
		return sandbox.Config{}, fmt.Errorf("%w: %w", sandbox.ErrInvalid, err)
	}
	return c, nil
}

// FromMemberConfig makes a message of what is asked of a member.
func FromMemberConfig(c sandbox.MemberConfig) *pb.MemberConfig {
	out := &pb.MemberConfig{
		Name: c.Name, Rootfs: c.Rootfs, Bundle: c.Bundle, Args: c.Args, Env: c.Env, Cwd: c.Cwd, User: c.User,
		ReadOnly: c.ReadOnly, Memory: c.Memory, NanoCpus: c.NanoCPUs, PidsLimit: c.PidsLimit,
		CapAdd: c.CapAdd, CapDrop: c.CapDrop, Privileged: c.Privileged,
		StopSignal: c.StopSignal, Custody: string(c.Custody), Tty: c.TTY, Stdin: c.Stdin,
		AutoRemove: c.AutoRemove, Labels: c.Labels, LogPath: c.LogPath, LogMax: c.LogMax,
	}
	for _, v := range c.Volumes {
		out.Volumes = append(out.Volumes, &pb.Volume{Source: v.Source, Target: v.Target, ReadOnly: v.ReadOnly})
	}
	out.Hooks = fromHooks(c.Hooks)
	for _, w := range c.Collect {
		out.Collect = append(out.Collect, &pb.Collect{Path: w.Path, On: string(w.On), Max: w.Max})
	}
	if c.CustodyTTL != 0 {
		out.CustodyTtl = durationpb.New(c.CustodyTTL)
	}
	for _, t := range c.Tmpfs {
		out.Tmpfs = append(out.Tmpfs, &pb.Tmpfs{Target: t.Target, Size: t.Size})
	}
	if c.Namespaces != nil {
		out.Namespaces = make(map[string]string, len(c.Namespaces))
		for k, s := range c.Namespaces {
			out.Namespaces[string(k)] = s.String()
		}
	}
	return out
}

// ToMemberConfig is the inverse of [FromMemberConfig]. Its errors wrap
// [sandbox.ErrInvalid].
func ToMemberConfig(m *pb.MemberConfig) (sandbox.MemberConfig, error) {
	c := sandbox.MemberConfig{
		Name: m.GetName(), Rootfs: m.GetRootfs(), Bundle: m.GetBundle(), Args: m.GetArgs(), Env: m.GetEnv(),
		Cwd: m.GetCwd(), User: m.GetUser(), ReadOnly: m.GetReadOnly(), Memory: m.GetMemory(),
		NanoCPUs: m.GetNanoCpus(), PidsLimit: m.GetPidsLimit(), CapAdd: m.GetCapAdd(), CapDrop: m.GetCapDrop(),
		Privileged: m.GetPrivileged(), StopSignal: m.GetStopSignal(), Custody: sandbox.Custody(m.GetCustody()),
		TTY: m.GetTty(), Stdin: m.GetStdin(), AutoRemove: m.GetAutoRemove(), Labels: m.GetLabels(), LogPath: m.GetLogPath(),
		LogMax: m.GetLogMax(),
	}
	for _, v := range m.GetVolumes() {
		c.Volumes = append(c.Volumes, request.Volume{Source: v.GetSource(), Target: v.GetTarget(), ReadOnly: v.GetReadOnly()})
	}
	for _, t := range m.GetTmpfs() {
		c.Tmpfs = append(c.Tmpfs, request.Tmpfs{Target: t.GetTarget(), Size: t.GetSize()})
	}
	c.Hooks = toHooks(m.GetHooks())
	for _, w := range m.GetCollect() {
		c.Collect = append(c.Collect, request.Collect{Path: w.GetPath(), On: request.When(w.GetOn()), Max: w.GetMax()})
	}
	c.CustodyTTL = m.GetCustodyTtl().AsDuration()
	for name, source := range m.GetNamespaces() {
		k, err := namespace.ParseKind(name)
		if err != nil {
			return sandbox.MemberConfig{}, fmt.Errorf("%w: %w", sandbox.ErrInvalid, err)
		}
		s, err := namespace.ParseSource(source)
		if err != nil {
			return sandbox.MemberConfig{}, fmt.Errorf("%w: %w", sandbox.ErrInvalid, err)
		}
		if c.Namespaces == nil {
			c.Namespaces = namespace.Selection{}
		}
		c.Namespaces[k] = s
	}
	return c, nil
}

// FromInfo makes a message of what is known of a sandbox.
func FromInfo(i sandbox.Info) *pb.SandboxInfo {
	out := &pb.SandboxInfo{
		Id: i.ID, Name: i.Name, State: i.State, CreatedAt: fromTime(i.CreatedAt), PausePid: int32(i.PausePID),
		Hostname: i.Hostname, NetworkMode: string(i.Network.Mode), Namespaces: fromNamespaces(i.Namespaces),
		Labels: i.Labels, Annotations: i.Annotations, Cgroup: i.Cgroup, Reason: i.Reason,
		Networks: fromNetworks(i.Network.Networks), Tombstone: fromTombstone(i.Network.Tombstone),
	}
	out.Sysctls, out.ShmSize = i.Sysctls, i.ShmSize
	if i.Network.Requested != nil {
		out.NetworkRequested = fromNetworkRequest(*i.Network.Requested)
	}
	if i.IDs != nil {
		out.Ids = &pb.IDRange{Start: i.IDs.Start, Size: i.IDs.Size}
	}
	out.Hooks = fromHookRuns(i.Hooks)
	for _, m := range i.Members {
		out.Members = append(out.Members, FromMemberInfo(m))
	}
	return out
}

// ToInfo is the inverse of [FromInfo]. Maps and lists are never nil, so that
// the JSON of the result has {} and [] where a Manager's has.
func ToInfo(m *pb.SandboxInfo) sandbox.Info {
	i := sandbox.Info{
		ID: m.GetId(), Name: m.GetName(), State: m.GetState(), CreatedAt: toTime(m.GetCreatedAt()),
		PausePID: int(m.GetPausePid()), Hostname: m.GetHostname(),
		Network: sandbox.NetworkInfo{
			Mode: sandbox.NetworkMode(m.GetNetworkMode()), Networks: toNetworks(m.GetNetworks()), Tombstone: toTombstone(m.GetTombstone()),
		},
		Namespaces: toNamespaces(m.GetNamespaces()), Labels: orEmpty(m.GetLabels()),
		Annotations: orEmpty(m.GetAnnotations()), Cgroup: m.GetCgroup(), Reason: m.GetReason(),
		Members: make([]sandbox.MemberInfo, 0, len(m.GetMembers())),
	}
	i.Sysctls, i.ShmSize = m.GetSysctls(), m.GetShmSize()
	if m.GetNetworkRequested() != nil {
		if q, err := toNetworkRequest(m.GetNetworkRequested()); err == nil {
			i.Network.Requested = &q
		}
	}
	if r := m.GetIds(); r != nil {
		i.IDs = &idrange.Range{Start: r.GetStart(), Size: r.GetSize()}
	}
	i.Hooks = toHookRuns(m.GetHooks())
	for _, mm := range m.GetMembers() {
		i.Members = append(i.Members, ToMemberInfo(mm))
	}
	return i
}

// FromMemberInfo makes a message of what is known of a member.
func FromMemberInfo(i sandbox.MemberInfo) *pb.MemberInfo {
	out := &pb.MemberInfo{
		Id: i.ID, Name: i.Name, Sandbox: i.Sandbox, State: i.State, Pid: int32(i.PID), MonitorPid: int32(i.MonitorPID),
		CreatedAt: fromTime(i.CreatedAt), StartedAt: fromTime(i.StartedAt), Command: i.Command, Tty: i.TTY,
		Namespaces: fromNamespaces(i.Namespaces), Root: i.Root, LogPath: i.LogPath, LogLinesDropped: i.LogLinesDropped, Cgroup: i.Cgroup,
		Custody: fromCustody(i.Custody), Labels: i.Labels, Collection: i.Collection, Hooks: fromHookRuns(i.Hooks),
	}
	if i.Exit != nil {
		out.Exit = FromExit(*i.Exit)
	}
	if l := i.Limits; l != nil {
		out.Limits = &pb.Limits{Memory: l.Memory, NanoCpus: l.NanoCPUs, Pids: l.Pids}
	}
	for _, m := range i.Mounts {
		out.Mounts = append(out.Mounts, &pb.MountInfo{Destination: m.Destination, Type: m.Type, Source: m.Source, Options: m.Options})
	}
	out.Env = i.Env
	return out
}

// ToMemberInfo is the inverse of [FromMemberInfo]; see [ToInfo].
func ToMemberInfo(m *pb.MemberInfo) sandbox.MemberInfo {
	i := sandbox.MemberInfo{
		ID: m.GetId(), Name: m.GetName(), Sandbox: m.GetSandbox(), State: m.GetState(), PID: int(m.GetPid()),
		MonitorPID: int(m.GetMonitorPid()), CreatedAt: toTime(m.GetCreatedAt()), StartedAt: toTime(m.GetStartedAt()),
		Command: append([]string{}, m.GetCommand()...), TTY: m.GetTty(), Namespaces: toNamespaces(m.GetNamespaces()),
		Root: m.GetRoot(), LogPath: m.GetLogPath(), LogLinesDropped: m.GetLogLinesDropped(), Cgroup: m.GetCgroup(),
		Custody: toCustody(m.GetCustody()), Labels: orEmpty(m.GetLabels()), Collection: m.GetCollection(), Hooks: toHookRuns(m.GetHooks()),
	}
	if m.GetExit() != nil {
		e := ToExit(m.GetExit())
		i.Exit = &e
	}
	if l := m.GetLimits(); l != nil {
		i.Limits = &sandbox.LimitsInfo{Memory: l.GetMemory(), NanoCPUs: l.GetNanoCpus(), Pids: l.GetPids()}
	}
	for _, mount := range m.GetMounts() {
		i.Mounts = append(i.Mounts, sandbox.MountInfo{
			Destination: mount.GetDestination(), Type: mount.GetType(), Source: mount.GetSource(), Options: mount.GetOptions(),
		})
	}
	i.Env = m.GetEnv()
	return i
}

func fromCustody(c sandbox.CustodyInfo) *pb.CustodyInfo {
	out := &pb.CustodyInfo{
		Policy: string(c.Policy), Held: c.Held, Since: fromTime(c.Since), Until: fromTime(c.Until), TmpfsBytes: c.TmpfsBytes,
	}
	if r := c.Released; r != nil {
		out.Released = &pb.CustodyRelease{At: fromTime(r.At), Reason: r.Reason}
	}
	return out
}

func toCustody(m *pb.CustodyInfo) sandbox.CustodyInfo {
	c := sandbox.CustodyInfo{
		Policy: sandbox.Custody(m.GetPolicy()), Held: m.GetHeld(), Since: toTime(m.GetSince()),
		Until: toTime(m.GetUntil()), TmpfsBytes: m.GetTmpfsBytes(),
	}
	if r := m.GetReleased(); r != nil {
		c.Released = &sandbox.CustodyRelease{At: toTime(r.GetAt()), Reason: r.GetReason()}
	}
	return c
}

// FromExit makes a message of an exit record.
func FromExit(e sandbox.Exit) *pb.ExitRecord {
	return &pb.ExitRecord{
		Known: e.Known, Code: int32(e.Code), Signal: int32(e.Signal), OomKilled: e.OOMKilled,
		FinishedAt: fromTime(e.FinishedAt), Reason: e.Reason,
		Rusage: &pb.Rusage{UserMicros: e.Rusage.UserMicros, SystemMicros: e.Rusage.SystemMicros, MaxRssKib: e.Rusage.MaxRSSKiB},
	}
}

// ToExit is the inverse of [FromExit].
func ToExit(m *pb.ExitRecord) sandbox.Exit {
	u := m.GetRusage()
	return sandbox.Exit{
		Known: m.GetKnown(), Code: int(m.GetCode()), Signal: int(m.GetSignal()), OOMKilled: m.GetOomKilled(),
		FinishedAt: toTime(m.GetFinishedAt()), Reason: m.GetReason(),
		Rusage: exit.Rusage{UserMicros: u.GetUserMicros(), SystemMicros: u.GetSystemMicros(), MaxRSSKiB: u.GetMaxRssKib()},
	}
}

func fromNamespaces(in map[namespace.Kind]sandbox.NamespaceInfo) map[string]*pb.NamespaceInfo {
	out := make(map[string]*pb.NamespaceInfo, len(in))
	for k, n := range in {
		out[string(k)] = &pb.NamespaceInfo{Source: n.Source, Inode: n.Inode, Path: n.Path}
	}
	return out
}

func toNamespaces(in map[string]*pb.NamespaceInfo) map[namespace.Kind]sandbox.NamespaceInfo {
	out := make(map[namespace.Kind]sandbox.NamespaceInfo, len(in))
	for k, n := range in {
		out[namespace.Kind(k)] = sandbox.NamespaceInfo{Source: n.GetSource(), Inode: n.GetInode(), Path: n.GetPath()}
	}
	return out
}

func fromTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func toTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}
