package builtin

import (
	"errors"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// nftPool has connections to nftables. They are kept, because closing one waits
// until the kernel has got rid of what was deleted before: 10 ms, an RCU grace
// period.
type nftPool struct{ connPool[*nftables.Conn] }

func newNftPool() *nftPool {
	return &nftPool{connPool[*nftables.Conn]{dial: dialNft, close: func(c *nftables.Conn) { c.CloseLasting() }}}
}

// nftBuffer is for the biggest transaction, which makes the tables again with
// the elements of every sandbox: some 100 bytes each.
const nftBuffer = 16 << 20

// use runs fn with a connection, and sends what fn has put into it as one transaction.
func (p *nftPool) use(fn func(c *nftables.Conn) error) error {
	c, err := p.get()
	if err != nil {
		return err
	}
	if err = fn(c); err == nil {
		err = c.Flush()
	}
	if err != nil {
		// There may be answers that nobody has read, or requests that were not sent.
		err = once(errors.Join(err, c.CloseLasting()))
		var derr error
		if c, derr = dialNft(); derr != nil {
			return err
		}
	}
	p.put(c)
	return err
}

// onceError says each of several causes once, in one line.
type onceError struct {
	text string
	err  error
}

func (e *onceError) Error() string { return e.text }
func (e *onceError) Unwrap() error { return e.err }

// once makes err say once what it says of each message of a transaction.
func once(err error) error {
	if err == nil {
		return nil
	}
	var causes []string
	for line := range strings.SplitSeq(err.Error(), "\n") {
		line = strings.TrimPrefix(line, "conn.Receive: ") // the whole answer, which begins with the first cause
		if !slices.Contains(causes, line) {
			causes = append(causes, line)
		}
	}
	return &onceError{strings.Join(causes, "; "), err}
}

func dialNft() (*nftables.Conn, error) {
	return nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetWriteBuffer(nftBuffer)
	}))
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
