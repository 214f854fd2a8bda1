package seccomp

import (
	"slices"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Cache remembers the filters that were compiled last: nearly all members have the
// same profile, and to compile it takes 200 KB. The zero value is ready for use.
// It is safe for concurrent use.
type Cache struct {
	mu   sync.Mutex
	last []compiled // the one that was asked for last is the first; guarded by mu
}

type compiled struct {
	profile *specs.LinuxSeccomp
	filter  []unix.SockFilter
}

// cacheMax is how many are remembered: profiles differ by the capabilities that
// a member has.
const cacheMax = 4

// Compile is [Compile]. The profile is kept, and must not be changed, nor must the
// filter, which others are given too.
func (c *Cache) Compile(s *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	if filter := c.find(s); filter != nil {
		return filter, nil
	}
	filter, err := Compile(s)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.last) == cacheMax {
		c.last = c.last[:cacheMax-1]
	}
	c.last = slices.Insert(c.last, 0, compiled{s, slices.Clip(slices.Clone(filter))})
	return c.last[0].filter, nil
}

func (c *Cache) find(s *specs.LinuxSeccomp) []unix.SockFilter {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.last, func(o compiled) bool { return same(o.profile, s) })
	if i < 0 {
		return nil
	}
	found := c.last[i]
	copy(c.last[1:], c.last[:i])
	c.last[0] = found
	return found.filter
}

// same reports whether two profiles mean the same, unless they say it in
// different words.
func same(a, b *specs.LinuxSeccomp) bool {
	return a.DefaultAction == b.DefaultAction && equal(a.DefaultErrnoRet, b.DefaultErrnoRet) &&
		slices.Equal(a.Architectures, b.Architectures) && slices.Equal(a.Flags, b.Flags) &&
		a.ListenerPath == b.ListenerPath && a.ListenerMetadata == b.ListenerMetadata &&
		slices.EqualFunc(a.Syscalls, b.Syscalls, func(a, b specs.LinuxSyscall) bool {
			return a.Action == b.Action && equal(a.ErrnoRet, b.ErrnoRet) && slices.Equal(a.Names, b.Names) && slices.Equal(a.Args, b.Args)
		})
}

func equal(a, b *uint) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}
