package builtin

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

const (
	vethInfoPeer   = 1 // VETH_INFO_PEER, linux/veth.h
	brportMode     = 4 // IFLA_BRPORT_MODE, linux/if_link.h: hairpin
	brportLearning = 8 // IFLA_BRPORT_LEARNING
	infoSlaveKind  = 4 // IFLA_INFO_SLAVE_KIND
	infoSlaveData  = 5 // IFLA_INFO_SLAVE_DATA
	upFlag         = unix.IFF_UP

	inet6AddrGenMode = 8 // IFLA_INET6_ADDR_GEN_MODE
	addrGenModeNone  = 1 // IN6_ADDR_GEN_MODE_NONE
)

// connect makes a veth pair with one end in ns as eth0 and the other one in the
// bridge, and gives eth0 its addresses and routes. It returns eth0's hardware address.
func (d *Driver) connect(id string, p *plan, l lease, ns *os.File) (net.HardwareAddr, error) {
	mac := p.mac(l)
	inside, err := openInside(ns, l.v6.IsValid())
	if err != nil {
		return nil, err
	}
	defer inside.close()
	if err := d.socks.do(append([]request{d.newVeth(id, mac, ns)}, d.newPort(id, p)...)...); err != nil {
		return nil, fmt.Errorf("make link %s: %w", hostName(id), err)
	}
	if err := d.configureAt(l, inside); err != nil {
		return nil, err
	}
	return mac, d.socks.do(syncLink(hostName(id)), syncLink(d.opts.Bridge))
}

// syncLink asks for a link in order to have the kernel see that it has a carrier
// now, which it otherwise does a little later, and drops packets until then: a first
// connection would have to wait a second for the next attempt. (Since Linux 6.8;
// before, asking changes nothing.)
func syncLink(name string) request {
	const skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	r := newRequest("look at link "+name, unix.RTM_GETLINK, 0)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	r.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	return r
}

// configure gives eth0 in ns its addresses and routes.
func (d *Driver) configure(l lease, ns *os.File) error {
	inside, err := openInside(ns, l.v6.IsValid())
	if err != nil {
		return err
	}
	defer inside.close()
	return d.configureAt(l, inside)
}

func (d *Driver) configureAt(l lease, inside *socket) error {
	index, err := inside.index(ifName)
	if err != nil {
		return err
	}
	reqs := []request{setLinkUp(index), newAddress(index, l.v4, d.opts.Subnet), newDefaultRoute(index, gateway(d.opts.Subnet))}
	if l.v6.IsValid() {
		reqs = append(reqs, newAddress(index, l.v6, d.opts.Subnet6), newDefaultRoute(index, gateway(d.opts.Subnet6)))
	}
	if err := inside.do(reqs...); err != nil {
		return fmt.Errorf("configure %s in the sandbox: %w", ifName, err)
	}
	return nil
}

// openInside opens a socket in ns, and sets there how the IPv6 side of
// interfaces that are made from now on behaves: no waiting until an address is
// known to be nobody else's, no listening to router advertisements; and no
// IPv6 at all, for eth0, if the network has none.
func openInside(ns *os.File, six bool) (*socket, error) {
	var s *socket
	err := nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() (err error) {
		settings := []string{"accept_dad", "0", "accept_ra", "0"}
		if !six {
			settings = []string{"disable_ipv6", "1"}
		}
		for i := 0; i < len(settings); i += 2 {
			err := writeSysctl("net/ipv6/conf/default/"+settings[i], settings[i+1])
			if err != nil && !errors.Is(err, os.ErrNotExist) { // a host without IPv6
				return err
			}
		}
		s, err = newSocket()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("in the sandbox's network namespace: %w", err)
	}
	return s, nil
}

// newVeth asks for a veth pair with one end in ns. A pair cannot be set up by
// the request that makes it: an end without the other one is ENOTCONN.
//
// Without a number of queues the kernel makes one for each processor, uses one, and waits
// for an RCU grace period to give up the others, twice, with the lock of all networks (rtnl) held.
func (d *Driver) newVeth(id string, mac net.HardwareAddr, ns *os.File) request {
	r := newRequest("new veth pair", unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(hostName(id))))
	r.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(d.mtu))))
	r.AddData(nl.NewRtAttr(unix.IFLA_NUM_TX_QUEUES, nl.Uint32Attr(1)))
	r.AddData(nl.NewRtAttr(unix.IFLA_NUM_RX_QUEUES, nl.Uint32Attr(1)))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(vethInfoPeer, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(ifName))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(d.mtu)))
	peer.AddRtAttr(unix.IFLA_NUM_TX_QUEUES, nl.Uint32Attr(1))
	peer.AddRtAttr(unix.IFLA_NUM_RX_QUEUES, nl.Uint32Attr(1))
	peer.AddRtAttr(unix.IFLA_ADDRESS, mac)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns.Fd())))
	r.AddData(info)
	return r
}

// newPort asks for the host's end to be marked, put into the bridge and set up.
//
// A sandbox that connects to its own published port needs hairpin where
// br_netfilter is used: the frame's address is changed before it is routed, so that
// it never is. From an isolated one the bridge learns no hardware addresses: it
// would do so before any rule sees the frame.
//
// The host does no ARP there (IFF_NOARP): frames to one of the addresses that are for
// the next bridge only (01-80-C2-00-00-0X, IEEE 802.1D) are the port's own, and with
// LLDP's no rule of the bridge family sees them. ARP to the bridge is the bridge's.
func (d *Driver) newPort(id string, p *plan) []request {
	r := newRequest("add link to "+d.opts.Bridge, unix.RTM_NEWLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags = unix.IFF_UP | unix.IFF_NOARP
	msg.Change = msg.Flags
	r.AddData(msg)
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(hostName(id))))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(alias(d.opts.Mark, id))))
	r.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(d.bridge))))
	r.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(portGroup(d.opts.Mark))))
	reqs := []request{withoutAddress(id), r}
	if len(p.Ports) > 0 {
		reqs = append(reqs, setPort("set hairpin mode", id, brportMode, 1))
	}
	if p.Isolated {
		reqs = append(reqs, setPort("switch learning off", id, brportLearning, 0))
	}
	return reqs
}

// withoutAddress keeps a port from giving itself a link-local IPv6 address once it is
// up: a port needs none, and each is looked up, announced and put into the host's
// routing table, with the lock of all networks held. A host without IPv6 has none to give.
func withoutAddress(id string) request {
	r := newRequest("keep IPv6 addresses from link", unix.RTM_NEWLINK, 0, unix.EAFNOSUPPORT)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(hostName(id))))
	families := nl.NewRtAttr(unix.IFLA_AF_SPEC|unix.NLA_F_NESTED, nil)
	families.AddRtAttr(unix.AF_INET6|unix.NLA_F_NESTED, nil).AddRtAttr(inet6AddrGenMode, nl.Uint8Attr(addrGenModeNone))
	r.AddData(families)
	return r
}

// setPort asks for an attribute of a port to be set. The kernel takes those only
// once the link is one.
func setPort(what, id string, attribute int, value uint8) request {
	r := newRequest(what, unix.RTM_NEWLINK, 0)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(hostName(id))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(infoSlaveKind, nl.NonZeroTerminated("bridge"))
	info.AddRtAttr(infoSlaveData, nil).AddRtAttr(attribute, nl.Uint8Attr(value))
	r.AddData(info)
	return r
}

func setLinkUp(index int) request {
	r := newRequest("set link up", unix.RTM_NEWLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), unix.IFF_UP, unix.IFF_UP
	r.AddData(msg)
	return r
}

func newAddress(index int, a netip.Addr, subnet netip.Prefix) request {
	r := newRequest("add address "+a.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	msg := nl.NewIfAddrmsg(family)
	msg.Index, msg.Prefixlen = uint32(index), uint8(subnet.Bits())
	if a.Is6() {
		msg.IfAddrmsg.Flags = unix.IFA_F_NODAD
	}
	r.AddData(msg)
	r.AddData(nl.NewRtAttr(unix.IFA_LOCAL, a.AsSlice()))
	r.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, a.AsSlice()))
	if a.Is4() {
		r.AddData(nl.NewRtAttr(unix.IFA_BROADCAST, broadcast(subnet).AsSlice()))
	}
	return r
}

func broadcast(subnet netip.Prefix) netip.Addr {
	b := subnet.Addr().As4()
	for i := subnet.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

func newDefaultRoute(index int, gw netip.Addr) request {
	r := newRequest("add route through "+gw.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	msg := nl.NewRtMsg()
	msg.Family = unix.AF_INET
	if gw.Is6() {
		msg.Family = unix.AF_INET6
	}
	r.AddData(msg)
	r.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, gw.AsSlice()))
	r.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
	return r
}

// index returns the number of an interface of the socket's namespace.
func (s *socket) index(name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	// Any socket will do; unlike a netlink request it needs no lock.
	if err := unix.IoctlIfreq(s.fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	return int(req.Uint32()), nil
}

// linkIndex returns the number of a link of the host, 0 if there is none of that
// name. It costs no lock.
func linkIndex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	s := socket{fd: fd}
	defer s.close()
	index, err := s.index(name)
	if errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	return index, err
}

// linkThere reports whether the host has a link of that name.
func linkThere(name string) (bool, error) {
	index, err := linkIndex(name)
	return index != 0, err
}

// writeSysctl sets one of the calling thread's network namespace.
func writeSysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
