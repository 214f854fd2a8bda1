package builtin

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"strings"
	"sync"

	"github.com/sandboxd/sandboxd/netsetup"
)

// leaseDir is where leases are, below the driver's root.
const leaseDir = "leases"

// lease is a sandbox's addresses. The zero value is none.
type lease struct {
	v4, v6 netip.Addr // v6 is the zero value without an IPv6 subnet
}

// leases is the store of leases. A lease is a symbolic link whose name is the
// sandbox's id and whose target is its addresses, as "10.88.0.2" or
// "10.88.0.2,fd00::2": one system call makes it, so that it is there whole or
// not at all, and one removes it. Nothing is forced to disk: after a power cut
// no sandbox is left that could have one.
//
// The store of containernetworking/plugins (host-local) was not taken. It
// holds a lock on the directory while it reads all of it for each address, and
// a crash can leave a file without an owner.
type leases struct {
	root *os.Root
	log  *slog.Logger

	mu   sync.Mutex
	byID map[string]lease
	v4   pool
	v6   pool // of the zero prefix: no IPv6
}

// openLeases reads the store. What it cannot read is left alone and logged.
func openLeases(root *os.Root, subnet, subnet6 netip.Prefix, log *slog.Logger) (*leases, error) {
	s := &leases{root: root, log: log, byID: make(map[string]lease), v4: newPool(subnet), v6: newPool(subnet6)}
	entries, err := fs.ReadDir(root.FS(), leaseDir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		target, err := root.Readlink(path.Join(leaseDir, e.Name()))
		var l lease
		if err == nil {
			l, err = parseLease(target)
		}
		if err == nil {
			err = checkID(e.Name())
		}
		if err != nil {
			log.Warn("Lease cannot be read", "lease", e.Name(), "err", err)
			continue
		}
		s.note(e.Name(), l)
	}
	return s, nil
}

func parseLease(s string) (lease, error) {
	four, six, both := strings.Cut(s, ",")
	var l lease
	var err error
	if l.v4, err = netip.ParseAddr(four); err != nil {
		return lease{}, err
	}
	if both {
		if l.v6, err = netip.ParseAddr(six); err != nil {
			return lease{}, err
		}
	}
	if !l.v4.Is4() || both && (!l.v6.Is6() || l.v6.Is4In6() || l.v6.Zone() != "") {
		return lease{}, fmt.Errorf("lease %q: not an IPv4 and an IPv6 address", s)
	}
	return l, nil
}

func (l lease) String() string {
	if !l.v6.IsValid() {
		return l.v4.String()
	}
	return l.v4.String() + "," + l.v6.String()
}

func (s *leases) note(id string, l lease) {
	s.byID[id] = l
	s.v4.taken[l.v4] = id
	if l.v6.IsValid() {
		s.v6.taken[l.v6] = id
	}
}

// take gives id its addresses: those it has, or those in static and for a
// family without one the next that is free.
func (s *leases) take(id string, static []netip.Addr) (lease, error) {
	s.mu.Lock()
	l, have := s.byID[id]
	if have {
		s.mu.Unlock()
		return l, nil
	}
	l, err := s.pick(static)
	if err == nil {
		s.note(id, l)
	}
	s.mu.Unlock()
	if err != nil {
		return lease{}, err
	}
	// The file system is not waited for with the lock held.
	err = s.root.Symlink(l.String(), path.Join(leaseDir, id))
	if err != nil {
		s.forget(id)
		return lease{}, fmt.Errorf("write lease of %s: %w", l.v4, err)
	}
	return l, nil
}

func (s *leases) pick(static []netip.Addr) (l lease, err error) {
	var want4, want6 netip.Addr
	for _, a := range static {
		if a.Is4() {
			want4 = a
		} else {
			want6 = a
		}
	}
	if l.v4, err = s.v4.pick(want4); err != nil {
		return lease{}, err
	}
	if s.v6.subnet.IsValid() {
		if l.v6, err = s.v6.pick(want6); err != nil {
			return lease{}, err
		}
	}
	return l, nil
}

func (s *leases) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.byID[id]
	delete(s.byID, id)
	delete(s.v4.taken, l.v4)
	delete(s.v6.taken, l.v6)
}

// free takes id's addresses back. It succeeds if id has none.
func (s *leases) free(id string) error {
	if err := s.root.Remove(path.Join(leaseDir, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove lease: %w", err)
	}
	s.forget(id)
	return nil
}

func (s *leases) get(id string) (lease, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.byID[id]
	return l, ok
}

// ids returns who has a lease.
func (s *leases) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]string, 0, len(s.byID))
	for id := range s.byID {
		ids = append(ids, id)
	}
	return ids
}

// pool is the addresses of a subnet. They are handed out in order, so that one
// that was given back is the last to come again.
type pool struct {
	subnet netip.Prefix
	last   netip.Addr // that was handed out
	taken  map[netip.Addr]string
}

func newPool(subnet netip.Prefix) pool {
	return pool{subnet: subnet, taken: make(map[netip.Addr]string)}
}

// usable reports why a cannot be a sandbox's.
func usable(subnet netip.Prefix, a netip.Addr) error {
	switch {
	case !subnet.Contains(a):
		return fmt.Errorf("address %s is not in %s", a, subnet)
	case a == subnet.Addr() || a == gateway(subnet):
		return fmt.Errorf("address %s is the network's own", a)
	case a.Is4() && !subnet.Contains(a.Next()):
		return fmt.Errorf("address %s is the broadcast address", a)
	}
	return nil
}

// pick returns want or, if that is the zero value, the next free address.
func (p *pool) pick(want netip.Addr) (netip.Addr, error) {
	if want.IsValid() {
		if err := usable(p.subnet, want); err != nil {
			return netip.Addr{}, fmt.Errorf("%w: %w", netsetup.ErrInvalid, err)
		}
		if id, ok := p.taken[want]; ok {
			return netip.Addr{}, fmt.Errorf("address %s belongs to sandbox %s", want, id)
		}
		return want, nil
	}
	a := p.last
	// As many steps as addresses are taken, and a few for those that are not
	// usable, find a free one if there is any.
	for range len(p.taken) + 5 {
		if a = a.Next(); !a.IsValid() || !p.subnet.Contains(a) {
			a = gateway(p.subnet).Next()
		}
		if _, ok := p.taken[a]; !ok && usable(p.subnet, a) == nil {
			p.last = a
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("no address is free in %s: all %d are taken", p.subnet, len(p.taken))
}
