package journal

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/exit"
)

// Event is something that has happened. Its JSON form is stable: fields are
// added, never renamed or removed. docs/events.md describes it for users.
type Event struct {
	Seq         uint64            `json:"seq"`
	Time        time.Time         `json:"time"`
	Type        Type              `json:"type"`
	Sandbox     string            `json:"sandbox,omitempty"` // id
	SandboxName string            `json:"sandboxName,omitempty"`
	Member      string            `json:"member,omitempty"` // id; empty if it is the sandbox's
	MemberName  string            `json:"memberName,omitempty"`
	Rev         uint64            `json:"rev,omitempty"`  // counts the events of this sandbox or member that are tied to its record
	From        string            `json:"from,omitempty"` // state; empty if it is the first
	To          string            `json:"to,omitempty"`   // state; empty if it is gone
	Reason      string            `json:"reason,omitempty"`
	Exit        *exit.Record      `json:"exit,omitempty"`
	Attrs       map[string]string `json:"attrs,omitempty"`
}

// Type says what kind of event it is.
type Type string

// The types.
const (
	State      Type = "state"      // a sandbox or member is in another state
	Exit       Type = "exit"       // the same for a member that has exited
	Removed    Type = "removed"    // nothing of a sandbox or member is left
	OOM        Type = "oom"        // the kernel killed a process of the member for want of memory
	Hook       Type = "hook"       // a hook was run
	Collection Type = "collection" // what a member left was collected
	Custody    Type = "custody"    // root and namespaces of an exited member are held, or no longer
	Pause      Type = "pause"      // a pause was killed and replaced
	Monitor    Type = "monitor"    // a monitor was killed and replaced
	Network    Type = "network"    // a network was made or taken down, after a failure, or not
	Garbage    Type = "garbage"    // something that belonged to nobody was removed
	Daemon     Type = "daemon"     // a daemon has begun
)

// types are all of them, in the order above.
var types = []Type{State, Exit, Removed, OOM, Hook, Collection, Custody, Pause, Monitor, Network, Garbage, Daemon}

// Object is the id of what the event is about, the member's if there is one.
func (e *Event) Object() string {
	if e.Member != "" {
		return e.Member
	}
	return e.Sandbox
}

// Filter says which events are wanted: for each key one of the values. The zero
// value lets all pass.
type Filter map[string][]string

// filterKeys are the keys of a filter beside attr.NAME, with what they stand for.
var filterKeys = map[string]func(e *Event, want string) bool{
	"type":    func(e *Event, want string) bool { return string(e.Type) == want },
	"from":    func(e *Event, want string) bool { return e.From == want },
	"to":      func(e *Event, want string) bool { return e.To == want },
	"sandbox": func(e *Event, want string) bool { return names(e.Sandbox, e.SandboxName, want) },
	"member": func(e *Event, want string) bool {
		if s, m, ok := strings.Cut(want, "/"); ok {
			return names(e.Sandbox, e.SandboxName, s) && names(e.Member, e.MemberName, m)
		}
		return names(e.Member, e.MemberName, want)
	},
}

const attrPrefix = "attr."

// names reports whether want is the name, or the id or a beginning of it.
func names(id, name, want string) bool {
	return id != "" && (name == want || want != "" && strings.HasPrefix(id, want))
}

// ParseFilter reads K=V for each element of list.
func ParseFilter(list []string) (Filter, error) {
	f := Filter{}
	for _, s := range list {
		k, v, ok := strings.Cut(s, "=")
		if !ok {
			return nil, fmt.Errorf("filter %q is not KEY=VALUE", s)
		}
		f[k] = append(f[k], v)
	}
	return f, f.Check()
}

// Check says what is wrong with a filter.
func (f Filter) Check() error {
	for k, vs := range f {
		if len(k) > len(attrPrefix) && strings.HasPrefix(k, attrPrefix) {
			continue
		}
		if filterKeys[k] == nil {
			return fmt.Errorf("filter %q: unknown key (one of attr.NAME, from, member, sandbox, to, type)", k)
		}
		for _, v := range vs {
			if k == "type" && !slices.Contains(types, Type(v)) {
				return fmt.Errorf("filter type=%q: unknown type (one of %s)", v, typeNames())
			}
		}
	}
	return nil
}

func typeNames() string {
	var b strings.Builder
	for i, t := range types {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(string(t))
	}
	return b.String()
}

// Match reports whether e is wanted.
func (f Filter) Match(e *Event) bool {
	for k, vs := range f {
		if !slices.ContainsFunc(vs, func(v string) bool { return f.match(e, k, v) }) {
			return false
		}
	}
	return true
}

func (f Filter) match(e *Event, key, want string) bool {
	if name, ok := strings.CutPrefix(key, attrPrefix); ok {
		v, ok := e.Attrs[name]
		return ok && v == want
	}
	is := filterKeys[key]
	return is != nil && is(e, want)
}
