package metrics

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"iter"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/testenv"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

var update = flag.Bool("update", false, "write the table of metrics in docs/operations.md anew")

var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// source has as many sandboxes as records, each with the members of its id.
type source struct {
	records []*sandbox.Record
	members map[string][]*sandbox.MemberRecord
}

func (s *source) Records() iter.Seq2[*sandbox.Record, []*sandbox.MemberRecord] {
	return func(yield func(*sandbox.Record, []*sandbox.MemberRecord) bool) {
		for _, r := range s.records {
			if !yield(r, s.members[r.ID]) {
				return
			}
		}
	}
}

func (s *source) MemberDir(m *sandbox.MemberRecord) string { return m.ID }

func (s *source) add(id string, st sandbox.State, ms ...*sandbox.MemberRecord) {
	s.records = append(s.records, &sandbox.Record{
		ID: id, State: st, Config: sandbox.Config{Name: "name-" + id}, CreatedAt: now.Add(time.Duration(len(s.records)) * time.Second),
	})
	if s.members == nil {
		s.members = map[string][]*sandbox.MemberRecord{}
	}
	s.members[id] = ms
}

// counted is what monitors have counted, by directory.
type counted map[string]Output

func (c counted) read(dir string) (Output, error) {
	if o, ok := c[dir]; ok {
		return o, nil
	}
	return Output{}, os.ErrNotExist
}

// alive is a process that lives as long as the test.
func alive(t testing.TB) procid.ID {
	t.Helper()
	id, err := procid.Of(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// expect compares some families with their text.
func expect(t *testing.T, m *Metrics, text string, names ...string) {
	t.Helper()
	if err := testutil.GatherAndCompare(m.Gatherer(), strings.NewReader(text), names...); err != nil {
		t.Error(err)
	}
}

// value returns the one series of a family that has the labels, as NAME=VALUE.
func value(t *testing.T, m *Metrics, family string, labels ...string) float64 {
	t.Helper()
	fs, err := m.Gatherer().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fs {
		if f.GetName() != family {
			continue
		}
	series:
		for _, s := range f.GetMetric() {
			has := map[string]bool{}
			for _, l := range s.GetLabel() {
				has[l.GetName()+"="+l.GetValue()] = true
			}
			for _, want := range labels {
				if !has[want] {
					continue series
				}
			}
			switch {
			case s.Counter != nil:
				return s.GetCounter().GetValue()
			case s.Histogram != nil:
				return float64(s.GetHistogram().GetSampleCount())
			}
			return s.GetGauge().GetValue()
		}
	}
	t.Errorf("no %s%v", family, labels)
	return -1
}

func TestOutcomes(t *testing.T) {
	m := New(Options{Now: func() time.Time { return now }})
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, "ok"},
		{&sandbox.OpError{Err: sandbox.ErrExists}, "refused"},
		{fmt.Errorf("x: %w", sandbox.ErrInvalid), "refused"},
		{&sandbox.OpError{Err: sandbox.ErrNotFound}, "refused"},
		{&sandbox.OpError{Err: sandbox.ErrState}, "refused"},
		{&sandbox.OpError{Err: &sandbox.StartError{Text: "no such file"}}, "refused"},
		{&sandbox.OpError{Err: context.Canceled}, "canceled"},
		{fmt.Errorf("step: %w", context.DeadlineExceeded), "timeout"},
		{os.ErrDeadlineExceeded, "timeout"},
		{errors.New("disk on fire"), "error"},
		{&sandbox.OpError{Err: &sandbox.HookError{Err: errors.New("exit code 1")}}, "error"},
	} {
		before := value(t, m, "sandboxd_operations_total", "operation=create", "outcome="+tt.want)
		m.Operation("create")(tt.err)
		if got := value(t, m, "sandboxd_operations_total", "operation=create", "outcome="+tt.want); got != before+1 {
			t.Errorf("%v: %s is %v, want %v", tt.err, tt.want, got, before+1)
		}
	}
	if got := value(t, m, "sandboxd_operation_duration_seconds", "operation=create", "outcome=refused"); got != 5 {
		t.Errorf("%v refused operations were timed, want 5", got)
	}
}

// A create that hangs is to be seen, and where.
func TestInFlight(t *testing.T) {
	at := now
	m := New(Options{Now: func() time.Time { return at }})
	first := m.Operation("create")
	at = at.Add(5 * time.Second)
	second := m.Operation("create")
	step := m.Step("create", "cgroup")
	at = at.Add(2 * time.Second)
	check := func(op, oldest, steps float64) {
		t.Helper()
		if got := value(t, m, "sandboxd_operations_in_flight", "operation=create"); got != op {
			t.Errorf("%v in flight, want %v", got, op)
		}
		if got := value(t, m, "sandboxd_operation_oldest_age_seconds", "operation=create"); got != oldest {
			t.Errorf("the oldest is %v old, want %v", got, oldest)
		}
		if got := value(t, m, "sandboxd_operation_steps_in_flight", "operation=create", "step=cgroup"); got != steps {
			t.Errorf("%v in cgroup, want %v", got, steps)
		}
	}
	check(2, 7, 1)
	first(nil)
	check(1, 2, 1)
	step(errors.New("no space"))
	second(errors.New("no space"))
	check(0, 0, 0)
	if got := value(t, m, "sandboxd_operation_step_failures_total", "step=cgroup"); got != 1 {
		t.Errorf("%v failures, want 1", got)
	}
}

func TestExits(t *testing.T) {
	m := New(Options{})
	for _, e := range []sandbox.Exit{
		{Known: true},
		{Known: true, OOMKilled: true}, // a child was killed, and init coped
		{Known: true, Code: 3},
		{Known: true, Code: 137, Signal: 9},
		{Known: true, Code: 137, Signal: 9, OOMKilled: true},
		{Known: true, Code: 1, OOMKilled: true},
		{Code: -1},
	} {
		m.Exited(&sandbox.MemberRecord{Exit: &e}, "")
	}
	expect(t, m, `
# HELP sandboxd_member_exits_total Members whose init has ended, by class. For oom raise the memory limit or mend the leak; for unknown see what kills monitors.
# TYPE sandboxd_member_exits_total counter
sandboxd_member_exits_total{class="error"} 1
sandboxd_member_exits_total{class="ok"} 2
sandboxd_member_exits_total{class="oom"} 2
sandboxd_member_exits_total{class="signal"} 1
sandboxd_member_exits_total{class="unknown"} 1
`, "sandboxd_member_exits_total")
}

func TestState(t *testing.T) {
	src := &source{}
	src.add("1", sandbox.Ready,
		&sandbox.MemberRecord{ID: "a", State: sandbox.MemberRunning},
		&sandbox.MemberRecord{ID: "b", State: sandbox.MemberStarting},
		&sandbox.MemberRecord{ID: "c", State: sandbox.MemberExited, Exit: &sandbox.Exit{}, HeldSince: now.Add(-time.Hour), Monitor: alive(t)},
		&sandbox.MemberRecord{ID: "d", State: sandbox.MemberExited, Exit: &sandbox.Exit{}, HeldSince: now.Add(-2 * time.Hour), Monitor: procid.ID{PID: 1 << 24, Start: 1}})
	src.members["1"] = append(src.members["1"], &sandbox.MemberRecord{ID: "e", State: sandbox.MemberExited, Exit: &sandbox.Exit{},
		HeldSince: now.Add(-3 * time.Hour), Monitor: alive(t), Released: &sandbox.CustodyRelease{}}) // it is about to be killed
	src.add("2", sandbox.Unclean)
	tmpfs := func(r *sandbox.MemberRecord, dir string) int64 { return map[string]int64{"c": 4096}[dir] }
	m := New(Options{Now: func() time.Time { return now }})
	m.Attach(src, Readers{
		HeldTmpfs: tmpfs, Events: func() (uint64, bool) { return 7, true },
		Networks: func() []Network {
			return []Network{{Driver: "cni", Attached: 3, Tombstones: 2, Oldest: now.Add(-time.Minute)}, {Driver: "builtin"}}
		},
		Leases: func() []Leases { return []Leases{{"ipv4", 3, 250}} },
	})
	for family, want := range map[string]float64{
		"sandboxd_custody_held_tmpfs_bytes": 4096, "sandboxd_event_sequence": 7, "sandboxd_events_behind": 1,
		"sandboxd_network_attachments driver=cni": 3, "sandboxd_network_tombstones driver=cni": 2, "sandboxd_network_tombstones driver=builtin": 0,
		"sandboxd_network_tombstone_oldest_age_seconds driver=cni": 60, "sandboxd_network_tombstone_oldest_age_seconds driver=builtin": 0,
		"sandboxd_network_leases_in_use family=ipv4": 3, "sandboxd_network_leases_free family=ipv4": 250,
		"sandboxd_sandboxes state=Ready": 1, "sandboxd_sandboxes state=Unclean": 1, "sandboxd_sandboxes state=NotReady": 0,
		"sandboxd_members state=Running": 1, "sandboxd_members state=Created": 1, "sandboxd_members state=Exited": 3,
		"sandboxd_custody_held_members": 1, "sandboxd_custody_oldest_age_seconds": 3600,
	} {
		f := strings.Fields(family)
		if got := value(t, m, f[0], f[1:]...); got != want {
			t.Errorf("%s is %v, want %v", family, got, want)
		}
	}
}

// What members hold is read once, and then a few at each scrape when it is old.
func TestHeldTmpfsIsReadSeldom(t *testing.T) {
	at, reads, each := now, 0, int64(1)
	src := &source{}
	const n = heldReads + 10
	for i := range n {
		src.add(fmt.Sprint(i), sandbox.Ready, &sandbox.MemberRecord{
			ID: fmt.Sprint("m", i), State: sandbox.MemberExited, Exit: &sandbox.Exit{}, HeldSince: now, Monitor: alive(t),
		})
	}
	m := New(Options{Now: func() time.Time { return at }})
	m.Attach(src, Readers{HeldTmpfs: func(*sandbox.MemberRecord, string) int64 { reads++; return each }})
	check := func(wantReads int, want float64) {
		t.Helper()
		reads = 0
		if got := value(t, m, "sandboxd_custody_held_tmpfs_bytes"); got != want || reads != wantReads {
			t.Errorf("%v bytes with %d reads, want %v with %d", got, reads, want, wantReads)
		}
	}
	check(n, n)
	check(0, n)
	at, each = at.Add(heldFor), 2
	check(heldReads, n+heldReads)
	check(10, 2*n)
	check(0, 2*n)
	src.records = src.records[:1]
	check(0, 2)
	src.add("new", sandbox.Ready, &sandbox.MemberRecord{ID: "new", State: sandbox.MemberExited, Exit: &sandbox.Exit{}, HeldSince: now, Monitor: alive(t)})
	check(1, 4)
}

// An exit does not wait for a scrape that waits for the file systems of a member.
func TestExitWaitsForNoScrape(t *testing.T) {
	src := &source{}
	src.add("1", sandbox.Ready, &sandbox.MemberRecord{
		ID: "m", State: sandbox.MemberExited, Exit: &sandbox.Exit{}, HeldSince: now, Monitor: alive(t),
	})
	m := New(Options{})
	reading, exited := make(chan bool), make(chan bool)
	m.Attach(src, Readers{HeldTmpfs: func(*sandbox.MemberRecord, string) int64 {
		close(reading)
		select {
		case <-exited:
		case <-time.After(5 * time.Second):
			t.Error("the exit waits")
		}
		return 1
	}})
	go func() {
		<-reading
		m.Exited(&sandbox.MemberRecord{ID: "other", Exit: &sandbox.Exit{}}, "other")
		close(exited)
	}()
	value(t, m, "sandboxd_custody_held_tmpfs_bytes")
}

// The counts of members go with them, the total stays, and a new daemon's total
// begins with nothing.
func TestOutput(t *testing.T) {
	c := counted{"old": {Bytes: 1000, LinesDropped: 5}, "done": {Bytes: 7}}
	src := &source{}
	old := &sandbox.MemberRecord{ID: "old", State: sandbox.MemberRunning}
	done := &sandbox.MemberRecord{ID: "done", State: sandbox.MemberExited, Exit: &sandbox.Exit{}}
	src.add("1", sandbox.Ready, old, done)
	m := New(Options{})
	m.Attach(src, Readers{Output: c.read})
	check := func(bytes, lines, clients float64) {
		t.Helper()
		for name, want := range map[string]float64{
			"sandboxd_log_bytes_total": bytes, "sandboxd_log_lines_dropped_total": lines, "sandboxd_attach_clients_dropped_total": clients,
		} {
			if got := value(t, m, name); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
	}
	check(0, 0, 0)
	c["old"] = Output{Bytes: 1010, LinesDropped: 6, ClientsDropped: 1}
	check(10, 1, 1)
	check(10, 1, 1)
	// One that is added, writes, exits and is removed, all between two scrapes.
	c["new"] = Output{Bytes: 30}
	m.Exited(&sandbox.MemberRecord{ID: "new", Exit: &sandbox.Exit{}}, "new")
	delete(c, "new")
	check(40, 1, 1)
	// One that exits, and is still there.
	c["old"] = Output{Bytes: 1015, LinesDropped: 6, ClientsDropped: 1}
	exited := *old
	exited.State, exited.Exit = sandbox.MemberExited, &sandbox.Exit{}
	src.members["1"][0] = &exited
	m.Exited(&exited, "old")
	check(45, 1, 1)
	check(45, 1, 1)
	// One that goes without an exit leaves nothing behind here.
	c["gone"] = Output{Bytes: 1}
	src.members["1"] = append(src.members["1"], &sandbox.MemberRecord{ID: "gone", State: sandbox.MemberCreated})
	check(46, 1, 1)
	src.members["1"] = src.members["1"][:2]
	check(46, 1, 1)
	if n := len(m.output.seen); n != 0 {
		t.Errorf("%d members are remembered, want 0: %v", n, m.output.seen)
	}
}

func TestPerSandboxIsBounded(t *testing.T) {
	src := &source{}
	for i := range 5 {
		src.add(fmt.Sprint(4-i), sandbox.Ready)
	}
	mem := uint64(4096)
	read := func(r *sandbox.Record) (Usage, error) {
		if r.ID == "3" {
			return Usage{}, os.ErrNotExist // it is being removed
		}
		return Usage{Memory: &mem, Network: &Traffic{Received: 1, Sent: 2}}, nil
	}
	m := New(Options{})
	m.Attach(src, Readers{Usage: read, PerSandbox: 3})
	expect(t, m, `
# HELP sandboxd_sandbox_memory_bytes Memory charged to the sandbox, page cache and the tmpfs of exited members included. Limit members with --memory.
# TYPE sandboxd_sandbox_memory_bytes gauge
sandboxd_sandbox_memory_bytes{name="name-2",sandbox="2"} 4096
sandboxd_sandbox_memory_bytes{name="name-4",sandbox="4"} 4096
# HELP sandboxd_sandbox_metrics_left_out Sandboxes of which nothing is shown because there are more than --metrics-per-sandbox allows: raise it if the monitoring bears it.
# TYPE sandboxd_sandbox_metrics_left_out gauge
sandboxd_sandbox_metrics_left_out 2
`, "sandboxd_sandbox_memory_bytes", "sandboxd_sandbox_metrics_left_out", "sandboxd_sandbox_cpu_seconds_total")
}

func TestGarbage(t *testing.T) {
	m := New(Options{Now: func() time.Time { return now }})
	if at, _ := m.Waiting(); !at.IsZero() {
		t.Errorf("a garbage collection at %v, want none", at)
	}
	stuck := garbage.Finding{Kind: garbage.Tombstone, Name: "x", Action: "retried", Err: "no such plugin"}
	m.Garbage([]garbage.Finding{{Kind: garbage.Cgroup, Action: "removed"}, stuck})
	for family, want := range map[string]float64{
		"sandboxd_garbage_found_total kind=cgroup": 1, "sandboxd_garbage_removed_total kind=cgroup": 1, "sandboxd_garbage_waiting kind=cgroup": 0,
		"sandboxd_garbage_found_total kind=tombstone": 1, "sandboxd_garbage_removed_total kind=tombstone": 0, "sandboxd_garbage_waiting kind=tombstone": 1,
	} {
		f := strings.Fields(family)
		if got := value(t, m, f[0], f[1:]...); got != want {
			t.Errorf("%s is %v, want %v", family, got, want)
		}
	}
	if at, stay := m.Waiting(); !at.Equal(now) || len(stay) != 1 || stay[0] != stuck {
		t.Errorf("waiting = %v, %v", at, stay)
	}
	m.Garbage([]garbage.Finding{stuck})
	if got := value(t, m, "sandboxd_garbage_found_total", "kind=tombstone"); got != 1 {
		t.Errorf("a tombstone that stays was found %v times, want 1", got)
	}
	m.Garbage(nil)
	if got := value(t, m, "sandboxd_garbage_waiting", "kind=tombstone"); got != 0 {
		t.Errorf("%v tombstones wait, want 0", got)
	}
}

// full returns metrics that have something in every family.
func full(t testing.TB, sandboxes int) *Metrics {
	t.Helper()
	src := &source{}
	monitor := alive(t)
	dir := t.TempDir()
	for i := range sandboxes {
		id := fmt.Sprintf("%016x", i)
		m := &sandbox.MemberRecord{ID: filepath.Join(dir, id), State: sandbox.MemberRunning, Monitor: monitor}
		if i%2 == 1 {
			m.State, m.Exit, m.HeldSince = sandbox.MemberExited, &sandbox.Exit{}, now
		}
		src.add(id, sandbox.Ready, m)
		if err := os.Mkdir(m.ID, 0o700); err != nil {
			t.Fatal(err)
		}
		page := make([]byte, 4096) // docs/ARCHITECTURE.md, The monitor
		binary.LittleEndian.PutUint32(page[0:], 0x534d4253)
		binary.LittleEndian.PutUint32(page[4:], 1)
		binary.LittleEndian.PutUint64(page[72:], uint64(i))
		if err := os.WriteFile(filepath.Join(m.ID, "status"), page, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(dir string) (Output, error) {
		out, err := member.ReadOutput(dir)
		return Output{out.Bytes, out.LogErrors, out.ClientsDropped}, err
	}
	second, n := time.Second, uint64(1)
	m := New(Options{Version: "v1", Commit: "c", Go: "go1.26"})
	m.Recovered(time.Second)
	m.Attach(src, Readers{
		Output: read, HeldTmpfs: func(*sandbox.MemberRecord, string) int64 { return 1 },
		Events:   func() (uint64, bool) { return 7, true },
		Networks: func() []Network { return []Network{{Driver: "builtin"}, {Driver: "cni"}} },
		Leases:   func() []Leases { return []Leases{{"ipv4", 1, 2}, {"ipv6", 1, 2}} },
		Usage: func(*sandbox.Record) (Usage, error) {
			return Usage{CPU: &second, Memory: &n, PIDs: &n, Network: &Traffic{}}, nil
		},
		PerSandbox: 10,
	})
	for _, d := range networkDrivers {
		for _, op := range networkOperations {
			m.Network(d, op, time.Second, nil)
		}
	}
	for _, p := range []string{"bridge", "host-local", "portmap"} {
		for _, c := range []string{"ADD", "DEL"} {
			m.Plugin(p, c, time.Second, errors.New("x"))
		}
	}
	for _, op := range operations {
		for _, err := range []error{nil, errors.New("x"), sandbox.ErrState, context.Canceled, context.DeadlineExceeded} {
			m.Operation(op)(err)
		}
		for _, step := range []string{"record", "cgroup", "pause", "network", "data", "monitor", "created", "ready"} {
			m.Step(op, step)(errors.New("x"))
		}
	}
	for _, s := range hookStages() {
		m.Hook(string(s), time.Second, nil)
	}
	m.Collection(time.Second, nil)
	m.Garbage(nil)
	return m
}

// scrape reads the metrics as Prometheus does.
func scrape(t testing.TB, m *Metrics, accept string) string {
	t.Helper()
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, r)
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestLint(t *testing.T) {
	problems, err := testutil.GatherAndLint(full(t, 3).Gatherer())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestPromtool(t *testing.T) {
	testenv.Program(t, "promtool")
	m := full(t, 3)
	for _, accept := range []string{"text/plain", openMetrics} {
		cmd := exec.Command("promtool", "check", "metrics")
		cmd.Stdin = strings.NewReader(scrape(t, m, accept))
		out, err := cmd.CombinedOutput()
		if accept == openMetrics {
			// promtool reads the text format only, in which the help of a counter
			// would have its name to the end.
			if lint := new(exec.ExitError); errors.As(err, &lint) && lint.ExitCode() == 3 {
				err = nil
			}
			out = regexp.MustCompile(`(?m)^\w+_total no help text\n`).ReplaceAll(out, nil)
		}
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", accept, err, out)
		}
	}
}

const openMetrics = "application/openmetrics-text;version=1.0.0"

func TestOpenMetrics(t *testing.T) {
	text := scrape(t, full(t, 1), openMetrics)
	if !strings.HasSuffix(text, "# EOF\n") || !strings.Contains(text, "# UNIT") && !strings.Contains(text, "# TYPE sandboxd_operations counter") {
		t.Errorf("not OpenMetrics: …%s", text[max(0, len(text)-200):])
	}
	families := map[string]bool{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "#" && f[1] == "TYPE" {
			if families[f[2]] {
				t.Errorf("family %s is there twice", f[2])
			}
			families[f[2]] = true
		}
	}
}

// No label may have values that come from users.
func TestLabelsAreBounded(t *testing.T) {
	few, many := full(t, 1), full(t, 400)
	count := func(m *Metrics) (n int) {
		for line := range strings.Lines(scrape(t, m, "text/plain")) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "sandboxd_sandbox_") {
				n++
			}
		}
		return n
	}
	if a, b := count(few), count(many); a != b {
		t.Errorf("%d series with one sandbox, %d with 400", a, b)
	}
}

// The table in the documentation has a row for each family, with what it says of
// itself.
func TestDocumentation(t *testing.T) {
	const name, begin, end = "../docs/operations.md", "<!-- metrics: begin -->\n", "<!-- metrics: end -->\n"
	fs, err := full(t, 1).Gatherer().Gather()
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| metric | type | labels | what it is, and what to do |\n|---|---|---|---|\n")
	for _, f := range fs {
		if !strings.HasPrefix(f.GetName(), "sandboxd_") {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
	}
	doc, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(doc), begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %q and %q", name, begin, end)
	}
	if *update {
		if err := os.WriteFile(name, []byte(before+begin+table.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if old != table.String() {
		t.Errorf("the table in %s differs; go test ./metrics -run TestDocumentation -update writes it anew", name)
	}
}

func TestConcurrent(t *testing.T) {
	m := full(t, 10)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 50 {
				done := m.Operation("create")
				step := m.Step("create", fmt.Sprint("step", i%3))
				m.Exited(&sandbox.MemberRecord{Exit: &sandbox.Exit{}}, "x")
				m.Garbage([]garbage.Finding{{Kind: garbage.Temp}})
				step(nil)
				done(nil)
			}
		})
		wg.Go(func() {
			for range 10 {
				scrape(t, m, "text/plain")
				m.Waiting()
			}
		})
	}
	wg.Wait()
	if got := value(t, m, "sandboxd_operations_in_flight", "operation=create"); got != 0 {
		t.Errorf("%v in flight, want 0", got)
	}
}

// BenchmarkScrape is a scrape with 500 sandboxes, each with a member, of which
// half have exited.
func BenchmarkScrape(b *testing.B) {
	m := full(b, 500)
	h := m.Handler()
	r := httptest.NewRequest("GET", "/metrics", nil)
	b.ReportAllocs()
	for b.Loop() {
		h.ServeHTTP(discard{}, r)
	}
}

type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) WriteHeader(int)             {}
