package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Usage is what the kernel has counted for a cgroup and what its limits are, in
// the words of neither version of cgroups. A controller that the host does not
// have is nil.
type Usage struct {
	CPU    *CPUUsage    `json:"cpu,omitempty"`
	Memory *MemoryUsage `json:"memory,omitempty"`
	Pids   *PidsUsage   `json:"pids,omitempty"`
	IO     []IOUsage    `json:"io,omitempty"` // by device; only devices that were used
}

// CPUUsage counts the time on CPUs, in microseconds.
type CPUUsage struct {
	UsageMicros     int64   `json:"usageMicros"`
	UserMicros      int64   `json:"userMicros"`
	SystemMicros    int64   `json:"systemMicros"`
	Periods         int64   `json:"periods"`                  // of the limit, in which something ran
	Throttled       int64   `json:"throttled"`                // of these, in which something had to wait
	ThrottledMicros int64   `json:"throttledMicros"`          // the time of these waits
	Limit           float64 `json:"limit,omitempty"`          // in CPUs; 0: none
	PressureMicros  int64   `json:"pressureMicros,omitempty"` // some task waited for a CPU (cgroup v2)
}

// MemoryUsage counts memory, in bytes.
type MemoryUsage struct {
	Current int64 `json:"currentBytes"`
	Peak    int64 `json:"peakBytes,omitempty"`  // 0: the kernel does not tell (before Linux 5.19 with cgroup v2)
	Limit   int64 `json:"limitBytes,omitempty"` // 0: none
	// AtLimit counts how often the limit was hit, OOM how often nothing could be
	// freed then, OOMKills the processes that were killed for it.
	AtLimit  int64 `json:"atLimit"`
	OOM      int64 `json:"oom,omitempty"`
	OOMKills int64 `json:"oomKills"`
}

// PidsUsage counts processes and threads.
type PidsUsage struct {
	Current int64 `json:"current"`
	Peak    int64 `json:"peak,omitempty"`  // 0: the kernel does not tell
	Limit   int64 `json:"limit,omitempty"` // 0: none
	AtLimit int64 `json:"atLimit"`         // forks that failed for it
}

// IOUsage counts what was read from and written to a block device.
type IOUsage struct {
	Device     string `json:"device"` // MAJOR:MINOR
	ReadBytes  int64  `json:"readBytes"`
	WriteBytes int64  `json:"writeBytes"`
	Reads      int64  `json:"reads"`
	Writes     int64  `json:"writes"`
}

// noLimit is more than any limit: v1 says "none" with the largest multiple of a
// page.
const noLimit = 1 << 62

// Usage reads the counters of the cgroup at path. What is there is returned also
// with an error, which says what is missing although its controller is there; if
// nothing is left of the cgroup, it wraps [os.ErrNotExist].
func (h *Host) Usage(path string) (Usage, error) {
	if len(h.v1) > 0 {
		return h.usageV1(path)
	}
	return usageV2(filepath.Join(h.v2, path))
}

func (h *Host) usageV1(path string) (u Usage, err error) {
	dirs := h.V1Controllers()
	found := false
	dir := func(controller string) *counters {
		m := dirs[controller]
		if m == "" {
			return nil
		}
		d := filepath.Join(m, path)
		if _, err := os.Stat(d); err != nil {
			return nil
		}
		found = true
		return &counters{dir: d}
	}
	var errs []error
	if c := dir("memory"); c != nil {
		oom := c.keys("memory.oom_control")
		u.Memory = &MemoryUsage{
			Current: c.value("memory.usage_in_bytes"), Peak: c.value("memory.max_usage_in_bytes"),
			Limit: c.limit("memory.limit_in_bytes"), AtLimit: c.value("memory.failcnt"), OOMKills: oom["oom_kill"],
		}
		errs = append(errs, c.err)
	}
	if c := dir("cpuacct"); c != nil {
		u.CPU = &CPUUsage{
			UsageMicros: c.value("cpuacct.usage") / 1000,
			UserMicros:  c.value("cpuacct.usage_user") / 1000, SystemMicros: c.value("cpuacct.usage_sys") / 1000,
		}
		errs = append(errs, c.err)
	}
	if c := dir("cpu"); c != nil {
		if u.CPU == nil {
			u.CPU = new(CPUUsage)
		}
		// Without CONFIG_CFS_BANDWIDTH there is no limit, and neither file.
		st := c.optional("cpu.stat")
		u.CPU.Periods, u.CPU.Throttled, u.CPU.ThrottledMicros = st["nr_periods"], st["nr_throttled"], st["throttled_time"]/1000
		if quota := c.perhaps("cpu.cfs_quota_us"); quota > 0 {
			u.CPU.Limit = float64(quota) / float64(max(1, c.value("cpu.cfs_period_us")))
		}
		errs = append(errs, c.err)
	}
	if c := dir("pids"); c != nil {
		u.Pids = c.pids()
		errs = append(errs, c.err)
	}
	if c := dir("blkio"); c != nil {
		u.IO = c.blkio()
	}
	if !found {
		return u, &os.PathError{Op: "read cgroup", Path: path, Err: unix.ENOENT}
	}
	return u, errors.Join(errs...)
}

func usageV2(dir string) (u Usage, err error) {
	if _, err := os.Stat(dir); err != nil {
		return u, err
	}
	c := &counters{dir: dir}
	has := func(file string) bool {
		_, err := os.Stat(filepath.Join(dir, file))
		return err == nil
	}
	// cpu.stat is there without the controller, and then says less.
	st := c.optional("cpu.stat")
	if st != nil {
		u.CPU = &CPUUsage{
			UsageMicros: st["usage_usec"], UserMicros: st["user_usec"], SystemMicros: st["system_usec"],
			Periods: st["nr_periods"], Throttled: st["nr_throttled"], ThrottledMicros: st["throttled_usec"],
			PressureMicros: c.pressure("cpu.pressure"),
		}
		if f := strings.Fields(c.text("cpu.max", true)); len(f) == 2 && f[0] != "max" {
			quota, _ := strconv.ParseFloat(f[0], 64)
			period, _ := strconv.ParseFloat(f[1], 64)
			u.CPU.Limit = quota / max(1, period)
		}
	}
	if has("memory.current") {
		ev := c.keys("memory.events")
		u.Memory = &MemoryUsage{
			Current: c.value("memory.current"), Peak: c.perhaps("memory.peak"), Limit: c.limit("memory.max"),
			AtLimit: ev["max"], OOM: ev["oom"], OOMKills: ev["oom_kill"],
		}
	}
	if has("pids.current") {
		u.Pids = c.pids()
	}
	u.IO = parseIOStat(c.text("io.stat", true))
	return u, c.err
}

// counters reads the files of one cgroup. err is the first error.
type counters struct {
	dir string
	err error
}

// text returns the content of a file; one that may be missing is empty then.
func (c *counters) text(file string, mayMiss bool) string {
	f, err := os.Open(filepath.Join(c.dir, file))
	var b []byte
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(f, 1<<20))
		f.Close()
	}
	if err != nil && !(mayMiss && (errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP))) && c.err == nil {
		c.err = err
	}
	return string(b)
}

// number reads a counter. "max", which is how v2 says that there is no limit, is
// [noLimit]; what is no number is 0.
func number(s string) int64 {
	s = strings.TrimSpace(s)
	if s == "max" {
		return noLimit
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if errors.Is(err, strconv.ErrRange) {
		return noLimit // an unsigned one
	}
	return n
}

func (c *counters) value(file string) int64   { return number(c.text(file, false)) }
func (c *counters) perhaps(file string) int64 { return number(c.text(file, true)) }

// limit is 0 for "max", as v2 says it, and for what v1 means by that.
func (c *counters) limit(file string) int64 {
	n := c.value(file)
	if n >= noLimit {
		return 0
	}
	return n
}

func (c *counters) keys(file string) map[string]int64     { return parseKeys(c.text(file, false)) }
func (c *counters) optional(file string) map[string]int64 { return parseKeys(c.text(file, true)) }

func (c *counters) pids() *PidsUsage {
	return &PidsUsage{
		Current: c.value("pids.current"), Peak: c.perhaps("pids.peak"), Limit: c.limit("pids.max"),
		AtLimit: c.optional("pids.events")["max"],
	}
}

// pressure returns the total of the line "some" (Documentation/accounting/psi.rst).
func (c *counters) pressure(file string) int64 {
	for line := range strings.Lines(c.text(file, true)) {
		if rest, ok := strings.CutPrefix(line, "some "); ok {
			if _, total, ok := strings.Cut(rest, "total="); ok {
				return number(total)
			}
		}
	}
	return 0
}

// parseKeys reads lines of "KEY NUMBER". It returns nil if there is none.
func parseKeys(text string) map[string]int64 {
	var m map[string]int64
	for line := range strings.Lines(text) {
		k, v, ok := strings.Cut(line, " ")
		if !ok {
			continue
		}
		if m == nil {
			m = map[string]int64{}
		}
		m[k] = number(v)
	}
	return m
}

// parseIOStat reads io.stat of cgroup v2: "MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N …".
func parseIOStat(text string) []IOUsage {
	var out []IOUsage
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		d := IOUsage{Device: f[0]}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "rbytes":
				d.ReadBytes = number(v)
			case "wbytes":
				d.WriteBytes = number(v)
			case "rios":
				d.Reads = number(v)
			case "wios":
				d.Writes = number(v)
			}
		}
		if d != (IOUsage{Device: d.Device}) {
			out = append(out, d)
		}
	}
	return out
}

// blkio reads the counters of the throttling layer of cgroup v1, which sees all
// I/O whatever the scheduler of the device: lines of "MAJOR:MINOR Read|Write|… N".
func (c *counters) blkio() []IOUsage {
	by := map[string]*IOUsage{}
	read := func(file string, set func(d *IOUsage, op string, n int64)) {
		sc := bufio.NewScanner(bytes.NewReader([]byte(c.text(file, true))))
		for sc.Scan() {
			f := strings.Fields(sc.Text())
			if len(f) != 3 {
				continue // the total
			}
			d := by[f[0]]
			if d == nil {
				d = &IOUsage{Device: f[0]}
				by[f[0]] = d
			}
			set(d, f[1], number(f[2]))
		}
	}
	read("blkio.throttle.io_service_bytes_recursive", func(d *IOUsage, op string, n int64) {
		switch op {
		case "Read":
			d.ReadBytes = n
		case "Write":
			d.WriteBytes = n
		}
	})
	read("blkio.throttle.io_serviced_recursive", func(d *IOUsage, op string, n int64) {
		switch op {
		case "Read":
			d.Reads = n
		case "Write":
			d.Writes = n
		}
	})
	var out []IOUsage
	for _, d := range by {
		if *d != (IOUsage{Device: d.Device}) {
			out = append(out, *d)
		}
	}
	slices.SortFunc(out, func(a, b IOUsage) int { return strings.Compare(a.Device, b.Device) })
	return out
}

// Sample reads the two counters that tell most about what a cgroup is doing, in
// microseconds and bytes: what is cheap enough to be asked for often. One whose
// controller the host does not have is 0.
func (h *Host) Sample(path string) (cpuMicros, memory int64, err error) {
	if len(h.v1) == 0 {
		c := &counters{dir: filepath.Join(h.v2, path)}
		return c.keys("cpu.stat")["usage_usec"], c.perhaps("memory.current"), c.err
	}
	dirs := h.V1Controllers()
	if m := dirs["cpuacct"]; m != "" {
		c := &counters{dir: filepath.Join(m, path)}
		if cpuMicros, err = c.value("cpuacct.usage")/1000, c.err; err != nil {
			return 0, 0, err
		}
	}
	if m := dirs["memory"]; m != "" {
		c := &counters{dir: filepath.Join(m, path)}
		memory, err = c.value("memory.usage_in_bytes"), c.err
	}
	return cpuMicros, memory, err
}
