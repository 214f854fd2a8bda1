package sandbox

import (
	"time"

	"github.com/sandboxd/sandboxd/internal/idrange"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/request"
)

// recordVersion is written into every record. A record with another version is
// set aside, like one that cannot be read.
const recordVersion = 1

// Record is what is on disk about a sandbox, as STATE/sandboxes/ID/sandbox.json.
// It is written before anything that it implies is done to the host. The
// Manager alone changes it; a [Node] is shown it and must not keep it.
type Record struct {
	Version   int                       `json:"version"`
	ID        string                    `json:"id"` // 16 hex digits
	State     State                     `json:"state"`
	CreatedAt time.Time                 `json:"createdAt"`
	Config    Config                    `json:"config"` // every default filled in
	Cgroup    string                    `json:"cgroup"` // PARENT/ID
	IDs       *idrange.Range            `json:"ids,omitempty"`
	Pause     procid.ID                 `json:"pause,omitzero"`
	Inodes    map[namespace.Kind]uint64 `json:"inodes,omitempty"`   // of the namespaces that pause holds
	Hooks     []request.Hook            `json:"hooks,omitempty"`    // all that apply, in the order in which they are run
	HookRuns  []HookRun                 `json:"hookRuns,omitempty"` // what became of them, by their index
	Complete  bool                      `json:"complete,omitempty"` // it has been Ready once
	Networks  []network.Attachment      `json:"networks,omitempty"` // what came of Config.Net
	Reason    string                    `json:"reason,omitempty"`   // why it is NotReady or Unclean
	Telling
}

// Holds reports whether the sandbox's pause holds a namespace of kind k for
// members to join.
func (r *Record) Holds(k namespace.Kind) bool {
	for _, s := range r.Config.Share {
		if s == k {
			return true
		}
	}
	return false
}

// MemberRecord is what is on disk about a member, as
// STATE/sandboxes/SANDBOX/m/ID/member.json. Beside it are config.json (the
// resolved OCI configuration, written once), and the files of the monitor:
// status, exit.json, stdin, stdout, stderr, monitor.sock.
type MemberRecord struct {
	Version    int                       `json:"version"`
	ID         string                    `json:"id"` // 16 hex digits
	Sandbox    string                    `json:"sandbox"`
	State      MemberState               `json:"state"`
	CreatedAt  time.Time                 `json:"createdAt"`
	Config     MemberConfig              `json:"config"`     // as asked, defaults filled in
	Namespaces namespace.Selection       `json:"namespaces"` // every kind
	Cgroup     string                    `json:"cgroup"`     // PARENT/SANDBOX/ID
	LogPath    string                    `json:"logPath"`
	Monitor    procid.ID                 `json:"monitor,omitzero"`
	Init       procid.ID                 `json:"init,omitzero"`
	Inodes     map[namespace.Kind]uint64 `json:"inodes,omitempty"`
	Exit       *Exit                     `json:"exit,omitempty"`
	StartError string                    `json:"startError,omitempty"`
	HeldSince  time.Time                 `json:"heldSince,omitzero"`
	Released   *CustodyRelease           `json:"released,omitempty"`   // custody has been ended, or is about to be
	Collection string                    `json:"collection,omitempty"` // what was taken at the exit
	Hooks      []request.Hook            `json:"hooks,omitempty"`      // all that apply, in the order in which they are run
	HookRuns   []HookRun                 `json:"hookRuns,omitempty"`   // what became of them, by their index
	Complete   bool                      `json:"complete,omitempty"`   // it has been Created once
	// CollectDone says that what is collected after an exit has been, or that it
	// was given up, for the reason CollectError.
	CollectDone  bool   `json:"collectDone,omitempty"`
	CollectError string `json:"collectError,omitempty"`
	Reason       string `json:"reason,omitempty"`
	Telling
}
