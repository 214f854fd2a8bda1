package builtin

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

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
)

// hostPort is a port of the host, of whatever address.
type hostPort struct {
	proto network.Protocol
	port  uint16
}

// publisher is who publishes one.
type publisher struct {
	id   string
	port network.Port
}

// register notes an attachment, unless one of its ports is another's already.
func (d *Driver) register(id string, p *plan, l lease) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.portsFree(id, p.Ports); err != nil {
		return err
	}
	d.forgetPorts(id)
	for _, port := range p.Ports {
		k := hostPort{port.Protocol, port.HostPort}
		d.ports[k] = append(d.ports[k], publisher{id, port})
	}
	d.attached[id] = &attachment{*p, l}
	return nil
}

// portsFree reports which port is published by another sandbox. d.mu is held.
func (d *Driver) portsFree(id string, ports []network.Port) error {
	for _, ours := range ports {
		for _, theirs := range d.ports[hostPort{ours.Protocol, ours.HostPort}] {
			if theirs.id != id && overlap(ours, theirs.port) {
				return fmt.Errorf("port %s of the host is taken by sandbox %s", portName(ours), theirs.id)
			}
		}
	}
	return nil
}

func (d *Driver) unregister(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forgetPorts(id)
	delete(d.attached, id)
}

// forgetPorts forgets what id publishes. d.mu is held.
func (d *Driver) forgetPorts(id string) {
	a := d.attached[id]
	if a == nil {
		return
	}
	for _, port := range a.plan.Ports {
		k := hostPort{port.Protocol, port.HostPort}
		left := slices.DeleteFunc(d.ports[k], func(p publisher) bool { return p.id == id })
		if len(left) == 0 {
			delete(d.ports, k)
		} else {
			d.ports[k] = left
		}
	}
}

// choose gives a free host port to every port that has none, and reports
// which of the others somebody has.
func (d *Driver) choose(id string, ports []network.Port) error {
	for i := range ports {
		p := &ports[i]
		if p.HostPort != 0 {
			if err := d.available(id, *p); err != nil {
				return err
			}
			continue
		}
		var err error
		for range 20 { // what is free in one family may not be in the other
			if p.HostPort, err = tryBind(p.Protocol, bindAddresses(*p)[0], 0); err != nil {
				err = fmt.Errorf("choose a port of the host: %w", err)
				break
			}
			if slices.ContainsFunc(ports[:i], func(q network.Port) bool { return overlap(*p, q) }) {
				continue
			}
			if err = d.available(id, *p); err == nil {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *Driver) available(id string, p network.Port) error {
	d.mu.Lock()
	err := d.portsFree(id, []network.Port{p})
	d.mu.Unlock()
	if err != nil {
		return err
	}
	return checkFree(p)
}

// checkFree reports who on the host listens on a port. Who begins to listen
// later gets nothing from outside: connections are translated before.
func checkFree(p network.Port) error {
	for _, a := range bindAddresses(p) {
		_, err := tryBind(p.Protocol, a, p.HostPort)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			return fmt.Errorf("port %s of the host is taken by %s", portName(p), listener(p))
		case errors.Is(err, unix.EADDRNOTAVAIL):
			return fmt.Errorf("port %s: the host has no address %s", portName(p), a)
		case isErrno(err, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.ESOCKTNOSUPPORT):
			// A host that cannot have such sockets has nobody who listens on one.
		case err != nil:
			return fmt.Errorf("port %s of the host: %w", portName(p), err)
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
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, int(protocol(proto)))
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if kind == unix.SOCK_STREAM {
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
