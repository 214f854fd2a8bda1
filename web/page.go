package web

import (
	"cmp"
	"crypto/sha256"
	_ "embed" // the page's style
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/sandbox"
)

//go:embed page.css
var style string

// contentPolicy lets a browser use the page's own style, and nothing else.
func contentPolicy() string {
	sum := sha256.Sum256([]byte(style))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

// maxShown bounds the page. Those that need attention come first.
const maxShown = 200

// exitsSince is how far back the page shows exits.
const exitsSince = time.Hour

// view is what the page shows.
type view struct {
	Version   string
	At        time.Time
	Recovered bool
	Total     int // sandboxes
	Members   int
	Running   int
	Held      int
	Left      int // sandboxes that are not shown
	Sandboxes []sandboxView
	Exits     []exitView
	ExitsErr  string
	HaveGC    bool
	LastGC    time.Time
	Waiting   []garbage.Finding
	Pprof     bool
}

type sandboxView struct {
	sandbox.Info
	Age  string
	Bad  bool
	Grid grid
}

type exitView struct {
	Sandbox, Member, How, When string
	At                         time.Time
	Bad                        bool
}

// grid is who is in which namespace: a row for the sandbox's pause and for each
// member, a column for each kind that anybody joins.
type grid struct {
	Kinds []namespace.Kind
	Rows  []row
}

type row struct {
	Name, State string
	Pause, Bad  bool
	Cells       []cell
}

// cell is one namespace of a process. Equal letters in a column are the same namespace.
type cell struct {
	Letter string // empty: none
	Class  string // of the letter's colour
	Source string // sandbox, private, host, member:NAME, or "gone"
}

func (s *Server) page(w http.ResponseWriter, r *http.Request) {
	var html []byte
	if !s.working(r.Context(), func() {
		v := s.view(r)
		html = v.html()
	}) {
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Write(html) // a client that has gone away needs no answer
}

func (s *Server) view(r *http.Request) view {
	now := s.o.Now()
	v := view{Version: s.o.Version, At: now.UTC(), Pprof: s.o.Pprof}
	src := s.source()
	if src == nil {
		return v
	}
	v.Recovered = true
	infos := src.List()
	v.Total = len(infos)
	var exits []Exit
	for _, i := range infos {
		v.Members += len(i.Members)
		for _, m := range i.Members {
			if m.State == sandbox.MemberRunning.String() {
				v.Running++
			}
			if m.Custody.Held {
				v.Held++
			}
			if m.Exit != nil {
				exits = append(exits, Exit{i.Name, m.Name, *m.Exit})
			}
		}
	}
	slices.SortStableFunc(infos, func(a, b sandbox.Info) int { return cmp.Compare(attention(a), attention(b)) })
	if len(infos) > maxShown {
		v.Left = len(infos) - maxShown
		infos = infos[:maxShown]
	}
	for _, i := range infos {
		v.Sandboxes = append(v.Sandboxes, sandboxView{Info: i, Age: age(now, i.CreatedAt), Bad: attention(i) == 0, Grid: makeGrid(i)})
	}
	if s.o.Exits != nil {
		var err error
		if exits, err = s.o.Exits(r.Context(), now.Add(-exitsSince)); err != nil {
			v.ExitsErr = err.Error()
		}
	}
	v.Exits = makeExits(exits, now)
	if s.o.Waiting != nil {
		v.HaveGC = true
		v.LastGC, v.Waiting = s.o.Waiting()
		v.LastGC = v.LastGC.UTC()
	}
	return v
}

// attention is 0 for what somebody should look at.
func attention(i sandbox.Info) int {
	bad := func(state string) bool { return state == "NotReady" || state == "Unclean" }
	if bad(i.State) || slices.ContainsFunc(i.Members, func(m sandbox.MemberInfo) bool { return bad(m.State) }) {
		return 0
	}
	return 1
}

// makeExits returns those of the last hour, newest first.
func makeExits(exits []Exit, now time.Time) []exitView {
	var vs []exitView
	for _, e := range exits {
		if now.Sub(e.Exit.FinishedAt) > exitsSince {
			continue
		}
		how := fmt.Sprintf("code %d", e.Exit.Code)
		switch {
		case !e.Exit.Known:
			how = "unknown"
		case e.Exit.Signal != 0:
			how = fmt.Sprintf("signal %d", e.Exit.Signal)
		}
		vs = append(vs, exitView{
			Sandbox: e.Sandbox, Member: e.Member, How: how + " · " + e.Exit.Reason,
			When: age(now, e.Exit.FinishedAt), At: e.Exit.FinishedAt.UTC(), Bad: !e.Exit.Known || e.Exit.Code != 0,
		})
	}
	slices.SortStableFunc(vs, func(a, b exitView) int { return b.At.Compare(a.At) })
	return vs[:min(len(vs), maxShown)]
}

func makeGrid(i sandbox.Info) grid {
	var g grid
	for _, k := range namespace.Kinds() {
		_, has := i.Namespaces[k]
		for _, m := range i.Members {
			_, in := m.Namespaces[k]
			has = has || in
		}
		if has {
			g.Kinds = append(g.Kinds, k)
		}
	}
	letters := make([]map[uint64]int, len(g.Kinds)) // by column, of an inode
	pause := row{Name: "pause", State: i.State, Pause: true, Bad: i.State == "NotReady"}
	for c, k := range g.Kinds {
		letters[c] = map[uint64]int{}
		n, ok := i.Namespaces[k]
		if !ok {
			pause.Cells = append(pause.Cells, cell{})
			continue
		}
		pause.Cells = append(pause.Cells, makeCell(letters[c], n.Inode, "held"))
	}
	g.Rows = append(g.Rows, pause)
	for _, m := range i.Members {
		r := row{Name: m.Name, State: m.State, Bad: m.State == "Unclean"}
		for c, k := range g.Kinds {
			n, ok := m.Namespaces[k]
			if !ok {
				r.Cells = append(r.Cells, cell{})
				continue
			}
			r.Cells = append(r.Cells, makeCell(letters[c], n.Inode, n.Source))
		}
		g.Rows = append(g.Rows, r)
	}
	return g
}

// makeCell gives a namespace the letter that it has in its column, or the next one.
func makeCell(letters map[uint64]int, inode uint64, source string) cell {
	if source == "host" {
		return cell{Letter: "H", Class: "host", Source: source}
	}
	if inode == 0 {
		return cell{Letter: "–", Class: "gone", Source: source + ", gone"}
	}
	n, ok := letters[inode]
	if !ok {
		n = len(letters)
		letters[inode] = n
	}
	return cell{Letter: letter(n), Class: fmt.Sprintf("n%d", n%6), Source: source}
}

// letter counts A…G, I…Z, A1…: H is the host.
func letter(n int) string {
	const names = "ABCDEFGIJKLMNOPQRSTUVWXYZ"
	if n < len(names) {
		return names[n : n+1]
	}
	return fmt.Sprintf("%c%d", names[n%len(names)], n/len(names))
}

// age is a duration in the unit that a person would use.
func age(now, then time.Time) string {
	switch d := now.Sub(then); {
	case then.IsZero():
		return "–"
	case d < time.Minute:
		return fmt.Sprintf("%d s", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	default:
		return fmt.Sprintf("%d d", int(d.Hours()/24))
	}
}
