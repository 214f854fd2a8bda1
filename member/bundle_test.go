package member

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandboxd/sandboxd/internal/request"
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
