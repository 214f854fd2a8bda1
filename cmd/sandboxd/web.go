package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api/server"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/metrics"
	"github.com/sandboxd/sandboxd/sandbox"
	"github.com/sandboxd/sandboxd/web"
)

// webOptions are what `serve` serves over HTTP.
type webOptions struct {
	address    string // HOST:PORT or unix://PATH; empty: nothing
	perSandbox int    // of how many sandboxes at most metrics are shown
	pprof      bool
}

// memProfileRate is the runtime's own. The memory profiler, which comes with
// net/http/pprof, is off unless it is asked for: see main.
const memProfileRate = 512 << 10

// perSandboxDefault is what --metrics-per-sandbox means without a number.
const perSandboxDefault = 100

// startWeb listens and serves until stopWeb. With an empty address it returns nil,
// which both take for a server that nobody asks.
func startWeb(ctx context.Context, o webOptions, mt *metrics.Metrics, n *node, journal string, log *slog.Logger) (*web.Server, error) {
	if o.address == "" {
		return nil, nil
	}
	if o.pprof {
		runtime.MemProfileRate = memProfileRate
	}
	l, err := listenWeb(ctx, o.address)
	if err != nil {
		return nil, fmt.Errorf("--metrics-address: %w", err)
	}
	log.Info("Metrics served", "address", l.Addr().String())
	return web.Serve(l, web.Options{
		Log: log, Metrics: mt.Handler(), Pprof: o.pprof, Version: readVersion().Version, Waiting: mt.Waiting,
		Checks: map[string]func(context.Context) error{"network": n.networkReady},
		Exits:  func(ctx context.Context, since time.Time) ([]web.Exit, error) { return exitsSince(ctx, journal, since) },
	}), nil
}

// maxExits bounds what the page shows.
const maxExits = 200

// exitsSince reads the last exits from the journal in the directory dir.
func exitsSince(ctx context.Context, dir string, since time.Time) ([]web.Exit, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	filter, err := journal.ParseFilter([]string{"type=" + string(journal.Exit)})
	if err != nil {
		return nil, err
	}
	var exits []web.Exit
	for e, err := range journal.Read(ctx, dir, journal.Query{Since: since, Filter: filter}, nil) {
		if err != nil {
			return exits, fmt.Errorf("exits from the journal: %w", err)
		}
		if e.Exit == nil {
			continue
		}
		if exits = append(exits, web.Exit{Sandbox: e.SandboxName, Member: e.MemberName, Exit: *e.Exit}); len(exits) == 2*maxExits {
			exits = slices.Delete(exits, 0, maxExits)
		}
	}
	return exits[max(0, len(exits)-maxExits):], nil
}

func stopWeb(s *web.Server) error {
	if s == nil {
		return nil
	}
	// Whoever reads a page then loads it again; the daemon's end waits for nobody.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

func listenWeb(ctx context.Context, address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		if !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("%q: the path of a socket begins with /", address)
		}
		return server.Listen(ctx, path)
	}
	if _, port, err := net.SplitHostPort(address); err != nil || port == "" {
		return nil, fmt.Errorf("%q: want HOST:PORT or unix://PATH", address)
	}
	var lc net.ListenConfig
	for deadline := time.Now().Add(portWait); ; time.Sleep(5 * time.Millisecond) {
		l, err := lc.Listen(ctx, "tcp", address)
		if err == nil || !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			return l, err
		}
	}
}

// portWait bounds the wait for a port that is taken: a daemon that was killed while
// it started a process leaves it to that child, until its execve closes the
// descriptor.
const portWait = 500 * time.Millisecond

// metricsReaders is where metrics are read from when somebody scrapes.
func metricsReaders(n *node, j *journal.Journal, perSandbox int) metrics.Readers {
	return metrics.Readers{
		Output: func(dir string) (metrics.Output, error) {
			out, err := member.ReadOutput(dir)
			return metrics.Output{Bytes: out.Bytes, LinesDropped: out.LogErrors, ClientsDropped: out.ClientsDropped}, err
		},
		HeldTmpfs: n.HeldTmpfs, Events: func() (uint64, bool) { return j.Last(), j.Behind() },
		Networks: n.networks.counts, Leases: n.networks.leases,
		Usage: n.sandboxUsage, PerSandbox: perSandbox,
	}
}

// networkReady reports why sandboxes that ask for no network in particular cannot
// be made now.
func (n *node) networkReady(ctx context.Context) error {
	mode := n.DefaultNetwork()
	if mode != network.ModeBuiltin && mode != network.ModeCNI {
		return nil
	}
	if err := n.networks.store.Status(ctx, mode); err != nil {
		return fmt.Errorf("%s: %w", mode, err)
	}
	return nil
}

// sandboxUsage reads what the processes of a sandbox use together. What this host
// does not count is not there.
func (n *node) sandboxUsage(r *sandbox.Record) (metrics.Usage, error) {
	var out metrics.Usage
	u, err := n.cg.Usage(r.Cgroup)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // in v1 there is none before the first member
		return out, err
	}
	if u.CPU != nil {
		d := time.Duration(u.CPU.UsageMicros) * time.Microsecond
		out.CPU = &d
	}
	if u.Memory != nil {
		b := uint64(u.Memory.Current)
		out.Memory = &b
	}
	if u.Pids != nil {
		p := uint64(u.Pids.Current)
		out.PIDs = &p
	}
	if r.Holds(namespace.Net) && r.Pause.Alive() {
		f, err := os.Open("/proc/" + strconv.Itoa(r.Pause.PID) + "/net/dev")
		if err != nil {
			return out, err
		}
		defer f.Close()
		t, err := parseNetDev(f)
		if err != nil {
			return out, err
		}
		out.Network = &t
	}
	return out, nil
}

// parseNetDev adds up a /proc/PID/net/dev (proc_pid_net(5)): after two lines of
// headings, "NAME: BYTES …" with the bytes received first and those sent ninth.
func parseNetDev(r io.Reader) (metrics.Traffic, error) {
	var t metrics.Traffic
	for sc := bufio.NewScanner(r); ; {
		if !sc.Scan() {
			return t, sc.Err()
		}
		name, counts, ok := strings.Cut(sc.Text(), ":")
		if !ok || strings.TrimSpace(name) == "lo" {
			continue
		}
		f := strings.Fields(counts)
		if len(f) < 9 {
			return t, fmt.Errorf("net/dev: %q has not the fields that are expected", sc.Text())
		}
		received, err1 := strconv.ParseUint(f[0], 10, 64)
		sent, err2 := strconv.ParseUint(f[8], 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			return t, fmt.Errorf("net/dev: %w", err)
		}
		t.Received += received
		t.Sent += sent
	}
}

// countedExecer tells the metrics of commands that clients of the API run.
type countedExecer struct {
	server.Execer
	o sandbox.Observer
}

// Exec implements [server.Execer].
func (c countedExecer) Exec(ctx context.Context, ref string, r sandbox.ExecRequest) (sandbox.ExecResult, error) {
	done := c.o.Operation("exec")
	res, err := c.Execer.Exec(ctx, ref, r)
	done(err)
	return res, err
}
