package member

import (
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultCapabilities are those of Docker and containerd.
var defaultCapabilities = []string{
	"CAP_CHOWN",
	"CAP_DAC_OVERRIDE",
	"CAP_FOWNER",
	"CAP_FSETID",
	"CAP_KILL",
	"CAP_SETGID",
	"CAP_SETUID",
	"CAP_SETPCAP",
	"CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW",
	"CAP_SYS_CHROOT",
	"CAP_MKNOD",
	"CAP_AUDIT_WRITE",
	"CAP_SETFCAP",
}

// defaultMaskedPaths are hidden because they tell about the host or its other
// tenants; the list is that of Docker and containerd.
var defaultMaskedPaths = []string{
	"/proc/acpi",
	"/proc/asound",
	"/proc/interrupts",
	"/proc/kcore",
	"/proc/keys",
	"/proc/latency_stats",
	"/proc/sched_debug",
	"/proc/scsi",
	"/proc/timer_list",
	"/proc/timer_stats",
	"/sys/devices/virtual/powercap",
	"/sys/firmware",
}

var defaultReadonlyPaths = []string{
	"/proc/bus",
	"/proc/fs",
	"/proc/irq",
	"/proc/sys",
	"/proc/sysrq-trigger",
}

// DefaultSpec returns the configuration of a member that is not from a bundle,
// before anything of a request is applied: what users of Docker and containerd
// know. Process.Args, Root and Seccomp are left out. A privileged one sees the
// host's kernel interfaces unmasked and may use every device; its capabilities
// are those of the default all the same and are for the caller to extend.
func DefaultSpec(privileged bool) *specs.Spec {
	ro := "ro"
	if privileged {
		ro = "rw"
	}
	s := &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Cwd:          "/",
			Env:          []string{"PATH=" + defaultPath},
			Capabilities: giveCapabilities(defaultCapabilities),
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", ro}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", ro}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			privateShm(),
		},
		Linux: &specs.Linux{
			Resources:     &specs.LinuxResources{Devices: deviceRules(privileged)},
			MaskedPaths:   slices.Clone(defaultMaskedPaths),
			ReadonlyPaths: slices.Clone(defaultReadonlyPaths),
		},
	}
	if privileged {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	}
	return s
}

// thermalPaths are masked too: they let a member watch the load of the host's
// CPUs. There is one for each CPU, and none on many machines.
func thermalPaths() []string {
	paths, _ := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle") // fails for bad patterns only
	return paths
}

func privateShm() specs.Mount {
	return specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}}
}

// giveCapabilities gives a process caps and nothing inheritable or ambient, so that
// a change of uid takes them away (Docker does so since CVE-2022-24769).
func giveCapabilities(caps []string) *specs.LinuxCapabilities {
	return &specs.LinuxCapabilities{Bounding: slices.Clone(caps), Effective: slices.Clone(caps), Permitted: slices.Clone(caps)}
}

// deviceRules are the default device rules: device nodes can be made, but only
// those that every container has can be opened.
func deviceRules(privileged bool) []specs.LinuxDeviceCgroup {
	if privileged {
		return []specs.LinuxDeviceCgroup{{Allow: true, Type: "a", Access: "rwm"}}
	}
	rules := []specs.LinuxDeviceCgroup{
		{Type: "a", Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "b", Access: "m"},
	}
	const any = -1
	for _, d := range [][2]int64{
		{1, 3},     // null
		{1, 5},     // zero
		{1, 7},     // full
		{1, 8},     // random
		{1, 9},     // urandom
		{5, 0},     // tty
		{5, 1},     // console
		{5, 2},     // ptmx
		{136, any}, // pts
	} {
		r := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d[0], Access: "rwm"}
		if d[1] != any {
			r.Minor = &d[1]
		}
		rules = append(rules, r)
	}
	return rules
}
