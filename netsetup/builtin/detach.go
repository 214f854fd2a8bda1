package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crash"
)

// Removing a link takes the kernel an RCU grace period, 15 ms and more, with its
// lock held: for a hundred, one by one, almost two seconds. A link that goes
// with its namespace costs a hundredth of that, because the kernel takes
// namespaces that are dead apart together, and so does one that is removed with
// all others of its group (IFLA_GROUP): 100 of them take 55 to 75 ms. So Detach sets
// the link down, puts it into a group of our own, and answers; the sandbox's
// namespace usually goes next. Links whose namespace stays are removed behind
// the answer, by their group.

const (
	linkGrace = 200 * time.Millisecond // for a link to go with its namespace
	hostGrace = 2 * time.Second        // for the next sandbox to come, before bridge and table go
	closeWait = 2 * time.Second        // for links to go, in Close
)

// Detach takes back what Attach did, all or a part of it.
func (d *Driver) Detach(_ context.Context, id string, raw json.RawMessage, _ *os.File) error {
	if err := checkID(id); err != nil {
		return err
	}
	d.host.RLock()
	defer d.host.RUnlock()
	l, ok := d.leases.get(id)
	if !ok {
		d.unregister(id)
		return nil // a lease is the first that is made, and the last that goes
	}
	var errs []error
	p, err := decodePlan(raw)
	if err == nil {
		err = d.nft.remove(id, p, l)
	} else {
		err = errors.Join(err, d.nft.removeByID(map[string]bool{id: true}))
	}
	errs = append(errs, err)
	crash.Point("builtin detach nft after")
	errs = append(errs, d.cutOff(id))
	crash.Point("builtin detach link after")
	if err := once(errors.Join(errs...)); err != nil {
		return err
	}
	if err := d.leases.release(id, time.Now()); err != nil {
		return err
	}
	crash.Point("builtin detach lease after")
	d.unregister(id)
	d.wakeUp()
	return nil
}

// Forget lets the ports go. The lease is found by [Driver.GC], as one of nobody.
func (d *Driver) Forget(_ context.Context, id string, _ json.RawMessage) error {
	d.unregister(id)
	return nil
}

// cutOff sets a sandbox's links down and into the group of those that go.
func (d *Driver) cutOff(id string) error {
	down := func(name string) request {
		r := newRequest("set link "+name+" down", unix.RTM_NEWLINK, 0, unix.ENODEV)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Change = unix.IFF_UP
		r.AddData(msg)
		r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		r.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(goingGroup(d.opts.Mark))))
		return r
	}
	return d.socks.do(down(hostName(id)), down(ifbName(id)))
}

// background does what nobody waits for.
func (d *Driver) background(ctx context.Context, events <-chan event) {
	var idle time.Time               // since when nobody has had a lease
	pending := make(map[event]bool)  // events that are to be handled, perhaps again
	due := make(map[event]time.Time) // when each may be handled at the earliest
	for {
		next := d.settle(time.Now(), &idle, linkGrace, hostGrace)
		for e := range pending {
			if wait := max(time.Until(due[e]), time.Millisecond); next == 0 || wait < next {
				next = wait
			}
		}
		var timer <-chan time.Time
		if next > 0 {
			timer = time.After(next)
		}
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
		case e := <-events:
			pending[e] = true
			for len(events) > 0 {
				pending[<-events] = true
			}
		case <-timer:
		}
		delete(pending, linkGone) // that is for settle
		for e := range pending {
			if time.Now().Before(due[e]) {
				continue
			}
			due[e] = time.Now().Add(eventPause)
			if err := d.handle(e); err != nil {
				d.log.Warn("Host network is not repaired", "bridge", d.opts.Bridge, "err", err)
				due[e] = time.Now().Add(time.Second)
			} else {
				delete(pending, e)
			}
		}
	}
}

func (d *Driver) wakeUp() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// settle frees the leases of links that are gone, removes links that have been
// detached for longer than grace, and the bridge and all the rest if there has
// been no lease for longer than hostGrace. It returns when it wants to be called again; 0
// is when something happens.
func (d *Driver) settle(now time.Time, idle *time.Time, grace, hostGrace time.Duration) time.Duration {
	wait := d.settleLinks(now, grace)
	if !d.leases.empty() {
		*idle = time.Time{}
		return wait
	}
	if idle.IsZero() {
		*idle = now
	}
	if left := hostGrace - now.Sub(*idle); left > 0 {
		return left
	}
	if err := d.teardown(); err != nil {
		d.log.Warn("Host network is not put back", "bridge", d.opts.Bridge, "err", err)
		return time.Minute
	}
	return 0
}

func (d *Driver) settleLinks(now time.Time, grace time.Duration) (wait time.Duration) {
	released := d.leases.released()
	var due []string
	for id, since := range released {
		there, err := d.linksThere(id)
		switch age := now.Sub(since); {
		case err != nil:
			d.log.Warn("Link cannot be looked up", "sandbox", id, "err", err)
			wait = time.Second
		case !there:
			d.free(id)
		case age >= grace:
			due = append(due, id)
		case wait == 0 || grace-age < wait:
			wait = grace - age
		}
	}
	if len(due) == 0 {
		return wait
	}
	if err := d.removeLinks(due); err != nil {
		d.log.Warn("Links of detached sandboxes are not removed", "links", len(due), "err", err)
		return 5 * time.Second
	}
	for _, id := range due {
		if there, err := d.linksThere(id); err == nil && !there {
			d.free(id)
		} else {
			wait = time.Second
		}
	}
	return wait
}

func (d *Driver) linksThere(id string) (bool, error) {
	one, err1 := linkThere(hostName(id))
	two, err2 := linkThere(ifbName(id))
	return one || two, errors.Join(err1, err2)
}

func (d *Driver) free(id string) {
	if err := d.leases.free(id); err != nil {
		d.log.Warn("Lease is not freed", "sandbox", id, "err", err)
	}
}

// removeLinks removes the links of detached sandboxes.
func (d *Driver) removeLinks(ids []string) error {
	var errs []error
	for _, id := range ids { // a crash may have come before Detach got to it
		errs = append(errs, d.cutOff(id))
	}
	links, err := allLinks()
	if err != nil {
		return err
	}
	for _, l := range links {
		// A group is a number that anybody may use.
		if a := l.Attrs(); a.Group == goingGroup(d.opts.Mark) && !d.isOurs(a) {
			return errors.Join(append(errs, d.removeEach(ids))...)
		}
	}
	r := newRequest("delete links", unix.RTM_DELLINK, 0, unix.ENODEV)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(goingGroup(d.opts.Mark))))
	return errors.Join(append(errs, d.socks.do(r))...)
}

func allLinks() ([]netlink.Link, error) {
	for {
		links, err := netlink.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) { // they changed meanwhile
			return links, err
		}
	}
}

func (d *Driver) removeEach(ids []string) error {
	var errs []error
	for _, id := range ids {
		for _, name := range []string{hostName(id), ifbName(id)} {
			errs = append(errs, d.socks.do(deleteLink(name)))
		}
	}
	return errors.Join(errs...)
}

// deleteLink is a request that succeeds if there is no such link.
func deleteLink(name string) request {
	r := newRequest("delete link "+name, unix.RTM_DELLINK, 0, unix.ENODEV)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	return r
}

// isOurs reports whether a link is one of a sandbox of this installation. It may have
// no alias yet if a crash came early; then its name is on record.
func (d *Driver) isOurs(a *netlink.LinkAttrs) bool {
	if strings.HasPrefix(a.Alias, alias(d.opts.Mark, "")+" ") {
		return true
	}
	return a.Alias == "" && d.leases.hasLink(a.Name)
}

// teardown puts the host back, if nobody has a lease.
func (d *Driver) teardown() error {
	d.host.Lock()
	defer d.host.Unlock()
	if !d.leases.empty() {
		return nil
	}
	if !d.up {
		if nothing, err := d.nothingLeft(); err != nil || nothing {
			return err
		}
	}
	if err := d.unclaim(); err != nil {
		return fmt.Errorf("put sysctls back: %w", err)
	}
	crash.Point("builtin teardown sysctls after")
	d.up = false
	if err := d.nft.delete(); err != nil {
		return err
	}
	crash.Point("builtin teardown table after")
	link, err := findLink(d.opts.Bridge)
	if err != nil || link == nil || d.ours(link) != nil {
		return err
	}
	return d.socks.do(deleteLink(d.opts.Bridge))
}

// nothingLeft reports whether the host has nothing that this or an earlier
// daemon has made.
func (d *Driver) nothingLeft() (bool, error) {
	record, err := d.readHostRecord()
	if err != nil || len(record.Sysctls) > 0 {
		return false, err
	}
	link, err := findLink(d.opts.Bridge)
	if err != nil || link != nil && d.ours(link) == nil {
		return false, err
	}
	there := false
	err = d.nft.conns.use(func(c *nftables.Conn) error {
		for _, t := range []*nftables.Table{d.nft.inet, d.nft.br} {
			has, err := hasTable(c, t)
			if err != nil {
				return err
			}
			there = there || has
		}
		return nil
	})
	return !there, err
}

// Close stops watching the host. Networks stay; if there are none, the host is
// left as it was found.
func (d *Driver) Close() error {
	d.cancel()
	d.done.Wait()
	var idle time.Time
	for deadline := time.Now().Add(closeWait); ; time.Sleep(5 * time.Millisecond) {
		now := time.Now()
		d.settle(now, &idle, 0, 0)
		if len(d.leases.released()) == 0 || now.After(deadline) {
			break
		}
	}
	d.socks.end()
	d.nft.conns.end()
	return d.root.Close()
}
