package main

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
)

// parseSize reads a number of bytes: digits, and b or one of k, m, g, t, in either
// case, for powers of 1024, which may be written as in 64m, 64mb, 64Mi or 64MiB and
// may have decimals.
func parseSize(s string) (int64, error) {
	bad := fmt.Errorf("size %q is not a number of bytes such as 4096, 64m, 64MiB or 0.5g", s)
	unit := strings.TrimLeft(s, "0123456789.")
	whole, frac, decimals := strings.Cut(strings.TrimSuffix(s, unit), ".")
	shift := 0
	switch unit = strings.ToLower(unit); unit {
	case "", "b":
	default:
		if shift = 10 * strings.IndexByte("bkmgt", unit[0]); shift <= 0 {
			return 0, bad
		}
		switch unit[1:] {
		case "", "b", "i", "ib":
		default:
			return 0, bad
		}
	}
	n, err := strconv.ParseUint(whole, 10, 63)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, bad
	}
	size := int64(n) << shift
	if decimals {
		f, err := strconv.ParseUint(frac, 10, 20) // six digits or so
		if err != nil || shift == 0 || len(frac) > 6 {
			return 0, bad
		}
		size += int64(float64(f) / math.Pow10(len(frac)) * float64(int64(1)<<shift))
	}
	return size, nil
}

// parseCPUs reads a number of CPUs such as 2 or 0.5, as billionths.
func parseCPUs(s string) (int64, error) {
	whole, frac, _ := strings.Cut(s, ".")
	w, err := strconv.ParseUint(whole, 10, 32)
	if err == nil && frac != "" {
		if len(frac) > 9 {
			return 0, fmt.Errorf("number of CPUs %q has more than nine decimals", s)
		}
		var f uint64
		f, err = strconv.ParseUint(frac+strings.Repeat("0", 9-len(frac)), 10, 32)
		if n := int64(w*1e9 + f); err == nil && n > 0 {
			return n, nil
		}
	}
	if err != nil || w == 0 || strings.HasSuffix(s, ".") {
		hint := ""
		if m, merr := strconv.ParseUint(strings.TrimSuffix(s, "m"), 10, 32); merr == nil && m > 0 && strings.HasSuffix(s, "m") {
			hint = fmt.Sprintf("; %s is %g", s, float64(m)/1000) // as Kubernetes writes it
		}
		return 0, fmt.Errorf("number of CPUs %q is not a positive number such as 2 or 0.5%s", s, hint)
	}
	return int64(w) * 1e9, nil
}

// parseVolume reads SRC:DST[:ro|rw].
func parseVolume(s string) (request.Volume, error) {
	f := strings.Split(s, ":")
	if len(f) < 2 || len(f) > 3 || f[0] == "" || f[1] == "" {
		return request.Volume{}, fmt.Errorf("volume %q is not SRC:DST[:ro]", s)
	}
	v := request.Volume{Source: f[0], Target: f[1]}
	if len(f) == 3 {
		switch f[2] {
		case "ro":
			v.ReadOnly = true
		case "rw":
		default:
			return request.Volume{}, fmt.Errorf("volume %q: unknown option %q (one of ro, rw)", s, f[2])
		}
	}
	var err error
	if v.Source, err = filepath.Abs(v.Source); err != nil {
		return request.Volume{}, err
	}
	if !filepath.IsAbs(v.Target) {
		return request.Volume{}, fmt.Errorf("volume %q: %s is not an absolute path", s, v.Target)
	}
	return v, nil
}

// parseTmpfs reads DST[:size=SIZE].
func parseTmpfs(s string) (request.Tmpfs, error) {
	dst, opts, _ := strings.Cut(s, ":")
	t := request.Tmpfs{Target: dst}
	if !filepath.IsAbs(dst) {
		return t, fmt.Errorf("tmpfs %q is not DST[:size=SIZE] with an absolute DST", s)
	}
	if dst == s {
		return t, nil
	}
	val, ok := strings.CutPrefix(opts, "size=")
	if !ok {
		return t, fmt.Errorf("tmpfs %q: unknown option %q (only size=SIZE)", s, opts)
	}
	var err error
	if t.Size, err = parseSize(val); err != nil {
		return t, fmt.Errorf("tmpfs %q: %w", s, err)
	}
	if t.Size == 0 {
		return t, fmt.Errorf("tmpfs %q: size is 0", s)
	}
	return t, nil
}

// parseEnv reads K=V, or K alone for K's value in the CLI's own environment.
// ok is false if K alone is not set there: the variable is left out then, as
// with other container tools.
func parseEnv(s string, lookup func(string) (string, bool)) (kv string, ok bool, err error) {
	k, _, hasValue := strings.Cut(s, "=")
	if k == "" {
		return "", false, fmt.Errorf("environment variable %q has no name", s)
	}
	if strings.ContainsRune(s, 0) {
		return "", false, fmt.Errorf("environment variable %q contains a zero byte", k)
	}
	if hasValue {
		return s, true, nil
	}
	v, ok := lookup(k)
	return k + "=" + v, ok, nil
}

// parsePairs reads a list of K=V into a map. what names the list in errors.
func parsePairs(what string, list []string) (map[string]string, error) {
	if len(list) == 0 {
		return nil, nil
	}
	m := make(map[string]string, len(list))
	for _, s := range list {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%s %q is not KEY=VALUE", what, s)
		}
		if _, ok := m[k]; ok {
			return nil, fmt.Errorf("%s %q is given twice", what, k)
		}
		m[k] = v
	}
	return m, nil
}

// parseShare reads the list of --share. It is never nil: an empty list means
// that the sandbox holds nothing.
func parseShare(s string) ([]namespace.Kind, error) {
	ks, err := namespace.ParseKinds(s)
	if err != nil {
		return nil, err
	}
	if ks == nil {
		ks = []namespace.Kind{}
	}
	return ks, nil
}

// parsePath makes the path of a directory on the host absolute. The daemon has
// another working directory.
func parsePath(s string) (string, error) {
	if s == "" {
		return "", errors.New("path is empty")
	}
	return filepath.Abs(s)
}

// value is a flag whose text is parsed as it is set, so that its error names
// the flag and comes before anything is done.
type value[T any] struct {
	p     *T
	text  string
	typ   string // shown in the usage
	parse func(string) (T, error)
}

func (v *value[T]) String() string { return v.text }
func (v *value[T]) Type() string   { return v.typ }
func (v *value[T]) Set(s string) error {
	t, err := v.parse(s)
	if err != nil {
		return err
	}
	*v.p, v.text = t, s
	return nil
}

// parseTimeout parses a time to wait. A number without a unit is of seconds, as
// users of other container tools write it.
func parseTimeout(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if n, nerr := strconv.ParseUint(s, 10, 31); nerr == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is no time such as 10, 500ms or 1m", s)
	case d < 0:
		return 0, fmt.Errorf("%s is negative", s)
	}
	return d, nil
}

// list is [value] for a flag that may be given several times.
type list[T any] struct {
	p     *[]T
	texts []string
	typ   string
	parse func(string) (T, error)
}

func (l *list[T]) String() string { return strings.Join(l.texts, " ") }
func (l *list[T]) Type() string   { return l.typ }
func (l *list[T]) Set(s string) error {
	t, err := l.parse(s)
	if err != nil {
		return err
	}
	*l.p, l.texts = append(*l.p, t), append(l.texts, s)
	return nil
}
