package sandbox

import (
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/statefile"
)

// describe adds to what is shown of members what they were made with. Of one whose
// configuration cannot be read, nothing is added.
func describe(stateDir string, ms []MemberInfo) {
	for n := range ms {
		i := &ms[n]
		if spec, err := readSpec(filepath.Join(stateDir, sandboxesDir, i.Sandbox, membersDir, i.ID)); err == nil {
			i.describe(spec)
		}
	}
}

func (i *MemberInfo) describe(spec *specs.Spec) {
	if spec.Process != nil {
		i.Env = spec.Process.Env
	}
	for _, m := range spec.Mounts {
		i.Mounts = append(i.Mounts, MountInfo{m.Destination, m.Type, m.Source, m.Options})
	}
	i.Limits = new(LimitsInfo)
	if spec.Linux == nil || spec.Linux.Resources == nil {
		return
	}
	r := spec.Linux.Resources
	if m := r.Memory; m != nil && m.Limit != nil {
		i.Limits.Memory = max(0, *m.Limit) // -1 is none
	}
	if c := r.CPU; c != nil && c.Quota != nil && *c.Quota > 0 {
		period := uint64(100_000) // the kernel's
		if c.Period != nil && *c.Period > 0 {
			period = *c.Period
		}
		i.Limits.NanoCPUs = int64(float64(*c.Quota) / float64(period) * 1e9)
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		i.Limits.Pids = max(0, *p.Limit)
	}
}

// readSpec reads the OCI configuration of the member whose directory is dir.
func readSpec(dir string) (*specs.Spec, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var spec specs.Spec
	if err := statefile.Read(root, specFile, &spec); err != nil {
		return nil, err
	}
	return &spec, nil
}
