package member

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

var updateSpecs = flag.Bool("update-specs", false, "rewrite the golden configurations")

func bundleDir(t *testing.T, config string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "config.json"), config)
	if err := os.Mkdir(filepath.Join(dir, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestBundleErrors(t *testing.T) {
	wrap := func(s string) string {
		return `{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"cwd":"/","user":{"uid":0,"gid":0},"args":["sh"]}` + s + `}`
	}
	proc := func(s string) string {
		return `{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"cwd":"/","user":{},"args":["sh"]` + s + `}}`
	}
	linux := func(s string) string { return wrap(`,"linux":{` + s + `}`) }
	tests := []struct{ name, config, want string }{
		{"plain", wrap(""), ""},
		{"garbage", `{`, "unexpected end of JSON input"},
		{"not an object", `[]`, "a JSON array is not what belongs here"},
		{"version", `{"ociVersion":"2.0.0","root":{"path":"rootfs"}}`, `ociVersion: "2.0.0" is not 1.x`},
		{"half a version", `{"ociVersion":"1.x","root":{"path":"rootfs"}}`, `ociVersion: "1.x" is not 1.x`},
		{"no version", `{"root":{"path":"rootfs"}}`, `ociVersion: "" is not 1.x`},
		{"no root", `{"ociVersion":"1.0.0"}`, "root.path: missing"},
		{"root missing", `{"ociVersion":"1.0.0","root":{"path":"x"},"process":{"args":["a"],"cwd":"/"}}`, "no such file"},
		{"no command", `{"ociVersion":"1.0.0","root":{"path":"rootfs"}}`, "no command"},
		{"unknown", wrap(`,"foo":1`), "foo: not known to this version of sandboxd"},
		{"unknown in linux", linux(`"foo":1`), "linux.foo: not known to this version of sandboxd"},
		{"unknown in list", wrap(`,"mounts":[{"destination":"/a"},{"destination":"/b","foo":1}]`), "mounts[1].foo: not known"},
		{"case", wrap(`,"Hostname":"x"`), "Hostname: not known"},
		{"twice", wrap(`,"hostname":"x","hostname":"y"`), "hostname: named twice"},
		{"wrong type", wrap(`,"hostname":1`), "hostname: a JSON number is not what belongs here"},
		{"hooks", wrap(`,"hooks":{"poststart":[{"path":"/x"}]}`), ""},
		{"vm", wrap(`,"vm":{"hypervisor":{"path":"/x"},"kernel":{"path":"/x"}}`), "vm: not supported"},
		{"intelRdt", linux(`"intelRdt":{}`), "linux.intelRdt: not supported"},
		{"apparmor", proc(`,"apparmorProfile":"x"`), "process.apparmorProfile: not supported"},
		{"cgroupsPath", linux(`"cgroupsPath":"/x"`), `linux.cgroupsPath: a member's cgroup`},
		{"mappings", linux(`"uidMappings":[{"containerID":0,"hostID":1,"size":1}]`), "linux.uidMappings"},
		{"namespace twice", linux(`"namespaces":[{"type":"pid"},{"type":"pid"}]`), `linux.namespaces[1]: type "pid" is named twice`},
		{"namespace unknown", linux(`"namespaces":[{"type":"x"}]`), "linux.namespaces[0].type"},
		{"namespace path", linux(`"namespaces":[{"type":"network","path":"/x"}]`), "--ns net=SOURCE"},
		{"user namespace", linux(`"namespaces":[{"type":"user"}]`), "user=private is not supported"},
		{"shared hostname", wrap(`,"hostname":"x"`), `hostname: "x" would change the uts namespace`},
		{"shared sysctl", linux(`"sysctl":{"net.ipv4.ip_forward":"1"}`), "of the net namespace, which is not its own"},
		{"host sysctl", linux(`"sysctl":{"vm.swappiness":"1"}`), "can only be set for the whole host"},
		{"timeOffsets", linux(`"timeOffsets":{"boottime":{"secs":1}}`), "linux.timeOffsets: they need a time namespace"},
		{"capability", proc(`,"capabilities":{"bounding":["CAP_FOO"]}`), `process.capabilities.bounding: unknown capability "CAP_FOO"`},
		{"rlimit", proc(`,"rlimits":[{"type":"RLIMIT_FOO","soft":1,"hard":1}]`), `unknown limit "RLIMIT_FOO"`},
		{"rlimit order", proc(`,"rlimits":[{"type":"RLIMIT_CPU","soft":2,"hard":1}]`), "soft limit 2"},
		{"size of no terminal", proc(`,"consoleSize":{"height":5,"width":6}`), ""},
		{"devices that differ", linux(`"devices":[{"path":"/dev/x","type":"c","major":1,"minor":3},{"path":"/dev/x","type":"c","major":1,"minor":5}]`), "linux.devices[1].path: there is another device with the path /dev/x"},
		{"device twice", linux(`"devices":[{"path":"/dev/x","type":"c","major":1,"minor":3},{"path":"/dev/x","type":"c","major":1,"minor":3}]`), ""},
		{"oom score", proc(`,"oomScoreAdj":1001`), "1001 is not between"},
		{"seccomp", linux(`"seccomp":{"defaultAction":"SCMP_ACT_NOTIFY"}`), "linux.seccomp: seccomp default action"},
		{"memory", linux(`"resources":{"memory":{"limit":4096}}`), "linux.resources.memory.limit: 4096"},
		{"mount target", wrap(`,"mounts":[{"destination":""}]`), `mounts[0].destination "" is not an absolute path`},
		{"mount target that leads out", wrap(`,"mounts":[{"destination":"a/../.."}]`), `mounts[0].destination "/" is the root itself`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Resolve(&request.Member{Bundle: bundleDir(t, tt.config)}, facts())
			check(t, err, tt.want)
		})
	}
}

// Paths in a bundle may be relative: to the bundle, and in the member to its root.
func TestBundlePaths(t *testing.T) {
	dir := bundleDir(t, `{"ociVersion":"1.0.0","root":{"path":"rootfs"},"process":{"args":["a"],"cwd":"/"},"mounts":[
		{"destination":"a/b/","source":"../v","options":["rbind"]},
		{"destination":"/x//./c","type":"bind","source":"/v"},
		{"destination":"/t","type":"tmpfs","source":"t"}]}`)
	spec, err := ReadBundle(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got [][2]string
	for _, m := range spec.Mounts {
		got = append(got, [2]string{m.Source, m.Destination})
	}
	want := [][2]string{{filepath.Join(filepath.Dir(dir), "v"), "/a/b"}, {"/v", "/x/c"}, {"t", "/t"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sources and destinations (-want +got):\n%s", diff)
	}
	if want := filepath.Join(dir, "rootfs"); spec.Root.Path != want {
		t.Errorf("root.path %q, want %q", spec.Root.Path, want)
	}
}

// What is at a device's path in the root is it, or refused: the launch program leaves
// it there.
func TestBundleDevicesInRoot(t *testing.T) {
	testenv.Root(t)
	resolve := func(config string) error {
		dir := bundleDir(t, `{"ociVersion":"1.0.0","root":{"path":"rootfs"},"process":{"args":["a"],"cwd":"/"},`+config+`}`)
		dev := filepath.Join(dir, "rootfs/dev")
		write(t, filepath.Join(dev, "file"), "")
		for name, mode := range map[string]uint32{"five": unix.S_IFCHR, "block": unix.S_IFBLK, "fifo": unix.S_IFIFO} {
			if err := unix.Mknod(filepath.Join(dev, name), mode|0o600, int(unix.Mkdev(1, 5))); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("five", filepath.Join(dev, "link")); err != nil {
			t.Fatal(err)
		}
		_, err := Resolve(&request.Member{Bundle: dir}, facts())
		return err
	}
	device := func(path, typ string, minor int) string {
		return fmt.Sprintf(`"linux":{"devices":[{"path":%q,"type":%q,"major":1,"minor":%d}]}`, path, typ, minor)
	}
	const other = "linux.devices: there is something else than the device "
	for _, tt := range []struct{ config, want string }{
		{device("/dev/five", "c", 5), ""},
		{device("/dev/five", "u", 5), ""},
		{device("/dev/fifo", "p", 0), ""},
		{device("/dev/new", "c", 5), ""},
		{device("/dev/five", "c", 3), other + "c 1:3 at /dev/five in the root"},
		{device("/dev/block", "c", 5), other + "c 1:5 at /dev/block in the root"},
		{device("/dev/file", "c", 5), other},
		{device("/dev/link", "c", 5), other},
		{device("/dev", "c", 5), other},
		{device("/dev/file", "c", 5) + `,"mounts":[{"destination":"/dev","type":"tmpfs"}]`, ""},
	} {
		check(t, resolve(tt.config), tt.want)
	}
}

// The environment of a bundle lacks HOME at most if the root says nothing of it.
func TestBundleHome(t *testing.T) {
	for env, want := range map[string]string{``: "HOME=/home/bob", `"HOME=/x"`: "HOME=/x"} {
		dir := bundleDir(t, `{"ociVersion":"1.0.0","root":{"path":`+strconv.Quote(rootfs(t))+`},"process":{"args":["a"],"cwd":"/","user":{"uid":1000,"gid":5},"env":[`+env+`]}}`)
		r, err := Resolve(&request.Member{Bundle: dir}, facts())
		if err != nil {
			t.Fatal(err)
		}
		if p := r.Spec.Process; !slices.Equal(p.Env, []string{want}) || p.User.GID != 5 {
			t.Errorf("environment %q, group %d; want %s and 5", p.Env, p.User.GID, want)
		}
	}
}

func TestOOMScoreThatCannotBeSet(t *testing.T) {
	for _, tt := range []struct {
		adj  int
		own  uint64
		want int
	}{{-1000, 0, 1}, {-1000, 1 << unix.CAP_SYS_RESOURCE, 0}, {1000, 0, 0}} {
		r := resolver{own: tt.own, spec: &specs.Spec{Process: &specs.Process{OOMScoreAdj: &tt.adj}}, out: &Resolved{}}
		if err := r.oomScore(); err != nil || len(r.out.Warnings) != tt.want {
			t.Errorf("oomScoreAdj %d with capabilities %#x: %v, warnings %q, want %d", tt.adj, tt.own, err, r.out.Warnings, tt.want)
		}
	}
}

// TestGolden shows whole configurations. The seccomp profile and paths that
// depend on the machine are left out.
func TestGolden(t *testing.T) {
	for _, name := range []string{"default", "runc", "rootless"} {
		t.Run(name, func(t *testing.T) {
			req := &request.Member{Rootfs: rootfs(t), Args: []string{"sh"}}
			if name != "default" {
				b, err := os.ReadFile(filepath.Join("testdata", "bundle-"+name+".json"))
				if err != nil {
					t.Fatal(err)
				}
				req = &request.Member{Bundle: bundleDir(t, string(b))}
			}
			r, err := Resolve(req, facts())
			if err != nil {
				t.Fatal(err)
			}
			l := r.Spec.Linux
			if (l.Seccomp != nil) != (name == "default") {
				t.Errorf("seccomp profile %v", l.Seccomp)
			}
			l.Seccomp, r.Spec.Root.Path = nil, "ROOT"
			thermal := thermalPaths()
			l.MaskedPaths = slices.DeleteFunc(l.MaskedPaths, func(p string) bool { return slices.Contains(thermal, p) })
			got, err := json.MarshalIndent(r.Spec, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			path := filepath.Join("testdata", "spec-"+name+".golden.json")
			if *updateSpecs {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("configuration (-want +got):\n%s", diff)
			}
		})
	}
}

// FuzzBundle: any bytes are an error of one line or a configuration that can be
// written, and that is taken again.
func FuzzBundle(f *testing.F) {
	for _, name := range []string{"runc", "rootless"} {
		b, err := os.ReadFile(filepath.Join("testdata", "bundle-"+name+".json"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"ociVersion":"1.0.0","root":{"path":"x"},"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		spec, err := ParseBundle(b)
		if err != nil {
			return
		}
		out, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseBundle(out); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	})
}
