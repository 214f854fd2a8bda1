package metrics

import (
	"sync"

	"github.com/sandboxd/sandboxd/sandbox"
)

// outputs adds up what monitors have counted. Their counts go with the members;
// a total must not, so each is looked at whenever somebody scrapes, and a last
// time when the member has exited.
type outputs struct {
	mu    sync.Mutex
	read  func(dir string) (Output, error) // nil: nothing is counted
	seen  map[string]seen                  // by directory; of members that have not exited
	round int                              // of looking at all members
	total Output
}

// seen is what has been added to the total of one member, and in which round it
// was last looked at.
type seen struct {
	Output
	round int
}

// prime takes note of what has been counted before this daemon began: it is not
// part of its total, which begins with 0.
func (o *outputs) prime(src Source, read func(dir string) (Output, error)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.read = read; read == nil {
		return
	}
	for _, ms := range src.Records() {
		for _, m := range ms {
			if m.Exit != nil || m.State == sandbox.MemberCreating {
				continue
			}
			dir := src.MemberDir(m)
			if now, err := o.read(dir); err == nil {
				o.seen[dir] = seen{now, o.round}
			}
		}
	}
}

// update adds what has been counted since the last time.
// Preconditions: o.mu is held.
func (o *outputs) update(dir string) {
	if o.read == nil {
		return
	}
	now, err := o.read(dir)
	if err != nil {
		return // it is being made or removed; there is a next time, or Exited was told
	}
	was := o.seen[dir].Output
	// A monitor that replaces a killed one goes on with its page.
	o.total.Bytes += since(now.Bytes, was.Bytes)
	o.total.LinesDropped += since(now.LinesDropped, was.LinesDropped)
	o.total.ClientsDropped += since(now.ClientsDropped, was.ClientsDropped)
	o.seen[dir] = seen{now, o.round}
}

// forget drops members that were removed without an exit.
// Preconditions: o.mu is held; update has been called for all others.
func (o *outputs) forget() {
	for dir, s := range o.seen {
		if s.round != o.round {
			delete(o.seen, dir)
		}
	}
	o.round++
}

// since is now-was, or now if the count began anew.
func since(now, was uint64) uint64 {
	if now < was {
		return now
	}
	return now - was
}

// ended is update for a member that has exited.
func (o *outputs) ended(dir string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.update(dir)
	delete(o.seen, dir)
}
