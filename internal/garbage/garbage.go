// Package garbage holds the words for what is found on the host that belongs to
// nobody any more. It is plain data, shared by the packages that look and those
// that show.
package garbage

import "time"

// Kind is a kind of thing that can be garbage.
type Kind string

// The kinds.
const (
	Record     Kind = "record"     // of a sandbox or member whose processes are gone
	Pause      Kind = "pause"      // without a record
	Monitor    Kind = "monitor"    // without a member
	Cgroup     Kind = "cgroup"     //
	Layer      Kind = "layer"      // a member's upper and work directory
	Mount      Kind = "mount"      //
	Link       Kind = "link"       // a network interface
	Nft        Kind = "nft"        // an element of our nftables table
	Lease      Kind = "lease"      // an address
	CNI        Kind = "cni"        // an entry of the CNI cache
	Tombstone  Kind = "tombstone"  // a network that could not be taken down yet
	Temp       Kind = "temp"       // a temporary file
	Collection Kind = "collection" // unfinished or past its time
	Foreign    Kind = "foreign"    // what somebody else has put where only we put things; kept
)

// Finding is one thing that was found.
type Finding struct {
	Kind   Kind      `json:"kind"`
	Name   string    `json:"name"`            // what a person needs to find it: a path, an id, an address
	Since  time.Time `json:"since,omitzero"`  // the zero value: unknown
	Reason string    `json:"reason"`          // why it belongs to nobody
	Action string    `json:"action"`          // one of those below
	Err    string    `json:"error,omitempty"` // why the action failed
}

// What is done about a finding.
const (
	Removed     = "removed"
	WouldRemove = "would remove"
	Retried     = "retried"
	WouldRetry  = "would retry"
	Kept        = "kept" // for somebody to look at, or because it could not be removed
)

// Done sets what came of an attempt to remove the thing.
func (f *Finding) Done(err error) {
	f.Action = Removed
	if err != nil {
		f.Action, f.Err = Kept, err.Error()
	}
}
