package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sandboxd/sandboxd/sandbox"
)

var (
	sandboxes = prometheus.NewDesc("sandboxd_sandboxes",
		"Sandboxes by state. Look at NotReady and Unclean ones with inspect, then remove them.", []string{"state"}, nil)
	members = prometheus.NewDesc("sandboxd_members",
		"Members by state. Unclean ones say in inspect what could not be taken down; exited ones cost memory until they are removed.", []string{"state"}, nil)
	held = prometheus.NewDesc("sandboxd_custody_held_members",
		"Exited members whose root and namespaces are held. Remove them, or set --custody-ttl or --custody-max, if they are too many.", nil, nil)
	heldOldest = prometheus.NewDesc("sandboxd_custody_oldest_age_seconds",
		"For how long the oldest of them has been held, 0 if there is none.", nil, nil)
	heldTmpfs = prometheus.NewDesc("sandboxd_custody_held_tmpfs_bytes",
		"Memory that the tmpfs of exited members hold; sandboxd ps shows whose. Remove them, or set --custody-max-tmpfs, if it is too much.", nil, nil)
	eventSequence = prometheus.NewDesc("sandboxd_event_sequence",
		"Number of the last event in the journal. One that stands still while things happen means that the journal cannot be written.", nil, nil)
	eventsBehind = prometheus.NewDesc("sandboxd_events_behind",
		"1 if events wait for being written to the journal: make space under the root directory, or they will be lost.", nil, nil)
	logBytes = prometheus.NewDesc("sandboxd_log_bytes_total",
		"Bytes that monitors have read from their members' stdout and stderr since this daemon began.", nil, nil)
	logDrops = prometheus.NewDesc("sandboxd_log_lines_dropped_total",
		"Lines that monitors could not write to a log: its disk is full, or the log has reached its maximum.", nil, nil)
	clientDrops = prometheus.NewDesc("sandboxd_attach_clients_dropped_total",
		"Attached clients that a monitor hung up on because they read too slowly. They can read the log.", nil, nil)
)

// State names that people see; a record knows finer ones.
var (
	sandboxStates = []sandbox.State{sandbox.Creating, sandbox.Ready, sandbox.NotReady, sandbox.Stopped, sandbox.Deleting, sandbox.Unclean}
	memberStates  = []sandbox.MemberState{
		sandbox.MemberCreating, sandbox.MemberCreated, sandbox.MemberRunning, sandbox.MemberExited,
		sandbox.MemberCollected, sandbox.MemberDeleting, sandbox.MemberUnclean,
	}
)

// state shows what there is.
type state struct {
	src    Source
	o      Options
	output *outputs
}

// Describe implements [prometheus.Collector].
func (s *state) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sandboxes, members, held, heldOldest} {
		ch <- d
	}
	if s.o.HeldTmpfs != nil {
		ch <- heldTmpfs
	}
	if s.o.Events != nil {
		ch <- eventSequence
		ch <- eventsBehind
	}
	if s.o.Output != nil {
		ch <- logBytes
		ch <- logDrops
		ch <- clientDrops
	}
}

// Collect implements [prometheus.Collector].
func (s *state) Collect(ch chan<- prometheus.Metric) {
	var (
		ofSandboxes = map[sandbox.State]int{}
		ofMembers   = map[sandbox.MemberState]int{}
		nHeld       int
		tmpfs       int64
		oldest      time.Time
	)
	s.output.mu.Lock()
	for r, ms := range s.src.Records() {
		ofSandboxes[r.State]++
		for _, m := range ms {
			st := m.State
			if st == sandbox.MemberStarting {
				st = sandbox.MemberCreated
			}
			ofMembers[st]++
			if m.Exit != nil && !m.HeldSince.IsZero() && m.Released == nil && m.Monitor.Alive() {
				nHeld++
				if s.o.HeldTmpfs != nil {
					tmpfs += s.o.HeldTmpfs(m, s.src.MemberDir(m))
				}
				if oldest.IsZero() || m.HeldSince.Before(oldest) {
					oldest = m.HeldSince
				}
			}
			if m.Exit == nil && st != sandbox.MemberCreating {
				s.output.update(s.src.MemberDir(m))
			}
		}
	}
	s.output.forget()
	out := s.output.total
	s.output.mu.Unlock()

	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, st := range sandboxStates {
		gauge(sandboxes, float64(ofSandboxes[st]), st.String())
	}
	for _, st := range memberStates {
		gauge(members, float64(ofMembers[st]), st.String())
	}
	gauge(held, float64(nHeld))
	age := 0.0
	if !oldest.IsZero() {
		age = max(0, s.o.Now().Sub(oldest).Seconds())
	}
	gauge(heldOldest, age)
	if s.o.HeldTmpfs != nil {
		gauge(heldTmpfs, float64(tmpfs))
	}
	if s.o.Events != nil {
		last, behind := s.o.Events()
		gauge(eventSequence, float64(last))
		waits := 0.0
		if behind {
			waits = 1
		}
		gauge(eventsBehind, waits)
	}
	if s.o.Output != nil {
		counter := func(d *prometheus.Desc, v uint64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
		}
		counter(logBytes, out.Bytes)
		counter(logDrops, out.LinesDropped)
		counter(clientDrops, out.ClientsDropped)
	}
}
