package metrics

import (
	"time"

	"github.com/sandboxd/sandboxd/sandbox"
)

// Reading what one member holds takes some ten system calls. What members in
// custody hold changes seldom: by a copy, or a joined program.
const (
	heldFor   = time.Minute // how long a reading is good
	heldReads = 32          // how many old readings one scrape renews
)

// tmpfsCache is what members in custody hold in memory, as it was when it was
// last read: for the first time at once, then a few at each scrape.
type tmpfsCache struct {
	read    func(r *sandbox.MemberRecord, dir string) int64
	entries map[string]*tmpfsEntry // by id
	round   int
	left    int // old readings that this scrape may still renew
}

type tmpfsEntry struct {
	bytes int64
	at    time.Time
	round int
}

// begin begins a scrape.
func (c *tmpfsCache) begin() { c.round, c.left = c.round+1, heldReads }

// of returns what a member holds.
func (c *tmpfsCache) of(r *sandbox.MemberRecord, dir string, now time.Time) int64 {
	e := c.entries[r.ID]
	switch {
	case e == nil:
		e = &tmpfsEntry{bytes: c.read(r, dir), at: now}
		c.entries[r.ID] = e
	case now.Sub(e.at) >= heldFor && c.left > 0:
		c.left--
		e.bytes, e.at = c.read(r, dir), now
	}
	e.round = c.round
	return e.bytes
}

// end forgets those that the scrape has not asked about: they are held no more.
func (c *tmpfsCache) end() {
	for id, e := range c.entries {
		if e.round != c.round {
			delete(c.entries, id)
		}
	}
}
