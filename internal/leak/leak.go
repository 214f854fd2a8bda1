// Package leak is the leak oracle: it looks at the kernel, not at our records,
// and says what is there now and was not before.
//
// A [Snapshot] lists everything of ours on the host: processes, namespaces,
// mounts in every mount namespace, cgroups in every hierarchy, network links,
// files, descriptors, memfds and POSIX shared memory. Two of them are compared by
// [Diff]; only what is new is a [Finding]. The kernel takes some things apart a
// little after the call that ended them has returned, so [Snapshot.Wait] looks
// again for a bounded time before it believes what it sees.
//
// # Whose is it
//
// Other programs run on the host, and other tests of this suite. [Options] say
// what is ours. A process is, if it descends from the observer, carries one of
// the marks, is in a cgroup below the parent, or has a file below one of the
// directories open; a namespace or memfd is, if a process of ours holds it; a
// mount is, if it is made on or of a path below one of the directories. On a
// machine that nothing else uses, Global counts all that is new.
package leak

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// Kind is a kind of thing that can be left behind.
type Kind string

// The kinds, in the order in which findings are reported.
const (
	Process   Kind = "process"   // also zombies; kernel threads are ignored
	Thread    Kind = "thread"    // one that is in other namespaces than its process, or more than there may be
	Namespace Kind = "namespace" // held by a process, a thread, a descriptor or a bind mount
	Mount     Kind = "mount"     // in a mount namespace that is not itself a finding
	Cgroup    Kind = "cgroup"
	Link      Kind = "link" // in the observer's network namespace, or Options.NetNS
	Address   Kind = "address"
	Route     Kind = "route"
	Nft       Kind = "nft"    // a table of nftables, or something in one
	Sysctl    Kind = "sysctl" // with its value: another one is a finding
	File      Kind = "file"   // of any type, below Options.Dirs
	FD        Kind = "fd"     // of the process Options.PID
	Memfd     Kind = "memfd"
	Shm       Kind = "shm" // in /dev/shm
)

var kinds = []Kind{Process, Thread, Namespace, Mount, Cgroup, Link, Address, Route, Nft, Sysctl, File, FD, Memfd, Shm}

// Options say what is ours. With the zero value it is what descends from this
// process.
type Options struct {
	// Dirs are directories, such as the state and the root directory, below
	// which everything is ours. One that does not exist is empty.
	Dirs []string
	// Keep are files and directories, with all that is below them, that are meant
	// to outlive what they tell of: they are not looked at.
	Keep []string
	// CgroupParent is the path of a cgroup, the same in every hierarchy, which
	// is ours with all that is below it. Empty: no cgroups are looked at.
	CgroupParent string
	// Marks are installations' marks, which pause, monitor and launch carry in
	// their command lines.
	Marks []string
	// Ancestor is the process whose descendants are ours; 0 is this one, and a
	// negative number none.
	Ancestor int
	// PID is a process, usually a daemon, whose descriptors are counted; 0 is
	// none. They are compared by what they are, not by number: one pipe more
	// is a finding, another pipe is not.
	PID int
	// Threads is how many more threads the process PID may have than before. A Go
	// program keeps those that it ever needed at once, so some more are no leak. 0:
	// threads are not counted.
	Threads int
	// Links makes every new network link ours.
	Links bool
	// NetNS is the file of a network namespace in which every new link, address,
	// route, part of an nftables table and value of a sysctl is ours. Empty: none.
	NetNS string
	// Global makes everything new ours.
	Global bool
}

// Snapshot is what there was at one time. It can be kept as JSON.
type Snapshot struct {
	Options Options
	// Things maps what identifies a thing to what a person wants to know of it.
	Things map[Kind]map[string]string
	// Threads is how many the process Options.PID has.
	Threads int
}

// Finding is one thing that was left behind.
type Finding struct {
	Kind   Kind
	What   string // what identifies it
	Detail string // who holds it, where it comes from; may be empty
}

func (f Finding) String() string {
	if f.Detail == "" {
		return fmt.Sprintf("%s %s", f.Kind, f.What)
	}
	return fmt.Sprintf("%s %s: %s", f.Kind, f.What, f.Detail)
}

// Diff returns what is in after and not in before, sorted by kind and name.
func Diff(before, after *Snapshot) []Finding {
	var fs []Finding
	newMountNS := map[string]bool{}
	for _, kind := range kinds {
		var names []string
		for what := range after.Things[kind] {
			if _, had := before.Things[kind][what]; !had {
				names = append(names, what)
			}
		}
		slices.Sort(names)
		for _, what := range names {
			if kind == Namespace {
				newMountNS[what] = true
			}
			// A mount namespace that was left is one finding, not forty.
			if ns, _, _ := strings.Cut(what, " "); kind == Mount && newMountNS[ns] {
				continue
			}
			fs = append(fs, Finding{kind, what, after.Things[kind][what]})
		}
		if o := after.Options; kind == Thread && o.Threads > 0 && after.Threads > before.Threads+o.Threads {
			what := fmt.Sprintf("%d of pid %d", after.Threads, o.PID)
			fs = append(fs, Finding{Thread, what, fmt.Sprintf("before there were %d, and %d more are no finding", before.Threads, o.Threads)})
		}
	}
	return fs
}

// Wait compares the host with s until nothing is left behind or d is over, and
// returns what was then.
func (s *Snapshot) Wait(d time.Duration) ([]Finding, error) {
	for deadline := time.Now().Add(d); ; time.Sleep(20 * time.Millisecond) {
		now, err := Take(s.Options)
		if err != nil {
			return nil, err
		}
		if fs := Diff(s, now); len(fs) == 0 || time.Now().After(deadline) {
			return fs, nil
		}
	}
}

// Report writes findings one a line, as a sentence for people, or says that
// there are none.
func Report(fs []Finding) string {
	if len(fs) == 0 {
		return "nothing was left behind"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d left behind:", len(fs))
	for _, f := range fs {
		fmt.Fprintf(&b, "\n  %s", f)
	}
	return b.String()
}

// grace is how long the kernel is given to free what nobody holds any more.
const grace = 5 * time.Second

// Check fails the test if, once its later clean-ups have run, something is left
// that was not there now: below dirs, or of processes that descend from the test.
// Not for parallel tests.
func Check(tb testing.TB, dirs ...string) {
	tb.Helper()
	CheckWith(tb, Options{Dirs: dirs})
}

// CheckWith is [Check] with other options.
func CheckWith(tb testing.TB, o Options) {
	tb.Helper()
	if o.Ancestor == 0 {
		o.Ancestor = os.Getpid()
	}
	before, err := Take(o)
	if err != nil {
		tb.Fatalf("leak: %v", err)
	}
	tb.Cleanup(func() {
		fs, err := before.Wait(grace)
		if err != nil {
			tb.Errorf("leak: %v", err)
		}
		if len(fs) > 0 {
			tb.Errorf("leak: %s", Report(fs))
		}
	})
}
