package builtin

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

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

	mu    sync.Mutex
	byID  map[string]lease
	going map[string]time.Time // since when those are detached whose link is there still
	v4    pool
	v6    pool // of the zero prefix: no IPv6
}

// goingSuffix is on the name of a lease of a sandbox that is detached, but whose
// link the kernel has not removed yet. Its address is nobody else's until then.
const goingSuffix = ".going"

// openLeases reads the store. What it cannot read is left alone and logged.
func openLeases(root *os.Root, subnet, subnet6 netip.Prefix, log *slog.Logger) (*leases, error) {
	s := &leases{root: root, log: log, byID: make(map[string]lease), going: make(map[string]time.Time), v4: newPool(subnet), v6: newPool(subnet6)}
	entries, err := fs.ReadDir(root.FS(), leaseDir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		id, l, going, err := s.read(e.Name())
		if err != nil {
			log.Warn("Lease cannot be read", "lease", e.Name(), "err", err)
			continue
		}
		s.note(id, l)
		if going {
			s.going[id] = time.Time{}
		}
	}
	return s, nil
}

// read reads one lease, called by the name of its file.
func (s *leases) read(name string) (id string, l lease, going bool, err error) {
	target, err := s.root.Readlink(path.Join(leaseDir, name))
	if err != nil {
		return "", lease{}, false, err
	}
	if l, err = parseLease(target); err != nil {
		return "", lease{}, false, err
	}
	id, going = strings.CutSuffix(name, goingSuffix)
	return id, l, going, checkID(id)
}

// damaged returns the names in the directory that are no leases.
func (s *leases) damaged() ([]string, error) {
	entries, err := fs.ReadDir(s.root.FS(), leaseDir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, _, _, err := s.read(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			names = append(names, e.Name())
		}
	}
	return names, nil
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
	_, going := s.going[id]
	if have {
		s.mu.Unlock()
		if going {
			return lease{}, fmt.Errorf("sandbox %s is being detached", id)
		}
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
	name := path.Join(leaseDir, id)
	err = s.root.Symlink(l.String(), name)
	if errors.Is(err, fs.ErrExist) { // something that is no lease, or it would be known
		if err = s.root.RemoveAll(name); err == nil {
			err = s.root.Symlink(l.String(), name)
		}
	}
	if err != nil {
		s.forget(id)
		return lease{}, fmt.Errorf("write lease of %s: %w", l.v4, err)
	}
	return l, nil
}

// restore returns the lease of a sandbox that has had one. If it was lost, the
// sandbox gets the addresses again that it uses, as inside says.
func (s *leases) restore(id string, static []netip.Addr, inside func() []netip.Addr) (lease, error) {
	if l, ok := s.get(id); ok {
		return l, nil
	}
	for _, a := range inside() {
		if s.v4.subnet.Contains(a) || s.v6.subnet.Contains(a) {
			static = append(slices.DeleteFunc(static, func(s netip.Addr) bool { return s.Is4() == a.Is4() }), a)
		}
	}
	return s.take(id, static)
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
	delete(s.going, id)
	delete(s.v4.taken, l.v4)
	delete(s.v6.taken, l.v6)
}

// release marks id's lease as one that is to be freed when its link is gone.
func (s *leases) release(id string, now time.Time) error {
	name := path.Join(leaseDir, id)
	if err := s.root.Rename(name, name+goingSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release lease: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.byID[id]; ok {
		s.going[id] = now
	}
	return nil
}

// free takes a released lease back.
func (s *leases) free(id string) error {
	if err := s.root.Remove(path.Join(leaseDir, id+goingSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove lease: %w", err)
	}
	s.forget(id)
	return nil
}

// get returns the lease of a sandbox that is not detached.
func (s *leases) get(id string) (lease, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, going := s.going[id]
	l, ok := s.byID[id]
	return l, ok && !going
}

// released returns who is detached, and since when.
func (s *leases) released() map[string]time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.going)
}

// hasLink reports whether somebody with a lease has a link of that name.
func (s *leases) hasLink(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.byID {
		if name == hostName(id) || name == ifbName(id) {
			return true
		}
	}
	return false
}

func (s *leases) empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byID) == 0
}

// ids returns who has a lease and is not detached.
func (s *leases) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]string, 0, len(s.byID))
	for id := range s.byID {
		if _, going := s.going[id]; !going {
			ids = append(ids, id)
		}
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
			return netip.Addr{}, netsetup.Invalid(err)
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
