package member

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
)

var update = flag.Bool("update", false, "write testdata/programs anew")

// Files of which only matters which is which. Stdout and stderr would not do: go
// test -json makes one of them.
var aFile, anotherFile = devNull(), devNull()

func devNull() *os.File {
	f, err := os.Open(os.DevNull)
	if err != nil {
		panic(err)
	}
	return f
}

// withUserNS puts in into a user namespace; the descriptor is of no matter here.
func withUserNS(in *Input) {
	in.UserNS = os.Stdin
	in.UIDs = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	in.GIDs = in.UIDs
	in.Namespaces[namespace.User] = Join{File: in.UserNS}
}

func TestProgramsAreAsReviewed(t *testing.T) {
	tests := []struct {
		name string
		edit func(*Input)
	}{
		{"default", func(*Input) {}},
		{"read-only", func(in *Input) { in.Root.ReadOnly = true }},
		{"hooks", func(in *Input) { in.Made = aFile }},
		{"files", func(in *Input) { in.Files = map[string]string{"/etc/hosts": "/srv/hosts"} }},
		{"tty", func(in *Input) {
			in.Spec.Process.Terminal = true
			in.Spec.Process.ConsoleSize = &specs.Box{Height: 24, Width: 80}
		}},
		{"bundle", func(in *Input) {
			in.Root = &Root{Path: "/bundle/rootfs", ReadOnly: true}
			in.Spec.Hostname, in.Spec.Domainname = "box", "example.org"
			in.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
			in.Spec.Linux.RootfsPropagation = "rslave"
			in.Spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 3, Nanosecs: 4}}
			in.Namespaces[namespace.Time] = Join{Private: true}
			in.Spec.Process.OOMScoreAdj = new(int)
			in.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
			in.Spec.Process.User = specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}}
			in.Spec.Mounts = append(in.Spec.Mounts,
				specs.Mount{Destination: "/data", Source: "/srv/data", Options: []string{"rbind", "rro", "nosuid"}},
				specs.Mount{Destination: "/live", Source: "/srv/live", Options: []string{"rbind", "rslave"}},
				specs.Mount{Destination: "/etc/resolv.conf", Source: "/run/resolv.conf", Options: []string{"bind", "ro"}})
			in.Spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}
			in.Cgroups = []CgroupHierarchy{
				{Dir: "cpu,cpuacct", Options: []string{"cpu", "cpuacct"}}, {Dir: "systemd", Options: []string{"name=systemd"}}, {Dir: "unified", Unified: true}}
		}},
		{"cgroups", func(in *Input) {
			in.Cgroups = []CgroupHierarchy{
				{Dir: "cpu,cpuacct", Options: []string{"cpu", "cpuacct"}, Own: "/sys/fs/cgroup/cpu,cpuacct/sandboxd/s/m"},
				{Dir: "unified", Unified: true, Own: "/sys/fs/cgroup/unified/sandboxd/s/m"}}
		}},
		{"user-namespace", func(in *Input) {
			withUserNS(in)
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/data", Source: "/srv/data", Options: []string{"rbind"}})
		}},
		{"shared-pid", func(in *Input) {
			in.Namespaces = map[namespace.Kind]Join{namespace.PID: {File: os.Stdin}, namespace.Net: {File: aFile}, namespace.Mnt: {Private: true}}
			in.Shm, in.HostMnt = anotherFile, os.Stdin
		}},
		{"joined-mnt", func(in *Input) {
			in.Root, in.RootFD = nil, aFile
			in.Namespaces = map[namespace.Kind]Join{namespace.Mnt: {File: os.Stdin}}
			in.Spec.Mounts, in.Spec.Linux = nil, nil
			in.Spec.Process.NoNewPrivileges = false
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := goldenInput()
			tt.edit(in)
			p, err := Compile(in)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if err := p.Dump(&got); err != nil {
				t.Fatal(err)
			}
			b, err := p.Encode()
			if size, serr := p.Size(); err != nil || serr != nil || size != len(b) {
				t.Errorf("Size = %d, %v; Encode returns %d bytes, %v", size, serr, len(b), err)
			}
			file := filepath.Join("testdata/programs", tt.name+".golden")
			if *update {
				if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("%s (-want +got; -update writes it):\n%s", file, diff)
			}
		})
	}
}

func TestCompileRefuses(t *testing.T) {
	tests := []struct {
		name, want string
		edit       func(*Input)
	}{
		{"hostname in a shared namespace", "hostname: the uts namespace is shared", func(in *Input) {
			in.Spec.Hostname = "x"
			delete(in.Namespaces, namespace.UTS)
		}},
		{"sysctl of a shared namespace", `linux.sysctl: "net.core.somaxconn": the net namespace is shared`, func(in *Input) {
			in.Spec.Linux.Sysctl = map[string]string{"net.core.somaxconn": "1"}
			in.Namespaces[namespace.Net] = Join{File: os.Stdin}
		}},
		{"sysctl of the host", `linux.sysctl: "vm.swappiness" belongs to no namespace`, func(in *Input) {
			in.Spec.Linux.Sysctl = map[string]string{"vm.swappiness": "1"}
		}},
		{"sysctl that is a path", `linux.sysctl: "net/../vm/swappiness" is not a name`, func(in *Input) {
			in.Spec.Linux.Sysctl = map[string]string{"net/../vm/swappiness": "1"}
		}},
		{"capability", `process.capabilities.bounding: unknown capability "CAP_FLY"`, func(in *Input) {
			in.Spec.Process.Capabilities.Bounding = []string{"CAP_FLY"}
		}},
		{"ambient capability", "process.capabilities: CAP_KILL is ambient but not permitted and inheritable", func(in *Input) {
			in.Spec.Process.Capabilities.Ambient = []string{"CAP_KILL"}
		}},
		{"rlimit", `process.rlimits: unknown type "RLIMIT_FUN"`, func(in *Input) {
			in.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_FUN"}}
		}},
		{"bind option", `mounts[7] on "/v": option "sze=1" means nothing for a bind mount`, func(in *Input) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/v", Source: "/v", Options: []string{"bind", "sze=1"}})
		}},
		{"option of a cgroup mount", `mounts[6] on "/sys/fs/cgroup": option "memory" means nothing for the hierarchies that there are`, func(in *Input) {
			in.Spec.Mounts[6].Options = append(in.Spec.Mounts[6].Options, "memory")
		}},
		{"tmpcopyup", `mounts[7] on "/v": option "tmpcopyup" is not supported`, func(in *Input) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/v", Type: "tmpfs", Options: []string{"tmpcopyup"}})
		}},
		{"id outside the map", `mounts[7] on "/v": option "uid=70000": id 70000 is not mapped in the user namespace`, func(in *Input) {
			withUserNS(in)
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/v", Type: "tmpfs", Options: []string{"uid=70000"}})
		}},
		{"apparmor", `process.apparmorProfile "p": AppArmor profiles are not supported`, func(in *Input) { in.Spec.Process.ApparmorProfile = "p" }},
		{"personality", "linux.personality is not supported", func(in *Input) { in.Spec.Linux.Personality = &specs.LinuxPersonality{} }},
		{"memory policy", "linux.memoryPolicy is not supported", func(in *Input) { in.Spec.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{} }},
		{"relative cwd", `process.cwd "x" is not an absolute path`, func(in *Input) { in.Spec.Process.Cwd = "x" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := goldenInput()
			tt.edit(in)
			if _, err := Compile(in); err == nil || err.Error() != tt.want {
				t.Errorf("Compile = %v, want %s", err, tt.want)
			}
		})
	}
}

// Whatever a bundle says, it is refused or becomes a program that can be
// encoded and shown, and in which nothing mounts before the root is entered.
func FuzzCompile(f *testing.F) {
	for _, edit := range []func(*Input){func(*Input) {}, withUserNS} {
		in := goldenInput()
		edit(in)
		b, err := json.Marshal(in.Spec)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, true, in.UserNS != nil)
	}
	f.Add([]byte(`{"process":{"args":["/x"],"cwd":"/","consoleSize":{"height":70000},"terminal":true}}`), false, false)
	f.Add([]byte(`{"process":{"args":[""],"cwd":"/","env":["PATH=:"]},"mounts":[{"destination":"..","type":"bind","source":"/"}]}`), false, true)
	f.Fuzz(func(t *testing.T, b []byte, overlay, user bool) {
		in := goldenInput()
		in.Spec = new(specs.Spec)
		if err := json.Unmarshal(b, in.Spec); err != nil {
			return
		}
		in.Root.Overlay = overlay
		if user {
			withUserNS(in)
		}
		p, err := Compile(in)
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an error without a text")
			}
			return
		}
		if _, err := p.Encode(); err != nil {
			t.Errorf("Compile gave a program that cannot be encoded: %v", err)
		}
		if err := p.Dump(io.Discard); err != nil {
			t.Error(err)
		}
		if last := p.Step(p.Len() - 1); !strings.HasPrefix(last, "execute ") {
			t.Errorf("the program ends with %q", last)
		}
	})
}

func BenchmarkCompile(b *testing.B) {
	in := goldenInput()
	var p *launch.Program
	for b.Loop() {
		var err error
		if p, err = Compile(in); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(p.Len()), "calls")
}
