package seccomp

import (
	"reflect"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func cacheProfile() *specs.LinuxSeccomp {
	one := uint(1)
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, DefaultErrnoRet: &one, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchAARCH64},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write"}, Action: specs.ActAllow},
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 8, Op: specs.OpEqualTo}}},
		},
	}
}

func TestCache(t *testing.T) {
	var c Cache
	first, err := c.Compile(cacheProfile())
	if err != nil {
		t.Fatal(err)
	}
	if want, err := Compile(cacheProfile()); err != nil || !slices.Equal(first, want) {
		t.Errorf("the cache compiles %v, want %v (%v)", first, want, err)
	}
	if again, err := c.Compile(cacheProfile()); err != nil || &again[0] != &first[0] {
		t.Errorf("an equal profile was compiled again (%v)", err)
	}
	p := cacheProfile()
	if n := testing.AllocsPerRun(10, func() { c.Compile(p) }); n > 0 {
		t.Errorf("a profile that is known makes %v allocations", n)
	}
	two := uint(2)
	for name, change := range map[string]func(p *specs.LinuxSeccomp){
		"default action": func(p *specs.LinuxSeccomp) { p.DefaultAction, p.DefaultErrnoRet = specs.ActAllow, nil },
		"default errno":  func(p *specs.LinuxSeccomp) { p.DefaultErrnoRet = &two },
		"no errno":       func(p *specs.LinuxSeccomp) { p.DefaultErrnoRet = nil },
		"architectures": func(p *specs.LinuxSeccomp) {
			p.Architectures = append(p.Architectures, specs.ArchX86, specs.ArchARM, specs.ArchX32)
		},
		"name":            func(p *specs.LinuxSeccomp) { p.Syscalls[0].Names[1] = "close" },
		"fewer names":     func(p *specs.LinuxSeccomp) { p.Syscalls[0].Names = p.Syscalls[0].Names[:1] },
		"action":          func(p *specs.LinuxSeccomp) { p.Syscalls[0].Action = specs.ActLog },
		"errno of a rule": func(p *specs.LinuxSeccomp) { p.Syscalls[0].Action, p.Syscalls[0].ErrnoRet = specs.ActErrno, &two },
		"argument":        func(p *specs.LinuxSeccomp) { p.Syscalls[1].Args[0].Value = 9 },
		"fewer rules":     func(p *specs.LinuxSeccomp) { p.Syscalls = p.Syscalls[:1] },
	} {
		p := cacheProfile()
		change(p)
		got, err := c.Compile(p)
		want, werr := Compile(p)
		if !slices.Equal(got, want) || err != nil || werr != nil {
			t.Errorf("with another %s the filter is %v, %v, want %v, %v", name, got, err, want, werr)
		}
		if len(c.last) > cacheMax {
			t.Fatalf("%d filters are kept", len(c.last))
		}
	}
	p = cacheProfile()
	p.Architectures = []specs.Arch{"x"} // which is refused
	if _, err := c.Compile(p); err == nil {
		t.Error("a profile that cannot be compiled was taken for one that can")
	}
}

// A field that is added to the type must be compared too.
func TestCacheComparesEverything(t *testing.T) {
	for typ, want := range map[reflect.Type]int{
		reflect.TypeFor[specs.LinuxSeccomp](): 7, reflect.TypeFor[specs.LinuxSyscall](): 4, reflect.TypeFor[specs.LinuxSeccompArg](): 4,
	} {
		if n := typ.NumField(); n != want {
			t.Errorf("%v has %d fields, same compares %d", typ, n, want)
		}
	}
}
