package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
)

// insideVar is set in the process that the tests run in: a child of this one in
// a network namespace of its own, which is "the host" for them.
const insideVar = "BUILTIN_TEST_INSIDE"

func TestMain(m *testing.M) {
	if os.Getenv(insideVar) != "" {
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // tests that need a network are skipped, by testenv.Root
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), insideVar+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

var (
	testSubnet  = netip.MustParsePrefix("10.99.0.0/24")
	testSubnet6 = netip.MustParsePrefix("fd99::/64")
)

// newDriver returns a driver in a fresh directory. At the end the host has to
// be as it was; what the test attached is detached for it.
func newDriver(tb testing.TB, mod ...func(*Options)) *Driver {
	tb.Helper()
	o := Options{
		Root: tb.TempDir(), Bridge: "sbtest0", Subnet: testSubnet, Subnet6: testSubnet6, Mark: "0123456789abcdef",
		Log: slog.New(slog.NewTextHandler(tb.Output(), nil)),
	}
	for _, f := range mod {
		f(&o)
	}
	setUp("lo")
	before := snapshot(tb)
	d, err := New(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		for id, a := range d.attached {
			raw, err := json.Marshal(a.plan)
			if err == nil {
				err = d.Detach(context.Background(), id, raw, nil)
			}
			if err != nil {
				tb.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
		if diff := difference(before, snapshot(tb)); diff != "" {
			tb.Errorf("the host is not as it was %s", diff)
		}
		if left, err := os.ReadDir(filepath.Join(o.Root, leaseDir)); err != nil || len(left) > 0 {
			tb.Errorf("leases are left: %v, %v", left, err)
		}
	})
	return d
}

// difference lists what is in only one of two snapshots.
func difference(before, after []string) string {
	var s strings.Builder
	for _, l := range before {
		if !slices.Contains(after, l) {
			fmt.Fprintf(&s, "\nbefore: %s", l)
		}
	}
	for _, l := range after {
		if !slices.Contains(before, l) {
			fmt.Fprintf(&s, "\nafter: %s", l)
		}
	}
	return s.String()
}

// abandon ends a driver as SIGKILL would: it puts nothing back.
func abandon(d *Driver) {
	d.cancel()
	d.done.Wait()
	d.socks.end()
	d.nft.conns.end()
	d.root.Close()
}

// snapshot describes all of the host that a driver may change.
func snapshot(tb testing.TB) []string {
	tb.Helper()
	var lines []string
	links, err := netlink.LinkList()
	if err != nil {
		tb.Fatal(err)
	}
	for _, l := range links {
		lines = append(lines, "link "+l.Attrs().Name)
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			tb.Fatal(err)
		}
		for _, a := range addrs {
			lines = append(lines, "address "+a.String())
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		if err != nil {
			tb.Fatal(err)
		}
		for _, r := range routes {
			if prefixOf(r.Dst).Addr().IsMulticast() { // the kernel adds those when it has time
				continue
			}
			lines = append(lines, "route "+r.String())
		}
	}
	c, err := nftables.New()
	if err != nil {
		tb.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		tb.Fatal(err)
	}
	for _, t := range tables {
		lines = append(lines, fmt.Sprintf("table %d %s", t.Family, t.Name))
	}
	settings, err := filepath.Glob("/proc/sys/net/ipv[46]/conf/*/*")
	if err != nil {
		tb.Fatal(err)
	}
	for _, s := range append(settings, "/proc/sys/net/ipv4/ip_forward") {
		if b, err := os.ReadFile(s); err == nil {
			lines = append(lines, s+" "+strings.TrimSpace(string(b)))
		}
	}
	slices.Sort(lines)
	return lines
}

// newNS returns a network namespace with lo up, that lives as long as the test.
func newNS(tb testing.TB) *os.File {
	tb.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	inside(tb, f, func() error { return setUp("lo") })
	return f
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// inside runs fn in a namespace, or where the test is if that is nil.
func inside(tb testing.TB, ns *os.File, fn func() error) {
	tb.Helper()
	if err := insideErr(ns, fn); err != nil {
		tb.Fatal(err)
	}
}

func insideErr(ns *os.File, fn func() error) error {
	if ns == nil {
		return fn()
	}
	return nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, fn)
}

func netipPrefix(s string) netip.Prefix {
	p, _ := netip.ParsePrefix(s)
	return p
}

func plan1(tb testing.TB, d *Driver, id string, req *network.Request) json.RawMessage {
	tb.Helper()
	raw, err := d.Plan(context.Background(), id, req)
	if err != nil {
		tb.Fatal(err)
	}
	return raw
}

// attach gives a new namespace a network.
func attach(tb testing.TB, d *Driver, id string, req *network.Request) (*os.File, *network.Result, json.RawMessage) {
	tb.Helper()
	ns := newNS(tb)
	raw := plan1(tb, d, id, req)
	res, err := d.Attach(context.Background(), id, raw, ns)
	if err != nil {
		tb.Fatal(err)
	}
	return ns, res, raw
}

// serve answers whatever comes to addr in ns with name and the address that it comes from.
func serve(tb testing.TB, ns *os.File, network, addr, name string) {
	tb.Helper()
	inside(tb, ns, func() error {
		if network[:3] == "udp" {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			tb.Cleanup(func() { c.Close() })
			go func() {
				b := make([]byte, 100)
				for {
					_, from, err := c.ReadFrom(b)
					if err != nil {
						return
					}
					c.WriteTo([]byte(name+" "+from.(*net.UDPAddr).AddrPort().Addr().Unmap().String()), from)
				}
			}()
			return nil
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		tb.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, name+" "+c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String())
				c.Close()
			}
		}()
		return nil
	})
}

// fetch returns what answers at addr to somebody in ns.
func fetch(ns *os.File, network, addr string, timeout time.Duration) (string, error) {
	var c net.Conn
	dial := func() (err error) {
		c, err = (&net.Dialer{Deadline: time.Now().Add(timeout)}).Dial(network, addr)
		return err
	}
	var err error
	if ns == nil {
		err = dial()
	} else {
		err = nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, dial)
	}
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	if network[:3] == "udp" {
		c.Write([]byte("?"))
		b := make([]byte, 100)
		n, err := c.Read(b)
		return string(b[:n]), err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

const (
	idA = "aaaaaaaaaaaa0001"
	idB = "bbbbbbbbbbbb0002"
)
