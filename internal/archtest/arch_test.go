package archtest

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sandboxd/sandboxd"

// allowed says which of the project's packages each may import directly, beside
// internal/…, which all may. A name that ends in … stands for a tree. A package
// without a line fails the test: decide where it belongs.
var allowed = map[string][]string{
	"sandbox":    {},
	"pause":      {},
	"member":     {},
	"netsetup/…": {"netsetup/…"},
	"collect":    {},
	"hook":       {},
	"image":      {},
	"metrics":    {"sandbox"},
	"web":        {"sandbox"},
	"cri":        {"sandbox", "image"},
	"api/…":      {"sandbox", "api/…"},
	"cmd/…":      {"sandbox", "pause", "member", "netsetup/…", "collect", "hook", "image", "metrics", "web", "cri", "api/…"},
	"e2e":        {}, // a black box has no way in
	"e2e/bench":  {"api/…", "sandbox"},
	"internal…":  {},
}

// allowedExec are the packages whose code, tests apart, may start programs by
// os/exec: everything else starts processes by a launch program or not at all.
var allowedExec = []string{
	"cmd/…", "e2e/…",
	"netsetup/cni",                         // plugins are programs of the host's
	"hook",                                 // hooks are programs of the host's
	"internal/testenv", "internal/testsum", // only tests and CI use them
}

// namespaceCalls change the namespaces of a thread, or pin one for it. A mistake
// with them shows in another goroutine, so there is one place for them.
var namespaceCalls = map[string]bool{
	"runtime.LockOSThread": true, "unix.Setns": true, "unix.Unshare": true, "syscall.Unshare": true,
}

// allowedNamespaceCalls may use them.
var allowedNamespaceCalls = []string{"internal/nsthread"}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		may, known := rule(p.name)
		if !known {
			t.Errorf("%s has no rule", p.name)
		}
		for imp := range p.imports() {
			to, ours := strings.CutPrefix(imp, module+"/")
			switch {
			case !ours, matches("internal…", to):
			case matches("cmd/…", to):
				t.Errorf("%s imports %s: nobody may", p.name, to)
			case to == "api/server" && !matches("cmd/…", p.name):
				t.Errorf("%s imports %s: only commands may", p.name, to)
			case !slices.ContainsFunc(may, func(pattern string) bool { return matches(pattern, to) }):
				t.Errorf("%s must not import %s", p.name, to)
			}
			if imp == "os/exec" && !among(allowedExec, p.name) {
				t.Errorf("%s must not import os/exec", p.name)
			}
			if imp == "C" {
				t.Errorf("%s uses cgo", p.name)
			}
		}
	}
}

func TestNamespaceCalls(t *testing.T) {
	for _, p := range packages(t) {
		if among(allowedNamespaceCalls, p.name) {
			continue
		}
		for name, f := range p.files {
			for _, call := range calls(f) {
				if namespaceCalls[call] {
					t.Errorf("%s calls %s: use internal/nsthread", name, call)
				}
			}
		}
	}
}

// A function that can call any method by its name, which templates do, makes the
// linker keep all exported methods of all types: 3 MB of the daemon.
func TestNoMethodsByName(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags=grpcnotrace", "-ldflags=-dumpdep", "-o", "/dev/null", "./cmd/sandboxd")
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "main.main") {
		t.Fatalf("%v: %.1000s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "<ReflectMethod>") {
			t.Fatalf("the program can call methods by name: %sgo build -ldflags=-dumpdep shows who needs that", line)
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		var with []string
		for name, f := range p.files {
			if f.Doc != nil && !ast.IsGenerated(f) {
				with = append(with, filepath.Base(name))
			}
		}
		slices.Sort(with)
		if len(with) != 1 {
			t.Errorf("%s has %d package comments %v, want 1", p.name, len(with), with)
		}
	}
}

// The rules themselves are tried, since a rule that matches nothing is kept by
// everybody.
func TestRules(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          bool
	}{
		{"sandbox", "sandbox", true},
		{"sandbox", "sandbox/x", false},
		{"api/…", "api", true},
		{"api/…", "api/sandboxd/v1", true},
		{"api/…", "apix", false},
		{"internal…", "internal/leak", true},
		{"internal…", "internal/leak/cmd/leakcheck", true},
	} {
		if got := matches(tt.pattern, tt.name); got != tt.want {
			t.Errorf("matches(%q, %q) = %t", tt.pattern, tt.name, got)
		}
	}
	src := "package p\nimport \"golang.org/x/sys/unix\"\nfunc f() { go func() { unix.Setns(1, 2) }() }\n"
	f, err := parser.ParseFile(token.NewFileSet(), "p.go", src, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got := calls(f); !slices.Contains(got, "unix.Setns") {
		t.Errorf("calls = %v, without unix.Setns", got)
	}
}

func rule(name string) ([]string, bool) {
	for pattern, may := range allowed {
		if matches(pattern, name) {
			return may, true
		}
	}
	return nil, false
}

func among(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) })
}

// matches reports whether name is pattern, or for one that ends in … is in its tree.
func matches(pattern, name string) bool {
	tree, ok := strings.CutSuffix(pattern, "…")
	tree = strings.TrimSuffix(tree, "/")
	return name == tree || ok && strings.HasPrefix(name, tree+"/")
}

// goPackage is one of the project's packages with its files, test files apart,
// for every architecture and build tag.
type goPackage struct {
	name  string // below the module
	files map[string]*ast.File
}

func (p goPackage) imports() map[string]bool {
	m := map[string]bool{}
	for _, f := range p.files {
		for _, spec := range f.Imports {
			if imp, err := strconv.Unquote(spec.Path.Value); err == nil {
				m[imp] = true
			}
		}
	}
	return m
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-tags=e2e", "-json=ImportPath,Dir,GoFiles,IgnoredGoFiles", module+"/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var ps []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var listed struct {
			ImportPath, Dir         string
			GoFiles, IgnoredGoFiles []string
		}
		if err := dec.Decode(&listed); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		p := goPackage{strings.TrimPrefix(listed.ImportPath, module+"/"), map[string]*ast.File{}}
		for _, name := range append(listed.GoFiles, listed.IgnoredGoFiles...) {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file := filepath.Join(listed.Dir, name)
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			p.files[path.Join(p.name, name)] = f
		}
		if len(p.files) > 0 {
			ps = append(ps, p)
		}
	}
	if len(ps) < 5 {
		t.Fatalf("go list names only %d packages", len(ps))
	}
	return ps
}

// calls returns the functions of other packages that f mentions, as "unix.Setns".
func calls(f *ast.File) []string {
	var names []string
	ast.Inspect(f, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if pkg, ok := sel.X.(*ast.Ident); ok {
				names = append(names, pkg.Name+"."+sel.Sel.Name)
			}
		}
		return true
	})
	return names
}
