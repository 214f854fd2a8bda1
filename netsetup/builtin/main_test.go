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
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/testenv"
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

// newDriver returns a driver in a fresh directory. What it made is taken from
// the host at the end.
func newDriver(tb testing.TB, mod ...func(*Options)) *Driver {
	tb.Helper()
	o := Options{
		Root: tb.TempDir(), Bridge: "sbtest0", Subnet: testSubnet, Subnet6: testSubnet6, Mark: "0123456789abcdef",
		Log: slog.New(slog.NewTextHandler(tb.Output(), nil)),
	}
	for _, f := range mod {
		f(&o)
	}
	d, err := New(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { d.Close() })
	return d
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

// serve answers connections to addr in ns with the address they come from and name.
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
					c.WriteTo([]byte(name), from)
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
				io.WriteString(c, name)
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

func TestAttach(t *testing.T) {
	testenv.Root(t)
	setUp("lo")
	d := newDriver(t)
	ns, res, raw := attach(t, d, idA, &network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}})
	t.Logf("%+v", res)
	serve(t, ns, "tcp", ":80", "A")
	for _, addr := range []string{"10.99.0.2:80", "[fd99::2]:80", "127.0.0.1:8080", "[::1]:8080", "10.99.0.1:8080", "[fd99::1]:8080"} {
		s, err := fetch(nil, "tcp", addr, 2*time.Second)
		t.Log(addr, s, err)
	}
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	t.Logf("%s %v", out, err)
	if err := d.Detach(t.Context(), idA, raw, ns); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command("ip", "a").CombinedOutput()
	t.Logf("%s %v", out, err)
}
