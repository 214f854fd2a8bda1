package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestParseMounts(t *testing.T) {
	const hybrid = `25 1 0:22 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw,mode=755
30 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 master:2 - cgroup cgroup rw,cpu,cpuacct
32 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
33 25 0:26 / /mnt/again rw - cgroup cgroup rw,memory
`
	const v2 = `34 25 0:29 / /sys/fs/cgroup/with\040blank rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
35 25 0:29 / /mnt/again rw - cgroup2 cgroup2 rw
`
	v1 := []Hierarchy{
		{Mount: "/sys/fs/cgroup/memory", Controllers: []string{"memory"}},
		{Mount: "/sys/fs/cgroup/cpu,cpuacct", Controllers: []string{"cpu", "cpuacct"}},
		{Mount: "/sys/fs/cgroup/systemd", Controllers: []string{"name=systemd"}},
	}
	unified := Hierarchy{Mount: "/sys/fs/cgroup/with blank", V2: true}
	for _, tt := range []struct {
		in   string
		mode Mode
		want []Hierarchy
	}{
		{hybrid, V1, v1},
		{v2, V2, []Hierarchy{unified}},
		{hybrid + v2, Hybrid, append(slices.Clone(v1), unified)},
	} {
		h, err := parseMounts(strings.NewReader(tt.in))
		if err != nil {
			t.Error(err)
			continue
		}
		if h.Mode() != tt.mode {
			t.Errorf("mode is %s, want %s", h.Mode(), tt.mode)
		}
		if diff := cmp.Diff(tt.want, h.Hierarchies()); diff != "" {
			t.Errorf("%s: hierarchies (-want +got):\n%s", tt.mode, diff)
		}
	}
	for _, bad := range []string{"", "25 1 0:22 / /sys rw - sysfs sysfs rw\n", "25 1\n"} {
		if h, err := parseMounts(strings.NewReader(bad)); err == nil {
			t.Errorf("parseMounts(%q) = %+v, want an error", bad, h)
		}
	}
}

func TestResources(t *testing.T) {
	p64 := func(n int64) *int64 { return &n }
	u64 := func(n uint64) *uint64 { return &n }
	yes, no, w := true, false, uint16(10)
	leaf := specs.LinuxWeightDevice{}
	leaf.LeafWeight = &w
	for _, tt := range []struct {
		name    string
		in      specs.LinuxResources
		v1, v2  string // the error, or ""
		needsV2 []need
	}{
		{name: "nothing"},
		{name: "memory", in: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p64(1)}}, needsV2: []need{{"memory limits", "memory"}}},
		//lint:ignore SA1019 see unsupported
		{name: "kernel memory", in: specs.LinuxResources{Memory: &specs.LinuxMemory{Kernel: p64(1)}}, v1: "memory.kernel", v2: "memory.kernel", needsV2: []need{{"memory limits", "memory"}}},
		{name: "oom", in: specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: &yes}}, v2: "disableOOMKiller", needsV2: []need{{"memory limits", "memory"}}},
		{name: "no oom", in: specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: &no}}, needsV2: []need{{"memory limits", "memory"}}},
		{name: "flat", in: specs.LinuxResources{Memory: &specs.LinuxMemory{UseHierarchy: &no}}, v1: "useHierarchy", v2: "useHierarchy", needsV2: []need{{"memory limits", "memory"}}},
		{name: "swappiness", in: specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: u64(0)}}, v2: "swappiness", needsV2: []need{{"memory limits", "memory"}}},
		{name: "realtime", in: specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimeRuntime: p64(1), Cpus: "0"}}, v2: "realtimeRuntime", needsV2: []need{{"cpuset", "cpuset"}, {"cpu limits", "cpu"}}},
		{name: "leaf weight", in: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{LeafWeight: &w}}, v2: "leafWeight", needsV2: []need{{"block I/O limits", "io"}}},
		{name: "unified", in: specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}, v1: "unified"},
		{name: "device type", in: specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "x", Access: "r"}}}, v1: "devices[0]", v2: "devices[0]", needsV2: []need{{"device rules", "devices"}}},
		{name: "leaf weight of a device", in: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{leaf}}}, v2: "weightDevice.leafWeight", needsV2: []need{{"block I/O limits", "io"}}},
		{name: "device access in any order", in: specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "c", Access: "mwr"}}}, needsV2: []need{{"device rules", "devices"}}},
		{name: "device access with something else", in: specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "c", Access: "rx"}}}, v1: "access", v2: "access", needsV2: []need{{"device rules", "devices"}}},
		{name: "device access", in: specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "c"}}}, v1: "access", v2: "access", needsV2: []need{{"device rules", "devices"}}},
	} {
		for _, v2 := range []bool{false, true} {
			want := tt.v1
			if v2 {
				want = tt.v2
				if got := needs(&tt.in, true); !slices.Equal(got, tt.needsV2) {
					t.Errorf("%s: needs %v, want %v", tt.name, got, tt.needsV2)
				}
			}
			_, err := resources(&tt.in, v2)
			if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s, v2=%v: error %v, want %q", tt.name, v2, err, want)
			}
		}
	}
}

func TestCheckPath(t *testing.T) {
	for _, bad := range []string{"", "/", "x", "/a/../..", "/a/", "//a", "/a/."} {
		if err := CheckPath(bad); err == nil {
			t.Errorf("CheckPath(%q) = nil", bad)
		}
	}
	if err := CheckPath("/a/b"); err != nil {
		t.Error(err)
	}
}

// newSandbox makes a sandbox's cgroup, which is gone from every hierarchy at
// the end of the test.
func newSandbox(t testing.TB) (*Host, string) {
	t.Helper()
	testenv.Root(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	parent := fmt.Sprintf("/sandboxd-test-%d", os.Getpid())
	path := parent + "/sandbox"
	t.Cleanup(func() {
		remove(t, h, parent)
		for _, m := range h.mounts() {
			if exists(m + parent) {
				t.Errorf("%s is left", m+parent)
			}
		}
	})
	if err := h.MakeSandbox(path); err != nil {
		t.Fatal(err)
	}
	return h, path
}

func remove(t testing.TB, h *Host, path string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := h.Remove(ctx, path); err != nil {
		t.Error(err)
	}
}

func makeMember(t testing.TB, h *Host, path string, r *specs.LinuxResources) {
	t.Helper()
	if err := h.MakeMember(path, r); err != nil {
		t.Fatal(err)
	}
}

// run starts a shell in the cgroup.procs files. It is reaped by the test.
func run(t testing.TB, procs []string, script string) *exec.Cmd {
	t.Helper()
	var join strings.Builder
	for _, p := range procs {
		fmt.Fprintf(&join, "echo $$ > %s || exit 99\n", p)
	}
	cmd := exec.Command("sh", "-c", join.String()+script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil { // it says when it is ready
		t.Fatalf("the process did not start: %v", err)
	}
	return cmd
}

func TestLimitsAreSet(t *testing.T) {
	h, path := newSandbox(t)
	limit, quota, period, pids, shares := int64(64<<20), int64(50000), uint64(100000), int64(42), uint64(512)
	p := func(n int64) *int64 { return &n }
	res := &specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: &limit},
		CPU:     &specs.LinuxCPU{Quota: &quota, Period: &period, Shares: &shares, Cpus: "0"},
		Pids:    &specs.LinuxPids{Limit: &pids},
		Devices: append(defaultDevices(), specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: p(10), Minor: p(200), Access: "rw"}),
	}
	member := path + "/member"
	makeMember(t, h, member, res)
	want := map[string]string{
		"memory/memory.limit_in_bytes": "67108864", "cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000",
		"cpu/cpu.shares": "512", "cpuset/cpuset.cpus": "0", "pids/pids.max": "42",
	}
	if h.Mode() == V2 {
		want = map[string]string{"/memory.max": "67108864", "/cpu.max": "50000 100000", "/pids.max": "42", "/cpuset.cpus": "0"}
	}
	v1 := h.V1Controllers()
	for file, want := range want {
		c, name, _ := strings.Cut(file, "/")
		mount := h.v2
		if c != "" {
			mount = v1[c]
		}
		b, err := os.ReadFile(filepath.Join(mount, member, name))
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s is %q (%v), want %q", file, got, err, want)
		}
	}
	// The rules hold: the null device opens, a disk that none allows does not.
	disk := filepath.Join(t.TempDir(), "disk")
	if err := unix.Mknod(disk, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))); err != nil {
		t.Fatal(err)
	}
	cmd := run(t, procs(h, member), "echo; cat /dev/null && cat "+disk+" 2>&1 | grep -q 'Operation not permitted'")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if f := h.OOMFile(member); f != "" {
		if b, err := os.ReadFile(f); err != nil || !strings.Contains(string(b), "oom_kill ") {
			t.Errorf("%s: %q, %v", f, b, err)
		}
	} else {
		t.Error("no OOM file beside a memory limit")
	}
}

// The library would pass over it.
func TestWeightThatCannotBeSet(t *testing.T) {
	testenv.Cgroup2(t)
	h, path := newSandbox(t)
	weight, d := uint16(100), specs.LinuxWeightDevice{}
	d.Weight = &weight
	err := h.MakeMember(path+"/member", &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{d}}})
	if bfq := exists(filepath.Join(h.v2, path, "member/io.bfq.weight")); !bfq && (err == nil || !strings.Contains(err.Error(), "weights of block devices")) {
		t.Errorf("MakeMember = %v, want an error that names them", err)
	}
}

func TestLimitOfMissingController(t *testing.T) {
	h, path := newSandbox(t)
	have, err := h.controllers(path)
	if err != nil {
		t.Fatal(err)
	}
	class := uint32(7)
	for controller, res := range map[string]*specs.LinuxResources{
		"net_cls": {Network: &specs.LinuxNetwork{ClassID: &class}},
		"rdma":    {Rdma: map[string]specs.LinuxRdma{"mlx": {HcaHandles: &class}}},
	} {
		if slices.Contains(have, controller) {
			continue
		}
		err := h.MakeMember(path+"/member", res)
		if err == nil || !strings.Contains(err.Error(), "no "+controller+" controller") {
			t.Errorf("MakeMember = %v, want an error that names %s", err, controller)
		}
	}
}

func TestMembersJoinEveryHierarchy(t *testing.T) {
	h, path := newSandbox(t)
	makeMember(t, h, path+"/member", nil)
	makeMember(t, h, path+"/member", nil) // again
	cmd := run(t, procs(h, path+"/member"), "echo; exec sleep 1000")
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	v1 := h.V1Controllers()
	for line := range strings.Lines(string(b)) {
		// A hierarchy that somebody has unmounted is listed until it is gone.
		_, rest, _ := strings.Cut(line, ":")
		controllers, at, _ := strings.Cut(rest, ":")
		first, _, _ := strings.Cut(controllers, ",")
		if mounted := controllers == "" && h.v2 != "" || v1[first] != ""; mounted && at != path+"/member\n" {
			t.Errorf("the process is in %q", line)
		}
	}
	if got, err := h.List(filepath.Dir(path)); err != nil || !slices.Equal(got, []string{"sandbox"}) {
		t.Errorf("List = %v, %v", got, err)
	}
	if got, err := h.List("/nowhere"); err != nil || len(got) != 0 {
		t.Errorf("List of nothing = %v, %v", got, err)
	}
}

func TestLeafIsInOneHierarchy(t *testing.T) {
	h, path := newSandbox(t)
	leaf := path + "/pause"
	if err := errors.Join(h.MakeLeaf(leaf), h.MakeLeaf(leaf)); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range h.mounts() {
		if exists(m + leaf) {
			n++
		}
	}
	if n != 1 {
		t.Errorf("the leaf is in %d hierarchies", n)
	}
	cmd := run(t, []string{h.LeafProcs(leaf)}, "echo; exec sleep 1000")
	dir, err := h.TrackingDir(leaf)
	if err != nil || (dir == nil) != (h.Mode() == V1) {
		t.Errorf("TrackingDir = %v, %v", dir, err)
	}
	if dir != nil {
		dir.Close()
	}
	remove(t, h, path)
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("the process in the leaf ended with %v", cmd.ProcessState)
	}
}

// A group that forks while it is killed, in cgroups of its own making.
func TestKillForking(t *testing.T) {
	h, path := newSandbox(t)
	member := path + "/member"
	pids := int64(200)
	var res *specs.LinuxResources
	if cs, _ := h.controllers(path); slices.Contains(cs, "pids") {
		res = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &pids}} // should the test fail
	}
	const bomb = "f() { while :; do sleep 1000 & sh -c : & done 2>/dev/null; }; f & f & echo; exec sleep 1000" // wait would end with the two
	for _, way := range []struct {
		name string
		kill func(context.Context) error
	}{
		{"as Kill does", func(ctx context.Context) error { return h.Kill(ctx, member) }},
		// What is left of it where there is no cgroup.kill, in each hierarchy.
		{"by pid in the first hierarchy", func(ctx context.Context) error { return h.killBy(ctx, h.mounts()[0], member, h.killByPID) }},
		{"by pid in the last hierarchy", func(ctx context.Context) error {
			return h.killBy(ctx, h.mounts()[len(h.mounts())-1], member, h.killByPID)
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			makeMember(t, h, member, res)
			makeMember(t, h, member+"/inner", nil)
			outer, inner := run(t, procs(h, member), bomb), run(t, procs(h, member+"/inner"), "echo; exec sleep 1000")
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := way.kill(ctx); err != nil {
				t.Fatal(err)
			}
			for _, m := range h.mounts() {
				if pids, err := pidsBelow(m + member); err != nil || len(pids) > 0 {
					t.Errorf("%s: left are %v (%v)", m, pids, err)
				}
			}
			for _, cmd := range []*exec.Cmd{outer, inner} {
				if cmd.Wait() == nil {
					t.Error("a process ended by itself")
				}
			}
			remove(t, h, member)
			if err := h.Kill(ctx, member); err != nil {
				t.Errorf("Kill of what is not there: %v", err)
			}
		})
	}
}

func TestKillGivesUp(t *testing.T) {
	h, path := newSandbox(t)
	makeMember(t, h, path+"/member", nil)
	cmd := run(t, procs(h, path+"/member"), "echo; exec sleep 1000")
	ctx, cancel := context.WithCancelCause(t.Context())
	boom := errors.New("boom")
	cancel(boom)
	// Killed, but not waited for longer than ctx says: either may come first.
	if err := h.Kill(ctx, path); err != nil && !errors.Is(err, boom) {
		t.Errorf("Kill = %v", err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process was not killed")
	}
}

func BenchmarkMakeRemove(b *testing.B) {
	h, path := newSandbox(b)
	limit, pids := int64(64<<20), int64(100)
	res := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids}, Devices: defaultDevices()}
	n := 0
	for b.Loop() {
		n++
		sandbox := path + "/" + strconv.Itoa(n)
		if err := errors.Join(h.MakeSandbox(sandbox), h.MakeLeaf(sandbox+"/pause"), h.MakeMember(sandbox+"/member", res)); err != nil {
			b.Fatal(err)
		}
		remove(b, h, sandbox)
	}
}

func BenchmarkSandbox(b *testing.B) {
	h, path := newSandbox(b)
	n := 0
	for b.Loop() {
		n++
		if err := errors.Join(h.MakeSandbox(path+"/"+strconv.Itoa(n)), h.MakeLeaf(path+"/"+strconv.Itoa(n)+"/pause")); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		remove(b, h, path+"/"+strconv.Itoa(n))
		b.StartTimer()
	}
}

// procs are the files that a shell writes its pid to, to be in the cgroup at path
// of every hierarchy.
func procs(h *Host, path string) []string {
	ps := h.Tasks(path)
	if h.v2 != "" {
		ps = append(ps, filepath.Join(h.v2, path, "cgroup.procs"))
	}
	return ps
}

// A cgroup that somebody else made above, as with mkdir, has no processors in
// the v1 cpuset hierarchy, and nothing could run below it.
func TestMembersRunBelowABareCgroup(t *testing.T) {
	testenv.Root(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	parent := fmt.Sprintf("/sandboxd-test-bare-%d", os.Getpid())
	t.Cleanup(func() { remove(t, h, parent) })
	for _, m := range h.mounts() {
		if err := os.Mkdir(m+parent, 0o755); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	if err := h.MakeSandbox(parent + "/sandbox"); err != nil {
		t.Fatal(err)
	}
	makeMember(t, h, parent+"/sandbox/member", nil)
	if err := run(t, procs(h, parent+"/sandbox/member"), "echo").Wait(); err != nil {
		t.Error(err)
	}
}

// defaultDevices are rules like those that a member has.
func defaultDevices() []specs.LinuxDeviceCgroup {
	rule := func(allow bool, typ string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		d := specs.LinuxDeviceCgroup{Allow: allow, Type: typ, Access: access}
		if major >= 0 {
			d.Major = &major
		}
		if minor >= 0 {
			d.Minor = &minor
		}
		return d
	}
	return []specs.LinuxDeviceCgroup{
		rule(false, "a", -1, -1, "rwm"),
		rule(true, "c", -1, -1, "m"),
		rule(true, "b", -1, -1, "m"),
		rule(true, "c", 1, 3, "rwm"),    // null
		rule(true, "c", 1, 5, "rwm"),    // zero
		rule(true, "c", 1, 7, "rwm"),    // full
		rule(true, "c", 1, 8, "rwm"),    // random
		rule(true, "c", 1, 9, "rwm"),    // urandom
		rule(true, "c", 5, 0, "rwm"),    // tty
		rule(true, "c", 5, 1, "rwm"),    // console
		rule(true, "c", 5, 2, "rwm"),    // ptmx
		rule(true, "c", 136, -1, "rwm"), // pts
	}
}
