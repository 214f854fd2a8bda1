package hook

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/request"
)

// Dirs are directories in which a host's hooks are configured, by one file
// NAME.json each, in the form of podman and CRI-O (oci-hooks(5), schema 1.0.0). A
// file takes the place of one with the same name in an earlier directory. One
// that does not exist is passed over.
//
// Stages are those of runtime-spec with its meaning, but for poststop, which is at the
// exit as it is with podman, and our own: postcreate, prestop, predelete,
// oci-poststop, and for sandboxes sandbox-postcreate, sandbox-prestop,
// sandbox-poststop and sandbox-predelete.
type Dirs []string

// Target is whom hooks of [Dirs] are chosen for.
type Target struct {
	Sandbox     bool // the sandbox itself, not a member
	Annotations map[string]string
	Command     string // process.args[0]; empty for a sandbox
	BindMounts  bool   // it has volumes
}

// Hooks reads the directories and returns the hooks for t, in the order of the
// files' names in lower case. If a file is broken, the error names it and
// there are no hooks: one that is left out might be the one that matters.
func (d Dirs) Hooks(t Target) ([]request.Hook, error) {
	files := map[string]string{} // path by name
	for _, dir := range d {
		ents, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("hooks directory: %w", err)
		}
		for _, e := range ents {
			if strings.HasSuffix(e.Name(), ".json") {
				files[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	names := slices.SortedFunc(maps.Keys(files), func(a, b string) int {
		return cmp.Or(strings.Compare(strings.ToLower(a), strings.ToLower(b)), strings.Compare(a, b))
	})
	var hs []request.Hook
	var errs []error
	for _, name := range names {
		f, err := readFile(files[name])
		if err != nil {
			errs = append(errs, fmt.Errorf("hook file %s: %w", files[name], err))
			continue
		}
		if !f.matches(t) {
			continue
		}
		for _, h := range f.hooks(t.Sandbox) {
			if err := CheckProgram(h); err != nil {
				errs = append(errs, fmt.Errorf("hook file %s: %w", files[name], err))
			}
			hs = append(hs, h)
		}
	}
	if errs != nil {
		return nil, errors.Join(errs...)
	}
	return hs, nil
}

// file is a hook file as it is on disk.
type file struct {
	Version string     `json:"version"`
	Hook    specs.Hook `json:"hook"`
	When    struct {
		Always        *bool             `json:"always"`
		Annotations   map[string]string `json:"annotations"`
		Commands      []string          `json:"commands"`
		HasBindMounts *bool             `json:"hasBindMounts"`
	} `json:"when"`
	Stages []string `json:"stages"`

	hook        request.Hook // of each stage
	annotations []annotation
	commands    []*regexp.Regexp
}

type annotation struct{ key, value *regexp.Regexp }

// maxFile is more than a hook file can sensibly have.
const maxFile = 1 << 20

// readFile reads a file that may be anything.
func readFile(path string) (*file, error) {
	// A FIFO must not block the daemon.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, bare(err)
	} else if !st.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, bare(err)
	}
	return parseFile(b)
}

// bare takes the path out of an error that will be given it.
func bare(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

func parseFile(b []byte) (*file, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("larger than %d bytes", maxFile)
	}
	// The version first: what else is there depends on it.
	var v struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, jsonError(err)
	}
	if v.Version != "1.0.0" {
		return nil, fmt.Errorf("version %q: want 1.0.0", v.Version)
	}
	f := new(file)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(f); err != nil {
		return nil, jsonError(err)
	}
	if len(f.Stages) == 0 {
		return nil, errors.New("stages: none is named")
	}
	for _, name := range f.Stages {
		if s, _ := stageOf(name); s == "" {
			return nil, fmt.Errorf("stages: %q is unknown", name)
		}
	}
	var err error
	if f.hook, err = fromOCI(f.Hook, request.Poststop); err != nil { // the stage comes later
		return nil, fmt.Errorf("hook: %w", err)
	}
	w := &f.When
	if w.Always == nil && len(w.Annotations) == 0 && len(w.Commands) == 0 && w.HasBindMounts == nil {
		return nil, errors.New("when: there is no condition; for every container, say always")
	}
	for k, v := range w.Annotations {
		key, err := regexp.Compile(k)
		if err != nil {
			return nil, fmt.Errorf("when.annotations: %w", err)
		}
		value, err := regexp.Compile(v)
		if err != nil {
			return nil, fmt.Errorf("when.annotations: %w", err)
		}
		f.annotations = append(f.annotations, annotation{key, value})
	}
	for _, c := range w.Commands {
		re, err := regexp.Compile(c)
		if err != nil {
			return nil, fmt.Errorf("when.commands: %w", err)
		}
		f.commands = append(f.commands, re)
	}
	return f, nil
}

func jsonError(err error) error {
	if te, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%s: a JSON %s is not what belongs here", cmp.Or(te.Field, "file"), te.Value)
	}
	return errors.New(strings.TrimPrefix(err.Error(), "json: "))
}

// stageOf returns the stage that a hook file means by name, and whether it is the
// sandbox's.
func stageOf(name string) (stage request.Stage, sandbox bool) {
	if s, ok := strings.CutPrefix(name, "sandbox-"); ok {
		if slices.Contains(request.SandboxStages(), request.Stage(s)) {
			return request.Stage(s), true
		}
		return "", true
	}
	if name == string(request.Prestart) {
		return request.OCIPrestart, false
	}
	if slices.Contains(request.MemberStages(), request.Stage(name)) {
		return request.Stage(name), false
	}
	return "", false
}

// matches reports whether all conditions are met.
func (f *file) matches(t Target) bool {
	w := &f.When
	if w.Always != nil && !*w.Always || w.HasBindMounts != nil && !(*w.HasBindMounts && t.BindMounts) {
		return false
	}
	for _, a := range f.annotations {
		met := false
		for k, v := range t.Annotations {
			met = met || a.key.MatchString(k) && a.value.MatchString(v)
		}
		if !met {
			return false
		}
	}
	return len(f.commands) == 0 || !t.Sandbox &&
		slices.ContainsFunc(f.commands, func(re *regexp.Regexp) bool { return re.MatchString(t.Command) })
}

// hooks returns the file's hook for each of its stages that are a sandbox's, or a member's.
func (f *file) hooks(sandbox bool) []request.Hook {
	var hs []request.Hook
	for _, name := range f.Stages {
		stage, isSandbox := stageOf(name)
		if isSandbox == sandbox {
			h := f.hook
			h.Stage = stage
			hs = append(hs, h)
		}
	}
	return hs
}
