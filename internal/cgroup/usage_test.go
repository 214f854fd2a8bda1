package cgroup

import (
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestParseCounters(t *testing.T) {
	got := parseIOStat("8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n8:16 \n7:0 rbytes=0 wbytes=0 rios=0 wios=0\n254:1 rbytes=1 wbytes=18446744073709551615 rios=x wios=2\n")
	want := []IOUsage{{Device: "8:0", ReadBytes: 4096, Reads: 1}, {Device: "254:1", ReadBytes: 1, WriteBytes: noLimit, Writes: 2}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("io.stat (-want +got):\n%s", d)
	}
	if d := cmp.Diff(map[string]int64{"a": 1, "b": noLimit, "c": 0}, parseKeys("a 1\nb max\nnothing\nc ?\n")); d != "" {
		t.Errorf("keys (-want +got):\n%s", d)
	}
	if parseKeys("") != nil || parseIOStat("") != nil {
		t.Error("something is read out of nothing")
	}
}

func TestUsage(t *testing.T) {
	h, path := newSandbox(t)
	limit, quota, period, pids := int64(48<<20), int64(50_000), uint64(100_000), int64(6)
	member := path + "/member"
	makeMember(t, h, member, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids},
		CPU: &specs.LinuxCPU{Quota: &quota, Period: &period},
	})
	// It uses some memory and time, and forks more often than it may.
	cmd := run(t, procs(h, member), "echo; x=$(head -c 8388608 /dev/zero | tr '\\0' x); i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 1 | sleep 1 | sleep 1 | sleep 1 | sleep 1 | sleep 1 | sleep 1")
	cmd.Wait() // the fork that fails fails it
	u, err := h.Usage(member)
	if err != nil {
		t.Fatal(err)
	}
	if m := u.Memory; m == nil || m.Limit != limit || m.Current < 0 || m.Peak != 0 && m.Peak < 8<<20 || m.Peak > limit || h.Mode() != V2 && m.Peak == 0 {
		t.Errorf("memory %+v", m)
	}
	if c := u.CPU; c == nil || c.UsageMicros == 0 || c.Limit != 0.5 || c.Periods == 0 {
		t.Errorf("cpu %+v", c)
	}
	if p := u.Pids; p == nil || p.Limit != 6 || p.AtLimit == 0 || p.Peak > 6 {
		t.Errorf("pids %+v", p)
	}
	cpu, memory, err := h.Sample(member)
	if err != nil || cpu < u.CPU.UsageMicros || memory < 0 || memory > limit {
		t.Errorf("sample %d %d, %v; usage %+v", cpu, memory, err, u.CPU)
	}
	if _, err := h.Usage(path + "/none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("usage of nothing: %v", err)
	}
	// No limit is no limit in either version.
	free := path + "/free"
	makeMember(t, h, free, &specs.LinuxResources{})
	u, err = h.Usage(free)
	if err != nil || u.Memory == nil || u.Memory.Limit != 0 || u.Pids.Limit != 0 || u.CPU.Limit != 0 {
		t.Errorf("without limits: %+v %+v %+v, %v", u.CPU, u.Memory, u.Pids, err)
	}
}
