package metrics

import (
	"sync"

	"github.com/sandboxd/sandboxd/sandbox"
)

// outputs adds up what monitors have counted. Their counts go with the members;
// a total must not, so each is looked at whenever somebody scrapes, and a last
// time when the member has exited.
type outputs struct {
	read func(dir string) (Output, error) // nil: nothing is counted

	mu    sync.Mutex
	seen  map[string]Output // by directory; of members that have not exited
	total Output
}

// prime takes note of what has been counted before this daemon began: it is not
// part of its total, which begins with 0.
func (o *outputs) prime(src Source) {
	if o.read == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, ms := range src.Records() {
		for _, m := range ms {
			if m.Exit != nil || m.State == sandbox.MemberCreating {
				continue
			}
			dir := src.MemberDir(m)
			if now, err := o.read(dir); err == nil {
				o.seen[dir] = now
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
	was := o.seen[dir]
	// A monitor that replaces a killed one goes on with its page.
	o.total.Bytes += since(now.Bytes, was.Bytes)
	o.total.LinesDropped += since(now.LinesDropped, was.LinesDropped)
	o.total.ClientsDropped += since(now.ClientsDropped, was.ClientsDropped)
	o.seen[dir] = now
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
