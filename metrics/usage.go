package metrics

import (
	"cmp"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sandboxd/sandboxd/sandbox"
)

var perSandbox = []string{"sandbox", "name"}

var (
	sandboxCPU = prometheus.NewDesc("sandboxd_sandbox_cpu_seconds_total",
		"CPU time that the processes of the sandbox have used, those that ended included. Limit members with --cpus.", perSandbox, nil)
	sandboxMemory = prometheus.NewDesc("sandboxd_sandbox_memory_bytes",
		"Memory charged to the sandbox, page cache and the tmpfs of exited members included. Limit members with --memory.", perSandbox, nil)
	sandboxPIDs = prometheus.NewDesc("sandboxd_sandbox_pids",
		"Threads in the sandbox. Limit members with --pids-limit.", perSandbox, nil)
	sandboxReceived = prometheus.NewDesc("sandboxd_sandbox_network_receive_bytes_total",
		"Bytes received by the interfaces of the sandbox, lo apart.", perSandbox, nil)
	sandboxSent = prometheus.NewDesc("sandboxd_sandbox_network_transmit_bytes_total",
		"Bytes sent by the interfaces of the sandbox, lo apart.", perSandbox, nil)
	leftOut = prometheus.NewDesc("sandboxd_sandbox_metrics_left_out",
		"Sandboxes of which nothing is shown because there are more than --metrics-per-sandbox allows: raise it if the monitoring bears it.", nil, nil)
)

// usage shows what single sandboxes use: of the oldest max of them.
type usage struct {
	src  Source
	read func(*sandbox.Record) (Usage, error)
	max  int
}

// Describe implements [prometheus.Collector].
func (u *usage) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sandboxCPU, sandboxMemory, sandboxPIDs, sandboxReceived, sandboxSent, leftOut} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (u *usage) Collect(ch chan<- prometheus.Metric) {
	var rs []*sandbox.Record
	for r := range u.src.Records() {
		rs = append(rs, r)
	}
	// The same ones at every scrape, as long as they live.
	slices.SortFunc(rs, func(a, b *sandbox.Record) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	ch <- prometheus.MustNewConstMetric(leftOut, prometheus.GaugeValue, float64(max(0, len(rs)-u.max)))
	for _, r := range rs[:min(len(rs), u.max)] {
		now, err := u.read(r)
		if err != nil {
			continue // it is being made or removed
		}
		show := func(d *prometheus.Desc, t prometheus.ValueType, v float64) {
			ch <- prometheus.MustNewConstMetric(d, t, v, r.ID, r.Config.Name)
		}
		if now.CPU != nil {
			show(sandboxCPU, prometheus.CounterValue, now.CPU.Seconds())
		}
		if now.Memory != nil {
			show(sandboxMemory, prometheus.GaugeValue, float64(*now.Memory))
		}
		if now.PIDs != nil {
			show(sandboxPIDs, prometheus.GaugeValue, float64(*now.PIDs))
		}
		if now.Network != nil {
			show(sandboxReceived, prometheus.CounterValue, float64(now.Network.Received))
			show(sandboxSent, prometheus.CounterValue, float64(now.Network.Sent))
		}
	}
}
