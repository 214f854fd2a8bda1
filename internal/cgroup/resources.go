package cgroup

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/cgroups"
	devices "github.com/opencontainers/cgroups/devices/config"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// need is a controller that a limit of a configuration takes.
type need struct{ limit, controller string }

func needs(r *specs.LinuxResources, v2 bool) []need {
	var ns []need
	add := func(is bool, limit, controller string) {
		if is {
			ns = append(ns, need{limit, controller})
		}
	}
	blkio := "blkio"
	if v2 {
		blkio = "io"
	}
	add(r.Memory != nil && *r.Memory != specs.LinuxMemory{}, "memory limits", "memory")
	if c := r.CPU; c != nil {
		add(c.Cpus != "" || c.Mems != "", "cpuset", "cpuset")
		add(c.Shares != nil || c.Quota != nil || c.Period != nil || c.Burst != nil || c.Idle != nil ||
			c.RealtimePeriod != nil || c.RealtimeRuntime != nil, "cpu limits", "cpu")
	}
	add(r.Pids != nil && r.Pids.Limit != nil, "pids limit", "pids")
	add(r.BlockIO != nil, "block I/O limits", blkio)
	add(len(r.HugepageLimits) > 0, "huge page limits", "hugetlb")
	add(len(r.Rdma) > 0, "RDMA limits", "rdma")
	add(len(r.Devices) > 0, "device rules", "devices")
	if n := r.Network; n != nil {
		add(n.ClassID != nil && *n.ClassID != 0, "network class id", "net_cls")
		add(len(n.Priorities) > 0, "network priorities", "net_prio")
	}
	return ns
}

// unsupported names a field that the host's version of cgroups cannot express,
// or "".
func unsupported(r *specs.LinuxResources, v2 bool) string {
	if m := r.Memory; m != nil {
		switch {
		//lint:ignore SA1019 what is deprecated is still refused by its name
		case set(m.Kernel):
			return "memory.kernel"
		case set(m.KernelTCP):
			return "memory.kernelTCP"
		case m.UseHierarchy != nil && !*m.UseHierarchy:
			return "memory.useHierarchy=false"
		case v2 && m.Swappiness != nil:
			return "memory.swappiness"
		case v2 && set(m.DisableOOMKiller):
			return "memory.disableOOMKiller"
		}
	}
	if c := r.CPU; c != nil && v2 {
		switch {
		case set(c.RealtimeRuntime):
			return "cpu.realtimeRuntime"
		case set(c.RealtimePeriod):
			return "cpu.realtimePeriod"
		}
	}
	if b := r.BlockIO; b != nil && v2 {
		switch {
		case set(b.LeafWeight):
			return "blockIO.leafWeight"
		case slices.ContainsFunc(b.WeightDevice, func(d specs.LinuxWeightDevice) bool { return set(d.LeafWeight) }):
			return "blockIO.weightDevice.leafWeight"
		}
	}
	if r.Unified != nil && !v2 {
		return "unified"
	}
	return ""
}

// set reports whether an optional field asks for anything.
func set[T comparable](p *T) bool {
	var zero T
	return p != nil && *p != zero
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// resources translates the runtime specification's limits (config-linux.md,
// "Control groups") to the library's.
func resources(r *specs.LinuxResources, v2 bool) (*cgroups.Resources, error) {
	if f := unsupported(r, v2); f != "" {
		version := "v1"
		if v2 {
			version = "v2"
		}
		return nil, fmt.Errorf("resources.%s is not supported with cgroup %s", f, version)
	}
	out := &cgroups.Resources{SkipDevices: len(r.Devices) == 0, Unified: r.Unified}
	for i, d := range r.Devices {
		rule, err := deviceRule(d)
		if err != nil {
			return nil, fmt.Errorf("resources.devices[%d]: %w", i, err)
		}
		out.Devices = append(out.Devices, rule)
	}
	if m := r.Memory; m != nil {
		out.Memory = value(m.Limit)
		out.MemoryReservation = value(m.Reservation)
		out.MemorySwap = value(m.Swap)
		out.MemorySwappiness = m.Swappiness
		out.OomKillDisable = value(m.DisableOOMKiller)
		out.MemoryCheckBeforeUpdate = value(m.CheckBeforeUpdate)
	}
	if c := r.CPU; c != nil {
		out.CpuShares = value(c.Shares)
		out.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(out.CpuShares)
		out.CpuQuota = value(c.Quota)
		out.CpuBurst = c.Burst
		out.CpuPeriod = value(c.Period)
		out.CpuRtRuntime = value(c.RealtimeRuntime)
		out.CpuRtPeriod = value(c.RealtimePeriod)
		out.CpusetCpus = c.Cpus
		out.CpusetMems = c.Mems
		out.CPUIdle = c.Idle
	}
	if r.Pids != nil {
		out.PidsLimit = r.Pids.Limit
	}
	if b := r.BlockIO; b != nil {
		out.BlkioWeight = value(b.Weight)
		out.BlkioLeafWeight = value(b.LeafWeight)
		for _, d := range b.WeightDevice {
			out.BlkioWeightDevice = append(out.BlkioWeightDevice,
				cgroups.NewWeightDevice(d.Major, d.Minor, value(d.Weight), value(d.LeafWeight)))
		}
		out.BlkioThrottleReadBpsDevice = throttles(b.ThrottleReadBpsDevice)
		out.BlkioThrottleWriteBpsDevice = throttles(b.ThrottleWriteBpsDevice)
		out.BlkioThrottleReadIOPSDevice = throttles(b.ThrottleReadIOPSDevice)
		out.BlkioThrottleWriteIOPSDevice = throttles(b.ThrottleWriteIOPSDevice)
	}
	for _, l := range r.HugepageLimits {
		out.HugetlbLimit = append(out.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: l.Pagesize, Limit: l.Limit})
	}
	if len(r.Rdma) > 0 {
		out.Rdma = make(map[string]cgroups.LinuxRdma, len(r.Rdma))
		for name, l := range r.Rdma {
			out.Rdma[name] = cgroups.LinuxRdma{HcaHandles: l.HcaHandles, HcaObjects: l.HcaObjects}
		}
	}
	if n := r.Network; n != nil {
		out.NetClsClassid = value(n.ClassID)
		for _, p := range n.Priorities {
			out.NetPrioIfpriomap = append(out.NetPrioIfpriomap, &cgroups.IfPrioMap{Interface: p.Name, Priority: int64(p.Priority)})
		}
	}
	return out, nil
}

func throttles(ds []specs.LinuxThrottleDevice) []*cgroups.ThrottleDevice {
	var out []*cgroups.ThrottleDevice
	for _, d := range ds {
		out = append(out, cgroups.NewThrottleDevice(d.Major, d.Minor, d.Rate))
	}
	return out
}

func deviceRule(d specs.LinuxDeviceCgroup) (*devices.Rule, error) {
	r := &devices.Rule{Major: devices.Wildcard, Minor: devices.Wildcard, Allow: d.Allow}
	for _, c := range "rwm" { // the library takes them in this order only
		if strings.ContainsRune(d.Access, c) {
			r.Permissions += devices.Permissions(c)
		}
	}
	switch d.Type {
	case "", "a":
		r.Type = devices.WildcardDevice
	case "b":
		r.Type = devices.BlockDevice
	case "c", "u":
		r.Type = devices.CharDevice
	default:
		return nil, fmt.Errorf("device type %q is none of a, b, c, u", d.Type)
	}
	if d.Major != nil {
		r.Major = *d.Major
	}
	if d.Minor != nil {
		r.Minor = *d.Minor
	}
	if r.Permissions.IsEmpty() && r.Type == devices.WildcardDevice {
		r.Permissions = "rwm"
	}
	if r.Permissions.IsEmpty() || strings.Trim(d.Access, "rwm") != "" {
		return nil, fmt.Errorf("device access %q is not made of r, w, m", d.Access)
	}
	return r, nil
}
