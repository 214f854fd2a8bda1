package web

import (
	"net"
	"net/http"
	"sync"
	"time"
)

// conns bounds how many connections there are, without ever refusing one: whoever
// holds some open and asks for nothing must not keep monitoring out. A new one takes the
// place of the one that has been waited for longest, or if there is none whose request
// has not been read, of the one that has been served longest.
type conns struct {
	max int

	mu sync.Mutex
	m  map[net.Conn]connState
}

type connState struct {
	served bool // a request of it has been read
	since  time.Time
}

// changed is the server's [http.Server.ConnState].
func (c *conns) changed(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s == http.StateClosed || s == http.StateHijacked {
		delete(c.m, conn)
		return
	}
	if s == http.StateNew && len(c.m) >= c.max {
		if oldest := c.oldest(); oldest != nil {
			oldest.Close()
			delete(c.m, oldest)
		}
	}
	if _, there := c.m[conn]; there || s == http.StateNew { // else it was closed here
		c.m[conn] = connState{s == http.StateActive, time.Now()}
	}
}

// oldest returns the one that goes next. Preconditions: c.mu is held.
func (c *conns) oldest() net.Conn {
	var oldest net.Conn
	var at connState
	for conn, s := range c.m {
		if oldest == nil || at.served && !s.served || at.served == s.served && s.since.Before(at.since) {
			oldest, at = conn, s
		}
	}
	return oldest
}
