//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// metricsAddress is where the last started daemon of r serves metrics: it was
// told to take any port of 127.0.0.1.
func metricsAddress(r *rig) string {
	r.Helper()
	// What a daemon that is ready has written may still be on its way here.
	var address string
	r.eventually("it says where metrics are served", func() bool {
		text := r.d.log.String()
		m := regexp.MustCompile(`msg="Metrics served" address=(\S+)`).FindStringSubmatch(text[strings.LastIndex(text, "--- serve"):])
		if m != nil {
			address = m[1]
		}
		return m != nil
	})
	return address
}

// get fetches http://ADDRESS PATH and returns status and body. An address that
// begins with / is a Unix socket's.
func get(r *rig, address, path string) (int, string) {
	r.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	host := address
	if strings.HasPrefix(address, "/") {
		host = "localhost"
	}
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+host+path, nil)
	if err != nil {
		r.Fatal(err)
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, to string) (net.Conn, error) {
		var d net.Dialer
		if host != address {
			network, to = "unix", address
		}
		return d.DialContext(ctx, network, to)
	}}}
	res, err := c.Do(req)
	if err != nil {
		r.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// metric is the value of one series, as NAME{LABELS} in the text that the daemon
// serves; 0 if there is no such series.
func metric(r *rig, series string) float64 {
	r.Helper()
	_, text := get(r, metricsAddress(r), "/metrics")
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, series+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				r.Fatal(err)
			}
			return v
		}
	}
	return 0
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	testenv.Program(t, "promtool")
	r.d.flags = []string{"--metrics-address", "127.0.0.1:0", "--metrics-per-sandbox"}
	r.mustServe()
	r.ok("create", "box", "--net", "none")
	r.run("box", "fails", "echo some output; exit 3")
	r.exited("box/fails")
	r.fails(125, "already exists", "create", "box", "--net", "none")
	for series, want := range map[string]float64{
		`sandboxd_sandboxes{state="Ready"}`:                               1,
		`sandboxd_members{state="Exited"}`:                                1,
		`sandboxd_member_exits_total{class="error"}`:                      1,
		`sandboxd_operations_total{operation="create",outcome="ok"}`:      1,
		`sandboxd_operations_total{operation="create",outcome="refused"}`: 1,
		`sandboxd_custody_held_members`:                                   1,
		`sandboxd_log_bytes_total`:                                        float64(len("some output\n")),
		`sandboxd_sandbox_metrics_left_out`:                               0,
	} {
		if got := metric(r, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}

	// One that does not end when it is asked to: the stop is seen where it waits.
	r.run("box", "stubborn", "trap '' TERM; echo ready; while :; do sleep 1; done")
	r.eventually("it ignores the signal", func() bool { return strings.Contains(r.logOf("box/stubborn"), "ready") })
	stop := r.command("stop", "--time", "50s", "box/stubborn")
	if err := stop.Start(); err != nil {
		t.Fatal(err)
	}
	r.eventually("the stop is in flight, in its step", func() bool {
		return metric(r, `sandboxd_operations_in_flight{operation="stop_member"}`) == 1 &&
			metric(r, `sandboxd_operation_steps_in_flight{operation="stop",step="signal"}`) == 1 &&
			metric(r, `sandboxd_operation_oldest_age_seconds{operation="stop_member"}`) > 0
	})
	r.sig(r.member("box/stubborn").PID, unix.SIGKILL)
	if err := stop.Wait(); err != nil {
		t.Error(err)
	}
	if got := metric(r, `sandboxd_operations_in_flight{operation="stop_member"}`); got != 0 {
		t.Errorf("%v stops in flight after it, want 0", got)
	}

	// A pause that is killed is counted.
	r.sig(r.sandbox("box").PausePID, unix.SIGKILL)
	r.eventually("the pause was replaced", func() bool { return metric(r, `sandboxd_pause_reanchors_total{outcome="ok"}`) == 1 })

	_, text := get(r, metricsAddress(r), "/metrics")
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
	for path, want := range map[string]string{"/": "box/fails", "/healthz": "ok", "/readyz": "recovery"} {
		if code, text := get(r, metricsAddress(r), path); code != http.StatusOK || !strings.Contains(text, want) {
			t.Errorf("%s: %d, without %q: %s", path, code, want, text)
		}
	}
	if code, _ := get(r, metricsAddress(r), "/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles without --debug-pprof: %d", code)
	}

	// The counts of a new daemon begin with nothing; what there is stays.
	r.kill()
	r.mustServe()
	if got := metric(r, "sandboxd_log_bytes_total"); got != 0 {
		t.Errorf("%v bytes of output since the new daemon began, want 0", got)
	}
	if metric(r, `sandboxd_sandboxes{state="Ready"}`) != 1 || metric(r, "sandboxd_recovery_duration_seconds") <= 0 {
		t.Error("the new daemon does not show what it took up")
	}
	r.ok("rm", "-f", "box")

	for _, tt := range []struct{ flag, value, want string }{
		{"--metrics-address", "9477", "want HOST:PORT or unix://PATH"},
		{"--metrics-address", "127.0.0.1:", "want HOST:PORT or unix://PATH"},
		{"--metrics-address", metricsAddress(r), "address already in use"},
		{"--metrics-address", "unix://x", "begins with /"},
		{"--metrics-per-sandbox", "-1", "want 0 or more"},
	} {
		args := append(r.d.serveArgs(), "--state", r.d.state+".x", "--root", r.d.state+".x/root", "--address", "unix://"+r.d.state+".x/s", tt.flag+"="+tt.value)
		r.fails(125, tt.want, args...)
		if err := os.RemoveAll(r.d.state + ".x"); err != nil {
			t.Error(err)
		}
	}
}

// The alerts are what their tests say.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	testenv.Program(t, "promtool")
	for _, args := range [][]string{
		{"check", "config", "--lint=all", "--lint-fatal", "prometheus.yaml"},
		{"check", "rules", "--lint=all", "--lint-fatal", "alerts.yaml"},
		{"test", "rules", "alerts_test.yaml"},
	} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = "../docs/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	rules, err := os.ReadFile("../docs/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("../docs/prometheus/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		for _, what := range []string{" fires\n", " is quiet\n"} {
			if !strings.Contains(string(tests), m[1]+what) {
				t.Errorf("there is no test that %s%s", m[1], strings.TrimSpace(what))
			}
		}
	}
}

// quietQueries may return nothing on a host where all is well, by the reason.
var quietQueries = map[string]string{
	`sum by (operation, step) (sandboxd_operation_steps_in_flight{instance=~".*"}) > 0`:                                                        "nothing is under way",
	`histogram_quantile(0.99, sum by (le, driver, operation) (rate(sandboxd_network_operation_duration_seconds_bucket{instance=~".*"}[10s])))`: "no sandbox has a network",
	`sum by (plugin, command, outcome) (rate(sandboxd_network_plugin_runs_total{instance=~".*"}[10s]))`:                                        "no CNI network is configured",
	`histogram_quantile(0.99, sum by (le, plugin, command) (rate(sandboxd_network_plugin_duration_seconds_bucket{instance=~".*"}[10s])))`:      "no CNI network is configured",
}

// lazyFamilies are not there before something has happened that does not in this test.
var lazyFamilies = map[string]bool{
	"sandboxd_network_operation_duration_seconds": true,
	"sandboxd_network_plugin_runs_total":          true, "sandboxd_network_plugin_duration_seconds": true,
}

// TestDashboard has a real Prometheus scrape a real daemon, with the configuration
// of the documentation, and asks it every query of the dashboard and every
// expression of the alerts.
func TestDashboard(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	testenv.Program(t, "prometheus")
	r.d.flags = []string{"--metrics-address", "127.0.0.1:0", "--metrics-per-sandbox=5"}
	r.mustServe()
	address := startPrometheus(r, metricsAddress(r))
	var queries []string
	for _, q := range dashboardQueries(t) {
		queries = append(queries, strings.NewReplacer("$__rate_interval", "10s", "$instance", ".*").Replace(q))
	}
	if len(queries) < 30 {
		t.Fatalf("the dashboard has %d queries", len(queries))
	}

	// Something of everything has to happen between two scrapes.
	r.ok("create", "box", "--net", "none")
	for i, end := range []string{"exit 0", "exit 3", "kill -9 $$"} {
		name := fmt.Sprint("m", i)
		r.run("box", name, "echo hello; "+end, "--hook", "poststop=/bin/true", "--collect", "/etc")
		r.ok("rm", "-f", "box/"+name) // which waits for hook and collection
	}
	r.run("box", "stays", "sleep 1000")
	r.fails(125, "already exists", "create", "box", "--net", "none")
	r.fails(127, "no such file", "run", "box", "--rootfs", r.rootfs, "--name", "none", "--", "/none")

	missing := queries
	for deadline := time.Now().Add(ready); len(missing) > 0 && time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		var still []string
		for _, q := range missing {
			if n := query(r, address, q); n == 0 && quietQueries[q] == "" {
				still = append(still, q)
			}
		}
		missing = still
	}
	for _, q := range missing {
		t.Errorf("%s returns nothing", q)
	}
	rules, err := os.ReadFile("../docs/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	checkNames(r, string(rules)+strings.Join(queries, "\n"))
	r.ok("rm", "-f", "box")
}

// checkNames finds names of metrics that no daemon has.
func checkNames(r *rig, text string) {
	r.Helper()
	_, page := get(r, metricsAddress(r), "/metrics")
	for _, name := range regexp.MustCompile(`\b(sandboxd|process|go)_[a-z_]+\b`).FindAllString(text, -1) {
		family := strings.TrimSuffix(name, "_bucket")
		if !strings.Contains(page, "# TYPE "+family+" ") && !lazyFamilies[family] {
			r.Errorf("there is no metric %s", name)
		}
	}
}

// dashboardQueries are the expressions of all panels.
func dashboardQueries(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("../docs/prometheus/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	var qs []string
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			qs = append(qs, target.Expr)
		}
	}
	return qs
}

// startPrometheus starts a server that scrapes target, and the alerts with it,
// and returns its address when it answers.
func startPrometheus(r *rig, target string) string {
	r.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	config, err := os.ReadFile("../docs/prometheus/prometheus.yaml")
	if err != nil {
		r.Fatal(err)
	}
	rules, err := filepath.Abs("../docs/prometheus/alerts.yaml")
	if err != nil {
		r.Fatal(err)
	}
	dir := r.TempDir()
	file := filepath.Join(dir, "prometheus.yaml")
	text := strings.NewReplacer("127.0.0.1:9477", target, "scrape_interval: 15s", "scrape_interval: 250ms", "- alerts.yaml", "- "+rules).Replace(string(config))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		r.Fatal(err)
	}
	cmd := exec.Command("prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address, "--log.level=warn")
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		cmd.Wait()
		if r.Failed() {
			r.Logf("prometheus said:\n%s", out.String())
		}
	})
	r.eventually("prometheus is ready", func() bool {
		res, err := http.Get("http://" + address + "/-/ready")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	http.DefaultClient.CloseIdleConnections()
	return address
}

// query asks a Prometheus and returns how many series it gets.
func query(r *rig, address, expr string) int {
	r.Helper()
	_, text := get(r, address, "/api/v1/query?query="+url.QueryEscape(expr))
	var res struct {
		Status, Error string
		Data          struct{ Result []json.RawMessage }
	}
	if err := json.Unmarshal([]byte(text), &res); err != nil {
		r.Fatalf("%s: %v in %q", expr, err, text)
	}
	if res.Status != "success" {
		r.Errorf("%s: %s", expr, res.Error)
	}
	return len(res.Data.Result)
}
