package web

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"regexp"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/html"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/sandbox"
)

var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

type infos []sandbox.Info

func (is infos) List() []sandbox.Info { return slices.Clone(is) }

// serve returns a server's address, and the server.
func serve(t *testing.T, o Options) (string, *Server) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o.Now = func() time.Time { return now }
	s := Serve(l, o)
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String(), s
}

// ask sends a request and returns the answer with its body.
func ask(t *testing.T, method, address, path, host string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(method, "http://"+address+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if host != "" {
		r.Host = host
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}

// What a scrape has allocated is given back soon, and not when as much again has
// been allocated.
func TestRest(t *testing.T) {
	forced := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/cycles/forced:gc-cycles"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	address, _ := serve(t, Options{})
	for end, before := time.Now().Add(20*time.Second), forced(); forced() == before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing is given back after the start")
		}
	}
	before := forced()
	ask(t, "GET", address, "/healthz", "")
	for end := time.Now().Add(20 * time.Second); forced() == before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing is given back after a request")
		}
	}
}

func TestRoutes(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "metrics") })
	address, s := serve(t, Options{Metrics: handler})
	s.Recovered(infos{})
	with, _ := serve(t, Options{Pprof: true})
	for _, tt := range []struct {
		method, address, path, host string
		want                        int
	}{
		{"GET", address, "/", "", 200},
		{"HEAD", address, "/", "", 200},
		{"GET", address, "/metrics", "", 200},
		{"GET", address, "/healthz", "", 200},
		{"GET", address, "/readyz", "", 200},
		{"GET", address, "/other", "", 404},
		{"GET", address, "/../etc/passwd", "", 404},
		{"POST", address, "/", "", 405},
		{"PUT", address, "/metrics", "", 405},
		{"DELETE", address, "/readyz", "", 405},
		{"GET", address, "/debug/pprof/", "", 404},
		{"GET", address, "/debug/pprof/heap", "", 404},
		{"GET", with, "/debug/pprof/", "", 200},
		{"GET", with, "/debug/pprof/goroutine", "", 200},
		{"POST", with, "/debug/pprof/", "", 405},
		{"GET", address, "/metrics", "localhost:9477", 200},
		{"GET", address, "/metrics", "LocalHost", 200},
		{"GET", address, "/metrics", "[::1]:9477", 200},
		{"GET", address, "/metrics", "192.0.2.1", 200},
		{"GET", address, "/metrics", "evil.example", 403},
		{"GET", address, "/metrics", "localhost.evil.example:9477", 403},
		{"GET", address, "/", "127.0.0.1.evil.example", 403},
		{"GET", with, "/debug/pprof/heap", "evil.example", 403},
	} {
		res, _ := ask(t, tt.method, tt.address, tt.path, tt.host)
		if res.StatusCode != tt.want {
			t.Errorf("%s %s as %q: %s, want %d", tt.method, tt.path, tt.host, res.Status, tt.want)
		}
		if !strings.HasPrefix(res.Header.Get("Content-Security-Policy"), "default-src 'none'; style-src 'sha256-") {
			t.Errorf("%s %s: policy %q", tt.method, tt.path, res.Header.Get("Content-Security-Policy"))
		}
	}
}

// Elsewhere than on loopback a name may be what DNS calls this host.
func TestLocalOnly(t *testing.T) {
	for addr, want := range map[net.Addr]bool{
		&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}: true, &net.TCPAddr{IP: net.IPv6loopback}: true,
		&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}: false, &net.TCPAddr{}: false, &net.UnixAddr{Net: "unix"}: false,
	} {
		if got := localOnly(addr); got != want {
			t.Errorf("localOnly(%v) = %t, want %t", addr, got, want)
		}
	}
}

func TestReady(t *testing.T) {
	broken := error(nil)
	address, s := serve(t, Options{Checks: map[string]func(context.Context) error{
		"network": func(context.Context) error { return broken },
	}})
	check := func(code int, want string) {
		t.Helper()
		res, text := ask(t, "GET", address, "/readyz", "")
		if res.StatusCode != code || text != want {
			t.Errorf("%d %q, want %d %q", res.StatusCode, text, code, want)
		}
	}
	check(503, "not ok recovery: what an earlier daemon left is being taken up\n")
	s.Recovered(infos{})
	check(200, "ok     network\nok     recovery\n")
	broken = errors.New("no plugin bridge in /opt/cni/bin")
	check(503, "not ok network: no plugin bridge in /opt/cni/bin\nok     recovery\n")
}

// shown is a daemon's sandboxes, one of them with names that mean harm.
func shown() infos {
	ns := func(source string, inode uint64) sandbox.NamespaceInfo {
		return sandbox.NamespaceInfo{Source: source, Inode: inode}
	}
	kinds := func(net, pid, uts sandbox.NamespaceInfo) map[namespace.Kind]sandbox.NamespaceInfo {
		return map[namespace.Kind]sandbox.NamespaceInfo{namespace.Net: net, namespace.PID: pid, namespace.UTS: uts}
	}
	return infos{
		{ID: "0000000000000001", Name: "web", State: "Ready", CreatedAt: now.Add(-90 * time.Minute),
			Network: sandbox.NetworkInfo{Mode: "none"},
			Namespaces: map[namespace.Kind]sandbox.NamespaceInfo{
				namespace.Net: ns("", 10), namespace.UTS: ns("", 11),
			},
			Members: []sandbox.MemberInfo{
				{ID: "a", Name: "redis", State: "Running", Namespaces: kinds(ns("sandbox", 10), ns("private", 20), ns("sandbox", 11))},
				{ID: "b", Name: "side", State: "Running", Namespaces: kinds(ns("sandbox", 10), ns("member:redis", 20), ns("host", 99))},
				{ID: "c", Name: "job", State: "Exited", Namespaces: kinds(ns("private", 30), ns("private", 0), ns("sandbox", 11)),
					Custody: sandbox.CustodyInfo{Held: true},
					Exit:    &sandbox.Exit{Known: true, Code: 139, Signal: 11, Reason: "Signal", FinishedAt: now.Add(-5 * time.Minute)}},
				{ID: "d", Name: "old", State: "Exited", Exit: &sandbox.Exit{Known: true, FinishedAt: now.Add(-2 * time.Hour)}},
			}},
		{ID: "0000000000000002", Name: "<script>alert(1)</script>", State: "NotReady", Reason: `pause "was" <b>killed</b>`, CreatedAt: now},
	}
}

func TestPage(t *testing.T) {
	address, s := serve(t, Options{Version: "v1", Pprof: true, Waiting: func() (time.Time, []garbage.Finding) {
		return now, []garbage.Finding{{Kind: garbage.Tombstone, Name: "web", Reason: "DEL fails", Action: "retried", Err: "<i>exit 1</i>"}}
	}})
	_, before := ask(t, "GET", address, "/", "")
	if !strings.Contains(before, "taking up") {
		t.Errorf("before the recovery the page says %q", before)
	}
	checkPage(t, before)
	s.Recovered(shown())
	_, text := ask(t, "GET", address, "/", "")
	checkPage(t, text)
	for _, want := range []string{
		"sandboxd: 2 sandboxes", "&lt;script&gt;alert(1)&lt;/script&gt;", "&lt;b&gt;killed", "&lt;i&gt;exit 1",
		"web/job", "signal 11 · Signal", "5 min", "DEL fails", "Profiles",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page has no %q", want)
		}
	}
	if strings.Contains(text, "web/old") {
		t.Error("an exit of two hours ago is shown")
	}
	if strings.Index(text, "s-0000000000000002") > strings.Index(text, "s-0000000000000001") {
		t.Error("what needs attention is not first")
	}
	address, s = serve(t, Options{})
	s.Recovered(infos{})
	_, text = ask(t, "GET", address, "/", "")
	checkPage(t, text)
}

// A page with very many sandboxes shows some, and says so.
func TestPageIsBounded(t *testing.T) {
	var many infos
	for i := range maxShown + 7 {
		many = append(many, sandbox.Info{ID: fmt.Sprintf("%016x", i), Name: fmt.Sprint("n", i), State: "Ready"})
	}
	many[len(many)-1].State = "NotReady"
	address, s := serve(t, Options{})
	s.Recovered(many)
	_, text := ask(t, "GET", address, "/", "")
	if n := strings.Count(text, "<article"); n != maxShown || !strings.Contains(text, "7 more") || !strings.Contains(text, "NotReady") {
		t.Errorf("%d sandboxes, want %d, the one that is NotReady, and a word about 7 more", n, maxShown)
	}
}

func TestGrid(t *testing.T) {
	g := makeGrid(shown()[0])
	var got []string
	for _, r := range g.Rows {
		line := r.Name
		for i, c := range r.Cells {
			line += fmt.Sprintf(" %s=%s", g.Kinds[i], c.Letter)
		}
		got = append(got, line)
	}
	want := []string{
		"pause net=A uts=A pid=",
		"redis net=A uts=A pid=A",
		"side net=A uts=H pid=A",
		"job net=B uts=A pid=–",
		"old net= uts= pid=",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestLetter(t *testing.T) {
	seen := map[string]bool{"H": true}
	for n := range 200 {
		if l := letter(n); seen[l] {
			t.Errorf("letter(%d) = %s once more", n, l)
		} else {
			seen[l] = true
		}
	}
}

// checkPage looks for what keeps a page from being read by everybody, and for
// what would not be the page's own.
func checkPage(t *testing.T, text string) {
	t.Helper()
	doc, err := html.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	var refs []string
	level, tables, mains := 0, 0, 0
	for n := range doc.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		attr := map[string]string{}
		for _, a := range n.Attr {
			attr[a.Key] = a.Val
			if strings.HasPrefix(a.Key, "on") || a.Key == "style" {
				t.Errorf("<%s> has %s, which the policy forbids", n.Data, a.Key)
			}
			if (a.Key == "href" || a.Key == "src") && !strings.HasPrefix(a.Val, "/") {
				t.Errorf("<%s> refers to %s, which is not here", n.Data, a.Val)
			}
		}
		if id, ok := attr["id"]; ok {
			if ids[id] {
				t.Errorf("id %s twice", id)
			}
			ids[id] = true
		}
		if ref := attr["aria-labelledby"]; ref != "" {
			refs = append(refs, ref)
		}
		switch n.Data {
		case "html":
			if attr["lang"] == "" {
				t.Error("no language")
			}
		case "main":
			mains++
		case "script", "iframe", "object", "form", "img", "b", "i":
			t.Errorf("there is a <%s>", n.Data)
		case "style":
			if n.FirstChild == nil || n.FirstChild.Data != style {
				t.Error("the style is not the one whose sum is in the policy")
			}
		case "h1", "h2", "h3":
			now := int(n.Data[1] - '0')
			if now > level+1 {
				t.Errorf("<%s> follows <h%d>", n.Data, level)
			}
			level = now
		case "table":
			tables++
			if n.FirstChild == nil || !hasChild(n, "caption") {
				t.Error("a table has no caption")
			}
		case "th":
			if attr["scope"] == "" {
				t.Error("a heading of a table has no scope")
			}
		case "div":
			if attr["tabindex"] != "" && (attr["role"] == "" || attr["aria-label"] == "") {
				t.Error("something that can have the focus has no role and name")
			}
		}
	}
	for _, ref := range refs {
		if !ids[ref] {
			t.Errorf("aria-labelledby names %s, which is not there", ref)
		}
	}
	if mains != 1 || level == 0 {
		t.Errorf("%d <main>, headings to level %d", mains, level)
	}
}

func hasChild(n *html.Node, tag string) bool {
	for c := range n.ChildNodes() {
		if c.Data == tag {
			return true
		}
	}
	return false
}

// Text must be told from its background by everybody: WCAG 2.2, 1.4.3 wants a
// ratio of 4.5.
func TestContrast(t *testing.T) {
	parts := strings.SplitN(style, "@media (prefers-color-scheme: dark)", 2)
	if len(parts) != 2 {
		t.Fatal("no dark scheme")
	}
	dark, _, _ := strings.Cut(parts[1], "}")
	light, _, _ := strings.Cut(parts[0], "}")
	for scheme, text := range map[string]string{"light": light, "dark": dark} {
		colour := map[string]float64{}
		for _, m := range regexp.MustCompile(`--([a-z0-9]+): #([0-9a-f]{6});`).FindAllStringSubmatch(text, -1) {
			colour[m[1]] = luminance(t, m[2])
		}
		if len(colour) != 14 {
			t.Errorf("%s has %d colours, want 14", scheme, len(colour))
		}
		check := func(fg string, bgs ...string) {
			for _, bg := range bgs {
				a, b := colour[fg], colour[bg]
				if r := (max(a, b) + .05) / (min(a, b) + .05); r < 4.5 {
					t.Errorf("%s: %s on %s has a ratio of %.1f", scheme, fg, bg, r)
				}
			}
		}
		check("fg", "bg", "panel", "n0", "n1", "n2", "n3", "n4", "n5", "host")
		check("soft", "bg", "panel")
		check("link", "bg")
		check("bad", "bg", "panel")
	}
}

// luminance is that of WCAG 2.2, of a colour RRGGBB.
func luminance(t *testing.T, hex string) float64 {
	t.Helper()
	sum := 0.0
	for i, weight := range []float64{.2126, .7152, .0722} {
		n, err := strconv.ParseUint(hex[2*i:2*i+2], 16, 8)
		if err != nil {
			t.Fatal(err)
		}
		c := float64(n) / 255
		if c <= .04045 {
			c /= 12.92
		} else {
			c = math.Pow((c+.055)/1.055, 2.4)
		}
		sum += weight * c
	}
	return sum
}
