package builtin

import (
	"errors"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// nftPool has connections to nftables: as many as were in use at once. They
// are kept because closing one waits until the kernel has got rid of what was
// deleted before: 10 ms, an RCU grace period.
type nftPool struct {
	mu   sync.Mutex
	free []*nftables.Conn
}

// nftBuffer is for the biggest transaction, which makes the tables again with
// the elements of every sandbox: some 100 bytes each.
const nftBuffer = 16 << 20

// use runs fn with a connection, and sends what fn has put into it as one transaction.
func (p *nftPool) use(fn func(c *nftables.Conn) error) error {
	p.mu.Lock()
	var c *nftables.Conn
	if n := len(p.free); n > 0 {
		c, p.free = p.free[n-1], p.free[:n-1]
	}
	p.mu.Unlock()
	if c == nil {
		var err error
		if c, err = dialNft(); err != nil {
			return err
		}
	}
	err := fn(c)
	if err == nil {
		err = c.Flush()
	}
	if err != nil {
		// There may be answers that nobody has read, or requests that were not sent.
		err = errors.Join(err, c.CloseLasting())
		var derr error
		if c, derr = dialNft(); derr != nil {
			return err
		}
	}
	p.mu.Lock()
	p.free = append(p.free, c)
	p.mu.Unlock()
	return err
}

func dialNft() (*nftables.Conn, error) {
	return nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetWriteBuffer(nftBuffer)
	}))
}

func (p *nftPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.free {
		c.CloseLasting()
	}
	p.free = nil
}

// elementsPerMessage keeps a message below 64 KiB, the most that an attribute
// can hold.
const elementsPerMessage = 200

// addTo adds elements to a set in as many messages as it takes.
func addTo(c *nftables.Conn, s *nftables.Set, vals []element) error {
	for part := range slices.Chunk(vals, elementsPerMessage) {
		if err := c.SetAddElements(s, part); err != nil {
			return err
		}
	}
	return nil
}
