package collect

import (
	"context"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/internal/cgroup"
)

// maxSamples is how many samples are kept of a member: five minutes of seconds.
const maxSamples = 300

// Sampler measures members while they run, and keeps the last samples of each in
// memory. It is safe for concurrent use.
type Sampler struct {
	host     *cgroup.Host
	interval time.Duration
	now      func() time.Time

	mu    sync.Mutex
	rings map[string]*ring // by member; guarded by mu
}

type ring struct {
	cgroup  string
	samples []sample
	next    int // where the oldest is, once there are maxSamples
}

type sample struct{ unixMs, cpu, memory int64 }

// NewSampler returns a Sampler that measures nothing yet. If interval is 0 it
// never does.
func NewSampler(host *cgroup.Host, interval time.Duration) *Sampler {
	return &Sampler{host: host, interval: interval, now: time.Now, rings: map[string]*ring{}}
}

// Add begins to measure the member id, whose cgroup is at path.
func (s *Sampler) Add(id, path string) {
	if s.interval <= 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rings[id] == nil {
		s.rings[id] = &ring{cgroup: path}
	}
}

// Remove forgets a member.
func (s *Sampler) Remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.rings, id)
}

// Samples returns what has been measured of a member, or nil.
func (s *Sampler) Samples(id string) *Samples {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rings[id]
	if r == nil || len(r.samples) == 0 {
		return nil
	}
	out := &Samples{Interval: s.interval.String()}
	for i := range r.samples {
		x := r.samples[(r.next+i)%len(r.samples)]
		out.UnixMs = append(out.UnixMs, x.unixMs)
		out.CPU = append(out.CPU, x.cpu)
		out.Memory = append(out.Memory, x.memory)
	}
	return out
}

// Run measures until ctx ends.
func (s *Sampler) Run(ctx context.Context) {
	if s.interval <= 0 {
		return
	}
	tick := time.NewTicker(s.interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.measure()
		}
	}
}

// measure takes one sample of each member.
func (s *Sampler) measure() {
	s.mu.Lock()
	paths := make(map[string]string, len(s.rings))
	for id, r := range s.rings {
		paths[id] = r.cgroup
	}
	s.mu.Unlock()
	for id, path := range paths {
		cpu, memory, err := s.host.Sample(path)
		if err != nil {
			continue // it is about to go
		}
		s.mu.Lock()
		if r := s.rings[id]; r != nil {
			r.add(sample{s.now().UnixMilli(), cpu, memory})
		}
		s.mu.Unlock()
	}
}

func (r *ring) add(x sample) {
	if len(r.samples) < maxSamples {
		r.samples = append(r.samples, x)
		return
	}
	r.samples[r.next] = x
	r.next = (r.next + 1) % maxSamples
}
