package metrics

import (
	"sync"
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
		"Memory that the tmpfs of exited members hold; sandboxd ps shows whose. It may be some minutes old. Remove them, or set --custody-max-tmpfs, if it is too much.", nil, nil)
	eventSequence = prometheus.NewDesc("sandboxd_event_sequence",
		"Number of the last event in the journal. One that stands still while things happen means that the journal cannot be written.", nil, nil)
	eventsBehind = prometheus.NewDesc("sandboxd_events_behind",
		"1 if events wait for being written to the journal: make space under the root directory, or they will be lost.", nil, nil)
	attached = prometheus.NewDesc("sandboxd_network_attachments",
		"Sandboxes that have a network, by driver.", []string{"driver"}, nil)
	tombstones = prometheus.NewDesc("sandboxd_network_tombstones",
		"Networks of sandboxes that are gone, which could not be taken down yet; their addresses wait too. sandboxd ls -a and gc --dry-run say why.", []string{"driver"}, nil)
	tombstoneAge = prometheus.NewDesc("sandboxd_network_tombstone_oldest_age_seconds",
		"For how long the oldest of them has waited, 0 if there is none. They are retried by themselves: mend what keeps them.", []string{"driver"}, nil)
	leasesInUse = prometheus.NewDesc("sandboxd_network_leases_in_use",
		"Addresses of the builtin network that sandboxes have.", []string{"family"}, nil)
	leasesFree = prometheus.NewDesc("sandboxd_network_leases_free",
		"Addresses of the builtin network that are free. Before it is 0, remove sandboxes or choose a larger --subnet.", []string{"family"}, nil)
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
	r      Readers
	now    func() time.Time
	output *outputs

	mu    sync.Mutex // not output's, which exits wait for
	tmpfs tmpfsCache // guarded by mu
}

// Describe implements [prometheus.Collector].
func (s *state) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sandboxes, members, held, heldOldest} {
		ch <- d
	}
	if s.r.HeldTmpfs != nil {
		ch <- heldTmpfs
	}
	if s.r.Events != nil {
		ch <- eventSequence
		ch <- eventsBehind
	}
	if s.r.Networks != nil {
		ch <- attached
		ch <- tombstones
		ch <- tombstoneAge
	}
	if s.r.Leases != nil {
		ch <- leasesInUse
		ch <- leasesFree
	}
	if s.r.Output != nil {
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
		inCustody   []*sandbox.MemberRecord
		tmpfs       int64
		oldest      time.Time
	)
	now := s.now()
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
				inCustody = append(inCustody, m)
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
	if s.r.HeldTmpfs != nil {
		s.mu.Lock()
		s.tmpfs.begin()
		for _, m := range inCustody {
			tmpfs += s.tmpfs.of(m, s.src.MemberDir(m), now)
		}
		s.tmpfs.end()
		s.mu.Unlock()
	}

	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, st := range sandboxStates {
		gauge(sandboxes, float64(ofSandboxes[st]), st.String())
	}
	for _, st := range memberStates {
		gauge(members, float64(ofMembers[st]), st.String())
	}
	gauge(held, float64(len(inCustody)))
	gauge(heldOldest, s.age(oldest))
	if s.r.HeldTmpfs != nil {
		gauge(heldTmpfs, float64(tmpfs))
	}
	if s.r.Events != nil {
		last, behind := s.r.Events()
		gauge(eventSequence, float64(last))
		waits := 0.0
		if behind {
			waits = 1
		}
		gauge(eventsBehind, waits)
	}
	if s.r.Networks != nil {
		for _, n := range s.r.Networks() {
			gauge(attached, float64(n.Attached), n.Driver)
			gauge(tombstones, float64(n.Tombstones), n.Driver)
			gauge(tombstoneAge, s.age(n.Oldest), n.Driver)
		}
	}
	if s.r.Leases != nil {
		for _, l := range s.r.Leases() {
			gauge(leasesInUse, l.InUse, l.Family)
			gauge(leasesFree, l.Free, l.Family)
		}
	}
	if s.r.Output != nil {
		counter := func(d *prometheus.Desc, v uint64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
		}
		counter(logBytes, out.Bytes)
		counter(logDrops, out.LinesDropped)
		counter(clientDrops, out.ClientsDropped)
	}
}

// age is how long ago since was, in seconds; 0 if it is the zero time.
func (s *state) age(since time.Time) float64 {
	if since.IsZero() {
		return 0
	}
	return max(0, s.now().Sub(since).Seconds())
}
