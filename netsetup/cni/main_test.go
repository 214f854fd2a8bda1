package cni

import (
	"encoding/json"
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
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.OwnNetwork(m.Run)) }

var rigs atomic.Int64

// rig is a driver with directories of its own.
type rig struct {
	*Driver
	t    testing.TB
	dir  string // conf, bin, root, leases
	log  *buffer
	opts Options
}

func newRig(t testing.TB, bins ...string) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, dir: dir, log: &buffer{}}
	for _, d := range []string{"conf", "bin"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.opts = Options{
		Root: filepath.Join(dir, "root"), ConfDir: filepath.Join(dir, "conf"), BinDirs: append([]string{filepath.Join(dir, "bin")}, bins...),
		Mark: fmt.Sprintf("%08x%08x", os.Getpid(), rigs.Add(1)), Log: slog.New(slog.NewTextHandler(r.log, nil)),
	}
	r.open()
	t.Cleanup(func() { r.Close() })
	return r
}

func (r *rig) open() {
	r.t.Helper()
	d, err := Open(r.opts)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Driver = d
}

// config writes a file of the configuration directory. LEASES and DIR stand for directories.
func (r *rig) config(name, text string) {
	r.t.Helper()
	text = strings.NewReplacer("LEASES", filepath.Join(r.dir, "leases"), "DIR", r.dir).Replace(text)
	if err := os.WriteFile(filepath.Join(r.dir, "conf", name), []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// plugin makes a shell script a plugin. In it, $D is the rig's directory, and $CONF what came on stdin.
func (r *rig) plugin(name, script string) {
	r.t.Helper()
	script = "#!/bin/sh\nD=" + r.dir + "\nCONF=$(cat)\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(r.dir, "bin", name), []byte(script), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) read(name string) string {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, name))
	if err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
	return string(b)
}

// leases lists the addresses that host-local has given out below DIR/leases.
func (r *rig) leases() []string {
	r.t.Helper()
	files, _ := filepath.Glob(filepath.Join(r.dir, "leases", "*", "*"))
	var ips []string
	for _, f := range files {
		if ip, err := netip.ParseAddr(filepath.Base(f)); err == nil {
			ips = append(ips, ip.String())
		}
	}
	return ips
}

func (r *rig) cached() []string {
	files, _ := filepath.Glob(filepath.Join(r.dir, "root", "results", "*"))
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	return files
}

func (r *rig) plan(id string, req network.Request) json.RawMessage {
	r.t.Helper()
	p, err := r.Plan(r.t.Context(), id, &req)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

func (r *rig) attach(id string, plan json.RawMessage, ns *os.File) *network.Result {
	r.t.Helper()
	res, err := r.Attach(r.t.Context(), id, plan, ns)
	if err != nil {
		r.t.Fatal(err)
	}
	return res
}

func (r *rig) detach(id string, plan json.RawMessage, ns *os.File) {
	r.t.Helper()
	if err := r.Detach(r.t.Context(), id, plan, ns); err != nil {
		r.t.Fatal(err)
	}
}

// newNS makes a network namespace, with lo up as in a sandbox.
func newNS(t testing.TB) *os.File {
	t.Helper()
	testenv.Root(t)
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	stdin.Close()
	if werr := cmd.Wait(); err != nil || werr != nil {
		t.Fatal(err, werr)
	}
	t.Cleanup(func() { f.Close() })
	in(t, f, "ip", "link", "set", "lo", "up")
	return f
}

// in runs a command in a namespace, or in the test's if ns is nil.
func in(t testing.TB, ns *os.File, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	if ns != nil {
		cmd = exec.Command("nsenter", append([]string{"--net=/proc/self/fd/3", "--"}, args...)...)
		cmd.ExtraFiles = []*os.File{ns}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return string(out)
}

// within runs fn in a namespace; ns may be nil.
func within(t testing.TB, ns *os.File, fn func() error) {
	t.Helper()
	var err error
	if ns == nil {
		err = fn()
	} else {
		err = nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, fn)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// serve answers each connection to a TCP port of a namespace with a word.
func serve(t testing.TB, ns *os.File, port int, word string) {
	t.Helper()
	var l net.Listener
	within(t, ns, func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", fmt.Sprintf(":%d", port))
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, word)
			c.Close()
		}
	}()
}

// fetch reads what a TCP server sends, as seen from a namespace.
func fetch(t testing.TB, ns *os.File, addr string) (string, error) {
	t.Helper()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	var out string
	// net.Dial would use another thread.
	do := func() error {
		family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().Unmap().As4()})
		if to.Addr().Is6() {
			family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, opt := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} { // bounds connect too
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, opt, &unix.Timeval{Sec: 3})
		}
		if err := unix.Connect(fd, sa); err != nil {
			return err
		}
		buf := make([]byte, 64)
		n, err := unix.Read(fd, buf)
		out = string(buf[:max(n, 0)])
		return err
	}
	if ns == nil {
		return out, do()
	}
	err = nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, do)
	return out, err
}

func wantFetch(t testing.TB, ns *os.File, addr, want string) {
	t.Helper()
	// The other end may not have answered ARP or duplicate address detection yet.
	var got string
	var err error
	eventually(t, func() bool { got, err = fetch(t, ns, addr); return err == nil && got == want },
		func() string { return fmt.Sprintf("%s answers %q, %v; want %q", addr, got, err, want) })
}

func eventually(t testing.TB, ok func() bool, what func() string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what())
		}
	}
}

// buffer is a log that several goroutines write.
type buffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// links lists the network interfaces of a namespace, lo and what every namespace is born with apart.
func links(t testing.TB, ns *os.File) []string {
	t.Helper()
	var names []string
	within(t, ns, func() error {
		all, err := net.Interfaces()
		for _, i := range all {
			if !slices.Contains([]string{"lo", "sit0", "tunl0", "ip6tnl0", "ip6_vti0", "ip_vti0", "gre0", "gretap0", "erspan0", "ip6gre0", "teql0"}, i.Name) {
				names = append(names, i.Name)
			}
		}
		return err
	})
	return names
}

func mountTmpfs(t testing.TB, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}
