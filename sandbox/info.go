package sandbox

import (
	"time"

	"github.com/sandboxd/sandboxd/internal/idrange"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
)

// Info is what `sandboxd inspect` shows of a sandbox. Its JSON form is stable:
// fields are added, never renamed or removed. It is made from the state
// directory and from the kernel, with or without a daemon ([Dir.Sandbox]).
type Info struct {
	ID          string                           `json:"id"`
	Name        string                           `json:"name"`
	State       string                           `json:"state"` // Ready, NotReady, Stopped; Creating, Unclean; Removed with a network that is still there
	CreatedAt   time.Time                        `json:"createdAt"`
	PausePID    int                              `json:"pausePid"` // 0 if there is none
	Hostname    string                           `json:"hostname"`
	Network     NetworkInfo                      `json:"network"`
	Namespaces  map[namespace.Kind]NamespaceInfo `json:"namespaces"` // the kinds that the sandbox holds
	Labels      map[string]string                `json:"labels"`
	Annotations map[string]string                `json:"annotations"`
	Cgroup      string                           `json:"cgroup"` // relative to each hierarchy's mount point
	Reason      string                           `json:"reason,omitempty"`
	Hooks       []HookRun                        `json:"hooks,omitempty"` // those that have been run
	Members     []MemberInfo                     `json:"members"`         // by the time of their creation
	// What the sandbox was made with; absent in lists.
	Sysctls map[string]string `json:"sysctls,omitempty"`
	ShmSize int64             `json:"shmSize,omitempty"` // bytes
	IDs     *idrange.Range    `json:"ids,omitempty"`     // of the host, to which those of its user namespace are mapped
}

// NetworkInfo is the network part of [Info].
type NetworkInfo struct {
	Mode     NetworkMode          `json:"mode"`
	Networks []network.Attachment `json:"networks"` // that the sandbox is in
	// Requested is what was asked for beside the mode; absent if nothing was, and in lists.
	Requested *network.Request `json:"requested,omitempty"`
	// Tombstone is there if the sandbox is gone and its network is not.
	Tombstone *TombstoneInfo `json:"tombstone,omitempty"`
}

// TombstoneInfo says how it stands with taking a network down.
type TombstoneInfo struct {
	Since     time.Time `json:"since"` // the sandbox is gone
	Attempts  int       `json:"attempts"`
	LastError string    `json:"lastError,omitempty"`
	NextTry   time.Time `json:"nextTry,omitzero"` // the zero time: it is being tried
}

// NamespaceInfo shows one namespace.
type NamespaceInfo struct {
	Source string `json:"source,omitempty"` // members only: sandbox, private, host, member:NAME
	Inode  uint64 `json:"inode"`            // 0 if it is gone
	Path   string `json:"path"`             // /proc/PID/ns/KIND or /proc/PID/fd/N; empty if it is gone
}

// MemberInfo is what `sandboxd inspect` shows of a member.
type MemberInfo struct {
	ID         string                           `json:"id"`
	Name       string                           `json:"name"`
	Sandbox    string                           `json:"sandbox"` // id
	State      string                           `json:"state"`   // Created, Running, Exited, Collected; Creating, Unclean
	PID        int                              `json:"pid"`     // of init; 0 if there is none
	MonitorPID int                              `json:"monitorPid"`
	CreatedAt  time.Time                        `json:"createdAt"`
	StartedAt  time.Time                        `json:"startedAt,omitzero"`
	Command    []string                         `json:"command"`
	TTY        bool                             `json:"tty"`
	Namespaces map[namespace.Kind]NamespaceInfo `json:"namespaces"`
	Root       string                           `json:"root"` // /proc/MONITOR/fd/N; empty without custody
	LogPath    string                           `json:"logPath"`
	Cgroup     string                           `json:"cgroup"`
	Custody    CustodyInfo                      `json:"custody"`
	Labels     map[string]string                `json:"labels"`
	Exit       *Exit                            `json:"exit,omitempty"`       // nil until init has exited
	Hooks      []HookRun                        `json:"hooks,omitempty"`      // those that have been run
	Collection string                           `json:"collection,omitempty"` // what was taken at exit, SANDBOX/MEMBER-N below the collection directory
	// LogLinesDropped is how many lines are missing in the log: its disk was full, or
	// it has reached its maximum.
	LogLinesDropped uint64 `json:"logLinesDropped,omitempty"`
	// What the member was made with; absent in lists.
	Limits *LimitsInfo `json:"limits,omitempty"`
	Mounts []MountInfo `json:"mounts,omitempty"` // in their order; not the root
	Env    []string    `json:"env,omitempty"`    // K=V
}

// LimitsInfo are the limits of a member's cgroup; 0 is none.
type LimitsInfo struct {
	Memory   int64 `json:"memory"`   // bytes
	NanoCPUs int64 `json:"nanoCpus"` // 1e9 is one CPU
	Pids     int64 `json:"pids"`
}

// MountInfo is a mount of a member's, as in its OCI configuration.
type MountInfo struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type,omitempty"`
	Source      string   `json:"source,omitempty"`
	Options     []string `json:"options,omitempty"`
}

// CustodyInfo says whether a member's root and namespaces are held.
type CustodyInfo struct {
	Policy Custody   `json:"policy"`
	Held   bool      `json:"held"`
	Since  time.Time `json:"since,omitzero"`
	// Until is when custody will be ended; the zero time means when the member
	// is removed. It may end earlier where the host's custody is bounded.
	Until    time.Time       `json:"until,omitzero"`
	Released *CustodyRelease `json:"released,omitempty"` // nil unless custody was ended before the member was removed
	// TmpfsBytes is what its file systems in memory hold, which other
	// processes could have used.
	TmpfsBytes int64 `json:"tmpfsBytes"`
}

// CustodyRelease says when and why custody was ended.
type CustodyRelease struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
}

// brief leaves out of i what hooks have printed and what it was made with: lists are long.
func brief(i Info) Info {
	i.Sysctls, i.ShmSize, i.IDs, i.Network.Requested = nil, 0, nil, nil
	short := func(runs []HookRun) {
		for n := range runs {
			runs[n].Output = ""
		}
	}
	short(i.Hooks)
	for _, m := range i.Members {
		short(m.Hooks)
	}
	return i
}
