//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// fence is a block of code in a page.
type fence struct {
	lang string
	text []string
	line int // of the page where the text begins
}

func fences(t *testing.T, page string) (fs []fence) {
	t.Helper()
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	in := false
	for i, l := range strings.Split(string(b), "\n") {
		switch lang, ok := strings.CutPrefix(l, "```"); {
		case ok && in:
			in = false
		case ok:
			in = true
			fs = append(fs, fence{lang: lang, line: i + 2})
		case in:
			fs[len(fs)-1].text = append(fs[len(fs)-1].text, l)
		}
	}
	return fs
}

// command is one that a page shows, with the lines that it shows of its output.
type command struct {
	text string
	want []string
	line int
}

// commands finds what follows a "$ ".
func (f *fence) commands() (cs []command) {
	for i, l := range f.text {
		if text, ok := strings.CutPrefix(l, "$ "); ok {
			cs = append(cs, command{text: text, line: f.line + i})
		} else if len(cs) > 0 && l != "" {
			cs[len(cs)-1].want = append(cs[len(cs)-1].want, l)
		}
	}
	return cs
}

var (
	idPattern     = regexp.MustCompile(`\b[0-9a-f]{16}\b`)
	numberPattern = regexp.MustCompile(`(^|[^(\d])\d{2,}\b`)
	agePattern    = regexp.MustCompile(`\b\d+m?s\b`)
	spacePattern  = regexp.MustCompile(`\s+`)
	datePattern   = regexp.MustCompile(`\b\d+ (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\b|\b(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) +\d+\b`)
)

// same makes lines equal that differ only in what differs from run to run: ids,
// dates, pids and other long numbers, widths of columns. What is nothing but a
// number, or in parentheses, is a result.
func same(line string) string {
	line = idPattern.ReplaceAllString(line, "ID")
	line = datePattern.ReplaceAllString(line, "DATE")
	line = agePattern.ReplaceAllString(line, "AGE")
	line = strings.TrimSpace(spacePattern.ReplaceAllString(line, " "))
	if _, err := strconv.Atoi(line); err != nil && !strings.Contains(line, `"code"`) {
		line = numberPattern.ReplaceAllString(line, "${1}N")
	}
	return line
}

// missing returns the first of the lines that out does not have. Their order is
// not looked at: tables are sorted by ids.
func missing(lines []string, out string) string {
	have := strings.Split(out, "\n")
	for _, want := range lines {
		i := slices.IndexFunc(have, func(l string) bool { return same(l) == same(want) })
		if i < 0 {
			return want
		}
		have = slices.Delete(have, i, i+1)
	}
	return ""
}

func TestMissing(t *testing.T) {
	const out = "ID   NAME\n668b852c1fda24de web  Exited (139) 28411 7s\n42\n  \"code\": 7,\n"
	for _, tt := range []struct{ lines, want string }{
		{"ID NAME\n42", ""},
		{"0123456789abcdef web Exited (139) 1234 61s", ""},
		{"0123456789abcdef web Exited (13) 1234 61s", "0123456789abcdef web Exited (13) 1234 61s"},
		{"43", "43"},
		{"42\n42", "42"},
		{`"code": 7,`, ""},
		{`"code": 77,`, `"code": 77,`},
	} {
		if got := missing(strings.Split(tt.lines, "\n"), out); got != tt.want {
			t.Errorf("missing(%q) = %q, want %q", tt.lines, got, tt.want)
		}
	}
}

// TestPages runs every command of the pages' console blocks, a page's in one
// shell, and compares exit codes and what the pages show of the output.
func TestPages(t *testing.T) {
	for _, page := range []string{"../README.md", "../docs/operations.md"} {
		t.Run(filepath.Base(page), func(t *testing.T) {
			testenv.Program(t, "redis-server")
			testenv.Program(t, "curl")
			// On a host of its own, as pages take the default network.
			ns := newHost(t)
			d := startWarm(t, testenv.Busybox(t), func(d *daemon) {
				d.netns = ns
				d.flags = []string{"--network-default", "builtin", "--subnet6", "fd00:88::/64", "--cni-conf-dir", t.TempDir(),
					"--metrics-address", "127.0.0.1:9477"}
			})
			var cs []command
			for _, f := range fences(t, page) {
				if f.lang == "console" {
					cs = append(cs, f.commands()...)
				}
			}
			if len(cs) == 0 {
				t.Fatal("no commands")
			}
			outs, codes := shell(t, d, cs)
			for i, c := range cs {
				where := fmt.Sprintf("%s:%d: %s", page, c.line, c.text)
				// A page asks for the code of a command that fails.
				shown := i+1 < len(cs) && cs[i+1].text == "echo $?"
				fails := len(c.want) > 0 && strings.HasPrefix(c.want[0], "sandboxd: ")
				if (codes[i] == 0) == (shown || fails) {
					t.Errorf("%s\nexit code %d\n%s", where, codes[i], outs[i])
				}
				if l := missing(c.want, outs[i]); l != "" {
					t.Errorf("%s\nprints no line %q\n%s", where, l, outs[i])
				}
			}
		})
	}
}

// shell runs commands in one shell, as a client of d in a directory like a clone
// of the project, and returns what each printed and its exit code.
func shell(t *testing.T, d *daemon, cs []command) (outs []string, codes []int) {
	t.Helper()
	dir := t.TempDir()
	tools, err := filepath.Abs("../tools")
	if err != nil {
		t.Fatal(err)
	}
	links := map[string]string{"tools": tools, "bin/sandboxd": d.binary}
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	const mark = "@@ exit code "
	var script strings.Builder
	for _, c := range cs {
		fmt.Fprintf(&script, "%s\n{ code=$?; printf '\\n%s%%d\\n' $code; (exit $code); }\n", c.text, mark)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script.String())
	cmd.WaitDelay = time.Second // a command that hangs has the pipe
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"),
		"SANDBOXD_STATE="+d.state, "SANDBOXD_ADDRESS="+d.address())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	run := cmd.Run // its code is the last command's
	if d.netns != nil {
		run = func() error { return errors.Join(startIn(d.netns, cmd), cmd.Wait()) }
	}
	run()
	for part := range strings.SplitSeq(out.String(), "\n"+mark) {
		if len(outs) > 0 {
			var code string
			code, part, _ = strings.Cut(part, "\n")
			n, err := strconv.Atoi(code)
			if err != nil {
				t.Fatalf("exit code %q", code)
			}
			codes = append(codes, n)
		}
		outs = append(outs, part)
	}
	if len(codes) != len(cs) {
		t.Fatalf("%d of %d commands were run:\n%s", len(codes), len(cs), out.String())
	}
	return outs[:len(cs)], codes
}

// TestSetUpBlocks checks what cannot be run in a test: the targets of make exist,
// and there is nothing else but the installation.
func TestSetUpBlocks(t *testing.T) {
	testenv.Program(t, "go") // where it is not, there is no source tree
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range fences(t, "../README.md") {
		if f.lang != "sh" {
			continue
		}
		for _, l := range f.text {
			l, _, _ = strings.Cut(l, " #")
			l = strings.TrimSpace(l)
			n++
			target, ok := strings.CutPrefix(l, "make ")
			switch {
			case ok && !regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(target)+`:`).Match(makefile):
				t.Errorf("no target for %q in the Makefile", l)
			case !ok && l != "install -m 755 build/sandboxd /usr/local/bin/sandboxd":
				t.Errorf("%q is run by no test", l)
			}
		}
	}
	if n == 0 {
		t.Error("no blocks")
	}
}
