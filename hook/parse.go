package hook

import (
	"encoding/csv"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/request"
)

// Parse reads STAGE=PATH[,arg=ARG]…[,env=K=V]…[,timeout=DURATION][,retries=N]. A
// field that holds a comma is put into double quotes, as in CSV.
func Parse(s string) (request.Hook, error) {
	r := csv.NewReader(strings.NewReader(s))
	r.FieldsPerRecord = -1
	fields, err := r.Read()
	if err != nil || r.InputOffset() != int64(len(s)) {
		return request.Hook{}, errors.New("want STAGE=PATH[,arg=…][,env=K=V][,timeout=10s][,retries=3], fields with a comma in double quotes")
	}
	stage, path, ok := strings.Cut(fields[0], "=")
	if !ok {
		return request.Hook{}, fmt.Errorf("%q: want STAGE=PATH", fields[0])
	}
	h := request.Hook{Stage: request.Stage(stage), Path: path}
	var args []string
	seen := map[string]bool{}
	for _, f := range fields[1:] {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return request.Hook{}, fmt.Errorf("%q: want arg=, env=, timeout= or retries=", f)
		}
		if (k == "timeout" || k == "retries") && seen[k] {
			return request.Hook{}, fmt.Errorf("%s is given twice", k)
		}
		seen[k] = true
		switch k {
		case "arg":
			args = append(args, v)
		case "env":
			h.Env = append(h.Env, v)
		case "timeout":
			if h.Timeout, err = time.ParseDuration(v); err != nil || h.Timeout <= 0 {
				return request.Hook{}, fmt.Errorf("timeout %q: want a duration above 0, such as 10s", v)
			}
		case "retries":
			if h.Retries, err = strconv.Atoi(v); err != nil {
				return request.Hook{}, fmt.Errorf("retries %q: want a number", v)
			}
		default:
			return request.Hook{}, fmt.Errorf("%q: want arg=, env=, timeout= or retries=", f)
		}
	}
	if args != nil {
		h.Args = append([]string{path}, args...)
	}
	return h, Check(h, slices.Concat(request.SandboxStages(), request.MemberStages()))
}

// Check reports what makes a hook unusable, without looking at the host. stages
// are those that it may have.
func Check(h request.Hook, stages []request.Stage) error {
	if !slices.Contains(stages, h.Stage) {
		var names []string
		for _, s := range stages {
			if !slices.Contains(names, string(s)) {
				names = append(names, string(s))
			}
		}
		return fmt.Errorf("stage %q is not one of %s", string(h.Stage), strings.Join(names, ", "))
	}
	switch {
	case !filepath.IsAbs(h.Path) || filepath.Clean(h.Path) != h.Path || h.Path == "/" || !text(h.Path) || len(h.Path) >= unix.PathMax:
		return fmt.Errorf("program %q is not an absolute path in its shortest form", h.Path)
	case h.Timeout < 0 || h.Timeout > request.MaxHookTimeout:
		return fmt.Errorf("timeout %s of %s: want more than 0 and at most %s", h.Timeout, h.Path, request.MaxHookTimeout)
	case h.Retries < 0 || h.Retries > request.MaxHookRetries:
		return fmt.Errorf("retries %d of %s: want 0 to %d", h.Retries, h.Path, request.MaxHookRetries)
	}
	size := 0
	for _, a := range h.Args {
		if strings.ContainsRune(a, 0) || !utf8.ValidString(a) {
			return fmt.Errorf("argument %q of %s is not text", a, h.Path)
		}
		size += len(a)
	}
	for _, kv := range h.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || strings.ContainsRune(kv, 0) || !utf8.ValidString(kv) {
			return fmt.Errorf("environment %q of %s: want K=V", kv, h.Path)
		}
		size += len(kv)
	}
	if size > maxWords {
		return fmt.Errorf("arguments and environment of %s: %d bytes are more than %d", h.Path, size, maxWords)
	}
	return nil
}

// maxWords bounds a hook's arguments and environment: they are in every record.
const maxWords = 64 << 10

func text(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// CheckProgram reports why the hook's program cannot be executed on this host. That of
// a startContainer hook is in the member and cannot be looked at.
func CheckProgram(h request.Hook) error {
	if h.Stage == request.StartContainer {
		return nil
	}
	var st unix.Stat_t
	err := unix.Stat(h.Path, &st)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s program %s is not a regular file", h.Stage, h.Path)
	default:
		err = unix.Access(h.Path, unix.X_OK)
	}
	if errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s program %s is not executable", h.Stage, h.Path)
	}
	if err != nil {
		return fmt.Errorf("%s program %s: %w", h.Stage, h.Path, err)
	}
	return nil
}

// FromSpec returns the hooks of an OCI configuration with their OCI meaning, in
// the order of their stages.
func FromSpec(hooks *specs.Hooks) ([]request.Hook, error) {
	if hooks == nil {
		return nil, nil
	}
	var hs []request.Hook
	for _, list := range []struct {
		name  string
		stage request.Stage
		hooks []specs.Hook
	}{
		//lint:ignore SA1019 deprecated, and used
		{"prestart", request.OCIPrestart, hooks.Prestart},
		{"createRuntime", request.CreateRuntime, hooks.CreateRuntime},
		{"createContainer", request.CreateContainer, hooks.CreateContainer},
		{"startContainer", request.StartContainer, hooks.StartContainer},
		{"poststart", request.Poststart, hooks.Poststart},
		{"poststop", request.OCIPoststop, hooks.Poststop},
	} {
		for i, sh := range list.hooks {
			h, err := fromOCI(sh, list.stage)
			if err != nil {
				return nil, fmt.Errorf("hooks.%s[%d]: %w", list.name, i, err)
			}
			hs = append(hs, h)
		}
	}
	return hs, nil
}

// fromOCI makes a hook of one in the form of runtime-spec, in which no timeout means
// no limit; [request.MaxHookTimeout] is as near to that as a hook gets.
func fromOCI(sh specs.Hook, stage request.Stage) (request.Hook, error) {
	h := request.Hook{Stage: stage, Path: sh.Path, Args: sh.Args, Env: sh.Env, Timeout: request.MaxHookTimeout}
	if sh.Timeout != nil {
		if *sh.Timeout <= 0 || *sh.Timeout > int(request.MaxHookTimeout/time.Second) {
			return h, fmt.Errorf("timeout %d: want 1 to %d seconds", *sh.Timeout, int(request.MaxHookTimeout/time.Second))
		}
		h.Timeout = time.Duration(*sh.Timeout) * time.Second
	}
	return h, Check(h, []request.Stage{stage})
}
