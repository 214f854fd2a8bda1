// Package web serves, over HTTP and to be read only, what people and monitoring
// want to see of a daemon: metrics, its health, and a page that shows all
// sandboxes. It shows, and changes nothing. There is no authentication: whoever
// reaches the address sees names, states and labels, so it should be on
// loopback, a Unix socket, or behind a proxy.
//
// A [Server] listens before the daemon has recovered, so that a recovery that
// hangs can be seen.
package web

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/rest"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Source is what is shown; a [sandbox.Manager] is one.
type Source interface {
	List() []sandbox.Info
}

// Options say what a [Server] serves. What is nil is not shown.
type Options struct {
	Log     *slog.Logger     // default: discard
	Now     func() time.Time // default: time.Now
	Metrics http.Handler     // of /metrics
	Pprof   bool             // serve /debug/pprof/
	Version string

	// Waiting returns what the last garbage collection could not remove, and
	// when that was.
	Waiting func() (time.Time, []garbage.Finding)
	// Exits returns exits since a time, newest first, of members that are
	// there and of those that are gone.
	Exits func(ctx context.Context, since time.Time) ([]Exit, error)
	// Checks are asked, by name, whether new work can be done; the daemon is
	// ready if all of them return nil.
	Checks map[string]func(context.Context) error
}

// Exit is the end of one member.
type Exit struct {
	Sandbox, Member string // names
	Exit            sandbox.Exit
}

// Server is an HTTP server. Make it with [Serve].
type Server struct {
	o    Options
	http *http.Server
	src  atomic.Pointer[Source]
	csp  string
	done chan error
	rest *rest.Timer
	work chan struct{} // has room for those who are working
}

// Bounds of what a client may do.
const (
	maxConns      = 256
	maxWorking    = 8 // requests that are being answered, of those that cost something
	headerTimeout = 5 * time.Second
	answerTimeout = 30 * time.Second
	pprofTimeout  = 2 * time.Minute // a profile lasts 30 s unless told otherwise
	checkTimeout  = 5 * time.Second
)

// Serve answers requests on l, which it owns from now on, until Shutdown. Until
// [Server.Recovered] is called the daemon is not ready and has no sandboxes.
func Serve(l net.Listener, o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Server{o: o, csp: contentPolicy(), done: make(chan error, 1), rest: rest.NewTimer(), work: make(chan struct{}, maxWorking)}
	timeout := answerTimeout
	if o.Pprof {
		timeout = pprofTimeout
	}
	s.http = &http.Server{
		Handler: s.guard(s.routes(), localOnly(l.Addr())), ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout,
		WriteTimeout: timeout, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog:  slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		ConnState: (&conns{max: maxConns, m: map[net.Conn]connState{}}).changed,
	}
	go func() { s.done <- s.http.Serve(l) }()
	return s
}

// Recovered makes the daemon ready and src what is shown. src is lent until
// Shutdown has returned. A nil Server does nothing.
func (s *Server) Recovered(src Source) {
	if s != nil {
		s.src.Store(&src)
	}
}

// Shutdown ends the server: requests in progress until ctx ends.
func (s *Server) Shutdown(ctx context.Context) error {
	defer s.rest.Stop()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	if serr := <-s.done; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// working runs fn when there are few others, unless the client goes away before.
func (s *Server) working(ctx context.Context, fn func()) bool {
	select {
	case s.work <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	defer func() { <-s.work }()
	fn()
	return true
}

func (s *Server) source() Source {
	if p := s.src.Load(); p != nil {
		return *p
	}
	return nil
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.page)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", s.ready)
	if s.o.Metrics != nil {
		mux.Handle("GET /metrics", s.o.Metrics)
	}
	if s.o.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// guard keeps browsers from doing more with an answer than showing it, and pages
// of other sites from reading it.
func (s *Server) guard(next http.Handler, local bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", s.csp)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		// A site whose name its owner lets resolve to 127.0.0.1 is not this one
		// (DNS rebinding): on loopback, only names of loopback are.
		if local && !localHost(r.Host) {
			http.Error(w, "this host is not known here by that name; use 127.0.0.1 or localhost", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
		s.rest.Called()
	})
}

// localOnly reports whether only this host can reach a.
func localOnly(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return ok && t.IP.IsLoopback()
}

// localHost reports whether the Host of a request can only mean this host, or
// an address, which cannot be made to resolve to another.
func localHost(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	if strings.EqualFold(name, "localhost") {
		return true
	}
	_, err := netip.ParseAddr(name)
	return err == nil
}

// ready answers with 200 if new work can be done, else with 503; in either case
// with a line for each thing that was asked.
func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
	defer cancel()
	var text strings.Builder
	code := http.StatusOK
	say := func(name string, err error) {
		if err == nil {
			fmt.Fprintf(&text, "ok     %s\n", name)
			return
		}
		code = http.StatusServiceUnavailable
		fmt.Fprintf(&text, "not ok %s: %v\n", name, err)
	}
	if s.source() == nil {
		say("recovery", errors.New("what an earlier daemon left is being taken up"))
	} else {
		asked := s.working(ctx, func() {
			for _, name := range slices.Sorted(maps.Keys(s.o.Checks)) {
				say(name, s.o.Checks[name](ctx))
			}
		})
		if !asked {
			say("checks", ctx.Err())
		}
		say("recovery", nil)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	fmt.Fprint(w, text.String())
}
