package sandbox

import (
	"cmp"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/signum"
)

const (
	defaultShmSize = 64 << 20
	minShmSize     = 4096 // one page: less would hold nothing

	// Labels and annotations travel in every list and every record. The limit
	// is the one that Kubernetes sets for all annotations of an object.
	maxMetadata = 256 << 10
)

// completeSandbox checks c and returns a copy with every default filled in.
func completeSandbox(c Config, id string) (Config, error) {
	if c.Name == "" {
		c.Name = id
	} else if err := checkName("sandbox", c.Name); err != nil {
		return c, err
	}

	switch c.Network {
	case "":
		c.Network = request.NetworkNone
	case request.NetworkNone, request.NetworkHost, request.NetworkBuiltin, request.NetworkCNI:
	default:
		return c, invalidf("network %s: want builtin, cni, host or none", quote(string(c.Network)))
	}
	if c.Share == nil {
		c.Share = []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS}
		if c.Network == request.NetworkHost {
			c.Share = c.Share[1:]
		}
	}
	for i, k := range c.Share {
		switch {
		case k.Index() < 0:
			return c, invalidf("share: unknown namespace type %s", quote(string(k)))
		case slices.Contains(c.Share[:i], k):
			return c, invalidf("share: %s is named twice", k)
		case k == namespace.Mnt:
			return c, invalidf("share: a mount namespace cannot be shared by a sandbox; a member can use mnt=member:NAME")
		case k == namespace.Net && c.Network == request.NetworkHost:
			return c, invalidf("share: net cannot be shared with network host")
		}
	}

	if !slices.Contains(c.Share, namespace.Net) && (c.Network == request.NetworkBuiltin || c.Network == request.NetworkCNI) {
		return c, invalidf("network %s: the sandbox does not share net", c.Network)
	}
	var err error
	if c.Net, err = completeNetwork(c.Network, c.Net); err != nil {
		return c, err
	}

	switch holds := slices.Contains(c.Share, namespace.UTS); {
	case c.Hostname == "" && holds:
		c.Hostname = c.Name
	case c.Hostname == "":
	case !holds:
		return c, invalidf("hostname %s: the sandbox does not share uts", quote(c.Hostname))
	default:
		if err := checkHostname(c.Hostname); err != nil {
			return c, err
		}
	}

	switch {
	case c.ShmSize == 0:
		c.ShmSize = defaultShmSize
	case c.ShmSize < minShmSize:
		return c, invalidf("shm size %d: want at least %d bytes", c.ShmSize, minShmSize)
	}
	for k, v := range c.Sysctls {
		if k == "" || !printable(k) || !printable(v) {
			return c, invalidf("sysctl %s: the name or the value %s is empty or has control characters", quote(k), quote(v))
		}
	}
	if err := checkMetadata("label", c.Labels); err != nil {
		return c, err
	}
	if err := checkMetadata("annotation", c.Annotations); err != nil {
		return c, err
	}
	// The caller's maps and slices stay the caller's.
	c.Share = slices.Clone(c.Share)
	c.Hooks = slices.Clone(c.Hooks)
	c.Sysctls = maps.Clone(c.Sysctls)
	c.Labels = maps.Clone(c.Labels)
	c.Annotations = maps.Clone(c.Annotations)
	return c, nil
}

// completeMember checks the parts of c that concern its lifecycle, and fills in
// their defaults. What it is made of is for [MemberNode.ResolveMember] to check.
func completeMember(c MemberConfig, id string) (MemberConfig, error) {
	if c.Name == "" {
		c.Name = id
	} else if err := checkName("member", c.Name); err != nil {
		return c, err
	}
	switch c.Custody {
	case "":
		c.Custody = request.CustodyAlways
	case request.CustodyAlways, request.CustodyFailure, request.CustodyNever:
	default:
		return c, invalidf("custody %s: want always, failure or never", quote(string(c.Custody)))
	}
	if c.StopSignal == "" {
		c.StopSignal = "SIGTERM"
	}
	if _, err := signum.Parse(c.StopSignal); err != nil {
		return c, invalidf("stop signal: %v", err)
	}
	if c.LogPath != "" {
		if !filepath.IsAbs(c.LogPath) || strings.ContainsRune(c.LogPath, 0) {
			return c, invalidf("log path %s is not absolute", quote(c.LogPath))
		}
		var err error
		if c.LogPath, err = resolveLog(c.LogPath); err != nil {
			return c, err
		}
	}
	if err := checkMetadata("label", c.Labels); err != nil {
		return c, err
	}
	if c.LogMax < 0 {
		return c, invalidf("log limit of %d bytes is negative", c.LogMax)
	}
	if c.CustodyTTL < 0 {
		return c, invalidf("custody ttl %s is negative", c.CustodyTTL)
	}
	var err error
	if c.Collect, err = completeCollect(c.Collect); err != nil {
		return c, err
	}
	c.Namespaces = c.Namespaces.Clone()
	c.Hooks = slices.Clone(c.Hooks)
	c.Labels = maps.Clone(c.Labels)
	return c, nil
}

// maxCollectors bounds what is looked for after an exit; a glob can name much.
const maxCollectors = 64

// completeCollect checks collectors and returns a copy with every default filled in.
func completeCollect(in []request.Collect) ([]request.Collect, error) {
	if len(in) > maxCollectors {
		return nil, invalidf("%d collectors are more than %d", len(in), maxCollectors)
	}
	out := slices.Clone(in)
	for i := range out {
		c := &out[i]
		c.On = cmp.Or(c.On, request.OnAlways)
		if c.Max == 0 {
			c.Max = request.DefaultCollectMax
		}
		_, bad := path.Match(c.Path, "")
		switch {
		case !path.IsAbs(c.Path) || !printable(c.Path) || len(c.Path) > maxPath:
			return nil, invalidf("collect %s: want an absolute path in the member", quote(c.Path))
		case bad != nil:
			return nil, invalidf("collect %s: the pattern is not complete", quote(c.Path))
		case slices.Contains(strings.Split(c.Path, "/"), ".."):
			return nil, invalidf("collect %s: the path has an element ..", quote(c.Path))
		case !slices.Contains([]request.When{request.OnAlways, request.OnFailure, request.OnOOM, request.OnSignal}, c.On):
			return nil, invalidf("collect %s: condition %s: want always, failure, oom or signal", quote(c.Path), quote(string(c.On)))
		case c.Max < 0:
			return nil, invalidf("collect %s: the limit %d is negative", quote(c.Path), c.Max)
		}
		c.Path = path.Clean(c.Path)
	}
	return out, nil
}

// maxPath is one less than PATH_MAX, which counts the NUL.
const maxPath = 4095

func checkMetadata(what string, kv map[string]string) error {
	size := 0
	for k, v := range kv {
		if k == "" || !printable(k) {
			return invalidf("%s key %s is empty or has control characters", what, quote(k))
		}
		// Values of annotations are often whole documents: lines are allowed.
		if !utf8.ValidString(v) || strings.ContainsRune(v, 0) {
			return invalidf("%s %s: value %s is not text", what, quote(k), quote(v))
		}
		size += len(k) + len(v)
	}
	if size > maxMetadata {
		return invalidf("%ss: %d bytes are more than %d", what, size, maxMetadata)
	}
	return nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// resolveLog follows the symbolic links in the path of a log, once: monitors and
// readers follow none, because a member may have a volume where its log is.
func resolveLog(name string) (string, error) {
	if to, err := filepath.EvalSymlinks(name); err == nil {
		return to, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(name)) // the log itself is made
	if err != nil {
		return "", invalidf("log path %s: %v", quote(name), err)
	}
	return filepath.Join(dir, filepath.Base(name)), nil
}
