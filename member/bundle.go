package member

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/seccomp"
)

// maxConfig bounds a bundle's config.json.
const maxConfig = 4 << 20

// ReadBundle reads the configuration of the OCI bundle in directory dir, as
// [ParseBundle] does, and makes the paths in it absolute.
func ReadBundle(dir string) (*specs.Spec, error) {
	if err := checkPath("bundle", dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "config.json")
	b, err := readConfig(path)
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	spec, err := ParseBundle(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if !filepath.IsAbs(spec.Root.Path) {
		spec.Root.Path = filepath.Join(dir, spec.Root.Path)
	}
	for i, m := range spec.Mounts {
		if isBind(m) && m.Source != "" && !filepath.IsAbs(m.Source) {
			spec.Mounts[i].Source = filepath.Join(dir, m.Source)
		}
	}
	return spec, nil
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func readConfig(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxConfig)
	}
	return b, err
}

// ParseBundle reads the config.json of an OCI bundle strictly: a field that is
// unknown, named twice or not supported is an error that names it. A field is
// never ignored, because nobody would notice that what it asks for is not done.
//
// What a configuration may not say here: the path of a namespace (they are chosen
// by the request), a cgroup path (a member's cgroup is in its sandbox's), and
// mappings of ids (the sandbox's apply).
func ParseBundle(b []byte) (*specs.Spec, error) {
	// Checks the syntax, and bounds the depth for what follows.
	if !json.Valid(b) {
		var v any
		return nil, json.Unmarshal(b, &v)
	}
	if err := checkFields(b); err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) {
			return nil, fmt.Errorf("%s: a JSON %s is not what belongs here", te.Field, te.Value)
		}
		return nil, err
	}
	if err := checkBundle(&spec); err != nil {
		return nil, err
	}
	return &spec, nil
}

// checkFields reports the first member of a JSON object in b, which is valid, that
// has no place in [specs.Spec] or occurs twice. Unlike encoding/json it tells the
// whole path, and takes letters' case for what it is.
func checkFields(b []byte) error {
	f := fieldChecker{rest: b}
	return f.value(reflect.TypeFor[specs.Spec](), "")
}

// fieldChecker goes through JSON text that is known to be valid: it looks only for
// where things begin and end.
type fieldChecker struct {
	rest []byte
}

// next passes over blanks, commas and colons and returns the byte behind them.
func (f *fieldChecker) next() byte {
	f.rest = bytes.TrimLeft(f.rest, " \t\r\n,:")
	return f.rest[0]
}

// value checks one value, which is decoded into a t. t is nil below a value that is
// left alone.
func (f *fieldChecker) value(t reflect.Type, path string) error {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch f.next() {
	case '{':
		return f.object(t, path)
	case '[':
		var et reflect.Type
		if t != nil && (t.Kind() == reflect.Slice || t.Kind() == reflect.Array) {
			et = t.Elem()
		}
		f.rest = f.rest[1:]
		for i := 0; f.next() != ']'; i++ {
			// Only what holds objects has fields, and paths cost more than all the rest.
			sub := path
			if c := f.rest[0]; c == '{' || c == '[' {
				sub = fmt.Sprintf("%s[%d]", path, i)
			}
			if err := f.value(et, sub); err != nil {
				return err
			}
		}
		f.rest = f.rest[1:]
	case '"':
		f.text()
	default:
		if i := bytes.IndexAny(f.rest, " \t\r\n,:]}"); i >= 0 {
			f.rest = f.rest[i:]
		} else {
			f.rest = nil
		}
	}
	return nil
}

func (f *fieldChecker) object(t reflect.Type, path string) error {
	f.rest = f.rest[1:]
	var seen []string
	for f.next() != '}' {
		key := f.text()
		sub := key
		if path != "" {
			sub = path + "." + key
		}
		if i, twice := slices.BinarySearch(seen, key); twice {
			return fmt.Errorf("%s: named twice", sub)
		} else {
			seen = slices.Insert(seen, i, key)
		}
		var ft reflect.Type
		switch {
		case t == nil:
		case t.Kind() == reflect.Map:
			ft = t.Elem()
		case t.Kind() == reflect.Struct:
			if ft = fieldType(t, key); ft == nil {
				return fmt.Errorf("%s: not known to this version of sandboxd", sub)
			}
		}
		if err := f.value(ft, sub); err != nil {
			return err
		}
	}
	f.rest = f.rest[1:]
	return nil
}

// text passes over a string and returns what it says.
func (f *fieldChecker) text() string {
	end := 1
	for f.rest[end] != '"' {
		if f.rest[end] == '\\' {
			end++
		}
		end++
	}
	quoted := f.rest[:end+1]
	f.rest = f.rest[end+1:]
	if !bytes.ContainsRune(quoted, '\\') && utf8.Valid(quoted) {
		return string(quoted[1:end])
	}
	var s string
	json.Unmarshal(quoted, &s) // it is valid
	return s
}

// fieldTypes are the types of the fields of a struct, by JSON name; it is filled
// as types are met.
var fieldTypes sync.Map // reflect.Type to map[string]reflect.Type

// fieldType returns the type of the field of struct t that has the JSON name key,
// or nil.
func fieldType(t reflect.Type, key string) reflect.Type {
	m, ok := fieldTypes.Load(t)
	if !ok {
		fields := map[string]reflect.Type{}
		addFields(fields, t)
		m, _ = fieldTypes.LoadOrStore(t, fields)
	}
	return m.(map[string]reflect.Type)[key]
}

func addFields(to map[string]reflect.Type, t reflect.Type) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" {
			addFields(to, f.Type)
		} else if _, ok := to[name]; !ok {
			to[name] = f.Type
		}
	}
}

// checkBundle refuses what is illegal or not supported, whatever the request and
// the sandbox are.
func checkBundle(s *specs.Spec) error {
	major, rest, _ := strings.Cut(s.Version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	if _, err := strconv.ParseUint(minor, 10, 32); major != "1" || err != nil {
		return fmt.Errorf("ociVersion: %q is not 1.x", s.Version)
	}
	if s.Root == nil || s.Root.Path == "" {
		return errors.New("root.path: missing")
	}
	if err := checkText("root.path", s.Root.Path); err != nil {
		return err
	}
	if s.Process == nil {
		s.Process = &specs.Process{Cwd: "/"}
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	p, l := s.Process, s.Linux
	for _, f := range []struct {
		set  bool
		name string
	}{
		{s.Solaris != nil, "solaris"},
		{s.Windows != nil, "windows"},
		{s.VM != nil, "vm"},
		{s.ZOS != nil, "zos"},
		{s.FreeBSD != nil, "freebsd"},
		{p.CommandLine != "", "process.commandLine"},
		{p.User.Username != "", "process.user.username"},
		{p.ApparmorProfile != "", "process.apparmorProfile"},
		{p.SelinuxLabel != "", "process.selinuxLabel"},
		{p.ExecCPUAffinity != nil, "process.execCPUAffinity"},
		{len(l.NetDevices) > 0, "linux.netDevices"},
		{l.MountLabel != "", "linux.mountLabel"},
		{l.IntelRdt != nil, "linux.intelRdt"},
		{l.MemoryPolicy != nil, "linux.memoryPolicy"},
		{l.Personality != nil, "linux.personality"},
	} {
		if f.set {
			return fmt.Errorf("%s: not supported by this version of sandboxd: remove it from the bundle", f.name)
		}
	}
	if l.CgroupsPath != "" {
		return fmt.Errorf("linux.cgroupsPath: a member's cgroup is in its sandbox's: remove %q from the bundle", l.CgroupsPath)
	}
	if len(l.UIDMappings) > 0 || len(l.GIDMappings) > 0 {
		return errors.New("linux.uidMappings, gidMappings: a member has the mappings of its sandbox: remove them, and create the sandbox with --share user")
	}
	switch l.RootfsPropagation {
	case "", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable":
	default:
		return fmt.Errorf("linux.rootfsPropagation: %q is not a propagation (such as rprivate)", l.RootfsPropagation)
	}
	if _, err := bundleKinds(l.Namespaces); err != nil {
		return err
	}
	for i, m := range s.Mounts {
		what := fmt.Sprintf("mounts[%d]", i)
		if m.Destination != "" { // relative to the root, if it is relative (config.md)
			s.Mounts[i].Destination = filepath.Clean("/" + m.Destination)
		}
		if err := checkTarget(what+".destination", s.Mounts[i].Destination); err != nil {
			return err
		}
		if err := checkText(what+".source", m.Source); err != nil {
			return err
		}
		if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 {
			return fmt.Errorf("%s.uidMappings, gidMappings: not supported by this version of sandboxd: remove them from the bundle", what)
		}
	}
	for _, list := range []struct {
		name  string
		paths []string
	}{{"linux.maskedPaths", l.MaskedPaths}, {"linux.readonlyPaths", l.ReadonlyPaths}} {
		for i, path := range list.paths {
			if err := checkPath(fmt.Sprintf("%s[%d]", list.name, i), path); err != nil {
				return err
			}
		}
	}
	made := map[string]specs.LinuxDevice{}
	for i, d := range l.Devices {
		if err := checkTarget(fmt.Sprintf("linux.devices[%d].path", i), d.Path); err != nil {
			return err
		}
		if !slices.Contains([]string{"c", "u", "b", "p"}, d.Type) {
			return fmt.Errorf("linux.devices[%d].type: %q is not one of c, u, b, p", i, d.Type)
		}
		if o, ok := made[d.Path]; ok && (o.Type != d.Type || o.Major != d.Major || o.Minor != d.Minor) {
			return fmt.Errorf("linux.devices[%d].path: there is another device with the path %s", i, d.Path)
		}
		made[d.Path] = d
	}
	if err := checkBundleCapabilities(p.Capabilities); err != nil {
		return err
	}
	seen := map[string]bool{}
	for i, r := range p.Rlimits {
		if seen[r.Type] {
			return fmt.Errorf("process.rlimits[%d]: %s is named twice", i, r.Type)
		}
		seen[r.Type] = true
		if _, ok := rlimits[r.Type]; !ok {
			return fmt.Errorf("process.rlimits[%d].type: unknown limit %q", i, r.Type)
		}
		if r.Soft > r.Hard {
			return fmt.Errorf("process.rlimits[%d]: the soft limit %d of %s is above the hard limit %d", i, r.Soft, r.Type, r.Hard)
		}
	}
	if adj := p.OOMScoreAdj; adj != nil && (*adj < -1000 || *adj > 1000) {
		return fmt.Errorf("process.oomScoreAdj: %d is not between -1000 and 1000", *adj)
	}
	if p.User.UID > maxID || p.User.GID > maxID {
		return fmt.Errorf("process.user: id %d is above %d", max(p.User.UID, p.User.GID), uint32(maxID))
	}
	if u := p.User.Umask; u != nil && *u > 0o777 {
		return fmt.Errorf("process.user.umask: %#o is above 0777", *u)
	}
	if l.Seccomp != nil {
		if _, err := seccomp.Compile(l.Seccomp); err != nil {
			return fmt.Errorf("linux.seccomp: %w", err)
		}
	}
	return nil
}

// checkBundleCapabilities also refuses sets that capset(2) would. Ambient ones
// that cannot be are let pass: `runc spec` writes some.
func checkBundleCapabilities(c *specs.LinuxCapabilities) error {
	if c == nil {
		return nil
	}
	for _, set := range []struct {
		name string
		caps []string
	}{
		{"bounding", c.Bounding}, {"effective", c.Effective}, {"inheritable", c.Inheritable},
		{"permitted", c.Permitted}, {"ambient", c.Ambient},
	} {
		for _, s := range set.caps {
			if !slices.Contains(capNames, s) {
				return fmt.Errorf("process.capabilities.%s: unknown capability %q (capabilities(7) lists them)", set.name, s)
			}
			if set.name == "effective" && !slices.Contains(c.Permitted, s) {
				return fmt.Errorf("process.capabilities.effective: %s is not permitted too", s)
			}
		}
	}
	return nil
}

// bundleKinds returns the kinds that a configuration wants to be private.
func bundleKinds(list []specs.LinuxNamespace) ([]namespace.Kind, error) {
	var kinds []namespace.Kind
	for i, ns := range list {
		k, err := namespace.ParseKind(string(ns.Type))
		if err != nil {
			return nil, fmt.Errorf("linux.namespaces[%d].type: %w", i, err)
		}
		if slices.Contains(kinds, k) {
			return nil, fmt.Errorf("linux.namespaces[%d]: type %q is named twice", i, ns.Type)
		}
		if ns.Path != "" {
			return nil, fmt.Errorf("linux.namespaces[%d].path: not supported: choose where a namespace comes from with --ns %s=SOURCE", i, k)
		}
		kinds = append(kinds, k)
	}
	return kinds, nil
}
