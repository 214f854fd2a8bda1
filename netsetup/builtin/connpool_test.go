package builtin

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// However many connections were in use at once, and whether or not what they were
// used for has succeeded, a driver at rest has as many as when it was made.
func TestConnectionsAtRest(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	before := openSockets(t)
	const users = 5
	begun, end := make(chan struct{}), make(chan struct{})
	done := make(chan error, users)
	for i := range users {
		go func() {
			done <- d.nft.conns.use(func(*nftables.Conn) error {
				s, err := d.socks.get()
				if err != nil {
					return err
				}
				defer d.socks.put(s)
				begun <- struct{}{}
				<-end
				if i%2 == 0 {
					return errors.New("failed")
				}
				return nil
			})
		}()
	}
	for range users {
		<-begun
	}
	if n := openSockets(t); n != before+2*(users-1) {
		t.Errorf("%d sockets while %d are in use at once, %d before", n, users, before)
	}
	close(end)
	for range users {
		<-done
	}
	for deadline := time.Now().Add(5 * poolIdle); openSockets(t) != before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d sockets at rest, %d before", openSockets(t), before)
		}
	}
	// One that is put back into a pool that has ended is closed.
	s, err := d.socks.get()
	if err != nil {
		t.Fatal(err)
	}
	d.socks.end()
	d.socks.put(s)
	if n := openSockets(t); n != before-1 {
		t.Errorf("%d sockets when those of one pool are closed, %d before", n, before)
	}
}

func openSockets(t *testing.T) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && strings.HasPrefix(target, "socket:") {
			n++
		}
	}
	return n
}
