package builtin

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/hostport"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

var webPort = []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}

func TestDetach(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	a, _, raw := attach(t, d, idA, &network.Request{Ports: webPort, Isolated: true})
	serve(t, a, "tcp", ":80", "A")
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
	for range 2 {
		if err := d.Detach(t.Context(), idA, raw, a); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "")
	expect(t, "the host", nil, "tcp", "10.99.0.2:80", "")
	// The namespace stays, so the link is removed by us; who comes meanwhile gets
	// another address, and this one comes back.
	if _, res, _ := attach(t, d, idB, &network.Request{Ports: webPort}); res.Networks[0].Addresses[0].Addr().String() != "10.99.0.3" {
		t.Errorf("the next one gets %v", res.Networks[0].Addresses)
	}
	eventually(t, func() error {
		if there, err := linkThere(hostName(idA)); there || err != nil {
			return fmt.Errorf("link is there: %t, %v", there, err)
		}
		if n := len(d.leases.released()); n > 0 {
			return fmt.Errorf("%d leases are not free", n)
		}
		return nil
	})
	if err := d.Verify(t.Context(), idB, plan1(t, d, idB, &network.Request{}), nil); err != nil {
		t.Errorf("the other sandbox: %v", err)
	}
	ns := newNS(t)
	p := plan1(t, d, testID(9), &network.Request{Addresses: []netip.Addr{netip.MustParseAddr("10.99.0.2")}})
	if _, err := d.Attach(t.Context(), testID(9), p, ns); err != nil {
		t.Errorf("the address is not free again: %v", err)
	}
}

// TestDetachOfNothing: whatever is there or not, there is no error.
func TestDetachOfNothing(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	raw := plan1(t, d, idA, &network.Request{Ports: webPort})
	if err := d.Detach(t.Context(), idA, raw, nil); err != nil {
		t.Errorf("nothing was attached: %v", err)
	}
	for _, undo := range []func(ns *os.File){
		func(*os.File) {},
		func(*os.File) { del(t, hostName(idA)) },
		func(ns *os.File) { inside(t, ns, func() error { del(t, "eth0"); return nil }) },
		func(*os.File) { flush(t) },
		func(*os.File) { del(t, d.opts.Bridge) },
	} {
		ns, _, raw := attach(t, d, idA, &network.Request{Ports: webPort})
		undo(ns)
		if err := d.Detach(t.Context(), idA, raw, ns); err != nil {
			t.Errorf("Detach = %v", err)
		}
		ns.Close()
		eventually(t, func() error {
			if n := len(d.leases.released()); n > 0 {
				return fmt.Errorf("%d leases are not free", n)
			}
			return nil
		})
	}
	// A plan that cannot be read keeps nothing from being taken back, but is an error.
	ns, _, raw := attach(t, d, idA, &network.Request{Ports: webPort})
	if err := d.Detach(t.Context(), idA, json.RawMessage("{"), ns); err == nil {
		t.Error("a damaged plan is no error")
	}
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "")
	if err := d.Detach(t.Context(), idA, raw, ns); err != nil {
		t.Error(err)
	}
}

func del(t *testing.T, name string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		t.Error(err)
	}
}

// flush does what `nft flush ruleset` does.
func flush(t *testing.T) {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

// TestRepair: what somebody removes while the daemon runs is made again.
func TestRepair(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{Ports: webPort})
	b, _, _ := attach(t, d, idB, &network.Request{Isolated: true})
	serve(t, a, "tcp", ":80", "A")
	check := func() {
		t.Helper()
		eventually(t, func() error {
			if got, err := fetch(outside, "tcp", "192.0.2.1:8080", never); got != "A 192.0.2.2" {
				return fmt.Errorf("fetch = %q, %v", got, err)
			}
			if got, err := fetch(a, "tcp", "[fd99::1]:8080", never); got != "A fd99::1" {
				return fmt.Errorf("hairpin = %q, %v", got, err)
			}
			for id, a := range d.attached {
				raw, _ := json.Marshal(a.plan)
				if err := d.Verify(context.Background(), id, raw, nil); err != nil {
					return err
				}
			}
			return nil
		})
		expect(t, "B", b, "tcp", "10.99.0.2:80", "")
	}
	check()
	del(t, d.opts.Bridge)
	check()
	flush(t)
	check()
	bridge := func() netlink.Link {
		t.Helper()
		link, err := netlink.LinkByName(d.opts.Bridge)
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := netlink.AddrList(bridge(), family)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrDel(bridge(), &addrs[0]); err != nil {
			t.Fatal(err)
		}
		check()
	}
	if err := netlink.LinkSetDown(bridge()); err != nil { // takes the IPv6 address
		t.Fatal(err)
	}
	check()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.DelTable(d.nft.br)
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	check()
}

// TestBridgeDown: a bridge that somebody sets down is set up again, and the log says so. With an
// IPv6 subnet the address that the kernel takes away with it would tell as well.
func TestBridgeDown(t *testing.T) {
	testenv.Root(t)
	log := &logBuffer{}
	d := newDriver(t, func(o *Options) {
		o.Subnet6 = netip.Prefix{}
		o.Log = slog.New(slog.NewTextHandler(log, nil))
	})
	a, _, _ := attach(t, d, idA, &network.Request{})
	serve(t, a, "tcp", ":80", "A")
	bridge, err := netlink.LinkByName(d.opts.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetDown(bridge); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got, err := fetch(nil, "tcp", "10.99.0.2:80", never); got != "A 10.99.0.1" {
			return fmt.Errorf("fetch = %q, %v", got, err)
		}
		if !strings.Contains(log.String(), "bridge sbtest0 is down") {
			return fmt.Errorf("log:\n%s", log)
		}
		return nil
	})
}

// TestElements: elements of our sets that somebody else removes, one by one or a whole set of
// them, are put back while the daemon runs. Those that we remove are not.
func TestElements(t *testing.T) {
	testenv.Root(t)
	newOutside(t, 2) // for forward4 and forward6
	log := &logBuffer{}
	d := newDriver(t, func(o *Options) { o.Log = slog.New(slog.NewTextHandler(log, nil)) })
	attach(t, d, idA, &network.Request{Ports: append(webPort, network.Port{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8081, Port: 80, Protocol: network.TCP})})
	attach(t, d, idB, &network.Request{Isolated: true})
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	all := func() string {
		t.Helper()
		var s strings.Builder
		for _, set := range append(d.nft.inetSets(), d.nft.bridgeSets()...) {
			vals, err := c.GetSetElements(reference(set))
			if err != nil {
				t.Fatal(err)
			}
			var lines []string
			for _, v := range vals {
				lines = append(lines, fmt.Sprintf("%s %s: %x %x %s\n", set.Table.Name, set.Name, v.Key, v.Val, v.Comment))
			}
			slices.Sort(lines)
			s.WriteString(strings.Join(lines, ""))
		}
		return s.String()
	}
	remove := func(set *nftables.Set, vals ...element) {
		t.Helper()
		for i := range vals {
			vals[i].Comment = ""
		}
		if err := c.SetDeleteElements(reference(set), vals); err != nil {
			t.Fatal(err)
		}
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	before := all()
	back := func() {
		t.Helper()
		eventually(t, func() error {
			if now := all(); now != before {
				return fmt.Errorf("elements are\n%sand were\n%s", now, before)
			}
			return nil
		})
	}
	removed := 0
	for _, set := range append(d.nft.inetSets(), d.nft.bridgeSets()...) {
		vals, err := c.GetSetElements(reference(set))
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range vals {
			remove(set, v)
			removed++
			back()
		}
	}
	if removed < 15 {
		t.Errorf("only %d elements were removed of\n%s", removed, before)
	}
	// One that leads elsewhere stands in the place of ours.
	remove(d.nft.any4, element{Key: portKey(webPort[0])})
	c.SetAddElements(reference(d.nft.any4), []element{{Key: portKey(webPort[0]), Val: target(netip.MustParseAddr("10.99.0.9"), 80)}})
	c.Flush() // fails if it is there again already
	remove(d.nft.isolated, element{Key: ifname(hostName(idB))})
	back()

	// Somebody who does it for ever does not keep us busy.
	told := strings.Count(log.String(), "put back")
	const long = time.Second
	var usage [2]unix.Rusage
	removed = 0
	begin := time.Now()
	unix.Getrusage(unix.RUSAGE_SELF, &usage[0])
	theirs := []element{{Key: netip.MustParseAddr("203.0.113.1").AsSlice()}}
	for time.Since(begin) < long {
		// Ours, if it is there again, and one that is there always.
		c.SetDeleteElements(reference(d.nft.any4), []element{{Key: portKey(webPort[0])}})
		c.Flush()
		c.SetAddElements(reference(d.nft.isolated4), theirs)
		c.Flush()
		c.SetDeleteElements(reference(d.nft.isolated4), theirs)
		if c.Flush() == nil {
			removed++
		}
	}
	unix.Getrusage(unix.RUSAGE_SELF, &usage[1])
	n := strings.Count(log.String(), "put back") - told
	if most := int(time.Since(begin)/eventPause) + 2; removed < 3 || n > most {
		t.Errorf("%d elements were removed, and %d times put back, more than %d", removed, n, most)
	}
	t.Logf("%d removed, %d put back, CPU time %v", removed, n, time.Duration(usage[1].Utime.Nano()+usage[1].Stime.Nano()-usage[0].Utime.Nano()-usage[0].Stime.Nano()))
	back()
	time.Sleep(2 * eventPause) // for the last answer

	// What comes and goes by us is nobody else's doing.
	told = strings.Count(log.String(), "put back")
	for i := range 10 {
		ns, _, raw := attach(t, d, testID(i), &network.Request{Isolated: true, Ports: []network.Port{{HostPort: 9000, Port: 80, Protocol: network.TCP}}})
		if err := d.Detach(t.Context(), testID(i), raw, ns); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(2 * eventPause)
	if n := strings.Count(log.String(), "put back") - told; n > 0 {
		t.Errorf("our own removals were mended %d times", n)
	}
	back()
}

// logBuffer is a log that several goroutines write.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestAttachMeanwhile: what somebody removed a moment ago keeps nobody from
// getting a network.
func TestAttachMeanwhile(t *testing.T) {
	testenv.Root(t)
	for name, damage := range map[string]func(*Driver){
		"bridge": func(d *Driver) { del(t, d.opts.Bridge) },
		"rules":  func(*Driver) { flush(t) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDriver(t)
			attach(t, d, idB, &network.Request{})
			d.cancel() // nobody watches
			d.done.Wait()
			damage(d)
			a, _, raw := attach(t, d, idA, &network.Request{Ports: webPort})
			serve(t, a, "tcp", ":80", "A")
			expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
			if err := d.Verify(t.Context(), idA, raw, a); err != nil {
				t.Error(err)
			}
			if err := d.verifyHost(idB, &d.attached[idB].plan, d.attached[idB].lease); err != nil {
				t.Errorf("the other sandbox: %v", err)
			}
		})
	}
}

// TestRestart: a driver that is killed leaves networks that work, and the next
// one takes them over, with whatever was lost meanwhile.
func TestRestart(t *testing.T) {
	testenv.Root(t)
	newOutside(t, 2)
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, d *Driver)
	}{
		{"nothing", func(*testing.T, *Driver) {}},
		{"bridge", func(t *testing.T, d *Driver) { del(t, d.opts.Bridge) }},
		{"rules", func(t *testing.T, d *Driver) { flush(t) }},
		{"link", func(t *testing.T, d *Driver) { del(t, hostName(idA)) }},
		{"lease", func(t *testing.T, d *Driver) {
			if err := os.Remove(filepath.Join(d.opts.Root, leaseDir, idA)); err != nil {
				t.Fatal(err)
			}
		}},
		{"damaged lease", func(t *testing.T, d *Driver) {
			name := filepath.Join(d.opts.Root, leaseDir, idA)
			os.Remove(name)
			if err := os.WriteFile(name, []byte("garbage"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var opts Options
			d1 := newDriver(t, func(o *Options) { opts = *o })
			opts.Root = d1.opts.Root
			attach(t, d1, testID(1), &network.Request{}) // so that A's address is not the first
			a, _, raw := attach(t, d1, idA, &network.Request{Ports: webPort})
			serve(t, a, "tcp", ":80", "A")
			expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
			abandon(d1)
			tt.damage(t, d1)
			if tt.name == "nothing" {
				expect(t, "the host, without a daemon,", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
			}
			// The clean-up of newDriver ends the second driver instead of the first.
			d2, err := New(d1.opts)
			if err != nil {
				t.Fatal(err)
			}
			attached := d1.attached
			replace(d1, d2)
			for id, at := range attached {
				p, _ := json.Marshal(at.plan)
				ns := a
				if id != idA {
					ns = nil
				}
				if err := d1.Restore(t.Context(), id, p, ns); err != nil {
					t.Fatal(err)
				}
			}
			if err := d1.Verify(t.Context(), idA, raw, a); err != nil {
				t.Errorf("Verify = %v", err)
			}
			serve(t, a, "tcp", "10.99.0.3:82", "A") // the address is the same
			expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
			if damaged, err := d1.leases.damaged(); err != nil || len(damaged) > 0 {
				t.Errorf("damaged leases: %v, %v", damaged, err)
			}
		})
	}
}

// TestQueues: both ends have one queue. With more than are used the kernel waits for RCU grace
// periods when it makes them, and so does everybody else who makes one.
func TestQueues(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	ns, _, _ := attach(t, d, idA, &network.Request{})
	check := func(name string) error {
		link, err := netlink.LinkByName(name)
		if err == nil && (link.Attrs().NumTxQueues != 1 || link.Attrs().NumRxQueues != 1) {
			err = fmt.Errorf("%s has %d queues to send and %d to receive", name, link.Attrs().NumTxQueues, link.Attrs().NumRxQueues)
		}
		return err
	}
	inside(t, nil, func() error { return check(hostName(idA)) })
	inside(t, ns, func() error { return check("eth0") })
}

// TestPortHasNoAddress: the host's end of a pair is a port, and nothing of the host answers there.
func TestPortHasNoAddress(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	attach(t, d, idA, &network.Request{})
	inside(t, nil, func() error {
		link, err := netlink.LinkByName(hostName(idA))
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err == nil && len(addrs) > 0 {
			err = fmt.Errorf("%s has %v", hostName(idA), addrs)
		}
		return err
	})
}

func TestVerify(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	for _, tt := range []struct {
		name   string
		damage func(ns *os.File) error
		want   string
	}{
		{"nothing", func(*os.File) error { return nil }, ""},
		{"eth0 deleted", func(ns *os.File) error {
			return insideErr(ns, func() error { del(t, "eth0"); return nil })
		}, "eth0"},
		{"address", func(ns *os.File) error {
			return insideErr(ns, func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
				if err != nil {
					return err
				}
				return netlink.AddrDel(link, &addrs[0])
			})
		}, "lost address"},
		{"down", func(ns *os.File) error {
			return insideErr(ns, func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return netlink.LinkSetDown(link)
			})
		}, "is down"},
		{"not in the bridge", func(*os.File) error {
			link, err := netlink.LinkByName(hostName(idA))
			if err != nil {
				return err
			}
			return netlink.LinkSetNoMaster(link)
		}, "not in bridge"},
		{"not in its group", func(*os.File) error {
			link, err := netlink.LinkByName(hostName(idA))
			if err != nil {
				return err
			}
			return netlink.LinkSetGroup(link, 0)
		}, "not in group"},
		{"learning", func(*os.File) error {
			link, err := netlink.LinkByName(hostName(idA))
			if err != nil {
				return err
			}
			return netlink.LinkSetLearning(link, true)
		}, "learns"},
		{"entry of the bridge", func(*os.File) error {
			link, err := netlink.LinkByName(hostName(idA))
			if err != nil {
				return err
			}
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: d.attached[idA].plan.mac(d.attached[idA].lease)})
		}, "lost the entry"},
		{"elements", func(*os.File) error { // by the driver itself, lest it put them back
			return d.nft.conns.use(func(c *nftables.Conn) error { c.FlushSet(d.nft.any4); return nil })
		}, "any4"},
	} {
		ns, _, raw := attach(t, d, idA, &network.Request{Ports: webPort, Isolated: true})
		if err := tt.damage(ns); err != nil {
			t.Fatal(err)
		}
		err := d.Verify(t.Context(), idA, raw, ns)
		if ok := tt.want == ""; ok != (err == nil) || !ok && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Verify = %v, want %q", tt.name, err, tt.want)
		}
		if err := d.Restore(t.Context(), idA, raw, ns); err != nil {
			t.Errorf("%s: Restore = %v", tt.name, err)
		}
		if err := d.Verify(t.Context(), idA, raw, ns); err != nil {
			t.Errorf("%s: Verify after Restore = %v", tt.name, err)
		}
		if err := d.Detach(t.Context(), idA, raw, ns); err != nil {
			t.Errorf("%s: Detach = %v", tt.name, err)
		}
		ns.Close()
		eventually(t, func() error {
			if n := len(d.leases.released()); n > 0 {
				return fmt.Errorf("%d leases are not free", n)
			}
			return nil
		})
	}
}

// TestVerifyGateway: a bridge that is no gateway any more is not in order.
func TestVerifyGateway(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	ns, _, raw := attach(t, d, idA, &network.Request{})
	d.cancel() // nobody repairs
	d.done.Wait()
	bridge, err := netlink.LinkByName(d.opts.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetDown(bridge); err != nil {
		t.Fatal(err)
	}
	if err := d.Verify(t.Context(), idA, raw, ns); err == nil || !strings.Contains(err.Error(), "bridge sbtest0 is down") {
		t.Errorf("Verify = %v", err)
	}
	// Several findings are told apart in one line.
	inside(t, ns, func() error {
		eth0, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(eth0)
	})
	if err := d.Verify(t.Context(), idA, raw, ns); err == nil || err.Error() != "bridge sbtest0 is down; interface eth0 in the sandbox is down" {
		t.Errorf("Verify = %v", err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil { // without the IPv6 address
		t.Fatal(err)
	}
	if err := d.Verify(t.Context(), idA, raw, ns); err == nil || !strings.Contains(err.Error(), "bridge sbtest0 has lost address fd99::1") {
		t.Errorf("Verify = %v", err)
	}
}

// TestGC plants garbage, and things that only look like it.
func TestGC(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	attach(t, d, idA, &network.Request{Ports: webPort})
	gone := testID(7)
	attach(t, d, gone, &network.Request{Ports: []network.Port{{HostPort: 8081, Port: 80, Protocol: network.TCP}}})
	damaged := filepath.Join(d.opts.Root, leaseDir, "0123456789abcdef")
	if err := os.WriteFile(damaged, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Look-alikes: a name, a name and another mark's alias, a table.
	foreign := func(name, alias string) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		link := &netlink.Bridge{LinkAttrs: attrs}
		if err := netlink.LinkAdd(link); err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetAlias(link, alias); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { del(t, name) })
	}
	foreign("sb00000000aaaa", "mine")
	foreign("sb00000000bbbb", "sandboxd ffffffffffffffff 00000000bbbb0000")
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	other := c.AddTable(&nftables.Table{Name: "sandboxd_ffffffffffffffff", Family: nftables.TableFamilyINet})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	defer func() { c.DelTable(other); c.Flush() }()

	live := func() map[string]json.RawMessage { return map[string]json.RawMessage{idA: nil} }
	var want []garbage.Finding
	for _, dry := range []bool{true, false} {
		got, err := d.GC(t.Context(), live, dry)
		if err != nil {
			t.Fatal(err)
		}
		action := map[bool]string{true: "would remove", false: "removed"}[dry]
		want = []garbage.Finding{
			{Kind: garbage.Link, Name: hostName(gone), Reason: "its sandbox has no network on record", Action: action},
			{Kind: garbage.Nft, Name: "sandboxd_0123456789abcdef " + gone, Reason: "its sandbox has no network on record", Action: action},
			{Kind: garbage.Lease, Name: "10.99.0.3,fd99::3", Reason: "its sandbox has no network on record", Action: action},
			{Kind: garbage.Lease, Name: damaged, Reason: "it cannot be read", Action: action},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("GC(dry run %t) (-want +got):\n%s", dry, diff)
		}
	}
	if got, err := d.GC(t.Context(), live, false); err != nil || len(got) > 0 {
		t.Errorf("once more: %v, %v", got, err)
	}
	if err := d.Verify(t.Context(), idA, plan1(t, d, idA, &network.Request{Ports: nil}), nil); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"sb00000000aaaa", "sb00000000bbbb"} {
		if there, err := linkThere(name); !there {
			t.Errorf("%s was taken: %v", name, err)
		}
	}
	if there, err := hasTable(c, other); !there || err != nil {
		t.Errorf("another installation's table was taken: %v", err)
	}
}

func TestHostInTheWay(t *testing.T) {
	testenv.Root(t)
	bridge := func(alias string) func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "sbtest0"
		link := &netlink.Bridge{LinkAttrs: attrs}
		if err := netlink.LinkAdd(link); err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetAlias(link, alias); err != nil {
			t.Fatal(err)
		}
		return func() { del(t, "sbtest0") }
	}
	for _, tt := range []struct {
		name  string
		plant func() func()
		want  string
	}{
		{"no bridge", func() func() {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "sbtest0"
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "sbtest0p"}); err != nil {
				t.Fatal(err)
			}
			return func() { del(t, "sbtest0") }
		}, "no bridge but a veth"},
		{"somebody's bridge", func() func() { return bridge("") }, "somebody else's"},
		{"a bridge with a name", func() func() { return bridge("corp") }, `"corp"`},
		{"another installation's", func() func() { return bridge("sandboxd ffff") }, `"sandboxd ffff"`},
		{"overlap", func() func() {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "vpn0"
			link := &netlink.Bridge{LinkAttrs: attrs}
			if err := netlink.LinkAdd(link); err != nil {
				t.Fatal(err)
			}
			netlink.LinkSetUp(link)
			_, dst, _ := net.ParseCIDR("10.0.0.0/8")
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst}); err != nil {
				t.Fatal(err)
			}
			return func() { del(t, "vpn0") }
		}, "10.0.0.0/8 through vpn0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Cleanup(tt.plant())
			d := newDriver(t)
			for _, err := range []error{d.Status(t.Context()), d.prepare()} {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
			}
		})
	}
	d := newDriver(t)
	if err := d.Status(t.Context()); err != nil {
		t.Errorf("nothing in the way: %v", err)
	}
}

// TestHostRecordDamaged: without the record of what was changed nothing is
// changed, and who removes it is helped.
func TestHostRecordDamaged(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	file := filepath.Join(d.root.Name(), hostFile)
	if err := os.WriteFile(file, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.prepare(); err == nil || !strings.Contains(err.Error(), "remove "+file) {
		t.Errorf("prepared with a damaged record: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	attach(t, d, idA, &network.Request{})
}

// TestSideBySide: two installations share the host's devices; who leaves last
// puts them back.
func TestSideBySide(t *testing.T) {
	testenv.Root(t)
	outside := newOutside(t, 2)
	d1 := newDriver(t)
	d2 := beside(t)
	a, _, rawA := attach(t, d1, idA, &network.Request{Ports: webPort})
	b, _, _ := attach(t, d2, idB, &network.Request{Ports: []network.Port{{HostPort: 8081, Port: 80, Protocol: network.TCP}}})
	serve(t, a, "tcp", ":80", "A")
	serve(t, b, "tcp", ":80", "B")
	serve(t, outside, "tcp", ":90", "outside")
	expect(t, "outside", outside, "tcp", "192.0.2.1:8080", "A 192.0.2.2")
	expect(t, "outside", outside, "tcp", "[2001:db8:2::1]:8081", "B 2001:db8:2::2")
	expect(t, "A", a, "tcp", "192.0.2.1:8081", "B 10.98.0.1")
	expect(t, "B", b, "tcp", "[2001:db8:2::1]:8080", "A fd99::1")
	expect(t, "A", a, "tcp", "10.98.0.2:80", "")
	if err := d1.Detach(t.Context(), idA, rawA, a); err != nil {
		t.Fatal(err)
	}
	a.Close()
	eventually(t, func() error { return settled(d1) })
	if v, err := readSysctl("net/ipv4/conf/up2/forwarding"); v != "1" {
		t.Errorf("one left, and forwarding is %q, %v", v, err)
	}
	expect(t, "outside", outside, "tcp", "192.0.2.1:8081", "B 192.0.2.2")
	expect(t, "B", b, "tcp", "[2001:db8:2::2]:90", "outside 2001:db8:2::1")
}

// beside returns a second installation's driver.
func beside(t *testing.T) *Driver {
	return newDriver(t, func(o *Options) {
		o.Bridge, o.Mark = "sbtest1", "fedcba9876543210"
		o.Subnet, o.Subnet6 = netip.MustParsePrefix("10.98.0.0/24"), netip.MustParsePrefix("fd98::/64")
	})
}

// TestPortElsewhere: a port that another installation publishes is refused, with
// who has it, when a sandbox is planned and when it is attached.
func TestPortElsewhere(t *testing.T) {
	testenv.Root(t)
	withBridgeNetfilterOff(t) // for ::1
	d1, d2 := newDriver(t), beside(t)
	port := func(addr string, n uint16, proto network.Protocol) network.Port {
		p := network.Port{HostPort: n, Port: 80, Protocol: proto}
		if addr != "" {
			p.HostIP = netip.MustParseAddr(addr)
		}
		return p
	}
	a, _, rawA := attach(t, d1, idA, &network.Request{Ports: []network.Port{
		port("", 8080, network.TCP), port("127.0.0.1", 8081, network.TCP), port("::1", 8082, network.UDP), port("0.0.0.0", 8083, network.SCTP),
	}})
	serve(t, a, "tcp", ":80", "A")
	for _, tt := range []struct {
		port  network.Port
		taken bool
	}{
		{port("", 8080, network.TCP), true},
		{port("127.0.0.1", 8080, network.TCP), true},
		{port("::1", 8080, network.TCP), true},
		{port("", 8080, network.UDP), false},
		{port("", 8081, network.TCP), true},
		{port("127.0.0.1", 8081, network.TCP), true},
		{port("127.0.0.2", 8081, network.TCP), false},
		{port("::1", 8081, network.TCP), false},
		{port("::1", 8082, network.UDP), true},
		{port("::", 8082, network.UDP), true},
		{port("0.0.0.0", 8082, network.UDP), false},
		{port("127.0.0.1", 8083, network.SCTP), true},
	} {
		_, err := d2.Plan(t.Context(), idB, &network.Request{Ports: []network.Port{tt.port}})
		if got := err != nil; got != tt.taken {
			t.Errorf("Plan(%s) = %v, taken %t", hostport.Name(tt.port), err, tt.taken)
		} else if got {
			for _, want := range []string{hostport.Name(tt.port), "sandbox " + idA, tableName(d1.opts.Mark)} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("Plan(%s) = %v, want %q in it", hostport.Name(tt.port), err, want)
				}
			}
		}
	}

	// Planned before the other one had it.
	late := []byte(`{"ports":[{"hostPort":8080,"port":80,"protocol":"tcp"}]}`)
	if _, err := d2.Attach(t.Context(), idB, late, newNS(t)); err == nil || !strings.Contains(err.Error(), idA) {
		t.Errorf("Attach with another installation's port = %v", err)
	}
	if err := d2.Verify(t.Context(), idB, late, nil); err == nil || !strings.Contains(err.Error(), idA) {
		t.Errorf("Verify with another installation's port = %v", err)
	}
	if err := d2.Detach(t.Context(), idB, late, nil); err != nil {
		t.Fatal(err)
	}
	if e, err := d2.nft.owned(); err != nil || len(e) > 0 {
		t.Errorf("elements of the one that was refused: %v, %v", e, err)
	}
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")

	if err := d1.Detach(t.Context(), idA, rawA, a); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return settled(d1) })
	b := newNS(t)
	if _, err := d2.Attach(t.Context(), testID(3), late, b); err != nil {
		t.Fatalf("Attach once the port is free: %v", err)
	}
	serve(t, b, "tcp", ":80", "B")
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "B 10.98.0.1")
}

// TestPortElsewhereAtOnce: of two installations that publish a port at the same
// moment at least one is refused.
func TestPortElsewhereAtOnce(t *testing.T) {
	testenv.Root(t)
	ds := []*Driver{newDriver(t), beside(t)}
	plan := []byte(`{"ports":[{"hostPort":8080,"port":80,"protocol":"tcp"}]}`)
	for round := range 20 {
		ids := [2]string{testID(2 * round), testID(2*round + 1)}
		spaces := [2]*os.File{newNS(t), newNS(t)}
		var errs [2]error
		var wg sync.WaitGroup
		for i, d := range ds {
			wg.Go(func() { _, errs[i] = d.Attach(t.Context(), ids[i], plan, spaces[i]) })
		}
		wg.Wait()
		if errs[0] == nil && errs[1] == nil {
			t.Errorf("round %d: both publish the port", round)
		}
		for i, d := range ds {
			if errs[i] != nil && !strings.Contains(errs[i].Error(), tableName(ds[1-i].opts.Mark)) {
				t.Errorf("round %d: %v", round, errs[i])
			}
			if err := d.Detach(t.Context(), ids[i], plan, spaces[i]); err != nil {
				t.Fatal(err)
			}
			spaces[i].Close()
		}
	}
	eventually(t, func() error { return settled(ds[0]) })
}

// TestListsAreWhole: what an installation publishes all the time is found, by itself and
// by another one, also while it publishes other ports, and stops to.
func TestListsAreWhole(t *testing.T) {
	testenv.Root(t)
	d1, d2 := newDriver(t), beside(t)
	attach(t, d2, idB, &network.Request{}) // its table
	const n = 1500
	published := func(first, n int) (vals []element) {
		for i := range n {
			vals = append(vals, element{Key: portKey(network.Port{HostPort: uint16(first + i), Protocol: network.TCP}), Val: target(netip.MustParseAddr("10.98.0.1"), 80), Comment: idB})
		}
		return vals
	}
	change := func(fn func(c *nftables.Conn) error) {
		if err := d2.nft.conns.use(fn); err != nil {
			t.Error(err)
		}
	}
	stays, goes := published(10000, n), published(20000, 40)
	change(func(c *nftables.Conn) error { return addTo(c, d2.nft.any4, stays) })
	var wg sync.WaitGroup
	end := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
			}
			change(func(c *nftables.Conn) error { return addTo(c, d2.nft.any4, goes) })
			for _, e := range goes {
				change(func(c *nftables.Conn) error { return c.SetDeleteElements(d2.nft.any4, []element{e}) })
			}
			time.Sleep(20 * time.Millisecond) // a port is not published without end
		}
	})
	for range 50 {
		found, err := d1.nft.elsewhere()
		if err != nil {
			t.Fatal(err)
		}
		own, err := d2.nft.owned()
		if err != nil {
			t.Fatal(err)
		}
		theirs, ours := map[uint16]bool{}, map[uint16]bool{}
		for _, p := range found {
			theirs[p.Port.HostPort] = true
		}
		for _, e := range own[d2.nft.any4] {
			p, _ := publishedBy("any4", e.Key)
			ours[p.HostPort] = true
		}
		for p := uint16(10000); p < 10000+n; p++ {
			if !theirs[p] || !ours[p] {
				t.Errorf("port %d is found from elsewhere: %v, by whom it is of: %v", p, theirs[p], ours[p])
			}
		}
	}
	close(end)
	wg.Wait()
}

// settled takes d's host part down if it is not needed.
func settled(d *Driver) error {
	var idle time.Time
	d.settle(time.Now(), &idle, 0, 0)
	if !d.leases.empty() {
		return fmt.Errorf("leases: %v", d.leases.ids())
	}
	return nil
}

// TestLeftovers: a driver that finds nobody attached puts back what one that
// was killed left, wherever that was in the middle of.
func TestLeftovers(t *testing.T) {
	testenv.Root(t)
	newOutside(t, 2)
	for steps := range 4 {
		t.Run(fmt.Sprint(steps), func(t *testing.T) {
			d := newDriver(t)
			ns, _, raw := attach(t, d, idA, &network.Request{Ports: webPort})
			if err := d.Detach(t.Context(), idA, raw, ns); err != nil {
				t.Fatal(err)
			}
			d.cancel()
			d.done.Wait()
			if steps > 0 {
				if err := d.unclaim(); err != nil {
					t.Fatal(err)
				}
			}
			if steps > 1 {
				if err := d.nft.delete(); err != nil {
					t.Fatal(err)
				}
			}
			if steps > 2 {
				del(t, d.opts.Bridge)
			}
			d.socks.end()
			d.nft.conns.end()
			d.root.Close()
			next, err := New(d.opts)
			if err != nil {
				t.Fatal(err)
			}
			replace(d, next) // newDriver's clean-up closes it and compares
		})
	}
}

// replace makes d what next is, for the clean-up that knows d.
func replace(d, next *Driver) {
	d.opts, d.root, d.leases, d.nft, d.attached, d.ports = next.opts, next.root, next.leases, next.nft, next.attached, next.ports
	d.wake, d.up, d.mtu, d.bridge = next.wake, false, 0, 0
	next.cancel()
	next.done.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	events := d.watch(ctx)
	d.done.Go(func() { d.background(ctx, events) })
}

func TestManyAtOnce(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	const n = 200
	spaces := make([]*os.File, n)
	for i := range spaces {
		spaces[i] = newNS(t)
	}
	var mu sync.Mutex
	seen := make(map[netip.Addr]string)
	var wg sync.WaitGroup
	for i, ns := range spaces {
		wg.Go(func() {
			id := testID(i)
			raw, err := d.Plan(context.Background(), id, &network.Request{Ports: []network.Port{{HostPort: uint16(9000 + i), Port: 80, Protocol: network.TCP}}})
			if err != nil {
				t.Error(err)
				return
			}
			res, err := d.Attach(context.Background(), id, raw, ns)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, a := range res.Networks[0].Addresses {
				if other, ok := seen[a.Addr()]; ok {
					t.Errorf("%s and %s both have %s", id, other, a)
				}
				seen[a.Addr()] = id
			}
		})
	}
	wg.Wait()
	serve(t, spaces[150], "tcp", ":80", "150")
	expect(t, "the host", nil, "tcp", "127.0.0.1:9150", "150 10.99.0.1")
}

func TestBandwidth(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	a, _, _ := attach(t, d, idA, &network.Request{Ports: webPort, Bandwidth: network.Bandwidth{Ingress: 80e6, Egress: 40e6}})
	serve(t, a, "tcp", ":80", "A")
	expect(t, "the host", nil, "tcp", "127.0.0.1:8080", "A 10.99.0.1")
	for name, want := range map[string]uint64{hostName(idA): 10e6, ifbName(idA): 5e6} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		qdiscs, err := netlink.QdiscList(link)
		if err != nil {
			t.Fatal(err)
		}
		if tbf, ok := qdiscs[0].(*netlink.Tbf); !ok || tbf.Rate != want {
			t.Errorf("%s has %v, want a token bucket of %d bytes a second", name, qdiscs, want)
		}
	}
	// What it sends really goes there.
	link, err := netlink.LinkByName(ifbName(idA))
	if err != nil {
		t.Fatal(err)
	}
	if link.Attrs().Statistics.TxPackets == 0 {
		t.Error("nothing went through the limit of what it sends")
	}
}

// TestBandwidthLimits: the kernel takes the lowest and the highest rate, and
// something comes through.
func TestBandwidthLimits(t *testing.T) {
	testenv.Root(t)
	d := newDriver(t)
	for i, rate := range []uint64{minRate, maxRate} {
		ns, res, _ := attach(t, d, testID(i), &network.Request{Isolated: true, Bandwidth: network.Bandwidth{Ingress: rate, Egress: rate}})
		serve(t, ns, "tcp", ":80", "it")
		expect(t, "the host", nil, "tcp", res.Networks[0].Addresses[0].Addr().String()+":80", "it 10.99.0.1")
	}
}

var update = flag.Bool("update", false, "write testdata anew")

// TestRuleset compares the rules as nft shows them.
func TestRuleset(t *testing.T) {
	testenv.Root(t)
	nft := testenv.Program(t, "nft")
	d := newDriver(t)
	withBridgeNetfilterOff(t)
	attach(t, d, idA, &network.Request{Isolated: true, Ports: append([]network.Port{
		{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 53, Port: 5353, Protocol: network.UDP},
		{HostIP: netip.MustParseAddr("::1"), HostPort: 54, Port: 5454, Protocol: network.SCTP},
	}, webPort...)})
	var got strings.Builder
	for _, family := range []string{"inet", "bridge"} {
		out, err := exec.Command(nft, "list", "table", family, d.nft.inet.Name).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		got.Write(out)
	}
	golden := filepath.Join("testdata", "ruleset.nft")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
}

func withBridgeNetfilterOff(t *testing.T) {
	t.Helper()
	for _, s := range []string{"tables", "6tables"} {
		os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-ip"+s, []byte("0"), 0)
	}
}
