package metrics

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Operations that a daemon carries out, as the label operation names them.
var operations = []string{
	"create", "add", "start", "stop_member", "stop", "remove", "remove_member", "auto_remove", "kill", "exec",
}

// How an operation, hook or the like has ended, as the label outcome says.
const (
	outcomeOK       = "ok"
	outcomeRefused  = "refused"  // the request was at fault
	outcomeCanceled = "canceled" // the client has gone away, or the daemon is ending
	outcomeTimeout  = "timeout"
	outcomeError    = "error"
)

var outcomes = []string{outcomeOK, outcomeRefused, outcomeCanceled, outcomeTimeout, outcomeError}

// outcome puts an error into its class.
func outcome(err error) string {
	var start *sandbox.StartError
	var hook *sandbox.HookError
	switch {
	case err == nil:
		return outcomeOK
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return outcomeTimeout
	case errors.Is(err, context.Canceled):
		return outcomeCanceled
	case errors.As(err, &hook): // which is an ErrState too
		return outcomeError
	case errors.Is(err, sandbox.ErrInvalid), errors.Is(err, sandbox.ErrNotFound), errors.Is(err, sandbox.ErrExists),
		errors.Is(err, sandbox.ErrState), errors.As(err, &start):
		return outcomeRefused
	}
	return outcomeError
}

// Classes of exits.
var exitClasses = []string{"ok", "error", "signal", "oom", "unknown"}

func exitClass(e exit.Record) string {
	switch {
	case !e.Known:
		return "unknown"
	case e.Code == 0:
		return "ok"
	case e.OOMKilled:
		return "oom"
	case e.Signal != 0:
		return "signal"
	}
	return "error"
}

// hookStages are the stages of hooks, of sandboxes and of members.
func hookStages() []request.Stage {
	stages := append(request.SandboxStages(), request.MemberStages()...)
	slices.Sort(stages)
	return slices.Compact(stages)
}

// releaseReasons are why custody is released without a removal: its time is over,
// --custody-max, --custody-max-tmpfs, nobody had asked for it, or its monitor was killed.
var releaseReasons = []string{"ttl", "max", "tmpfs", "policy", "monitor"}

// Drivers, what they do, and how that ends.
var (
	networkDrivers    = []string{string(network.ModeBuiltin), string(network.ModeCNI)}
	networkOperations = []string{"attach", "detach", "verify", "restore"}
	networkOutcomes   = []string{outcomeOK, outcomeCanceled, outcomeTimeout, outcomeError}
)

var garbageKinds = []garbage.Kind{
	garbage.Record, garbage.Pause, garbage.Monitor, garbage.Cgroup, garbage.Layer, garbage.Mount, garbage.Link,
	garbage.Nft, garbage.Lease, garbage.CNI, garbage.Tombstone, garbage.Temp, garbage.Collection,
	garbage.Foreign,
}

// Upper bounds of histograms, in seconds.
var (
	operationBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60}
	workBuckets      = []float64{.005, .025, .1, .5, 1, 5, 10, 30, 60, 300}
)

// recorder counts what happens.
type recorder struct {
	now func() time.Time

	total        *prometheus.CounterVec
	duration     *prometheus.HistogramVec
	stepFailures *prometheus.CounterVec
	flight       *flight

	exits       *prometheus.CounterVec
	exited      func(dir string)
	reanchors   *prometheus.CounterVec
	monitors    prometheus.Counter
	recovery    prometheus.Gauge
	hooks       *prometheus.CounterVec
	hookTime    *prometheus.HistogramVec
	collections *prometheus.CounterVec
	collectTime prometheus.Histogram
	releases    *prometheus.CounterVec
	networks    *prometheus.CounterVec
	networkTime *prometheus.HistogramVec
	plugins     *prometheus.CounterVec
	pluginTime  *prometheus.HistogramVec
	found       *prometheus.CounterVec
	removed     *prometheus.CounterVec
	waiting     *prometheus.GaugeVec
	gcLast      prometheus.Gauge

	mu     sync.Mutex
	gcAt   time.Time         // guarded by mu
	gcStay []garbage.Finding // guarded by mu; replaced, never changed
}

func newRecorder(reg prometheus.Registerer, now func() time.Time) *recorder {
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sandboxd_" + name, Help: help}, labels)
		reg.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "sandboxd_" + name, Help: help})
		reg.MustRegister(g)
		return g
	}
	histograms := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "sandboxd_" + name, Help: help, Buckets: buckets}, labels)
		reg.MustRegister(h)
		return h
	}
	r := &recorder{
		now: now,
		total: counters("operations_total",
			"Operations that have ended. Look into the daemon's log for those that ended in error or timeout; refused and canceled are the clients'.",
			"operation", "outcome"),
		duration: histograms("operation_duration_seconds",
			"How long operations took, waiting for others included. If it grows, see which step is in flight.",
			operationBuckets, "operation", "outcome"),
		stepFailures: counters("operation_step_failures_total",
			"Steps of operations, recoveries and undos that failed: the step is where to look.",
			"operation", "step"),
		flight: newFlight(now),
		exits: counters("member_exits_total",
			"Members whose init has ended, by class. For oom raise the memory limit or mend the leak; for unknown see what kills monitors.",
			"class"),
		reanchors: counters("pause_reanchors_total",
			"Pauses that somebody killed. With outcome error the sandbox is NotReady: inspect it, then remove it. Find out who kills them.",
			"outcome"),
		monitors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sandboxd_monitor_replacements_total",
			Help: "Monitors that somebody killed while their member ran, and that were replaced. Find out who kills them.",
		}),
		recovery: gauge("recovery_duration_seconds",
			"How long this daemon took to take up what an earlier one had left. If it is long, look for Unclean sandboxes and slow networks."),
		hooks: counters("hook_runs_total",
			"Attempts to run a hook. For error and timeout, inspect shows the hook's output.", "stage", "outcome"),
		hookTime: histograms("hook_duration_seconds",
			"How long hooks took. What waits for them, waits as long.", workBuckets, "stage"),
		collections: counters("collections_total",
			"Attempts to collect what a member left. For error see the log, the space under the collection directory, and the manifest.", "outcome"),
		releases: counters("custody_releases_total",
			"Members whose root was let go before anybody removed them. For max and tmpfs raise --custody-max or --custody-max-tmpfs, or remove members sooner; ttl and policy are as somebody wanted it; monitor: somebody has killed it.", "reason"),
		networks: counters("network_operations_total",
			"Operations of network drivers that have ended. For error and timeout see the daemon's log, and for cni the plugins' own counts.",
			"driver", "operation", "outcome"),
		networkTime: histograms("network_operation_duration_seconds",
			"How long operations of network drivers took. A create waits for attach, and a removal for detach.",
			workBuckets, "driver", "operation"),
		plugins: counters("network_plugin_runs_total",
			"CNI plugins that were run. For error and timeout see what the plugin has said, in the daemon's log.",
			"plugin", "command", "outcome"),
		pluginTime: histograms("network_plugin_duration_seconds",
			"How long CNI plugins took. Each plugin of a chain adds to the time of a create.",
			workBuckets, "plugin", "command"),
		found: counters("garbage_found_total",
			"Things of ours that belonged to nobody. A rate that stays above zero is a leak: report what gc --dry-run says.", "kind"),
		removed: counters("garbage_removed_total",
			"Things of ours that belonged to nobody and were removed. What was found and not removed is in garbage_waiting.", "kind"),
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "sandboxd_garbage_waiting",
			Help: "What the last garbage collection found and could not remove: gc --dry-run says what and why.",
		}, []string{"kind"}),
		gcLast: gauge("garbage_collection_last_timestamp_seconds",
			"When the last garbage collection ended, 0 if there was none yet. If it is old, the daemon's log says why."),
	}
	r.collectTime = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "sandboxd_collection_duration_seconds",
		Help:    "How long it took to collect what members left. Set limits with --collect PATH,max=SIZE if it is too long.",
		Buckets: workBuckets,
	})
	reg.MustRegister(r.flight, r.monitors, r.collectTime, r.waiting)
	for _, op := range operations {
		for _, o := range outcomes {
			r.total.WithLabelValues(op, o)
		}
	}
	for _, c := range exitClasses {
		r.exits.WithLabelValues(c)
	}
	for _, o := range []string{outcomeOK, outcomeError} {
		r.reanchors.WithLabelValues(o)
	}
	for _, o := range []string{outcomeOK, outcomeTimeout, outcomeError} {
		r.collections.WithLabelValues(o)
		for _, s := range hookStages() {
			r.hooks.WithLabelValues(string(s), o)
		}
	}
	for _, why := range releaseReasons {
		r.releases.WithLabelValues(why)
	}
	for _, d := range networkDrivers {
		for _, op := range networkOperations {
			for _, o := range networkOutcomes {
				r.networks.WithLabelValues(d, op, o)
			}
		}
	}
	for _, k := range garbageKinds {
		r.found.WithLabelValues(string(k))
		r.removed.WithLabelValues(string(k))
		r.waiting.WithLabelValues(string(k))
	}
	return r
}

// Operation implements [sandbox.Observer].
func (r *recorder) Operation(op string) func(error) {
	begin := r.now()
	id := r.flight.begin(op, begin)
	return func(err error) {
		r.flight.end(op, id)
		o := outcome(err)
		r.total.WithLabelValues(op, o).Inc()
		r.duration.WithLabelValues(op, o).Observe(r.now().Sub(begin).Seconds())
	}
}

// Step implements [sandbox.Observer].
func (r *recorder) Step(op, step string) func(error) {
	r.flight.step(op, step, 1)
	return func(err error) {
		r.flight.step(op, step, -1)
		if err != nil {
			r.stepFailures.WithLabelValues(op, step).Inc()
		}
	}
}

// Exited implements [sandbox.Observer].
func (r *recorder) Exited(m *sandbox.MemberRecord, dir string) {
	if m.Exit != nil {
		r.exits.WithLabelValues(exitClass(*m.Exit)).Inc()
	}
	r.exited(dir)
}

// Reanchored implements [sandbox.Observer].
func (r *recorder) Reanchored(err error) {
	o := outcomeOK
	if err != nil {
		o = outcomeError
	}
	r.reanchors.WithLabelValues(o).Inc()
}

// MonitorReplaced implements [sandbox.Observer].
func (r *recorder) MonitorReplaced() { r.monitors.Inc() }

// Recovered implements [sandbox.Observer].
func (r *recorder) Recovered(took time.Duration) { r.recovery.Set(took.Seconds()) }

// Hook implements [sandbox.Observer].
func (r *recorder) Hook(stage string, took time.Duration, err error) {
	r.hooks.WithLabelValues(stage, workOutcome(err)).Inc()
	r.hookTime.WithLabelValues(stage).Observe(took.Seconds())
}

// Collection implements [sandbox.Observer].
func (r *recorder) Collection(took time.Duration, err error) {
	r.collections.WithLabelValues(workOutcome(err)).Inc()
	r.collectTime.Observe(took.Seconds())
}

// Network counts an operation of a network driver.
func (r *recorder) Network(driver, operation string, took time.Duration, err error) {
	r.networks.WithLabelValues(driver, operation, networkOutcome(err)).Inc()
	r.networkTime.WithLabelValues(driver, operation).Observe(took.Seconds())
}

// Plugin counts a CNI plugin that was run. There are as many as the host's
// configuration names.
func (r *recorder) Plugin(plugin, command string, took time.Duration, err error) {
	r.plugins.WithLabelValues(plugin, command, networkOutcome(err)).Inc()
	r.pluginTime.WithLabelValues(plugin, command).Observe(took.Seconds())
}

// networkOutcome is outcome for requests that have been found to be right.
func networkOutcome(err error) string {
	if o := outcome(err); o != outcomeRefused {
		return o
	}
	return outcomeError
}

// workOutcome is outcome for what nobody could have asked for in a wrong way.
func workOutcome(err error) string {
	switch o := outcome(err); o {
	case outcomeOK, outcomeTimeout:
		return o
	}
	return outcomeError
}

// CustodyReleased implements [sandbox.Observer].
func (r *recorder) CustodyReleased(reason string) { r.releases.WithLabelValues(reason).Inc() }

// Garbage implements [sandbox.Observer].
func (r *recorder) Garbage(found []garbage.Finding) {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	known := map[[2]string]bool{}
	for _, f := range r.gcStay {
		known[[2]string{string(f.Kind), f.Name}] = true
	}
	waiting := map[garbage.Kind]int{}
	var stay []garbage.Finding
	for _, f := range found {
		// What could not be removed is found again each time.
		if !known[[2]string{string(f.Kind), f.Name}] {
			r.found.WithLabelValues(string(f.Kind)).Inc()
		}
		if f.Action == garbage.Removed {
			r.removed.WithLabelValues(string(f.Kind)).Inc()
			continue
		}
		waiting[f.Kind]++
		stay = append(stay, f)
	}
	for _, k := range garbageKinds {
		r.waiting.WithLabelValues(string(k)).Set(float64(waiting[k]))
	}
	r.gcLast.Set(float64(now.UnixNano()) / 1e9)
	r.gcAt, r.gcStay = now, stay
}

// Waiting returns what the last garbage collection could not remove, and when
// that was; the zero time if there was none yet.
func (r *recorder) Waiting() (time.Time, []garbage.Finding) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gcAt, r.gcStay
}

// flight knows what is under way, and since when.
type flight struct {
	now func() time.Time

	mu    sync.Mutex
	next  uint64
	begun map[string]map[uint64]time.Time // by operation
	steps map[[2]string]int               // by operation and step; never removed, so that a gauge goes back to 0
}

var (
	inFlight = prometheus.NewDesc("sandboxd_operations_in_flight",
		"Operations under way. One that is in no step of operation_steps_in_flight waits for another one on the same sandbox or member.",
		[]string{"operation"}, nil)
	stepsInFlight = prometheus.NewDesc("sandboxd_operation_steps_in_flight",
		"Steps of operations, recoveries and undos under way. One that stays is stuck there: the step says in what.",
		[]string{"operation", "step"}, nil)
	oldestInFlight = prometheus.NewDesc("sandboxd_operation_oldest_age_seconds",
		"Age of the oldest operation under way, 0 if there is none. Stops may last as long as their timeout; others should not take seconds.",
		[]string{"operation"}, nil)
)

func newFlight(now func() time.Time) *flight {
	f := &flight{now: now, begun: map[string]map[uint64]time.Time{}, steps: map[[2]string]int{}}
	for _, op := range operations {
		f.begun[op] = map[uint64]time.Time{}
	}
	return f
}

func (f *flight) begin(op string, at time.Time) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next++
	if f.begun[op] == nil {
		f.begun[op] = map[uint64]time.Time{}
	}
	f.begun[op][f.next] = at
	return f.next
}

func (f *flight) end(op string, id uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.begun[op], id)
}

func (f *flight) step(op, step string, by int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.steps[[2]string{op, step}] += by
}

// Describe implements [prometheus.Collector].
func (f *flight) Describe(ch chan<- *prometheus.Desc) {
	ch <- inFlight
	ch <- stepsInFlight
	ch <- oldestInFlight
}

// Collect implements [prometheus.Collector].
func (f *flight) Collect(ch chan<- prometheus.Metric) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	for op, begun := range f.begun {
		var oldest time.Duration
		for _, at := range begun {
			oldest = max(oldest, now.Sub(at))
		}
		ch <- prometheus.MustNewConstMetric(inFlight, prometheus.GaugeValue, float64(len(begun)), op)
		ch <- prometheus.MustNewConstMetric(oldestInFlight, prometheus.GaugeValue, oldest.Seconds(), op)
	}
	for s, n := range f.steps {
		ch <- prometheus.MustNewConstMetric(stepsInFlight, prometheus.GaugeValue, float64(n), s[0], s[1])
	}
}
