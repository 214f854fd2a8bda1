package builtin

import (
	"sync"
	"time"
)

// poolIdle is how long a pool keeps connections that nobody has used at once.
const poolIdle = time.Second

// connPool has connections to the kernel, each of which is for one user at a time. As
// many as are in use at once are made; at rest it keeps one.
type connPool[T any] struct {
	dial  func() (T, error)
	close func(T)

	mu    sync.Mutex
	free  []T
	trim  *time.Timer // not nil while there are more than one to be closed
	ended bool
}

// open makes the first connection, so that a daemon at rest has as many
// descriptors sooner as later.
func (p *connPool[T]) open() error {
	c, err := p.dial()
	if err == nil {
		p.put(c)
	}
	return err
}

func (p *connPool[T]) get() (T, error) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		c := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return c, nil
	}
	p.mu.Unlock()
	return p.dial()
}

func (p *connPool[T]) put(c T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		p.close(c)
		return
	}
	p.free = append(p.free, c)
	if len(p.free) > 1 && p.trim == nil {
		p.trim = time.AfterFunc(poolIdle, p.shrink)
	}
}

// shrink closes all free connections but one: the others have been needed at
// once, and may be again before long.
func (p *connPool[T]) shrink() {
	p.mu.Lock()
	p.trim = nil
	var surplus []T
	if n := len(p.free); n > 1 {
		surplus, p.free = p.free[1:], p.free[:1:1]
	}
	p.mu.Unlock()
	for _, c := range surplus {
		p.close(c)
	}
}

// end closes all connections; one that is in use is closed when it is put back.
func (p *connPool[T]) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.trim != nil {
		p.trim.Stop()
	}
	for _, c := range p.free {
		p.close(c)
	}
	p.free, p.ended = nil, true
}
