package builtin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// event is something that happened on the host.
type event int

const (
	linkGone     event = iota // some link
	bridgeGone                // or down, or one of its addresses is gone; or perhaps: events were lost
	routeChanged              // a way out came, an address, or forwarding of all devices was set
	rulesGone                 // of our tables; or perhaps
	elementsGone              // of sets of our tables; or perhaps
)

// eventPause is the least time between two answers to one event: somebody who removes
// something again and again is not to keep the daemon busy.
const eventPause = 100 * time.Millisecond

// watch reports events until ctx is done. A filter in the kernel passes only
// what matters of links, addresses and routes: without it the daemon would wake up dozens of times for each
// sandbox that comes or goes.
func (d *Driver) watch(ctx context.Context) <-chan event {
	events := make(chan event, 64)
	send := func(e event) {
		select {
		case events <- e:
		case <-ctx.Done():
		}
	}
	d.listen(ctx, unix.NETLINK_ROUTE, []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF}, routeFilter(), func(m *netlink.Message) {
		switch {
		case m == nil:
			send(bridgeGone)
			send(routeChanged)
		case m.Header.Type == unix.RTM_DELLINK || m.Header.Type == unix.RTM_DELADDR || m.Header.Type == unix.RTM_NEWLINK:
			// All begin with 4 bytes and the link's number.
			if len(m.Data) >= 8 && int(binary.NativeEndian.Uint32(m.Data[4:])) == d.bridgeIndex() {
				send(bridgeGone)
			} else if m.Header.Type == unix.RTM_DELLINK {
				send(linkGone)
			}
		default:
			send(routeChanged)
		}
	})
	d.listen(ctx, unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, nftFilter(), func(m *netlink.Message) {
		switch {
		case m == nil:
			send(rulesGone)
			send(elementsGone)
		case !d.ofOurTable(m):
		case m.Header.Type == nftDel(unix.NFT_MSG_DELSETELEM):
			if !d.nft.conns.has(m.Header.PID) {
				send(elementsGone)
			}
		default:
			send(rulesGone)
		}
	})
	return events
}

// ofOurTable reports whether a message says that something of our tables is gone.
func (d *Driver) ofOurTable(m *netlink.Message) bool {
	switch m.Header.Type {
	case nftDel(unix.NFT_MSG_DELTABLE), nftDel(unix.NFT_MSG_DELCHAIN), nftDel(unix.NFT_MSG_DELRULE), nftDel(unix.NFT_MSG_DELSET), nftDel(unix.NFT_MSG_DELSETELEM):
	default:
		return false
	}
	const header = 4 // struct nfgenmsg
	if len(m.Data) < header {
		return false
	}
	attrs, err := netlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return false
	}
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_TABLE_NAME { // the same number for all kinds
			return attrs.String() == d.nft.inet.Name
		}
	}
	return false
}

func nftDel(t uint16) netlink.HeaderType {
	return netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | t)
}

// listen calls fn for each message to the groups that passes filter, and with nil
// when some were lost.
func (d *Driver) listen(ctx context.Context, protocol int, groups []uint32, filter []bpf.Instruction, fn func(*netlink.Message)) {
	c, err := netlink.Dial(protocol, nil)
	if err == nil {
		var raw []bpf.RawInstruction
		if raw, err = bpf.Assemble(filter); err == nil {
			err = c.SetBPF(raw)
		}
		for _, g := range groups {
			if err == nil {
				err = c.JoinGroup(g)
			}
		}
		if err != nil {
			c.Close()
		}
	}
	if err != nil {
		d.log.Warn("Host network is not watched", "err", err)
		return
	}
	d.done.Go(func() {
		<-ctx.Done()
		c.Close()
	})
	d.done.Go(func() {
		for {
			msgs, err := c.Receive()
			switch {
			case ctx.Err() != nil:
				return
			case errors.Is(err, unix.ENOBUFS):
				fn(nil)
			case err != nil:
				d.log.Warn("Host network is no longer watched", "err", err)
				return
			}
			for i := range msgs {
				fn(&msgs[i])
			}
		}
	})
}

// Offsets in a netlink message.
const (
	offType     = 4
	offFamily   = unix.SizeofNlMsghdr     // of a struct rtmsg
	offDstLen   = unix.SizeofNlMsghdr + 1 //
	offScope    = unix.SizeofNlMsghdr + 3 // of a struct ifaddrmsg
	offTable    = unix.SizeofNlMsghdr + 4 // of a struct rtmsg
	offFlags    = unix.SizeofNlMsghdr + 8 // of a struct ifinfomsg
	offChange   = unix.SizeofNlMsghdr + 12
	offNetconf  = unix.SizeofNlMsghdr + 8 // the first attribute after a struct netconfmsg: which device
	netconfAll  = 0xffffffff              // NETCONFA_IFINDEX_ALL
	passMessage = 0x7fffffff
)

// routeFilter passes links that go or are set down, addresses that go and are valid beyond
// their link, as sandboxes' links on the host have none, new routes of the main table
// that are IPv4 or a default route, and settings for all devices.
func routeFilter() []bpf.Instruction {
	is := func(t uint16, skip uint8) bpf.Instruction {
		return bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: messageType(t), SkipTrue: skip}
	}
	pass, drop := bpf.RetConstant{Val: passMessage}, bpf.RetConstant{Val: 0}
	up := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, unix.IFF_UP))
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: offType, Size: 2},
		is(unix.RTM_DELLINK, 1),
		pass,
		is(unix.RTM_NEWLINK, 6),
		bpf.LoadAbsolute{Off: offChange, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: up, SkipTrue: 3},
		bpf.LoadAbsolute{Off: offFlags, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: up, SkipTrue: 1},
		pass,
		drop,
		is(unix.RTM_DELADDR, 4),
		bpf.LoadAbsolute{Off: offScope, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.RT_SCOPE_UNIVERSE, SkipTrue: 1},
		pass,
		drop,
		is(unix.RTM_NEWROUTE, 8),
		bpf.LoadAbsolute{Off: offTable, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.RT_TABLE_MAIN, SkipTrue: 5},
		bpf.LoadAbsolute{Off: offFamily, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_INET, SkipTrue: 2},
		bpf.LoadAbsolute{Off: offDstLen, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 1},
		pass,
		drop,
		is(unix.RTM_NEWNETCONF, 3),
		bpf.LoadAbsolute{Off: offNetconf, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: netconfAll, SkipTrue: 1},
		pass,
		drop,
	}
}

// nftFilter passes all but the numbers of generations, which end every transaction:
// the kernel puts several messages together, and a filter sees the first one.
func nftFilter() []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: offType, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: messageType(uint16(nftDel(unix.NFT_MSG_NEWGEN))), SkipTrue: 1},
		bpf.RetConstant{Val: passMessage},
		bpf.RetConstant{Val: 0},
	}
}

// messageType returns what a filter, which reads in network order, finds for a
// number that the kernel wrote in its own.
func messageType(t uint16) uint32 {
	return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, t)))
}

func (d *Driver) bridgeIndex() int {
	d.host.RLock()
	defer d.host.RUnlock()
	return d.bridge
}

// handle answers an event. That a link is gone is for settle to see.
func (d *Driver) handle(e event) error {
	switch e {
	case bridgeGone, rulesGone:
		return d.repair()
	case elementsGone:
		return d.refill()
	case routeChanged:
		d.host.Lock()
		defer d.host.Unlock()
		if d.up {
			return errors.Join(d.setBridgeSysctls(), d.claim())
		}
	}
	return nil
}

// repair makes again what is missing of the bridge and the table, and puts the
// links of all attachments back into the bridge.
func (d *Driver) repair() error {
	d.host.Lock()
	defer d.host.Unlock()
	d.mu.Lock()
	needed := len(d.attached) > 0
	d.mu.Unlock()
	if !needed {
		d.up = false // the next sandbox makes what it needs
		return nil
	}
	link, err := findLink(d.opts.Bridge)
	if err != nil {
		return err
	}
	whole, err := d.nft.whole(d.anyIsolated())
	if err != nil {
		return err
	}
	var why error
	switch {
	case link == nil || link.Attrs().Index != d.bridge:
		why = fmt.Errorf("bridge %s was removed", d.opts.Bridge)
	case !whole:
		why = fmt.Errorf("nftables table %s is gone or was changed", d.nft.inet.Name)
	default:
		why = d.verifyGateway()
	}
	if d.up && why == nil {
		return nil
	}
	d.up = false
	if err := d.prepareLocked(); err != nil {
		return err
	}
	d.log.Warn("Host network was changed by somebody else and is repaired", "bridge", d.opts.Bridge, "err", why)
	return nil
}

// refill puts back what is missing of the elements of a table that is there.
func (d *Driver) refill() error {
	d.host.Lock() // so that nobody is being detached
	defer d.host.Unlock()
	if !d.up {
		return nil
	}
	all := d.allElements()
	if err := d.nft.addElements(all); err != nil {
		// Somebody's elements are in the places of ours, of which only maps can be full: or
		// a table is gone, which another event tells of.
		if err := d.nft.conns.use(func(c *nftables.Conn) error { return d.nft.build(c, all) }); err != nil {
			return fmt.Errorf("make nftables table %s: %w", d.nft.inet.Name, err)
		}
		if err := d.nft.addElements(d.nft.ofBridge(all)); err != nil {
			return err
		}
	}
	if err := d.claim(); err != nil {
		return err
	}
	d.log.Warn("Elements of nftables were removed by somebody else and are put back", "bridge", d.opts.Bridge)
	return nil
}

func (d *Driver) anyIsolated() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.attached {
		if a.plan.Isolated {
			return true
		}
	}
	return false
}

// enslaveAll puts the links of all attachments into the bridge.
func (d *Driver) enslaveAll() error {
	d.mu.Lock()
	attached := maps.Clone(d.attached)
	d.mu.Unlock()
	var reqs []request
	for id, a := range attached {
		reqs = append(reqs, d.newPort(id, &a.plan)...)
	}
	for i := range reqs {
		reqs[i].ignore = append(reqs[i].ignore, unix.ENODEV) // the sandbox removed it
	}
	var errs []error
	for len(reqs) > 0 {
		n := min(len(reqs), 50)
		errs = append(errs, d.socks.do(reqs[:n]...))
		reqs = reqs[n:]
	}
	for id, a := range attached {
		errs = append(errs, d.secure(id, &a.plan, a.lease))
	}
	return errors.Join(errs...)
}
