package member

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	mobyseccomp "github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/signum"
)

// Limits of what is taken from a request.
const (
	// minMemory is the lowest memory limit. Each CPU charges memory in batches of
	// 64 pages (MEMCG_CHARGE_BATCH), and the smallest init has page tables, a
	// kernel stack and the first pages of its program besides: below this the
	// kernel kills it before, or right after, its execve.
	minMemory = 1 << 20

	cpuPeriod   = 100_000    // microseconds; the kernel's default
	minNanoCPUs = 10_000_000 // the kernel takes no quota below 1 ms in a period

	maxString  = 32*4096 - 1 // one argument or variable: MAX_ARG_STRLEN of execve(2), less the NUL
	maxStrings = 1 << 20     // all of them: half of what execve(2) takes with a stack limit of 8 MiB
	pathMax    = 4096        // PATH_MAX, with the NUL
	maxLabels  = 64 << 10    // keys and values together
)

// SandboxFacts is what must be known of a sandbox to resolve a request for a
// member of it.
type SandboxFacts struct {
	Hostname    string           // of the sandbox's uts namespace, for $HOSTNAME; may be empty
	Holds       []namespace.Kind // by its pause
	HostNetwork bool             // the sandbox has the host's network
	UserNS      bool             // pause holds a user namespace
	Cgroup      string           // the sandbox's cgroup
	ShmShared   bool             // the sandbox has a /dev/shm of its own, for those who join its ipc namespace
	Members     []SiblingFacts   // that exist already, running or exited
}

// SiblingFacts is what must be known of a member that others may join.
type SiblingFacts struct {
	Name, ID   string
	Alive      bool                // init runs, or is about to
	Held       bool                // namespaces and root can be joined: init is alive, or they are in custody
	PidNSAlive bool                // its pid namespace still takes processes
	Namespaces namespace.Selection // as resolved
	Root       string              // a path of the host that leads to its root, such as /proc/PID/fd/16
}

// Resolved is a request with everything filled in.
type Resolved struct {
	// Spec is the whole configuration. Linux.Namespaces lists the kinds that
	// are private. Root is nil if the mnt namespace is not private.
	Spec       *specs.Spec
	Namespaces namespace.Selection // every kind
	Root       *Root               // nil if the mnt namespace is not private
	Shm        bool                // the tmpfs on /dev/shm stands for the sandbox's own: set [Input.Shm]
	StopSignal unix.Signal
	Custody    request.Custody
	Warnings   []string // what was asked for and is not done
}

// Resolve checks a request against the sandbox it is for and fills in the
// defaults. It reads the host (the bundle, whether sources exist, /etc/passwd in
// the root) and changes nothing. Each error is one line that names what is wrong
// and, where there is one, the way out.
func Resolve(req *request.Member, sb *SandboxFacts) (*Resolved, error) {
	own, err := ownCapabilities()
	if err != nil {
		return nil, err
	}
	r := &resolver{req: req, sb: sb, own: own, out: &Resolved{}}
	for _, step := range []func() error{
		r.checkRequest,
		r.readSource,
		r.namespaces,
		r.root,
		r.process,
		r.user,
		r.capabilities,
		r.mounts,
		r.resources,
		r.checkSpec,
		r.devices,
		r.oomScore,
		r.seccomp,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return r.out, nil
}

// resolver is a resolution under way.
type resolver struct {
	req    *request.Member
	sb     *SandboxFacts
	own    uint64 // capabilities that can be given
	spec   *specs.Spec
	listed []namespace.Kind // the private ones of a bundle
	out    *Resolved
}

func (r *resolver) warn(format string, args ...any) {
	r.out.Warnings = append(r.out.Warnings, fmt.Sprintf(format, args...))
}

// checkRequest looks at what needs no knowledge of anything else.
func (r *resolver) checkRequest() error {
	req := r.req
	for i, a := range req.Args {
		if err := checkString(fmt.Sprintf("argument %d", i), a); err != nil {
			return err
		}
	}
	if len(req.Args) > 0 && req.Args[0] == "" {
		return errors.New("no command: the first argument is empty")
	}
	for _, e := range req.Env {
		if err := checkEnv(e); err != nil {
			return err
		}
	}
	if req.Cwd != "" {
		if err := checkPath("working directory", req.Cwd); err != nil {
			return err
		}
	}
	if req.LogPath != "" {
		if err := checkPath("log path", req.LogPath); err != nil {
			return err
		}
	}
	if strings.IndexFunc(req.User, unicode.IsControl) >= 0 {
		return fmt.Errorf("user %q contains a control character", req.User)
	}
	switch req.Custody {
	case "":
		r.out.Custody = request.CustodyAlways
	case request.CustodyAlways, request.CustodyFailure, request.CustodyNever:
		r.out.Custody = req.Custody
	default:
		return fmt.Errorf("unknown custody %q (one of always, failure, never)", req.Custody)
	}
	r.out.StopSignal = unix.SIGTERM
	if req.StopSignal != "" {
		sig, err := signum.Parse(req.StopSignal)
		if err != nil {
			return fmt.Errorf("stop signal: %w", err)
		}
		r.out.StopSignal = sig
	}
	size := 0
	for k, v := range req.Labels {
		if k == "" {
			return fmt.Errorf("label %q lacks a key", "="+v)
		}
		if strings.IndexFunc(k, unicode.IsControl) >= 0 || strings.ContainsRune(v, 0) {
			return fmt.Errorf("label %q contains a control character", k)
		}
		size += len(k) + len(v)
	}
	if size > maxLabels {
		return fmt.Errorf("labels have %d bytes, %d are allowed", size, maxLabels)
	}
	if req.Privileged && req.Bundle != "" {
		return errors.New("privileged and bundle exclude each other: a bundle says itself what its process may do")
	}
	return nil
}

// readSource starts with the bundle's configuration or the default one.
func (r *resolver) readSource() error {
	if r.req.Bundle == "" {
		r.spec = DefaultSpec(r.req.Privileged)
		if !r.req.Privileged {
			r.spec.Linux.MaskedPaths = append(r.spec.Linux.MaskedPaths, thermalPaths()...)
		} else {
			var err error
			if r.spec.Linux.Devices, err = hostDevices("/dev"); err != nil {
				return err
			}
		}
		r.out.Spec = r.spec
		return nil
	}
	if r.req.Rootfs != "" {
		return errors.New("rootfs and bundle exclude each other: a member has one root")
	}
	spec, err := ReadBundle(r.req.Bundle)
	if err != nil {
		return err
	}
	if r.listed, err = bundleKinds(spec.Linux.Namespaces); err != nil {
		return err
	}
	r.spec, r.out.Spec = spec, spec
	return nil
}

// namespaces fills in where each kind comes from. What the request says wins;
// then what the sandbox holds is joined, also if a bundle lists the kind; then
// come a bundle's private ones, mnt, cgroup and pid; the rest is the host's.
func (r *resolver) namespaces() error {
	for k := range r.req.Namespaces {
		if k.Index() < 0 {
			return fmt.Errorf("unknown namespace type %q", k)
		}
	}
	sel := namespace.Selection{}
	r.spec.Linux.Namespaces = nil
	for _, k := range namespace.Kinds() {
		src, ok := r.req.Namespaces[k]
		if !ok {
			src = r.defaultSource(k)
		}
		src, err := r.checkSource(k, src)
		if err != nil {
			return err
		}
		sel[k] = src
		if src.From == namespace.Private {
			r.spec.Linux.Namespaces = append(r.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specType(k)})
		}
	}
	r.out.Namespaces = sel
	return nil
}

func (r *resolver) defaultSource(k namespace.Kind) namespace.Source {
	switch {
	case slices.Contains(r.sb.Holds, k) && k != namespace.Mnt:
		return namespace.Source{From: namespace.Sandbox}
	case k == namespace.Mnt, k == namespace.Cgroup, k == namespace.PID, slices.Contains(r.listed, k):
		return namespace.Source{From: namespace.Private}
	}
	return namespace.Source{From: namespace.Host}
}

// checkSource returns src with a member that only passes on the sandbox's, the
// host's or another member's namespace replaced by that.
func (r *resolver) checkSource(k namespace.Kind, src namespace.Source) (namespace.Source, error) {
	switch src.From {
	case namespace.Host:
		return src, nil
	case namespace.Private:
		if k == namespace.User {
			return src, errors.New("user=private is not supported: create the sandbox with --share user")
		}
		return src, nil
	case namespace.Sandbox:
		if k == namespace.Mnt {
			return src, errors.New("mnt=sandbox: a sandbox has no mnt namespace to join: use private, host or member:NAME")
		}
		if !slices.Contains(r.sb.Holds, k) {
			return src, fmt.Errorf("%s=sandbox: the sandbox holds no %s namespace: create it with --share %s, or use %[1]s=private or %[1]s=host", k, k, k)
		}
		return src, nil
	case namespace.Member:
		return r.checkMember(k, src.Member, nil)
	}
	return src, fmt.Errorf("%s: unknown namespace source %q", k, src.From)
}

func (r *resolver) checkMember(k namespace.Kind, name string, via []string) (namespace.Source, error) {
	m := r.sibling(name)
	if m == nil {
		return namespace.Source{}, fmt.Errorf("%s=member:%s: the sandbox has no such member", k, name)
	}
	// Records from a disk may say anything, also that two join each other.
	if slices.Contains(via, m.ID) {
		return namespace.Source{}, fmt.Errorf("%s=member:%s: members %s join each other in a circle", k, name, strings.Join(append(via, m.ID), ", "))
	}
	src, ok := m.Namespaces[k]
	switch {
	case ok && src.From == namespace.Member:
		return r.checkMember(k, src.Member, append(via, m.ID))
	case ok && src.From != namespace.Private:
		return src, nil
	}
	src = namespace.Source{From: namespace.Member, Member: m.Name}
	if m.Name == "" {
		src.Member = m.ID
	}
	if k == namespace.PID && !m.PidNSAlive {
		return src, fmt.Errorf("pid namespace of member %s is dead: its init has exited: use pid=private", name)
	}
	if !m.Alive && !m.Held {
		return src, fmt.Errorf("%s=member:%s: the member has exited and its namespaces are not held", k, name)
	}
	return src, nil
}

// sibling returns the member called name, or with that id. Names win.
func (r *resolver) sibling(name string) *SiblingFacts {
	for _, match := range []func(*SiblingFacts) bool{
		func(m *SiblingFacts) bool { return m.Name == name },
		func(m *SiblingFacts) bool { return m.ID == name },
	} {
		for i := range r.sb.Members {
			if match(&r.sb.Members[i]) {
				return &r.sb.Members[i]
			}
		}
	}
	return nil
}

// specType is the inverse of [namespace.ParseKind] for the runtime-spec's names.
func specType(k namespace.Kind) specs.LinuxNamespaceType {
	switch k {
	case namespace.Net:
		return specs.NetworkNamespace
	case namespace.Mnt:
		return specs.MountNamespace
	}
	return specs.LinuxNamespaceType(k)
}

func (r *resolver) private(k namespace.Kind) bool {
	return r.out.Namespaces[k].From == namespace.Private
}

// root finds the root directory. Members that use another's mounts have none of
// their own, nor anything that would change those.
func (r *resolver) root() error {
	req := r.req
	if !r.private(namespace.Mnt) {
		src := "mnt=" + r.out.Namespaces[namespace.Mnt].String()
		for _, f := range []struct {
			set  bool
			name string
		}{
			{req.Rootfs != "", "a rootfs"},
			{req.Bundle != "", "a bundle"},
			{len(req.Volumes) > 0, "volumes"},
			{len(req.Tmpfs) > 0, "tmpfs mounts"},
			{req.ReadOnly, "a read-only root"},
		} {
			if f.set {
				return fmt.Errorf("%s and %s exclude each other: the mounts are another's and must not be changed", src, f.name)
			}
		}
		r.spec.Root, r.spec.Mounts = nil, nil
		r.spec.Linux.MaskedPaths, r.spec.Linux.ReadonlyPaths, r.spec.Linux.Devices = nil, nil, nil
		return nil
	}
	if req.Bundle != "" {
		root := r.spec.Root
		root.Readonly = root.Readonly || req.ReadOnly
		if err := checkDir("root.path", root.Path); err != nil {
			return err
		}
		r.out.Root = &Root{Path: root.Path, ReadOnly: root.Readonly}
		return nil
	}
	if req.Rootfs == "" {
		return errors.New("no root: give a rootfs, a bundle, or mnt=member:NAME or mnt=host")
	}
	if err := checkPath("rootfs", req.Rootfs); err != nil {
		return err
	}
	if err := checkDir("rootfs", req.Rootfs); err != nil {
		return err
	}
	r.spec.Root = &specs.Root{Path: req.Rootfs, Readonly: req.ReadOnly}
	r.out.Root = &Root{Path: req.Rootfs, Overlay: true, ReadOnly: req.ReadOnly}
	return nil
}

// process fills in the command, its environment and directory.
func (r *resolver) process() error {
	p := r.spec.Process
	if len(r.req.Args) > 0 {
		p.Args = slices.Clone(r.req.Args)
	}
	if len(p.Args) == 0 || p.Args[0] == "" {
		return errors.New("no command: give one after --")
	}
	if r.req.Cwd != "" {
		p.Cwd = r.req.Cwd
	}
	if err := checkPath("working directory", p.Cwd); err != nil {
		return err
	}
	if r.req.Bundle == "" {
		p.Terminal = r.req.TTY
		if r.sb.Hostname != "" && r.out.Namespaces[namespace.UTS].From == namespace.Sandbox {
			p.Env = append(p.Env, "HOSTNAME="+r.sb.Hostname)
		}
	}
	p.Terminal = p.Terminal || r.req.TTY
	if p.Terminal && lookupEnv(p.Env, "TERM") < 0 {
		p.Env = append(p.Env, "TERM=xterm")
	}
	for _, e := range r.req.Env {
		p.Env = setEnv(p.Env, e)
	}
	return nil
}

// user fills in the ids, and HOME if nobody has said what it is.
func (r *resolver) user() error {
	p := r.spec.Process
	root := "/"
	switch src := r.out.Namespaces[namespace.Mnt]; src.From {
	case namespace.Private:
		root = r.out.Root.Path
	case namespace.Member:
		if m := r.sibling(src.Member); m != nil {
			root = m.Root
		}
	}
	who := r.req.User
	if r.req.Bundle != "" && who == "" {
		// As in runc and crun. Nobody has asked for it, so it may fail.
		if a, err := lookupUser(root, fmt.Sprint(p.User.UID)); err == nil && lookupEnv(p.Env, "HOME") < 0 {
			p.Env = append(p.Env, "HOME="+a.home)
		}
		return nil
	}
	a, err := lookupUser(root, who)
	if err != nil {
		return err
	}
	umask := p.User.Umask
	p.User = a.specUser()
	p.User.Umask = umask
	if lookupEnv(p.Env, "HOME") < 0 || (r.req.Bundle != "" && lookupEnv(r.req.Env, "HOME") < 0) {
		p.Env = setEnv(p.Env, "HOME="+a.home)
	}
	return nil
}

func (r *resolver) capabilities() error {
	p := r.spec.Process
	base := defaultCapabilities
	switch {
	case r.req.Privileged:
		base = capabilityNames(r.own)
	case r.req.Bundle != "" && p.Capabilities == nil:
		base = nil
	case r.req.Bundle != "":
		base = p.Capabilities.Bounding
	}
	if r.req.Bundle == "" || len(r.req.CapAdd)+len(r.req.CapDrop) > 0 {
		caps, err := changeCapabilities(base, r.req.CapAdd, r.req.CapDrop, r.own)
		if err != nil {
			return err
		}
		p.Capabilities = giveCapabilities(caps)
	}
	if p.Capabilities == nil {
		p.Capabilities = &specs.LinuxCapabilities{}
	}
	// As in runc, whose own `runc spec` asks for what capabilities(7) rules out.
	var inert []string
	p.Capabilities.Ambient = slices.DeleteFunc(slices.Clone(p.Capabilities.Ambient), func(s string) bool {
		no := !slices.Contains(p.Capabilities.Inheritable, s) || !slices.Contains(p.Capabilities.Permitted, s)
		if no {
			inert = append(inert, s)
		}
		return no
	})
	if len(inert) > 0 {
		r.warn("not ambient, because not permitted and inheritable: %s", strings.Join(inert, ", "))
	}
	// What sandboxd lacks, as CAP_SYS_RESOURCE in some virtual machines, is left
	// out: capset(2) would refuse the whole set.
	have := capabilityNames(r.own)
	var missing []string
	c := p.Capabilities
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted, &c.Inheritable, &c.Ambient} {
		*set = slices.DeleteFunc(slices.Clone(*set), func(s string) bool {
			lacks := !slices.Contains(have, s)
			if lacks && !slices.Contains(missing, s) {
				missing = append(missing, s)
			}
			return lacks
		})
	}
	if len(missing) > 0 {
		r.warn("not given, because sandboxd does not have it itself: %s", strings.Join(missing, ", "))
	}
	return nil
}

// mounts adds volumes and tmpfs, and chooses the /dev/shm.
func (r *resolver) mounts() error {
	if !r.private(namespace.Mnt) {
		return nil
	}
	taken := map[string]string{}
	add := func(what string, m specs.Mount) error {
		if err := checkTarget(what, m.Destination); err != nil {
			return err
		}
		m.Destination = filepath.Clean(m.Destination)
		if m.Destination == "/proc" || strings.HasPrefix(m.Destination, "/proc/") {
			return fmt.Errorf("%s %s: nothing can be mounted in /proc", what, m.Destination)
		}
		if by, ok := taken[m.Destination]; ok {
			return fmt.Errorf("%s %s: there is a %s already", what, m.Destination, by)
		}
		taken[m.Destination] = what
		// A mount of the default set or of the bundle gives way.
		r.spec.Mounts = slices.DeleteFunc(r.spec.Mounts, func(o specs.Mount) bool { return filepath.Clean(o.Destination) == m.Destination })
		r.spec.Mounts = append(r.spec.Mounts, m)
		return nil
	}
	for _, v := range r.req.Volumes {
		if err := checkPath("volume source", v.Source); err != nil {
			return err
		}
		if _, err := os.Stat(v.Source); err != nil {
			return fmt.Errorf("volume source: %w", pathError(v.Source, err))
		}
		opts := []string{"rbind", "rprivate", "rw"}
		if v.ReadOnly {
			opts[2] = "rro" // what is mounted in it too
		}
		if err := add("volume", specs.Mount{Destination: v.Target, Type: "bind", Source: v.Source, Options: opts}); err != nil {
			return err
		}
	}
	for _, t := range r.req.Tmpfs {
		opts := []string{"nosuid", "nodev", "mode=1777"}
		switch {
		case t.Size < 0:
			return fmt.Errorf("tmpfs %s: size %d is negative", t.Target, t.Size)
		case t.Size > 0 && t.Size < int64(os.Getpagesize()):
			return fmt.Errorf("tmpfs %s: size %d is less than a page (%d bytes)", t.Target, t.Size, os.Getpagesize())
		case t.Size > 0:
			opts = append(opts, fmt.Sprintf("size=%d", t.Size))
		}
		if err := add("tmpfs", specs.Mount{Destination: t.Target, Type: "tmpfs", Source: "tmpfs", Options: opts}); err != nil {
			return err
		}
	}
	if _, ok := taken["/dev/shm"]; !ok {
		r.shm()
	}
	return nil
}

// shm makes a new tmpfs on /dev/shm, the default's or a bundle's, that of the ipc
// namespace, since POSIX shared memory is nothing else than files there.
func (r *resolver) shm() {
	i := slices.IndexFunc(r.spec.Mounts, func(m specs.Mount) bool {
		return filepath.Clean(m.Destination) == "/dev/shm" && m.Type == "tmpfs"
	})
	if i < 0 {
		return
	}
	switch src := r.out.Namespaces[namespace.IPC]; src.From {
	case namespace.Sandbox:
		r.out.Shm = r.sb.ShmShared
	case namespace.Host:
		if r.req.Bundle == "" {
			r.spec.Mounts[i] = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"bind", "rprivate", "nosuid", "noexec", "nodev"}}
		}
	case namespace.Member:
		r.warn("/dev/shm is not shared with member %s: only System V objects and message queues are", src.Member)
	}
}

func (r *resolver) resources() error {
	req := r.req
	res := r.spec.Linux.Resources
	if res == nil {
		res = &specs.LinuxResources{}
		r.spec.Linux.Resources = res
	}
	if r.req.Bundle != "" {
		// As runc does: every member can use the devices that every container
		// has, and one without rules no others, although it can make nodes.
		rules := deviceRules(false)
		if len(res.Devices) > 0 {
			rules = slices.Concat(res.Devices, rules[1:])
		}
		res.Devices = rules
	}
	switch {
	case req.Memory < 0 || (req.Memory > 0 && req.Memory < minMemory):
		return fmt.Errorf("memory %d: the limit must be at least %d bytes, or init is killed before it runs", req.Memory, minMemory)
	case req.Memory > 0:
		if res.Memory == nil {
			res.Memory = &specs.LinuxMemory{}
		}
		res.Memory.Limit = &req.Memory
	}
	switch {
	case req.NanoCPUs < 0 || (req.NanoCPUs > 0 && req.NanoCPUs < minNanoCPUs):
		return fmt.Errorf("cpus %g: the kernel takes no less than %g", float64(req.NanoCPUs)/1e9, minNanoCPUs/1e9)
	case req.NanoCPUs > math.MaxInt64/cpuPeriod:
		return fmt.Errorf("cpus %g: that is more than any machine has", float64(req.NanoCPUs)/1e9)
	case req.NanoCPUs > 0:
		if res.CPU == nil {
			res.CPU = &specs.LinuxCPU{}
		}
		period, quota := uint64(cpuPeriod), req.NanoCPUs*cpuPeriod/1_000_000_000
		res.CPU.Period, res.CPU.Quota = &period, &quota
	}
	if req.PidsLimit < 0 {
		return fmt.Errorf("pids limit %d is negative", req.PidsLimit)
	}
	if req.PidsLimit > 0 {
		res.Pids = &specs.LinuxPids{Limit: &req.PidsLimit}
	}
	if m := res.Memory; m != nil && m.Limit != nil && *m.Limit >= 0 && *m.Limit < minMemory {
		return fmt.Errorf("linux.resources.memory.limit: %d: the limit must be at least %d bytes, or init is killed before it runs", *m.Limit, minMemory)
	}
	return nil
}

// checkSpec checks what a bundle may say only in some namespaces, and the strings
// of the process as they are now.
func (r *resolver) checkSpec() error {
	s, sel := r.spec, r.out.Namespaces
	for _, f := range []struct{ name, value string }{{"hostname", s.Hostname}, {"domainname", s.Domainname}} {
		if f.value == "" {
			continue
		}
		if !r.private(namespace.UTS) {
			return fmt.Errorf("%s: %q would change the uts namespace of others (uts=%s): remove it from the bundle, or use --ns uts=private", f.name, f.value, sel[namespace.UTS])
		}
		if len(f.value) > 64 || strings.IndexFunc(f.value, unicode.IsControl) >= 0 {
			return fmt.Errorf("%s: %q is longer than 64 bytes or contains a control character", f.name, f.value)
		}
	}
	var kinds []namespace.Kind
	for _, k := range namespace.Kinds() {
		if r.private(k) {
			kinds = append(kinds, k)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(s.Linux.Sysctl)) {
		if err := CheckSysctl(key, kinds); err != nil {
			return fmt.Errorf("linux.sysctl: %w: set it on the sandbox (--sysctl), or use a private namespace", err)
		}
		if strings.ContainsRune(s.Linux.Sysctl[key], 0) {
			return fmt.Errorf("linux.sysctl: the value of %q contains a NUL", key)
		}
	}
	if len(s.Linux.TimeOffsets) > 0 && !r.private(namespace.Time) {
		return errors.New("linux.timeOffsets: they need a time namespace of the member's own: use --ns time=private")
	}
	for name := range s.Linux.TimeOffsets {
		if name != "monotonic" && name != "boottime" {
			return fmt.Errorf("linux.timeOffsets.%s: not a clock (monotonic or boottime)", name)
		}
	}
	total := 0
	for i, a := range s.Process.Args {
		if err := checkString(fmt.Sprintf("argument %d", i), a); err != nil {
			return err
		}
		total += len(a) + 1 + 8 // the NUL and the pointer
	}
	for _, e := range s.Process.Env {
		if err := checkEnv(e); err != nil {
			return err
		}
		total += len(e) + 1 + 8
	}
	if total > maxStrings {
		return fmt.Errorf("arguments and environment have %d bytes, %d are allowed", total, maxStrings)
	}
	return nil
}

// devices refuses a device if there is something else at its path in the root: it
// would not be made, and nobody would notice. What mounts will cover is left alone.
func (r *resolver) devices() error {
	if !r.private(namespace.Mnt) || r.req.Bundle == "" {
		return nil
	}
	for _, d := range slices.Concat(r.spec.Linux.Devices, defaultDevices) {
		at := filepath.Clean(d.Path)
		if slices.ContainsFunc(r.spec.Mounts, func(m specs.Mount) bool { return at == m.Destination || strings.HasPrefix(at, m.Destination+"/") }) {
			continue
		}
		st, err := statInRoot(r.out.Root.Path, at)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			continue // the latter is for the launch program to tell of
		}
		if err != nil {
			return fmt.Errorf("linux.devices: %w", err)
		}
		typ := map[uint32]string{unix.S_IFCHR: "c", unix.S_IFBLK: "b", unix.S_IFIFO: "p"}[st.Mode&unix.S_IFMT]
		if want := strings.Replace(d.Type, "u", "c", 1); typ != want || typ != "p" && st.Rdev != unix.Mkdev(uint32(d.Major), uint32(d.Minor)) {
			return fmt.Errorf("linux.devices: there is something else than the device %s %d:%d at %s in the root", d.Type, d.Major, d.Minor, at)
		}
	}
	return nil
}

// oomScore warns of a score that is not set, see [addOOMScoreAdj].
func (r *resolver) oomScore() error {
	adj := r.spec.Process.OOMScoreAdj
	if adj == nil || r.own&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return nil
	}
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return err
	}
	own, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("/proc/self/oom_score_adj: %w", err)
	}
	if *adj < own {
		r.warn("oom_score_adj stays %d and is not lowered to %d, because sandboxd lacks CAP_SYS_RESOURCE", own, *adj)
	}
	return nil
}

// seccomp gives members that are from a root directory the default profile of
// Docker, which depends on their capabilities. A bundle has its own, or none.
func (r *resolver) seccomp() error {
	if r.req.Bundle != "" || r.req.Privileged {
		return nil
	}
	profile, err := mobyseccomp.GetDefaultProfile(r.spec)
	if err != nil {
		return fmt.Errorf("default seccomp profile: %w", err)
	}
	r.spec.Linux.Seccomp = profile
	return nil
}

// CheckSysctl reports whether the sysctl key ("net.ipv4.ip_forward", or with
// slashes) may be set by somebody whose own namespaces are of these kinds. A
// sysctl that is not namespaced may never be: it is the host's.
func CheckSysctl(key string, kinds []namespace.Kind) error {
	for part := range strings.FieldsFuncSeq("."+key+".", func(c rune) bool { return c == '.' || c == '/' }) {
		if strings.IndexFunc(part, func(c rune) bool { return unicode.IsControl(c) || unicode.IsSpace(c) }) >= 0 {
			return fmt.Errorf("sysctl %q contains a blank or control character", key)
		}
	}
	name := strings.ReplaceAll(key, "/", ".")
	if name == "" || strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") || strings.Contains(name, "..") {
		return fmt.Errorf("sysctl %q is not a name such as net.ipv4.ip_forward", key)
	}
	var k namespace.Kind
	switch {
	case strings.HasPrefix(name, "net."):
		k = namespace.Net
	case strings.HasPrefix(name, "fs.mqueue."), slices.Contains(ipcSysctls, name):
		k = namespace.IPC
	case name == "kernel.hostname", name == "kernel.domainname":
		k = namespace.UTS
	default:
		return fmt.Errorf("sysctl %q is not of a namespace: it can only be set for the whole host", key)
	}
	if !slices.Contains(kinds, k) {
		return fmt.Errorf("sysctl %q is of the %s namespace, which is not its own", key, k)
	}
	return nil
}

// ipcSysctls are those of ipc_namespaces(7) besides fs.mqueue.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
	"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// checkText refuses what cannot be shown in one line or given to the kernel.
func checkText(what, s string) error {
	if strings.IndexFunc(s, unicode.IsControl) >= 0 {
		return fmt.Errorf("%s %q contains a control character", what, s)
	}
	if len(s) >= pathMax {
		return fmt.Errorf("%s %.32q… has %d bytes, a path has at most %d", what, s, len(s), pathMax-1)
	}
	return nil
}

func checkPath(what, path string) error {
	if err := checkText(what, path); err != nil {
		return err
	}
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s %q is not an absolute path", what, path)
	}
	return nil
}

// checkTarget checks where in a member something is mounted.
func checkTarget(what, path string) error {
	if err := checkPath(what, path); err != nil {
		return err
	}
	clean := filepath.Clean(path)
	if clean != path && clean+"/" != path {
		return fmt.Errorf("%s %q is not in its shortest form %q", what, path, clean)
	}
	if clean == "/" {
		return fmt.Errorf("%s %q is the root itself", what, path)
	}
	return nil
}

func checkDir(what, path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", what, pathError(path, err))
	}
	if !st.IsDir() {
		return fmt.Errorf("%s %s is not a directory", what, path)
	}
	return nil
}

// pathError drops the name of the system call, which is no help to a user.
func pathError(path string, err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return fmt.Errorf("%s: %w", path, pe.Err)
	}
	return err
}

func checkString(what, s string) error {
	if strings.ContainsRune(s, 0) {
		return fmt.Errorf("%s contains a NUL", what)
	}
	if len(s) > maxString {
		return fmt.Errorf("%s has %d bytes, the kernel takes %d", what, len(s), maxString)
	}
	return nil
}

func checkEnv(e string) error {
	key, _, ok := strings.Cut(e, "=")
	if !ok || key == "" {
		return fmt.Errorf("environment variable %.64q is not NAME=VALUE", e)
	}
	return checkString("environment variable "+fmt.Sprintf("%.64q", key), e)
}

// lookupEnv returns the index of the variable called key, or -1.
func lookupEnv(env []string, key string) int {
	return slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, key+"=") })
}

// setEnv returns env with the variable of kv set, in its old place if it was there.
func setEnv(env []string, kv string) []string {
	key, _, _ := strings.Cut(kv, "=")
	if i := lookupEnv(env, key); i >= 0 {
		env[i] = kv
		return env
	}
	return append(env, kv)
}
