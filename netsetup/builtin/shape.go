package builtin

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
)

// shape limits a sandbox's traffic on the host, where the sandbox cannot change
// it: what it gets by a token bucket on the host's end of the pair, and what it
// sends by one on an ifb device, which all that comes in by that end is sent through.
func (d *Driver) shape(id string, b network.Bandwidth) error {
	if b == (network.Bandwidth{}) {
		return nil
	}
	link, err := netlink.LinkByName(hostName(id))
	if err != nil {
		return err
	}
	if b.Ingress > 0 {
		if err := netlink.QdiscReplace(bucket(link, b.Ingress)); err != nil {
			return fmt.Errorf("limit what %s gets: %w", hostName(id), err)
		}
	}
	if b.Egress == 0 {
		return nil
	}
	if err := d.shapeEgress(id, link, b.Egress); err != nil {
		return fmt.Errorf("limit what %s sends: %w", hostName(id), err)
	}
	return nil
}

func (d *Driver) shapeEgress(id string, link netlink.Link, rate uint64) error {
	ifb, err := findLink(ifbName(id))
	if err != nil {
		return err
	}
	if ifb == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = ifbName(id), link.Attrs().MTU
		if err := netlink.LinkAdd(&netlink.Ifb{LinkAttrs: attrs}); err != nil {
			return err
		}
		if ifb, err = netlink.LinkByName(ifbName(id)); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetAlias(ifb, alias(d.opts.Mark, id)); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(ifb); err != nil {
		return err
	}
	if err := netlink.QdiscReplace(bucket(ifb, rate)); err != nil {
		return err
	}
	in := netlink.MakeHandle(0xffff, 0)
	err = netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: in, Parent: netlink.HANDLE_INGRESS}})
	if err != nil && !isErrno(err, unix.EEXIST) {
		return err
	}
	return netlink.FilterReplace(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: link.Attrs().Index, Parent: in, Priority: 1, Protocol: unix.ETH_P_ALL},
		RedirIndex:  ifb.Attrs().Index,
		ClassId:     netlink.MakeHandle(1, 1),
	})
}

// Limits that the kernel can keep, in bits per second: it counts the time for which
// a bucket lasts in 32 bits, too few for the smallest bucket at a lower rate.
const (
	minRate = 8e3
	maxRate = 1e15
)

// A bucket holds what goes out in bucketTime, and no less than the biggest
// packet; what would have to wait for longer than queueTime is dropped.
const (
	bucketTime = 20 // milliseconds
	queueTime  = 50 // milliseconds
	minBucket  = 64 << 10
)

// bucket returns a queue that lets bits bits per second through.
func bucket(link netlink.Link, bits uint64) *netlink.Tbf {
	rate := max(bits/8, 1) // bytes a second
	burst := max(rate*bucketTime/1000, minBucket)
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate,
		Limit:      clamp(rate*queueTime/1000 + burst),
		Buffer:     netlink.Xmittime(rate, clamp(burst)),
	}
}

func clamp(n uint64) uint32 { return uint32(min(n, 1<<31-1)) }
