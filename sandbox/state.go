package sandbox

import "fmt"

// State is a sandbox's position in its lifecycle. The numbers are on disk:
// append only, never renumber.
type State uint8

// The states of a sandbox.
const (
	Creating State = 1 // intent recorded; resources may be half made
	Ready    State = 2 // pause runs
	NotReady State = 3 // pause is gone and could not be replaced
	Stopped  State = 4 // no member runs, none can be added; namespaces and custody are still held
	Deleting State = 5 // being taken apart; only delete is accepted
	Unclean  State = 6 // an undo step failed; delete retries it
)

// MemberState is a member's position in its lifecycle. The numbers are on disk.
type MemberState uint8

// The states of a member.
const (
	MemberCreating  MemberState = 1 // intent recorded
	MemberCreated   MemberState = 2 // init has done everything but its execve
	MemberStarting  MemberState = 3 // init has been told to go on; the outcome is not recorded yet
	MemberRunning   MemberState = 4
	MemberExited    MemberState = 5 // init is gone; the exit record says how
	MemberCollected MemberState = 6 // all that had to happen after the exit has happened
	MemberDeleting  MemberState = 7
	MemberUnclean   MemberState = 8
)

var stateNames = map[State]string{
	Creating: "Creating", Ready: "Ready", NotReady: "NotReady",
	Stopped: "Stopped", Deleting: "Deleting", Unclean: "Unclean",
}

// String returns the state in the word that users see.
func (s State) String() string {
	if n, ok := stateNames[s]; ok {
		return n
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

var memberStateNames = map[MemberState]string{
	MemberCreating: "Creating", MemberCreated: "Created", MemberStarting: "Created",
	MemberRunning: "Running", MemberExited: "Exited", MemberCollected: "Collected",
	MemberDeleting: "Deleting", MemberUnclean: "Unclean",
}

// String returns the state in the word that users see; [MemberStarting] is
// Created for them.
func (s MemberState) String() string {
	if n, ok := memberStateNames[s]; ok {
		return n
	}
	return fmt.Sprintf("MemberState(%d)", uint8(s))
}
