package collect

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/html"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/request"
)

var update = flag.Bool("update", false, "write testdata/page.txt anew")

func TestVerdict(t *testing.T) {
	began := time.Unix(1, 0)
	limit := cgroup.Usage{Memory: &cgroup.MemoryUsage{Limit: 64 << 20}}
	for _, tt := range []struct {
		m    Manifest
		want string
	}{
		{Manifest{}, "It has not been started."},
		{Manifest{StartedAt: began}, "It is running."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Known: true}}, "It ended well, with code 0."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Known: true, Code: 3}}, "It ended by itself, with code 3."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Known: true, Code: 143, Signal: 15}}, "It was killed by signal 15 (SIGTERM)."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Known: true, Code: 134, Signal: 6}}, "It was killed by signal 6 (SIGABRT), which programs send themselves when they find something wrong."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Known: true, Code: 162, Signal: 34}}, "It was killed by signal 34."},
		{Manifest{Exit: &exit.Record{Known: true, Code: 137, Signal: 9}}, "It was killed by signal 9 (SIGKILL) before it was started."},
		{Manifest{StartedAt: began, Counters: limit, Exit: &exit.Record{Known: true, Code: 137, Signal: 9, OOMKilled: true}}, "The kernel killed it because it needed more memory than its limit of 64.0 MiB."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Known: true, Code: 137, Signal: 9, OOMKilled: true}}, "The kernel killed it because it needed more memory than there was."},
		{Manifest{StartedAt: began, Counters: limit, Exit: &exit.Record{Known: true, Code: 1, OOMKilled: true}}, "It ended by itself, with code 1, after the kernel had killed a process of it that needed more memory than its limit of 64.0 MiB."},
		{Manifest{StartedAt: began, Exit: &exit.Record{Code: -1, Reason: "Unknown: nobody saw it"}}, "It has ended, and how is not known: nobody saw it."},
		{Manifest{StartError: "execute x: no such file", Exit: &exit.Record{Known: true, Code: 127, Reason: "StartError: execute x: no such file"}}, "Its command could not be executed: execute x: no such file."},
		{Manifest{Exit: &exit.Record{Known: true, Code: 126, Reason: "StartError: execute x"}}, "Its command could not be executed: execute x."},
	} {
		if got := verdict(&tt.m); got != tt.want {
			t.Errorf("verdict %q, want %q", got, tt.want)
		}
	}
}

// example is a report with everything in it, some of it chosen by somebody bad.
func example() *Report {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	m := &Manifest{
		Version: manifestVersion, Name: "web/app-3", Sandbox: "web", SandboxID: "00112233445566aa", Member: "app", MemberID: "aa66554433221100",
		Command:   []string{"app", "<b>&", "\x1b[2J"},
		CreatedAt: at.Add(-time.Hour), StartedAt: at.Add(-time.Hour), CollectedAt: at,
		Exit: &exit.Record{Known: true, Code: 139, Signal: 11, Reason: "Signal", FinishedAt: at},
		Counters: cgroup.Usage{
			CPU:    &cgroup.CPUUsage{UsageMicros: 90_500_000, UserMicros: 80_000_000, SystemMicros: 10_500_000, Periods: 9, Throttled: 2, ThrottledMicros: 1500, Limit: 0.5},
			Memory: &cgroup.MemoryUsage{Current: 1 << 20, Peak: 63 << 20, Limit: 64 << 20, AtLimit: 1, OOMKills: 2},
			Pids:   &cgroup.PidsUsage{Peak: 7, Limit: 10, AtLimit: 3},
			IO:     []cgroup.IOUsage{{Device: "8:0", ReadBytes: 4096, WriteBytes: 1 << 30}},
		},
		Network: []Interface{{Name: "eth0", RxBytes: 1000, RxPackets: 1, TxBytes: 2000, TxPackets: 20, TxDropped: 3}},
		Log: Log{Path: "/log", Dropped: 12, Lines: []LogLine{
			{at.Add(-time.Second), "stdout", "fine\tso far"}, {at, "stderr", "</pre><script>alert(1)</script>\x1b]0;x\a"},
		}},
		Collectors: []Collector{{Collect: request.Collect{Path: "/t/*", On: request.OnAlways, Max: 1 << 20}, Applied: true, Taken: 2, Bytes: 3 << 20, Skipped: 1, Why: "the limit of 1.0 MiB is reached"},
			{Collect: request.Collect{Path: "/core", On: request.OnOOM, Max: 1 << 20}}},
		Files: []File{
			{Path: "/t/core", Type: "file", Bytes: 3 << 20, Taken: true}, {Path: "/t/\x1b[31m", Type: "fifo", Why: "it holds no data"},
			{Path: "/t/l", Type: "link", Taken: true}, {Path: "/t/again", Type: "file", Taken: true, LinkOf: "/t/core"},
		},
		FilesMore: 4, Archive: &Archive{Bytes: 1234, Entries: 2}, Unknown: []string{"counters: it is a mystery"},
		Samples: &Samples{Interval: "1s", UnixMs: []int64{0, 1000, 2000, 3000}, CPU: []int64{0, 500_000, 600_000, 600_000}, Memory: []int64{1 << 20, 30 << 20, 63 << 20, 10 << 20}},
	}
	r := NewReport(m, Custody{Held: true, Until: at.Add(time.Hour), Mounts: []Mount{
		{Target: "/", Type: "overlay", From: "private", Used: 12 << 10}, {Target: "/t", Type: "tmpfs", From: "private", Used: 3 << 20, Size: 8 << 20, Memory: true},
		{Target: "/dev/shm", Type: "tmpfs", From: "sandbox", Used: 1 << 20, Size: 64 << 20, Memory: true},
		{Target: "/host", Type: "bind", From: "host"}, {Target: "/other", Type: "bind", From: "member:db"},
		{Target: "/before", Type: "overlay", Used: 1, Size: 2},
	}}, at.Add(time.Minute))
	r.Hooks = []Hook{
		{Stage: "prestart", Path: "/h/first", State: "succeeded", Attempts: 1, Output: "fine"},
		{Stage: "poststop", Path: "/h/last\n", State: "failed", Attempts: 3, Error: "exit status 1", Output: "no \x1b[31m space"},
	}
	return r
}

func TestTextPage(t *testing.T) {
	var b bytes.Buffer
	if err := example().WriteText(&b); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/page.txt"
	if *update {
		if err := os.WriteFile(golden, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(b.String(), "\n")); d != "" {
		t.Errorf("the page differs from %s (-want +got); see the change with -update and git diff:\n%s", golden, d)
	}
}

// Of one that runs, nothing is said of what is to happen after its end.
func TestPageOfRunning(t *testing.T) {
	r := example()
	r.Manifest.Exit, r.Manifest.State, r.Custody.Until = nil, "Running", time.Time{}
	var text, page bytes.Buffer
	if err := errors.Join(r.WriteText(&text), r.WriteHTML(&page)); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{text.String(), page.String()} {
		if strings.Contains(strings.ToLower(s), "still held") || strings.Contains(s, "removed") || !strings.Contains(s, "it has not ended") {
			t.Errorf("the page says:\n%s", s)
		}
	}
}

// The page is well formed, needs nothing from anywhere, runs nothing, and has names
// for what assistive technology reads out.
func TestHTMLPage(t *testing.T) {
	var b bytes.Buffer
	if err := example().WriteHTML(&b); err != nil {
		t.Fatal(err)
	}
	doc, err := html.Parse(&b)
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	attr := func(n *html.Node, key string) (string, bool) {
		for _, a := range n.Attr {
			if a.Key == key {
				return a.Val, true
			}
		}
		return "", false
	}
	ids := map[string]bool{}
	var refs []string
	points := regexp.MustCompile(`^\d+\.\d,\d+\.\d( \d+\.\d,\d+\.\d)+$`)
	for n := range doc.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		count[n.Data]++
		if id, ok := attr(n, "id"); ok {
			ids[id] = true
		}
		if ref, ok := attr(n, "aria-labelledby"); ok {
			refs = append(refs, ref)
		}
		for _, a := range n.Attr {
			if a.Key == "src" || a.Key == "href" || strings.HasPrefix(a.Key, "on") {
				t.Errorf("%s has %s=%q", n.Data, a.Key, a.Val)
			}
		}
		switch n.Data {
		case "th":
			if _, ok := attr(n, "scope"); !ok {
				t.Error("a header of a table has no scope")
			}
		case "svg":
			if _, ok := attr(n, "aria-label"); !ok {
				t.Error("a picture has no label")
			}
		case "polyline":
			if p, _ := attr(n, "points"); !points.MatchString(p) {
				t.Errorf("points %q", p)
			}
		case "script", "iframe", "object", "embed", "form", "link", "img":
			t.Errorf("there is a %s", n.Data)
		}
	}
	for _, r := range refs {
		if !ids[r] {
			t.Errorf("aria-labelledby=%q names nothing", r)
		}
	}
	if count["svg"] != 2 || count["line"] != 1 || count["section"] != 7 || count["h1"] != 1 || count["main"] != 1 || count["b"] != 0 {
		t.Errorf("elements: %v", count)
	}
}

func TestCurves(t *testing.T) {
	for name, s := range map[string]*Samples{
		"none": nil, "too few": {UnixMs: []int64{1, 2}, CPU: []int64{1, 2}, Memory: []int64{1, 2}},
		"of different length": {UnixMs: []int64{1, 2, 3}, CPU: []int64{1, 2}, Memory: []int64{1, 2, 3}},
	} {
		if c := curves(s, 0); c != nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
	c := curves(&Samples{UnixMs: []int64{0, 1000, 2000}, CPU: []int64{0, 500_000, 1_500_000}, Memory: []int64{10, 20, 40}}, 1000)
	if len(c) != 2 || c[0].Points != "0.0,90.0 300.0,60.0 600.0,0.0" || c[0].Limit != 0 || c[1].Points != "0.0,60.0 300.0,60.0 600.0,0.0" || c[1].Top != "100 %" {
		t.Errorf("curves %+v", c)
	}
	if c := curves(&Samples{UnixMs: []int64{5, 5, 5}, CPU: []int64{9, 1, 1}, Memory: []int64{0, 0, 0}}, 0); len(c) != 2 {
		t.Errorf("of nothing: %+v", c)
	}
}

func TestSampler(t *testing.T) {
	host, err := cgroup.Detect()
	if err != nil {
		t.Skip(err)
	}
	off := NewSampler(host, 0)
	off.Add("a", "/")
	off.measure()
	if off.Samples("a") != nil {
		t.Error("it measures although it is off")
	}
	s := NewSampler(host, time.Second)
	s.Add("none", "/no/such/cgroup")
	s.measure()
	if s.Samples("none") != nil {
		t.Error("there are samples of a cgroup that is not there")
	}
	r := &ring{}
	for i := range int64(maxSamples + 5) {
		r.add(sample{i, i, i})
	}
	s.rings["x"] = r
	got := s.Samples("x")
	if len(got.UnixMs) != maxSamples || got.UnixMs[0] != 5 || got.UnixMs[maxSamples-1] != maxSamples+4 {
		t.Errorf("%d samples from %d", len(got.UnixMs), got.UnixMs[0])
	}
	s.Remove("x")
	if s.Samples("x") != nil {
		t.Error("it is not forgotten")
	}
}

func TestParseNetDev(t *testing.T) {
	got := parseNetDev(`Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:    1234      10    1    2    0     0          0         0     5678      20    3    4    0     0       0          0
 cut: 1 2
`)
	want := []Interface{{"eth0", 1234, 10, 1, 2, 5678, 20, 3, 4}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}
