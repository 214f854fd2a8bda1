// Package hostport knows which ports of the host are published for sandboxes, and
// finds out who else on the host has one.
package hostport

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
)

// Registry notes which sandbox publishes which ports of the host, whatever makes
// its network. The zero value is empty and ready to use; it may be used from several goroutines.
type Registry struct {
	// Others returns what others on the host publish with rules of the kernel, so that no
	// socket shows it. Set before the Registry is used; nil: nobody is looked for.
	Others func() ([]Published, error)

	mu    sync.Mutex
	ports map[key][]publisher       // guarded by mu
	ids   map[string][]network.Port // guarded by mu

	// chosen are ports that Choose has found, so that it finds others for those who
	// ask before they are claimed. Guarded by mu.
	chosen map[key]choice
}

// Published is a port that somebody else publishes.
type Published struct {
	Port network.Port // what is known of it: not the port that it leads to
	By   string       // who, for messages
}

// choice is for whom a port was chosen, and when.
type choice struct {
	id string
	at time.Time
}

// chosenFor is how long a port that was chosen is not chosen for anybody else. It is
// no claim: who asks for that very port gets it.
const chosenFor = time.Minute

// chooseTries finds a port also if all but one of a hundred have been chosen before.
const chooseTries = 1000

// key is a port of the host, of whatever address.
type key struct {
	proto network.Protocol
	port  uint16
}

// publisher is who publishes one.
type publisher struct {
	id   string
	port network.Port
}

// Claim notes the ports of a sandbox in place of those that it had, unless one of
// them is another's.
func (r *Registry) Claim(id string, ports []network.Port) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.unclaimed(id, ports); err != nil {
		return err
	}
	r.forget(id)
	if len(ports) == 0 {
		return nil
	}
	if r.ports == nil {
		r.ports, r.ids = map[key][]publisher{}, map[string][]network.Port{}
	}
	for _, port := range ports {
		k := key{port.Protocol, port.HostPort}
		r.ports[k] = append(r.ports[k], publisher{id, port})
		delete(r.chosen, k)
	}
	r.ids[id] = slices.Clone(ports)
	return nil
}

// Release forgets the ports of a sandbox.
func (r *Registry) Release(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forget(id)
}

// forget does what Release does.
//
// Preconditions: r.mu is held.
func (r *Registry) forget(id string) {
	for _, port := range r.ids[id] {
		k := key{port.Protocol, port.HostPort}
		left := slices.DeleteFunc(r.ports[k], func(p publisher) bool { return p.id == id })
		if len(left) == 0 {
			delete(r.ports, k)
		} else {
			r.ports[k] = left
		}
	}
	delete(r.ids, id)
}

// unclaimed reports which port is published by another sandbox.
//
// Preconditions: r.mu is held.
func (r *Registry) unclaimed(id string, ports []network.Port) error {
	for _, ours := range ports {
		for _, theirs := range r.ports[key{ours.Protocol, ours.HostPort}] {
			if theirs.id != id && Overlap(ours, theirs.port) {
				return fmt.Errorf("port %s of the host is taken by sandbox %s", Name(ours), theirs.id)
			}
		}
	}
	return nil
}

// Choose gives a free host port to every port that has none, and reports which
// of the others somebody has: another sandbox, another installation, or a process of the
// host. Nothing is claimed; but a port is not chosen a second time as long as it may still be.
func (r *Registry) Choose(id string, ports []network.Port) error {
	if len(ports) == 0 {
		return nil
	}
	others, err := r.others()
	if err != nil {
		return err
	}
	for i := range ports {
		p := &ports[i]
		if p.HostPort != 0 {
			if err := r.available(id, *p, others); err != nil {
				return err
			}
			continue
		}
		var err error
		// What is free in one family may not be in the other; and the kernel does not
		// know which ports sandboxes have.
		for range chooseTries {
			if p.HostPort, err = tryBind(p.Protocol, bindAddresses(*p)[0], 0); err != nil {
				err = fmt.Errorf("choose a port of the host: %w", err)
				break
			}
			if slices.ContainsFunc(ports[:i], func(q network.Port) bool { return Overlap(*p, q) }) || !r.choose(id, *p) {
				err = fmt.Errorf("choose a port of the host: port %s was just chosen already", Name(*p))
				continue
			}
			if err = r.available(id, *p, others); err == nil {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// choose notes that a port is for id, unless it is for another sandbox.
func (r *Registry) choose(id string, p network.Port) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := key{p.Protocol, p.HostPort}
	if c, ok := r.chosen[k]; ok && c.id != id && time.Since(c.at) < chosenFor {
		return false
	}
	if r.chosen == nil {
		r.chosen = map[key]choice{}
	}
	r.chosen[k] = choice{id, time.Now()}
	return true
}

func (r *Registry) available(id string, p network.Port, others []Published) error {
	r.mu.Lock()
	err := r.unclaimed(id, []network.Port{p})
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if err := taken(p, others); err != nil {
		return err
	}
	return checkFree(p)
}

func (r *Registry) others() ([]Published, error) {
	if r.Others == nil {
		return nil, nil
	}
	others, err := r.Others()
	if err != nil {
		return nil, fmt.Errorf("look for ports that others publish: %w", err)
	}
	return others, nil
}

// Elsewhere reports which of the ports others publish too. Whoever publishes
// ports asks once more when they are published: of two that do so at the same moment the
// one that asks last sees the other.
func (r *Registry) Elsewhere(ports []network.Port) error {
	if len(ports) == 0 {
		return nil
	}
	others, err := r.others()
	if err != nil {
		return err
	}
	for _, p := range ports {
		if err := taken(p, others); err != nil {
			return err
		}
	}
	return nil
}

func taken(p network.Port, others []Published) error {
	for _, o := range others {
		if Overlap(p, o.Port) {
			return fmt.Errorf("port %s of the host is taken by %s", Name(p), o.By)
		}
	}
	return nil
}

// broadcast is the address of everybody on a link (RFC 919), and of no host.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Check looks at each port by itself, and for two that are the same.
func Check(ports []network.Port) error {
	for i, p := range ports {
		switch {
		case p.Protocol != network.TCP && p.Protocol != network.UDP && p.Protocol != network.SCTP:
			return fmt.Errorf("protocol %q of port %d is none of tcp, udp, sctp", p.Protocol, p.Port)
		case p.Port == 0:
			return errors.New("port 0 of the sandbox cannot be published")
		case p.HostIP.IsValid() && (p.HostIP.Zone() != "" || p.HostIP.Is4In6() || p.HostIP.IsMulticast() || p.HostIP == broadcast),
			p.HostIP.Is6() && p.HostIP.IsLinkLocalUnicast(): // every link has its own, and rules know addresses only
			return fmt.Errorf("port %s: not an address that a port can be published on", Name(p))
		}
		for _, q := range ports[:i] {
			if Overlap(p, q) {
				return fmt.Errorf("port %s is published twice", Name(p))
			}
		}
	}
	return nil
}

// Overlap reports whether one packet could be for both host ports.
func Overlap(p, q network.Port) bool {
	if p.HostPort != q.HostPort || p.HostPort == 0 || p.Protocol != q.Protocol {
		return false
	}
	every := func(a netip.Addr) bool { return !a.IsValid() }
	switch {
	case every(p.HostIP) || every(q.HostIP):
		return true
	case p.HostIP.Is4() != q.HostIP.Is4():
		return false
	}
	return p.HostIP.IsUnspecified() || q.HostIP.IsUnspecified() || p.HostIP == q.HostIP
}

// Name is how a port of the host is called in messages.
func Name(p network.Port) string {
	if p.HostIP.IsValid() {
		return fmt.Sprintf("%s/%s", netip.AddrPortFrom(p.HostIP, p.HostPort), p.Protocol)
	}
	return fmt.Sprintf("%d/%s", p.HostPort, p.Protocol)
}

// checkFree reports who on the host listens on a port. Who begins to listen
// later gets nothing from outside: connections are translated before.
func checkFree(p network.Port) error {
	for _, a := range bindAddresses(p) {
		_, err := tryBind(p.Protocol, a, p.HostPort)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			return fmt.Errorf("port %s of the host is taken by %s", Name(p), listener(p))
		case errors.Is(err, unix.EADDRNOTAVAIL):
			return fmt.Errorf("port %s: the host has no address %s", Name(p), a)
		case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.ESOCKTNOSUPPORT):
			// A host that cannot have such sockets has nobody who listens on one.
		case err != nil:
			return fmt.Errorf("port %s of the host: %w", Name(p), err)
		}
	}
	return nil
}

func bindAddresses(p network.Port) []netip.Addr {
	if p.HostIP.IsValid() {
		return []netip.Addr{p.HostIP}
	}
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// tryBind binds a socket to an address and port, closes it, and returns the
// port, which the kernel chooses if it is 0.
func tryBind(proto network.Protocol, a netip.Addr, port uint16) (uint16, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if a.Is6() {
		family = unix.AF_INET6
	}
	if proto == network.UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, number(proto))
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if kind == unix.SOCK_STREAM && port != 0 { // with it the kernel chooses among half of them only
		// Connections that were closed a moment ago are no listeners.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return 0, err
		}
	}
	var sa unix.Sockaddr
	if a.Is4() {
		sa = &unix.SockaddrInet4{Port: int(port), Addr: a.As4()}
	} else {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return 0, err
		}
		sa = &unix.SockaddrInet6{Port: int(port), Addr: a.As16()}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return 0, err
	}
	got, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	switch got := got.(type) {
	case *unix.SockaddrInet4:
		return uint16(got.Port), nil
	case *unix.SockaddrInet6:
		return uint16(got.Port), nil
	}
	return port, nil
}

// number is a protocol's in IP.
func number(p network.Protocol) int {
	switch p {
	case network.UDP:
		return unix.IPPROTO_UDP
	case network.SCTP:
		return unix.IPPROTO_SCTP
	default:
		return unix.IPPROTO_TCP
	}
}

// listener says who has a port, as well as it can be told.
func listener(p network.Port) string {
	for _, table := range []string{"", "6"} {
		f, err := os.Open("/proc/net/" + string(p.Protocol) + table)
		if err != nil {
			continue // SCTP has another form
		}
		inodes := inodesOf(f, p.HostPort, p.Protocol == network.TCP)
		f.Close()
		for _, inode := range inodes {
			if who := socketOwner(inode); who != "" {
				return who
			}
		}
	}
	return "somebody on the host"
}

// inodesOf returns the inode numbers of the sockets bound to port in a table as
// /proc/net/tcp (proc(5)); of those of TCP, only listening ones count.
func inodesOf(r io.Reader, port uint16, listening bool) []string {
	const listen = "0A"
	var inodes []string
	for s := bufio.NewScanner(r); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 10 || listening && f[3] != listen {
			continue
		}
		_, hex, ok := strings.Cut(f[1], ":")
		if n, err := strconv.ParseUint(hex, 16, 16); ok && err == nil && uint16(n) == port && f[9] != "0" {
			inodes = append(inodes, f[9])
		}
	}
	return inodes
}

// socketOwner returns the name and pid of a process that has a socket open, or
// "" if none can be seen.
func socketOwner(inode string) string {
	dirs, _ := filepath.Glob("/proc/[0-9]*/fd")
	for _, dir := range dirs {
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if target, _ := os.Readlink(filepath.Join(dir, fd.Name())); target == "socket:["+inode+"]" {
				proc := filepath.Dir(dir)
				name, _ := os.ReadFile(filepath.Join(proc, "comm"))
				return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), filepath.Base(proc))
			}
		}
	}
	return ""
}
