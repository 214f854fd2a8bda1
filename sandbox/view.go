package sandbox

import (
	"cmp"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/procid"
)

// Custody descriptors of a monitor; see docs/ARCHITECTURE.md, The monitor.
const (
	custodyRootFD = 16
	custodyNSFD   = 17 // plus the index of the kind
)

// view makes what is shown out of records, of what monitors have left, and of
// which processes are there.
type view struct {
	status  StatusReader
	alive   func(procid.ID) bool
	managed bool // a Manager keeps the records up to date
}

func (v view) sandbox(r *Record, ms []MemberInfo) Info {
	i := Info{
		ID: r.ID, Name: r.Config.Name, State: r.State.String(), CreatedAt: r.CreatedAt,
		Hostname: r.Config.Hostname, Network: NetworkInfo{Mode: r.Config.Network, Networks: r.Networks},
		Namespaces: map[namespace.Kind]NamespaceInfo{},
		Labels:     notNil(r.Config.Labels), Annotations: notNil(r.Config.Annotations),
		Cgroup: r.Cgroup, Reason: r.Reason, Members: ms,
		Sysctls: r.Config.Sysctls, ShmSize: r.Config.ShmSize, IDs: r.IDs,
	}
	if q := r.Config.Net; !reflect.ValueOf(q).IsZero() {
		i.Network.Requested = &q
	}
	if ms == nil {
		i.Members = []MemberInfo{}
	}
	if i.Network.Networks == nil {
		i.Network.Networks = []network.Attachment{}
	}
	slices.SortFunc(i.Members, func(a, b MemberInfo) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	alive := v.alive(r.Pause)
	if alive {
		i.PausePID = r.Pause.PID
	}
	if !v.managed && r.State == Ready && !alive {
		i.State, i.Reason = NotReady.String(), "pause is gone"
	}
	for _, k := range r.Config.Share {
		i.Namespaces[k] = held(r, k, alive)
	}
	return i
}

// held shows a namespace that a sandbox's pause holds if it is alive.
func held(r *Record, k namespace.Kind, alive bool) NamespaceInfo {
	if !r.Holds(k) || !alive {
		return NamespaceInfo{}
	}
	return NamespaceInfo{Inode: r.Inodes[k], Path: fmt.Sprintf("/proc/%d/ns/%s", r.Pause.PID, k)}
}

// member shows a member of the sandbox r, whose directory is dir.
func (v view) member(r *Record, mr *MemberRecord, dir string) MemberInfo {
	i := MemberInfo{
		ID: mr.ID, Name: mr.Config.Name, Sandbox: mr.Sandbox, State: mr.State.String(),
		CreatedAt: mr.CreatedAt, Command: mr.Config.Args, TTY: mr.Config.TTY,
		Namespaces: map[namespace.Kind]NamespaceInfo{}, LogPath: mr.LogPath, Cgroup: mr.Cgroup,
		Custody: CustodyInfo{Policy: mr.Config.Custody}, Labels: notNil(mr.Config.Labels), Exit: mr.Exit,
		Collection: mr.Collection,
	}
	if i.Command == nil {
		i.Command = []string{}
	}
	initAlive, monAlive := v.alive(mr.Init), v.alive(mr.Monitor)
	inCustody, since := !mr.HeldSince.IsZero(), mr.HeldSince
	if mr.State >= MemberStarting && mr.State != MemberUnclean {
		// If it cannot be read, what it would add is not shown.
		st, _ := v.status.MonitorStatus(mr, dir)
		i.LogLinesDropped = st.LogErrors
		if st.StartedAt != 0 {
			i.StartedAt = time.Unix(0, st.StartedAt).UTC()
		}
		if !v.managed && mr.State.alive() {
			i.State, i.Exit = v.now(mr, st, initAlive || monAlive)
			if i.Exit != nil && st.Custody {
				inCustody, since = true, i.Exit.FinishedAt
			}
		}
	}
	if i.Exit != nil {
		initAlive = false // a zombie, or another's pid
	}
	if initAlive {
		i.PID = mr.Init.PID
	}
	if monAlive {
		i.MonitorPID = mr.Monitor.PID
		i.Root = fmt.Sprintf("/proc/%d/fd/%d", mr.Monitor.PID, custodyRootFD)
	}
	i.Custody.Released = mr.Released
	if i.Exit != nil && monAlive && inCustody && mr.Released == nil {
		i.Custody.Held, i.Custody.Since = true, since
		if ttl := mr.Config.CustodyTTL; ttl > 0 {
			i.Custody.Until = since.Add(ttl)
		}
		i.Custody.TmpfsBytes = v.status.HeldTmpfs(mr, dir)
	}
	for k, src := range mr.Namespaces {
		n := NamespaceInfo{}
		switch {
		case initAlive:
			n = NamespaceInfo{Inode: mr.Inodes[k], Path: fmt.Sprintf("/proc/%d/ns/%s", mr.Init.PID, k)}
		case monAlive:
			// The monitor holds what would go with init; the rest is held by
			// those it came from.
			p := fmt.Sprintf("/proc/%d/fd/%d", mr.Monitor.PID, custodyNSFD+k.Index())
			if _, err := os.Lstat(p); err == nil {
				n = NamespaceInfo{Inode: mr.Inodes[k], Path: p}
				break
			}
			fallthrough
		default:
			if src.From == namespace.Sandbox {
				n = held(r, k, v.alive(r.Pause))
			}
		}
		n.Source = src.String()
		i.Namespaces[k] = n
	}
	return i
}

// now is the state of a member that nobody has been there to record.
func (v view) now(mr *MemberRecord, st MonitorStatus, anyAlive bool) (string, *Exit) {
	switch {
	case st.Exit != nil:
		return MemberExited.String(), st.Exit
	case !anyAlive:
		return MemberExited.String(), &Exit{Code: -1, Reason: "Unknown: monitor and init are gone"}
	case st.Phase == PhaseRunning:
		return MemberRunning.String(), nil
	}
	return mr.State.String(), nil
}

func notNil(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func sortInfos(is []Info) {
	slices.SortFunc(is, func(a, b Info) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
}
