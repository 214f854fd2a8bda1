package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftPool has connections to nftables. They are kept, because closing one waits
// until the kernel has got rid of what was deleted before: 10 ms, an RCU grace
// period.
type nftPool struct {
	connPool[*nftables.Conn]
	socks sync.Map // by connection: its nftSock
}

// nftSock is the socket of a connection.
type nftSock struct {
	conn *netlink.Conn
	port uint32 // of netlink, by which the kernel says who has changed something
}

func newNftPool() *nftPool {
	p := &nftPool{}
	p.dial, p.close = p.dialNft, func(c *nftables.Conn) { p.hangUp(c) }
	return p
}

// has reports whether a netlink port is that of one of the connections.
func (p *nftPool) has(port uint32) (found bool) {
	p.socks.Range(func(_, v any) bool { found = v.(nftSock).port == port; return !found })
	return found
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
		err = once(errors.Join(err, p.hangUp(c)))
		var derr error
		if c, derr = p.dialNft(); derr != nil {
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

// once makes err say in one line what it says in several, as of each message of a
// transaction, and nothing twice.
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

func (p *nftPool) dialNft() (*nftables.Conn, error) {
	var sock nftSock
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		sock.conn = c
		raw, err := c.SyscallConn()
		if err == nil {
			cerr := raw.Control(func(fd uintptr) { sock.port, err = portOf(int(fd)) })
			err = errors.Join(err, cerr)
		}
		return errors.Join(err, c.SetWriteBuffer(nftBuffer))
	}))
	if err == nil {
		p.socks.Store(c, sock)
	}
	return c, err
}

// portOf returns the netlink port of a socket.
func portOf(fd int) (uint32, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	nl, ok := sa.(*unix.SockaddrNetlink)
	if !ok {
		return 0, errors.New("not a netlink socket")
	}
	return nl.Pid, nil
}

func (p *nftPool) hangUp(c *nftables.Conn) error {
	p.socks.Delete(c)
	return c.CloseLasting()
}

// wholeTries is how often whole looks: far more often than it takes while sandboxes
// come and go.
const wholeTries = 50

// whole runs look, which lists elements by c, again if somebody has changed nftables
// meanwhile: the kernel lists in parts and counts what it has listed, so that it passes
// one over for each that is removed in between. What is changed all the time is listed as
// well as it can be.
func (p *nftPool) whole(c *nftables.Conn, look func() error) error {
	for i := range wholeTries {
		before, err := p.generation(c)
		if err != nil {
			return err
		}
		if err := look(); err != nil {
			return err
		}
		after, err := p.generation(c)
		if err != nil || after == before {
			return err
		}
		time.Sleep(min(time.Duration(i), 10) * time.Millisecond)
	}
	return nil
}

// nfgenmsg is the size of what a message begins with (struct nfgenmsg,
// linux/netfilter/nfnetlink.h).
const nfgenmsg = 4

// generation is a number that each change of nftables in this network namespace makes
// another.
func (p *nftPool) generation(c *nftables.Conn) (gen uint32, err error) {
	v, _ := p.socks.Load(c)
	answer, err := v.(nftSock).conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, nfgenmsg),
	})
	if err != nil {
		return 0, fmt.Errorf("read the generation of nftables: %w", err)
	}
	for _, m := range answer {
		if len(m.Data) < nfgenmsg {
			continue
		}
		attrs, err := netlink.NewAttributeDecoder(m.Data[nfgenmsg:])
		if err != nil {
			return 0, err
		}
		attrs.ByteOrder = binary.BigEndian
		for attrs.Next() {
			if attrs.Type() == unix.NFTA_GEN_ID {
				return attrs.Uint32(), attrs.Err()
			}
		}
	}
	return 0, errors.New("nftables has no generation")
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
