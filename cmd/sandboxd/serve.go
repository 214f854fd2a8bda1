package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/api/server"
	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/metrics"
	"github.com/sandboxd/sandboxd/sandbox"
)

// shutdownTimeout bounds how long calls in progress may go on after SIGTERM.
// What is cut off then, the next start undoes or finishes.
const shutdownTimeout = 10 * time.Second

type serveOptions struct {
	root         string
	cgroupParent string
	eventsMax    int64
	hooksDirs    []string
	gcInterval   time.Duration
	level        slog.Level
	json         bool
	web          webOptions
	collect      collectOptions
	custodyMax   int
	custodyTmpfs int64
	networks     networkOptions
}

func (a *app) serveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve [OPTION]…",
		Short: "Run the daemon",
		Long: `Run the daemon. It takes up what an earlier one left, then opens its socket
(mode 0600), tells systemd that it is ready (sd_notify) and logs "Ready".

SIGTERM and SIGINT end the daemon and nothing else: sandboxes and their members
go on, and so do their logs.`,
		Example: `  sandboxd serve
  sandboxd serve --state /run/test --root /var/lib/test --cgroup-parent /test --log-format json`,
		Args: argsBetween(0, 0),
	}
	var o serveOptions
	f := cmd.Flags()
	f.StringVar(&o.root, "root", "/var/lib/sandboxd", "`directory` for what outlives a reboot")
	f.StringArrayVar(&o.hooksDirs, "hooks-dir", nil, "`directory` with hooks for members and sandboxes, as podman and CRI-O have them; repeated, the later has precedence")
	f.StringVar(&o.cgroupParent, "cgroup-parent", "/sandboxd", "cgroup `path` above those of sandboxes, the same in every hierarchy")
	f.StringVar(&o.collect.collectDir, "collect-dir", "", "`directory` for what is taken of members at their exit (default ROOT/collected)")
	o.collect.collectMax, o.collect.collectKeep = collectMaxDefault, collectKeepDefault
	f.Var(&value[int64]{p: &o.collect.collectMax, text: "1g", typ: "size", parse: parseSize}, "collect-max-total", "how much collections take on disk at most; the oldest make room, successes before failures; 0 is no limit")
	f.Var(&value[time.Duration]{p: &o.collect.collectKeep, text: "168h", typ: "duration", parse: parseTTL}, "collect-keep", "how long a collection is kept; 0 is as long as there is room")
	f.Var(&value[time.Duration]{p: &o.collect.sampleInterval, typ: "duration", parse: parseTTL}, "sample-interval", "measure cpu and memory of members so often, such as 1s, and keep the last 300 samples for their manifests (default 0: never)")
	f.IntVar(&o.custodyMax, "custody-max", 0, "`number` of exited members that are held at most; custody of the oldest ends (default 0: no limit)")
	f.Var(&value[int64]{p: &o.custodyTmpfs, typ: "size", parse: parseSize}, "custody-max-tmpfs", "how much exited members hold in memory at most; custody of the oldest ends (default 0: no limit)")
	f.Var(&value[int64]{p: &o.eventsMax, typ: "size", parse: parseSize}, "events-max", "how large the journal of events may become (default 64m)")
	networkFlags(cmd, &o.networks)
	o.gcInterval = gcInterval
	f.Var(&value[time.Duration]{p: &o.gcInterval, text: "5m", typ: "duration", parse: parseTTL}, "gc-interval", "how often to look for what belongs to nobody any more; 0: only at the start")
	f.StringVar(&o.web.address, "metrics-address", "", "`address` for metrics, health and a page, by HTTP: HOST:PORT such as 127.0.0.1:9477, or unix://PATH (default: none)")
	f.IntVar(&o.web.perSandbox, "metrics-per-sandbox", 0, "metrics of each sandbox too, of the `N` oldest at most (100 without a number)")
	f.Lookup("metrics-per-sandbox").NoOptDefVal = strconv.Itoa(perSandboxDefault)
	f.BoolVar(&o.web.pprof, "debug-pprof", false, "Go's profiles under /debug/pprof at the metrics address")
	f.Var(&value[slog.Level]{p: &o.level, typ: "level", parse: parseLevel}, "log-level", "one of debug, info, warn, error (default info)")
	f.Var(&value[bool]{p: &o.json, typ: "text|json", parse: parseLogFormat}, "log-format", "form of the log on stderr (default text)")
	cmd.RegisterFlagCompletionFunc("log-level", oneOf("debug", "info", "warn", "error"))
	cmd.RegisterFlagCompletionFunc("log-format", oneOf("text", "json"))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if os.Geteuid() != 0 {
			return errors.New("serve must be run as root")
		}
		// What a shell has left open in us is nothing to hooks and CNI plugins. Linux
		// before 5.11 cannot say so for all at once.
		_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
		ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
		defer stop()
		// A log that nobody reads any more must not end the daemon, as SIGPIPE for
		// stderr would (package os/signal). It is caught and not ignored, so that
		// no program that is started inherits that.
		pipe := make(chan os.Signal, 1)
		signal.Notify(pipe, unix.SIGPIPE)
		defer signal.Stop(pipe)
		return a.serve(ctx, o)
	}
	return cmd
}

// serve runs the daemon until ctx ends.
func (a *app) serve(ctx context.Context, o serveOptions) (err error) {
	state, root := a.stateDir(), realPath(o.root)
	for i, dir := range o.hooksDirs {
		if o.hooksDirs[i], err = filepath.Abs(dir); err != nil {
			return err
		}
	}
	socket, err := api.SocketPath(a.socketAddress())
	if err != nil {
		return err
	}
	if o.web.perSandbox < 0 {
		return fmt.Errorf("--metrics-per-sandbox %d: want 0 or more", o.web.perSandbox)
	}
	if o.custodyMax < 0 {
		return fmt.Errorf("--custody-max %d: want 0 or more", o.custodyMax)
	}
	if o.collect.sampleInterval > 0 && o.collect.sampleInterval < minSampleInterval {
		return fmt.Errorf("--sample-interval %s is less than %s", o.collect.sampleInterval, minSampleInterval)
	}
	if o.gcInterval > 0 && o.gcInterval < minGCInterval {
		return fmt.Errorf("--gc-interval %s is less than %s", o.gcInterval, minGCInterval)
	}
	if o.collect.collectDir, err = filepath.Abs(cmp.Or(o.collect.collectDir, filepath.Join(root, "collected"))); err != nil {
		return err
	}
	if fi, err := os.Stat(o.collect.collectDir); err == nil && !fi.IsDir() {
		return fmt.Errorf("--collect-dir %s: not a directory", o.collect.collectDir)
	}
	if err := cgroup.CheckPath(o.cgroupParent); err != nil {
		return fmt.Errorf("--cgroup-parent: %w", err)
	}
	// Before anything is made. The daemon of the same state directory, if there
	// is one, has the same socket too; the lock tells more.
	if err := sandbox.Free(state); err != nil {
		return err
	}
	if err := server.Free(socket, state, root); err != nil {
		return err
	}
	rd, err := openRootDir(root, state, o.eventsMax)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rd.Close()) }()
	root = rd.path
	log := newLogger(a.err, o.level, o.json)
	for _, dir := range o.hooksDirs {
		// It may come later, with the package that has hooks.
		if _, err := os.Stat(dir); err != nil {
			log.Warn("No hooks directory yet", "dir", dir, "err", err)
		}
	}
	v := readVersion()
	mt := metrics.New(metrics.Options{Version: v.Version, Commit: v.Commit, Go: v.Go})
	node, err := newNode(nodeOptions{State: state, Root: root, CgroupParent: o.cgroupParent, HooksDirs: o.hooksDirs, Networks: o.networks, Metrics: mt, Log: log, collectOptions: o.collect})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	// Before the recovery, so that one that hangs can be seen.
	page, err := startWeb(ctx, o.web, mt, node, rd.journal.Path(), log)
	if err != nil {
		return err
	}
	stopPage := sync.OnceValue(func() error { return stopWeb(page) })
	defer func() { err = errors.Join(err, stopPage()) }()
	m, err := sandbox.Open(ctx, state, node, sandbox.Options{
		Log: log, Observer: mt, Journal: rd.journal, CgroupParent: o.cgroupParent, LogDir: filepath.Join(root, "sandboxes"),
		CustodyMax: o.custodyMax, CustodyMaxTmpfs: o.custodyTmpfs,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopPage(), m.Close()) }()
	if err := linkCollected(state, o.collect.collectDir); err != nil {
		return err
	}
	go node.sampler.Run(ctx)
	if err := linkRoot(state, root); err != nil {
		return err
	}
	var clean sync.WaitGroup
	defer clean.Wait()
	cleanCtx, stopCleaning := context.WithCancel(ctx)
	defer stopCleaning()
	clean.Go(func() { keepClean(cleanCtx, m, o.gcInterval, log) })
	mt.Attach(m, metricsReaders(node, rd.journal, o.web.perSandbox))
	page.Recovered(m)
	x, err := newExecer(m, node)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, x.close()) }()
	return serveAPI(ctx, m, countedExecer{x, mt}, socket, log)
}

// serveAPI answers calls on socket until ctx ends. m is lent and has recovered.
func serveAPI(ctx context.Context, m server.Manager, x server.Execer, socket string, log *slog.Logger) error {
	l, err := server.Listen(ctx, socket)
	if err != nil {
		return err
	}
	srv := server.New(m, x, log)
	stopped := make(chan struct{})
	defer func() { <-stopped }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(stopped)
		<-ctx.Done()
		log.Info("Shutting down")
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		srv.Shutdown(bounded)
	}()
	if err := notifyReady(os.Getenv("NOTIFY_SOCKET")); err != nil {
		log.Warn("Readiness not reported", "err", err)
	}
	log.Info("Ready", "socket", socket)
	return srv.Serve(l)
}

// notifyReady tells the service manager that the daemon is ready (sd_notify(3)).
// socket is $NOTIFY_SOCKET; if it is empty nobody wants to know.
func notifyReady(socket string) error {
	if socket == "" {
		return nil
	}
	// A leading @ is an abstract socket for package net too.
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("READY=1"))
	return err
}

func newLogger(w io.Writer, level slog.Level, json bool) *slog.Logger {
	o := &slog.HandlerOptions{Level: level}
	if json {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

func parseLevel(s string) (slog.Level, error) {
	switch s {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("unknown log level %q (one of debug, info, warn, error)", s)
}

func parseLogFormat(s string) (isJSON bool, err error) {
	switch s {
	case "text", "json":
		return s == "json", nil
	}
	return false, fmt.Errorf("unknown log format %q (one of text, json)", s)
}
