package hook

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/request"
)

// dir makes a hooks directory.
func dir(t *testing.T, files map[string]string) string {
	t.Helper()
	d := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(d, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func hookFile(path, when, stages string) string {
	return fmt.Sprintf(`{"version":"1.0.0","hook":{"path":%q,"args":["n",%q]},"when":{%s},"stages":[%s]}`, "/bin/true", path, when, stages)
}

const always = `"always":true`

func names(hs []request.Hook) []string {
	var s []string
	for _, h := range hs {
		s = append(s, string(h.Stage)+" "+h.Args[1])
	}
	return s
}

func TestDirs(t *testing.T) {
	usr := dir(t, map[string]string{
		"10-B.json": hookFile("usr-b", always, `"poststop"`),
		"10-a.json": hookFile("usr-a", always, `"prestart","poststart"`),
		"20.json":   hookFile("usr-20", always, `"createRuntime"`),
		"readme":    "no hook",
	})
	etc := dir(t, map[string]string{
		"20.json":   hookFile("etc-20", always, `"predelete","sandbox-poststop"`),
		"00-z.json": hookFile("etc-z", always, `"postcreate","sandbox-postcreate","sandbox-predelete"`),
	})
	d := Dirs{usr, filepath.Join(etc, "none"), etc}
	for sandbox, want := range map[bool][]string{
		false: {"postcreate etc-z", "oci-prestart usr-a", "poststart usr-a", "poststop usr-b", "predelete etc-20"},
		true:  {"postcreate etc-z", "predelete etc-z", "poststop etc-20"},
	} {
		hs, err := d.Hooks(Target{Sandbox: sandbox})
		if err != nil || !slices.Equal(names(hs), want) {
			t.Errorf("sandbox %t: %q, %v, want %q", sandbox, names(hs), err, want)
		}
	}
	if hs, err := (Dirs{etc, usr}).Hooks(Target{}); err != nil || !slices.Contains(names(hs), "createRuntime usr-20") {
		t.Errorf("the other way round: %q, %v", names(hs), err)
	}
	if hs, err := Dirs(nil).Hooks(Target{}); hs != nil || err != nil {
		t.Errorf("no directories: %v, %v", hs, err)
	}
}

func TestWhen(t *testing.T) {
	full := Target{Annotations: map[string]string{"com.example.dep": "fluid", "x": "y"}, Command: "/sbin/init", BindMounts: true}
	for _, tt := range []struct {
		when string
		t    Target
		want bool
	}{
		{always, Target{}, true},
		{`"always":false`, full, false},
		{`"commands":[".*/init$","/x"]`, full, true},
		{`"commands":["/x"]`, full, false},
		{`"commands":["^.*$"]`, Target{Sandbox: true}, false},
		{`"hasBindMounts":true`, full, true},
		{`"hasBindMounts":true`, Target{}, false},
		{`"hasBindMounts":false`, full, false},
		{`"annotations":{"^com\\.":"^fl"}`, full, true},
		{`"annotations":{"^com\\.":"^y$"}`, full, false}, // the value of another key
		{`"annotations":{"^com\\.":".*","z":".*"}`, full, false},
		{`"annotations":{"x":"y"},"commands":["init"],"hasBindMounts":true,"always":true`, full, true},
		{`"annotations":{"x":"y"},"commands":["nothing"]`, full, false},
	} {
		f, err := parseFile([]byte(hookFile("p", tt.when, `"poststop","sandbox-poststop"`)))
		if err != nil {
			t.Fatalf("%s: %v", tt.when, err)
		}
		if got := f.matches(tt.t); got != tt.want {
			t.Errorf("%s matches %+v: %t", tt.when, tt.t, got)
		}
	}
}

func TestFileTimeout(t *testing.T) {
	for timeout, want := range map[string]time.Duration{"": time.Hour, `,"timeout":7`: 7 * time.Second} {
		f, err := parseFile([]byte(`{"version":"1.0.0","hook":{"path":"/x"` + timeout + `},"when":{"always":true},"stages":["poststop"]}`))
		if err != nil || f.hook.Timeout != want {
			t.Errorf("%q: %v, %v, want %s", timeout, f, err, want)
		}
	}
}

// A broken file is named, with what is wrong, and so is each further one.
func TestBrokenFiles(t *testing.T) {
	good := hookFile("p", always, `"poststop"`)
	broken := map[string]string{
		"empty.json":    "",
		"version.json":  strings.Replace(good, "1.0.0", "0.1.0", 1),
		"json.json":     good[:len(good)-1],
		"twice.json":    good + "x",
		"type.json":     strings.Replace(good, `"always":true`, `"always":"yes"`, 1),
		"unknown.json":  strings.Replace(good, `"always"`, `"allways"`, 1),
		"when.json":     hookFile("p", "", `"poststop"`),
		"stage.json":    hookFile("p", always, `"never"`),
		"stages.json":   hookFile("p", always, ""),
		"box.json":      hookFile("p", always, `"sandbox-prestart"`),
		"regexp.json":   hookFile("p", `"commands":["("]`, `"poststop"`),
		"keyre.json":    hookFile("p", `"annotations":{"(":"x"}`, `"poststop"`),
		"relative.json": strings.Replace(good, "/bin/true", "true", 1),
		"missing.json":  strings.Replace(good, "/bin/true", "/no/such/program", 1),
		"timeout.json":  strings.Replace(good, `"args"`, `"timeout":0,"args"`, 1),
	}
	d := dir(t, broken)
	if err := unix.Mkfifo(filepath.Join(d, "fifo.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/no/such/file", filepath.Join(d, "dangling.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d, "good.json"), []byte(good), 0o644); err != nil {
		t.Fatal(err)
	}
	hs, err := Dirs{d}.Hooks(Target{})
	if hs != nil || err == nil {
		t.Fatalf("hooks %v, %v", hs, err)
	}
	for name := range broken {
		if !strings.Contains(err.Error(), filepath.Join(d, name)+": ") {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
	for _, name := range []string{"fifo.json", "dangling.json"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
	if strings.Contains(err.Error(), "good.json") {
		t.Errorf("a good file is named in %v", err)
	}
}

func FuzzHookFile(f *testing.F) {
	f.Add([]byte(hookFile("p", always, `"poststop","prestart","sandbox-predelete"`)))
	f.Add([]byte(hookFile("p", `"annotations":{"a":"b"},"commands":["c"],"hasBindMounts":true`, `"createRuntime"`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := parseFile(b)
		if err != nil {
			return
		}
		file.matches(Target{Annotations: map[string]string{"a": "b"}, Command: "c", BindMounts: true})
		for _, h := range slices.Concat(file.hooks(false), file.hooks(true)) {
			if err := Check(h, slices.Concat(request.MemberStages(), request.SandboxStages())); err != nil {
				t.Errorf("%s makes a hook that is refused: %v", b, err)
			}
		}
	})
}
