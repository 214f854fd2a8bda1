package builtin

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socket is a route netlink socket, of the network namespace in which it was
// opened. It is for one user at a time.
//
// Unlike those of the netlink library it sends several requests at once, which
// saves system calls and turns at the kernel's lock.
type socket struct {
	fd  int
	seq uint32
	buf []byte
}

// newSocket opens a socket in the network namespace of the calling thread.
func newSocket() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// What an error is about, beyond its number; and no echo of the request.
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return &socket{fd: fd, buf: make([]byte, 16<<10)}, nil
}

func (s *socket) close() { unix.Close(s.fd) }

// request is one thing to ask of the kernel.
type request struct {
	what string // for the error
	*nl.NetlinkRequest
	ignore []syscall.Errno // these are success
}

func newRequest(what string, typ, flags int, ignore ...syscall.Errno) request {
	return request{what, nl.NewNetlinkRequest(typ, flags|unix.NLM_F_ACK), ignore}
}

// do sends requests, which the kernel carries out one after the other, and waits
// for all answers. One that fails does not keep the next from being tried. The
// error joins those of the requests.
func (s *socket) do(reqs ...request) error {
	var out []byte
	for i := range reqs {
		s.seq++
		reqs[i].Seq = s.seq
		b := reqs[i].Serialize()
		out = append(out, b...)
		for len(out)%unix.NLMSG_ALIGNTO != 0 {
			out = append(out, 0)
		}
	}
	if err := unix.Sendto(s.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("netlink sendto", err)
	}
	first := s.seq - uint32(len(reqs)) + 1
	var errs []error
	for answered := 0; answered < len(reqs); {
		n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return errors.Join(append(errs, os.NewSyscallError("netlink recvfrom", err))...)
		}
		msgs, err := syscall.ParseNetlinkMessage(s.buf[:n])
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		for _, m := range msgs {
			i := int(m.Header.Seq - first)
			if m.Header.Type != unix.NLMSG_ERROR || i < 0 || i >= len(reqs) || len(m.Data) < 4 {
				continue
			}
			answered++
			if err := reqs[i].result(m); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (r request) result(m syscall.NetlinkMessage) error {
	errno := syscall.Errno(-int32(nl.NativeEndian().Uint32(m.Data[:4])))
	if errno == 0 {
		return nil
	}
	for _, ok := range r.ignore {
		if errno == ok {
			return nil
		}
	}
	if why := extAck(m); why != "" {
		return fmt.Errorf("%s: %w: %s", r.what, errno, why)
	}
	return fmt.Errorf("%s: %w", r.what, errno)
}

// extAck returns the kernel's words about an error, if it has any.
func extAck(m syscall.NetlinkMessage) string {
	const attrMsg = 1
	if m.Header.Flags&unix.NLM_F_ACK_TLVS == 0 || len(m.Data) < 4+unix.SizeofNlMsghdr {
		return ""
	}
	b := m.Data[4+unix.SizeofNlMsghdr:]
	if m.Header.Flags&unix.NLM_F_CAPPED == 0 {
		n := int(nl.NativeEndian().Uint32(m.Data[4:8])) - unix.SizeofNlMsghdr
		if n < 0 || n > len(b) {
			return ""
		}
		b = b[n:]
	}
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return ""
	}
	for _, a := range attrs {
		if a.Attr.Type == attrMsg {
			return unix.ByteSliceToString(a.Value)
		}
	}
	return ""
}

// socketPool has sockets of the host's namespace.
type socketPool struct{ connPool[*socket] }

func newSocketPool() *socketPool {
	return &socketPool{connPool[*socket]{dial: newSocket, close: (*socket).close}}
}

// do sends requests on a socket of its own, as [socket.do] does.
func (p *socketPool) do(reqs ...request) error {
	s, err := p.get()
	if err != nil {
		return err
	}
	defer p.put(s)
	return s.do(reqs...)
}
