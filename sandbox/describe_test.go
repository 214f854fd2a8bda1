package sandbox

import (
	"reflect"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestDescribe(t *testing.T) {
	ptr := func(n int64) *int64 { return &n }
	period := uint64(50_000)
	for _, tt := range []struct {
		name string
		res  *specs.LinuxResources
		want LimitsInfo
	}{
		{"none", nil, LimitsInfo{}},
		{"empty", &specs.LinuxResources{Memory: &specs.LinuxMemory{}, CPU: &specs.LinuxCPU{}, Pids: &specs.LinuxPids{}}, LimitsInfo{}},
		{"unlimited", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(-1)}, CPU: &specs.LinuxCPU{Quota: ptr(-1)}, Pids: &specs.LinuxPids{Limit: ptr(-1)}}, LimitsInfo{}},
		{"all", &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr(64 << 20)}, CPU: &specs.LinuxCPU{Quota: ptr(75_000), Period: &period}, Pids: &specs.LinuxPids{Limit: ptr(10)},
		}, LimitsInfo{64 << 20, 1_500_000_000, 10}},
		{"the kernel's period", &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(50_000)}}, LimitsInfo{NanoCPUs: 500_000_000}},
	} {
		var i MemberInfo
		i.describe(&specs.Spec{
			Process: &specs.Process{Env: []string{"A=b"}},
			Mounts:  []specs.Mount{{Destination: "/data", Type: "bind", Source: "/srv", Options: []string{"ro"}}},
			Linux:   &specs.Linux{Resources: tt.res},
		})
		want := MemberInfo{Limits: &tt.want, Env: []string{"A=b"}, Mounts: []MountInfo{{"/data", "bind", "/srv", []string{"ro"}}}}
		if !reflect.DeepEqual(i, want) {
			t.Errorf("%s: %+v, limits %+v; want %+v", tt.name, i, *i.Limits, tt.want)
		}
	}
}
