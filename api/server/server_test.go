package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/api/server"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/sandbox"
)

// fake answers with what it is made of and keeps what it was asked.
type fake struct {
	server.Manager // panics where a test calls what it does not expect

	err    error
	info   sandbox.Info
	member sandbox.MemberInfo
	exit   sandbox.Exit

	tombstones []sandbox.Info

	following chan struct{} // closed when events are followed

	asked []any
}

func (f *fake) ask(args ...any) { f.asked = args }

func (f *fake) Create(_ context.Context, c sandbox.Config) (sandbox.Info, error) {
	f.ask("create", c)
	return f.info, f.err
}
func (f *fake) Stop(_ context.Context, ref string, d time.Duration) error {
	f.ask("stop", ref, d)
	return f.err
}
func (f *fake) Remove(_ context.Context, ref string, force bool) error {
	f.ask("remove", ref, force)
	return f.err
}
func (f *fake) Tombstones() []sandbox.Info { return f.tombstones }
func (f *fake) List() []sandbox.Info       { return []sandbox.Info{f.info, f.info} }
func (f *fake) Inspect(ref string) (sandbox.Info, error) {
	f.ask("inspect", ref)
	return f.info, f.err
}
func (f *fake) Add(_ context.Context, ref string, c sandbox.MemberConfig) (sandbox.MemberInfo, error) {
	f.ask("add", ref, c)
	return f.member, f.err
}

func (f *fake) Run(_ context.Context, ref string, c sandbox.MemberConfig) (sandbox.MemberInfo, error) {
	f.ask("run", ref, c)
	return f.member, f.err
}
func (f *fake) Start(_ context.Context, ref string) (sandbox.MemberInfo, error) {
	f.ask("start", ref)
	return f.member, f.err
}
func (f *fake) StopMember(_ context.Context, ref string, d time.Duration) error {
	f.ask("stopmember", ref, d)
	return f.err
}
func (f *fake) Kill(_ context.Context, ref string, sig unix.Signal) error {
	f.ask("kill", ref, sig)
	return f.err
}
func (f *fake) RemoveMember(_ context.Context, ref string, force bool) error {
	f.ask("removemember", ref, force)
	return f.err
}
func (f *fake) ReopenLog(_ context.Context, ref string) error {
	f.ask("reopen", ref)
	return f.err
}
func (f *fake) InspectMember(ref string) (sandbox.MemberInfo, error) {
	f.ask("inspectmember", ref)
	return f.member, f.err
}

func (f *fake) Events(ctx context.Context, q sandbox.EventQuery) iter.Seq2[sandbox.Event, error] {
	f.ask("events", *q.After, q.Follow)
	return func(yield func(sandbox.Event, error) bool) {
		for n := uint64(1); n <= 3; n++ {
			if !yield(sandbox.Event{Seq: n, Time: time.Unix(int64(n), 0).UTC(), Type: "state"}, nil) {
				return
			}
		}
		if q.Follow {
			close(f.following)
			<-ctx.Done()
			yield(sandbox.Event{}, ctx.Err())
		} else if f.err != nil {
			yield(sandbox.Event{}, f.err)
		}
	}
}

func (f *fake) ForgetNetwork(_ context.Context, id string) error {
	f.ask("forgetnetwork", id)
	return f.err
}
func (f *fake) GC(_ context.Context, dryRun bool) ([]garbage.Finding, error) {
	f.ask("gc", dryRun)
	return []garbage.Finding{{Kind: garbage.Link, Name: "x"}}, f.err
}

func (f *fake) Exec(_ context.Context, ref string, r sandbox.ExecRequest) (sandbox.ExecResult, error) {
	f.ask("exec", ref, r)
	return sandbox.ExecResult{Code: 4, Stdout: []byte("o"), Stderr: []byte("e"), Truncated: true}, f.err
}

// Wait waits as a manager does while the member "running" runs.
func (f *fake) Wait(ctx context.Context, ref string) (sandbox.Exit, error) {
	f.ask("wait", ref)
	if ref == "a/running" {
		<-ctx.Done()
		return sandbox.Exit{}, ctx.Err()
	}
	return f.exit, f.err
}

// start serves m on a socket and returns a client and what ends the server.
func start(t *testing.T, m *fake) (c *api.Client, shutdown func()) {
	t.Helper()
	path, shutdown := serve(t, m)
	return dial(t, path), shutdown
}

func dial(t *testing.T, path string) *api.Client {
	t.Helper()
	c, err := api.Dial("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// serve serves m on the socket whose path it returns.
func serve(t *testing.T, m *fake) (path string, shutdown func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s.sock")
	l, err := server.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	s := server.New(m, m, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	shutdown = func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		s.Shutdown(ctx)
		if ctx.Err() != nil {
			t.Error("Shutdown waited for its deadline")
		}
	}
	t.Cleanup(func() {
		shutdown()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("socket after shutdown: %v, want it gone", err)
		}
	})
	return path, shutdown
}

// A call is one request and one answer. What gRPC sends beside it to measure the
// connection (PING, and WINDOW_UPDATE with it) wakes both sides twice more, and
// tells nothing of a unix socket.
func TestNothingBesideTheCall(t *testing.T) {
	real, _ := serve(t, &fake{info: sandbox.Info{ID: "1"}})
	between := filepath.Join(t.TempDir(), "between.sock")
	l, err := net.Listen("unix", between)
	if err != nil {
		t.Fatal(err)
	}
	var sent, answered bytes.Buffer
	copied := make(chan error, 1)
	go func() { copied <- relay(l, real, &sent, &answered) }()
	c := dial(t, between)
	for range 3 {
		if _, err := c.Inspect(t.Context(), "1"); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	l.Close()
	if err := <-copied; err != nil {
		t.Fatal(err)
	}
	sent.Next(len(http2.ClientPreface))
	for name, b := range map[string]*bytes.Buffer{"client": &sent, "server": &answered} {
		var got []string
		fr := http2.NewFramer(nil, b)
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				break
			}
			if h := f.Header(); h.StreamID != 0 || h.Type != http2.FrameSettings && h.Type != http2.FrameGoAway {
				got = append(got, h.Type.String())
			}
		}
		want := slices.Repeat([]string{"HEADERS", "DATA"}, 3)
		if name == "client" {
			want = slices.Insert(want, 0, "WINDOW_UPDATE") // once, that of the connection
		} else {
			want = append([]string{"WINDOW_UPDATE"}, slices.Repeat([]string{"HEADERS", "DATA", "HEADERS"}, 3)...)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("frames of the %s (-want +got):\n%s", name, d)
		}
	}
}

// relay passes one connection on to the socket at path, and keeps what goes
// there and what comes back.
func relay(l net.Listener, path string, there, back io.Writer) error {
	in, err := l.Accept()
	if err != nil {
		return err
	}
	out, err := net.Dial("unix", path)
	if err != nil {
		in.Close()
		return err
	}
	defer out.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(io.MultiWriter(in, back), out)
		in.Close()
	}()
	io.Copy(io.MultiWriter(out, there), in)
	out.(*net.UnixConn).CloseWrite()
	<-done
	return nil
}

// TestRemoveTells: who removes a sandbox learns that its network is still there, and not of
// one that had the name before.
func TestRemoveTells(t *testing.T) {
	tomb := func(name string, since time.Time) sandbox.Info {
		return sandbox.Info{ID: "0123456789abcdef", Name: name, Reason: "left of " + name, Network: sandbox.NetworkInfo{Tombstone: &sandbox.TombstoneInfo{Since: since}}}
	}
	old, later := time.Now().Add(-time.Minute), time.Now().Add(time.Minute)
	for _, tt := range []struct {
		name, ref, want string
		tombstones      []sandbox.Info
	}{
		{"none", "web", "", nil},
		{"by name", "web", "left of web", []sandbox.Info{tomb("db", later), tomb("web", later)}},
		{"by id", "0123", "left of web", []sandbox.Info{tomb("web", later)}},
		{"of another one", "web", "", []sandbox.Info{tomb("web", old), tomb("db", later)}},
	} {
		c, _ := start(t, &fake{tombstones: tt.tombstones})
		if left, err := c.Remove(t.Context(), tt.ref, false); err != nil || left != tt.want {
			t.Errorf("%s: left %q, %v, want %q", tt.name, left, err, tt.want)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	f := &fake{
		info:   sandbox.Info{ID: "1", Name: "web", Members: []sandbox.MemberInfo{}},
		member: sandbox.MemberInfo{ID: "2", Name: "m"},
		exit:   sandbox.Exit{Known: true, Code: 3},
	}
	c, _ := start(t, f)
	ctx := t.Context()
	cfg := sandbox.Config{Name: "web", ShmSize: 5}
	mcfg := sandbox.MemberConfig{Name: "m", Args: []string{strings.Repeat("x", 10000), "a\nb"}, Volumes: []request.Volume{{Source: "/s", Target: "/t"}}}
	exec := sandbox.ExecRequest{Args: []string{"a"}, Env: []string{"K=V"}, Cwd: "/", User: "1:2", Stdin: []byte("in")}
	id := func(i sandbox.Info, err error) (any, error) { return i.ID, err }
	mid := func(i sandbox.MemberInfo, err error) (any, error) { return i.ID, err }
	none := func(err error) (any, error) { return nil, err }
	calls := []struct {
		call func() (any, error)
		want any
		asks []any
	}{
		{func() (any, error) { return id(c.Create(ctx, cfg)) }, "1", []any{"create", cfg}},
		{func() (any, error) { return none(c.Stop(ctx, "web", 3*time.Second)) }, nil, []any{"stop", "web", 3 * time.Second}},
		{func() (any, error) { return none(c.Stop(ctx, "web", 0)) }, nil, []any{"stop", "web", time.Duration(0)}},
		{func() (any, error) { return c.Remove(ctx, "web", true) }, "", []any{"remove", "web", true}},
		{func() (any, error) { return id(c.Inspect(ctx, "web")) }, "1", []any{"inspect", "web"}},
		{func() (any, error) { return mid(c.Add(ctx, "web", mcfg)) }, "2", []any{"add", "web", mcfg}},
		{func() (any, error) { return mid(c.Run(ctx, "web", mcfg)) }, "2", []any{"run", "web", mcfg}},
		{func() (any, error) { return mid(c.Start(ctx, "web/m")) }, "2", []any{"start", "web/m"}},
		{func() (any, error) { return none(c.StopMember(ctx, "web/m", time.Minute)) }, nil, []any{"stopmember", "web/m", time.Minute}},
		{func() (any, error) { return none(c.Kill(ctx, "web/m", unix.SIGHUP)) }, nil, []any{"kill", "web/m", unix.SIGHUP}},
		{func() (any, error) { return none(c.RemoveMember(ctx, "web/m", false)) }, nil, []any{"removemember", "web/m", false}},
		{func() (any, error) { return none(c.ForgetNetwork(ctx, "0123456789abcdef")) }, nil, []any{"forgetnetwork", "0123456789abcdef"}},
		{func() (any, error) { e, err := c.Wait(ctx, "web/m"); return e.Code, err }, 3, []any{"wait", "web/m"}},
		{func() (any, error) { return none(c.ReopenLog(ctx, "web/m")) }, nil, []any{"reopen", "web/m"}},
		{func() (any, error) { return mid(c.InspectMember(ctx, "web/m")) }, "2", []any{"inspectmember", "web/m"}},
		{func() (any, error) { r, err := c.Exec(ctx, "web/m", exec); return fmt.Sprint(r), err },
			fmt.Sprint(sandbox.ExecResult{Code: 4, Stdout: []byte("o"), Stderr: []byte("e"), Truncated: true}), []any{"exec", "web/m", exec}},
	}
	for _, tt := range calls {
		f.err = nil
		got, err := tt.call()
		if err != nil || got != tt.want {
			t.Errorf("%v: got %v, %v, want %v", tt.asks[0], got, err, tt.want)
		}
		if d := cmp.Diff(tt.asks, f.asked); d != "" {
			t.Errorf("%v (-want +got):\n%s", tt.asks[0], d)
		}
		f.err = sandbox.ErrState
		if _, err := tt.call(); !errors.Is(err, sandbox.ErrState) {
			t.Errorf("%v of a manager that refuses: %v", tt.asks[0], err)
		}
	}
	if l, err := c.List(ctx); err != nil || len(l) != 2 || l[1].Name != "web" {
		t.Errorf("List = %v, %v", l, err)
	}
	if err := c.Stop(ctx, "web", -time.Second); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("Stop with a negative timeout: %v", err)
	}
}

func TestShutdownEndsWaiting(t *testing.T) {
	c, shutdown := start(t, new(fake))
	failed := make(chan error, 1)
	go func() {
		_, err := c.Wait(context.Background(), "a/running")
		failed <- err
	}()
	// A call that is answered shows that the connection is there; the one above
	// is on it or will be refused, and both are ErrUnavailable.
	if _, err := c.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	shutdown()
	select {
	case err := <-failed:
		if !errors.Is(err, api.ErrUnavailable) {
			t.Errorf("Wait = %v, want ErrUnavailable", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Wait goes on after the shutdown")
	}
}

func TestNobodyListens(t *testing.T) {
	c, err := api.Dial(filepath.Join(t.TempDir(), "no.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.List(t.Context())
	if !errors.Is(err, api.ErrUnavailable) || !strings.Contains(err.Error(), "no.sock") || strings.Contains(err.Error(), "desc =") {
		t.Errorf("List without a daemon: %v", err)
	}
}

// A daemon that is killed hangs up.
func TestDaemonHangsUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	c, err := api.Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.List(t.Context()); !errors.Is(err, api.ErrUnavailable) || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("List of a daemon that hangs up: %v", err)
	}
}

func TestDialRefusesAddresses(t *testing.T) {
	for _, addr := range []string{"", "tcp://127.0.0.1:1", "relative", "unix://relative"} {
		if c, err := api.Dial(addr); err == nil {
			c.Close()
			t.Errorf("Dial(%q): no error", addr)
		}
	}
}

// A daemon was killed, and for a moment its socket is held by a child that it was
// about to make.
func TestListenAfterADeadDaemon(t *testing.T) {
	const socket = "SANDBOXD_TEST_LISTEN"
	if path := os.Getenv(socket); path != "" { // this is the daemon
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		child := exec.Command("sleep", "60")
		child.ExtraFiles = []*os.File{f}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		fmt.Println(child.Process.Pid)
		os.Exit(0) // without removing the socket
	}
	path := filepath.Join(t.TempDir(), "s.sock")
	daemon := exec.Command("/proc/self/exe", "-test.run=^TestListenAfterADeadDaemon$")
	daemon.Env = append(os.Environ(), socket+"="+path)
	out, err := daemon.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	time.AfterFunc(50*time.Millisecond, func() { unix.Kill(child, unix.SIGKILL) })
	if err := server.Free(path); err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListen(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")

	old := unix.Umask(0) // a mode that the umask makes safe would prove nothing
	l, err := server.Listen(ctx, path)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket is %v, %v, want mode 0600", fi.Mode(), err)
	}
	if _, err := server.Listen(ctx, path); err == nil || !strings.Contains(err.Error(), "taken") {
		t.Errorf("Listen on a socket that is taken: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close() // as after SIGKILL
	l, err = server.Listen(ctx, path)
	if err != nil {
		t.Fatalf("Listen on a stale socket: %v", err)
	}
	l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, link, dir} {
		if _, err := server.Listen(ctx, p); err == nil {
			t.Errorf("Listen on %s: no error", p)
		}
		if _, err := os.Lstat(p); err != nil {
			t.Errorf("after Listen on %s: %v", p, err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("file is now %q, %v", b, err)
	}
}

func TestEventsAreStreamed(t *testing.T) {
	f := &fake{following: make(chan struct{})}
	c, shutdown := start(t, f)
	after := uint64(7)
	read := func(q sandbox.EventQuery) (seqs []uint64, err error) {
		for e, err := range c.Events(t.Context(), q) {
			if err != nil {
				return seqs, err
			}
			seqs = append(seqs, e.Seq)
		}
		return seqs, nil
	}
	if seqs, err := read(sandbox.EventQuery{After: &after}); err != nil || len(seqs) != 3 {
		t.Errorf("events %v, %v", seqs, err)
	}
	if d := cmp.Diff([]any{"events", uint64(7), false}, f.asked); d != "" {
		t.Errorf("asked (-want +got):\n%s", d)
	}
	f.err = &sandbox.EventGap{After: 7, First: 20, Last: 30}
	var gap *sandbox.EventGap
	if seqs, err := read(sandbox.EventQuery{After: &after}); len(seqs) != 3 || !errors.As(err, &gap) || gap.First != 20 {
		t.Errorf("events %v, %v; want a gap", seqs, err)
	}
	f.err = nil
	if found, err := c.GC(t.Context(), true); err != nil || len(found) != 1 || found[0].Kind != garbage.Link {
		t.Errorf("garbage %v, %v", found, err)
	}
	f.err = errors.New("somewhere")
	if found, err := c.GC(t.Context(), false); err == nil || err.Error() != "somewhere" || len(found) != 1 {
		t.Errorf("garbage %v, %v", found, err)
	}
	// Whoever follows is told that the daemon ends, and nobody waits for him.
	got := make(chan error)
	go func() {
		_, err := read(sandbox.EventQuery{After: &after, Follow: true})
		got <- err
	}()
	<-f.following
	shutdown()
	if err := <-got; !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("followed to %v", err)
	}
}
