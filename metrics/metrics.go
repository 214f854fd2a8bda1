// Package metrics shows what a daemon does and has as Prometheus metrics.
//
// What happens is counted as it happens: a [Metrics] is the Manager's
// [sandbox.Observer]. What there is is read when somebody scrapes, from records
// and from the functions in [Options], so that it is never out of date and costs
// nothing in between. A scrape waits for no operation.
//
// No label has values that grow with use: no ids, names or images. The one
// exception is metrics of single sandboxes, which are off by default and bounded.
// Every series of which all label values are known is there from the beginning,
// as zero, so that rates see the first event too.
package metrics

import (
	"iter"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"github.com/sandboxd/sandboxd/sandbox"
)

// Source is what metrics are read from; a [sandbox.Manager] is one.
type Source interface {
	Records() iter.Seq2[*sandbox.Record, []*sandbox.MemberRecord]
	MemberDir(*sandbox.MemberRecord) string
}

// Options are what is known from the beginning.
type Options struct {
	Version, Commit, Go string           // of build_info
	Now                 func() time.Time // default: time.Now
}

// Readers are where the rest is read from, whenever somebody scrapes. What is nil
// is not shown.
type Readers struct {
	// Output reads what a member's monitor has counted.
	Output func(dir string) (Output, error)
	// HeldTmpfs reads how many bytes the file systems in memory of a member in
	// custody hold.
	HeldTmpfs func(r *sandbox.MemberRecord, dir string) int64
	// Events returns the number of the last event, and whether some wait for
	// being written to the journal.
	Events func() (last uint64, behind bool)
	// Networks returns what there is of each network driver.
	Networks func() []Network
	// Leases returns how many addresses the builtin network has given out, and has.
	Leases func() []Leases
	// Usage reads what a sandbox uses now.
	Usage func(*sandbox.Record) (Usage, error)
	// PerSandbox is of how many sandboxes at most Usage is shown; 0 is off. The
	// oldest are shown.
	PerSandbox int
}

// Output is what a monitor has counted of its member's output.
type Output struct {
	Bytes          uint64 // read from stdout and stderr
	LinesDropped   uint64 // that could not be written to the log
	ClientsDropped uint64 // attached, and too slow
}

// Network is what there is of one network driver.
type Network struct {
	Driver     string
	Attached   int       // sandboxes that have a network of it
	Tombstones int       // networks of sandboxes that are gone, which could not be taken down yet
	Oldest     time.Time // since when the oldest of these waits; the zero time if there is none
}

// Leases counts the addresses of one family.
type Leases struct {
	Family      string // ipv4, ipv6
	InUse, Free float64
}

// Usage is what the processes of a sandbox use together. A nil part could not
// be read, or is not counted on this host.
type Usage struct {
	CPU     *time.Duration
	Memory  *uint64 // bytes
	PIDs    *uint64
	Network *Traffic
}

// Traffic is what the interfaces of a sandbox's network namespace have counted,
// without lo, in bytes.
type Traffic struct{ Received, Sent uint64 }

// Metrics are the metrics of one daemon. It is an [sandbox.Observer].
type Metrics struct {
	o   Options
	reg *prometheus.Registry
	*recorder
	output *outputs
}

var _ sandbox.Observer = (*Metrics)(nil)

// New returns the metrics of a daemon that has nothing yet.
func New(o Options) *Metrics {
	if o.Now == nil {
		o.Now = time.Now
	}
	m := &Metrics{o: o, reg: prometheus.NewRegistry()}
	m.recorder = newRecorder(m.reg, o.Now)
	m.output = &outputs{seen: map[string]seen{}}
	m.exited = m.output.ended
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sandboxd_build_info", Help: "1; the labels say what is running. Two versions at once for long mean an upgrade that stopped half way.",
		ConstLabels: prometheus.Labels{"version": o.Version, "commit": o.Commit, "goversion": o.Go},
	})
	info.Set(1)
	m.reg.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Attach adds what is read from src when somebody scrapes. Call it once, when
// src has recovered; before, only what has happened is shown.
func (m *Metrics) Attach(src Source, r Readers) {
	m.output.prime(src, r.Output)
	m.reg.MustRegister(&state{
		src: src, r: r, now: m.o.Now, output: m.output,
		tmpfs: tmpfsCache{read: r.HeldTmpfs, entries: map[string]*tmpfsEntry{}},
	})
	if r.PerSandbox > 0 && r.Usage != nil {
		m.reg.MustRegister(&usage{src: src, read: r.Usage, max: r.PerSandbox})
	}
}

// Gatherer is where the metrics can be read without HTTP.
//
// The gauge go_memstats_alloc_bytes is left out: in the OpenMetrics format the counter
// go_memstats_alloc_bytes_total has the same family name, and a family may be there
// only once. What it says is in go_memstats_heap_alloc_bytes too.
func (m *Metrics) Gatherer() prometheus.Gatherer {
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		families, err := m.reg.Gather()
		return slices.DeleteFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == "go_memstats_alloc_bytes" }), err
	})
}

// Handler serves the metrics in the text format, and in the OpenMetrics format
// to those who ask for it. What cannot be read is left out, and counted by
// promhttp_metric_handler_errors_total.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.Gatherer(), promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, Registry: m.reg, EnableOpenMetrics: true,
		MaxRequestsInFlight: 4,
	})
}
