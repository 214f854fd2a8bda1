package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/sandbox"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// cli runs the program as a user would.
func cli(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// The help is what users read most.
func TestHelp(t *testing.T) {
	a := &app{in: strings.NewReader(""), out: io.Discard, err: io.Discard, lookupEnv: os.LookupEnv}
	root := a.rootCommand()
	cmds := append([]*cobra.Command{root}, root.Commands()...)
	for _, c := range root.Commands() {
		if c.Name() != "completion" {
			cmds = append(cmds, c.Commands()...)
		}
	}
	var b strings.Builder
	for _, c := range cmds {
		if c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		if c.Short == "" || c.Long == "" || c.Example == "" {
			t.Errorf("%s lacks a text", c.CommandPath())
		}
		if c.Hidden {
			t.Errorf("%s is hidden", c.CommandPath())
		}
		code, out, errs := cli(t, append(strings.Fields(c.CommandPath())[1:], "--help")...)
		if code != 0 || errs != "" {
			t.Errorf("%s --help: exit code %d, stderr %q", c.CommandPath(), code, errs)
		}
		fmt.Fprintf(&b, "$ %s --help\n%s\n", c.CommandPath(), out)
	}
	golden := filepath.Join("testdata", "help.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("help differs from %s; see the change with -update and git diff", golden)
	}
}

// Whatever is wrong with a call is one line that names it, and nothing else.
func TestUsageErrors(t *testing.T) {
	t.Setenv("SANDBOXD_ADDRESS", "unix:///nonexistent/sandboxd.sock")
	t.Setenv("SANDBOXD_STATE", t.TempDir())
	for _, tt := range []struct {
		args string
		want string // in stderr
	}{
		{"bogus", `unknown command "bogus" (try`}, // not: did you mean logs?
		{"logz", "did you mean logs?"},
		{"help bogus", `unknown command "bogus"`},
		{"help run web", `unknown command "web" (try: sandboxd run --help)`},
		{"completion ksh", `unknown command "ksh"`},
		{"create --name web", "sandboxd create NAME"},
		{"create --network host", "it is called --net"},
		{"create --memory 1g web", "sandboxd run has it"},
		{"run web -p 80:80", "unknown shorthand flag: 'p' in -p; sandboxd create has it"},
		{"add web --sysctl net.a=b", "sandboxd create has it"},
		{"kill -s TERM web/m", "kill SANDBOX/MEMBER SIGNAL"},
		{"run web --volume /a", `sandboxd: --volume: volume "/a" is not`},
		{"logs --tail few a/b", `sandboxd: --tail "few": must be an integer`},
		{"creat", "did you mean create?"},
		{"--bogus", "unknown flag: --bogus"},
		{"ls --bogus", "(try: sandboxd ls --help)"},
		{"ls extra", `ls takes no arguments, but got "extra"`},
		{"ls -o yaml", `"yaml"`},
		{"create a b", `"b"`},
		{"create --share net,nett", `"nett"`},
		{"create --shm-size nonsense", `"nonsense"`},
		{"create --label x", `label "x" is not KEY=VALUE`},
		{"run", "run needs arguments"},
		{"run web --rootfs / --memory 12q", `"12q"`},
		{"run web --rootfs / --cpus lots", `"lots"`},
		{"run web --rootfs / --tmpfs /x:size=nonsense", `"nonsense"`},
		{"run web --rootfs / -v /a", `"/a"`},
		{"run web --rootfs / --ns net", `"net"`},
		{"run web --rootfs / --pids-limit -3", "-3"},
		{"run web --rootfs / -e =x", `"=x"`},
		{"start web", `"web" is not SANDBOX/MEMBER`},
		{"wait web", `"web"`},
		{"kill web/m BOGUS", `"BOGUS"`},
		{"stop --time -1s web", "-1s"},
		{"exec web/m", "exec needs arguments"},
		{"cp a b", `"a"`},
		{"cp a/b:/c d/e:/f", `"d/e:/f"`},
		{"cp a/b:/c d/e:/f", "are both in members"},
		{"logs --tail -2 a/b", "-2"},
		{"join --rootfs /x --ns mnt=host web -- x", "exclude each other"},
		{"serve --log-level loud", `"loud"`},
		{"--address tcp://x ls", `"tcp://x"`},
		{"create", "no daemon answers"},
		{"create", "(sandboxd serve starts one)"},
		{"run web --rootfs / sh -c true", "unknown shorthand flag: 'c' in -c; flags of the command need -- before it (try: sandboxd run --help)"},
		{"run web --collect /etc/passwd /etc/group -- echo hi", `["/etc/group"] is too much between "web" and --`},
		{"exec web/m ls -- -l", `["ls"] is too much between "web/m" and --`},
		{"run --rootfs / -- true", "the name of the sandbox is missing before --"},
		{"join -- true", "the name of the sandbox or member is missing before --"},
		{"run web --rootfs / --cpus 500m", "such as 2 or 0.5; 500m is 0.5"},
		{"create -p 99999:80", `port "99999:80": 99999 is not between 0 and 65535`},
		{"exec web/m ls --color", "unknown flag: --color; flags of the command need --"},
		{"stop web", "/nonexistent/sandboxd.sock"},
	} {
		code, out, errs := cli(t, strings.Fields(tt.args)...)
		if code != exitFailed || out != "" || !strings.HasPrefix(errs, "sandboxd: ") || !strings.Contains(errs, tt.want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("sandboxd %s: exit code %d, stdout %q, stderr %q; want %d and one line with %q", tt.args, code, out, errs, exitFailed, tt.want)
		}
	}
}

func TestVersionFlag(t *testing.T) {
	code, out, errs := cli(t, "--version")
	if want := "sandboxd " + readVersion().Version + "\n"; code != 0 || out != want || errs != "" {
		t.Errorf("--version: exit code %d, %q, %q, want %q", code, out, errs, want)
	}
}

func TestReport(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code int
		text string
	}{
		{nil, 0, ""},
		{exitCode(3), 3, ""},
		{fmt.Errorf("wrapped: %w", exitCode(137)), 137, ""},
		{fmt.Errorf("path a\nb: %w", os.ErrNotExist), 125, "sandboxd: path a b: file does not exist\n"},
		{fmt.Errorf("start: %w", &sandbox.StartError{Text: "execute x: no such file", Errno: unix.ENOENT}), 127, "sandboxd: start: execute x: no such file\n"},
		{&sandbox.StartError{Text: "execute x: denied", Errno: unix.EACCES}, 126, "sandboxd: execute x: denied\n"},
		{&failure{126, io.EOF}, 126, "sandboxd: EOF\n"},
	} {
		var b bytes.Buffer
		if code := (&app{err: &b}).report(tt.err); code != tt.code || b.String() != tt.text {
			t.Errorf("report(%v) = %d, %q, want %d, %q", tt.err, code, b.String(), tt.code, tt.text)
		}
	}
	if err := exitOf(sandbox.Exit{Known: false, Code: -1, Reason: "Unknown: nobody was there"}); err == nil || !strings.Contains(err.Error(), "nobody was there") {
		t.Errorf("exit that is not known: %v", err)
	}
}

func TestVersion(t *testing.T) {
	code, out, _ := cli(t, "version", "-o", "json")
	var v versionInfo
	if err := json.Unmarshal([]byte(out), &v); code != 0 || err != nil || v.Kernel == "" || !strings.HasPrefix(v.Go, "go") {
		t.Errorf("version: exit code %d, %q, %v", code, out, err)
	}
	if _, out, _ := cli(t, "version"); !regexp.MustCompile(`(?m)^kernel +\d`).MatchString(out) {
		t.Errorf("version: %q", out)
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, out, errs := cli(t, "completion", shell); code != 0 || len(out) < 1000 || errs != "" {
			t.Errorf("completion %s: exit code %d, %d bytes, stderr %q", shell, code, len(out), errs)
		}
	}
}

func TestNotifyReady(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	for _, socket := range []string{path, "@sandboxd-test-" + filepath.Base(t.TempDir()) + fmt.Sprint(os.Getpid())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := notifyReady(socket); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 64)
		if n, err := l.Read(b); err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("%s: got %q, %v", socket, b[:n], err)
		}
	}
	if err := notifyReady(""); err != nil {
		t.Error(err)
	}
	if err := notifyReady(path + "-away"); err == nil {
		t.Error("nobody listens, but there is no error")
	}
}

// What only looks works while no daemon runs.
func TestWithoutDaemon(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SANDBOXD_ADDRESS", "")
	t.Setenv("SANDBOXD_STATE", dir)
	for _, args := range []string{"ls -o json", "ps -o json"} {
		if code, out, errs := cli(t, strings.Fields(args)...); code != 0 || out != "[]\n" || errs != "" {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", args, code, out, errs)
		}
	}
	for _, args := range []string{"inspect web", "ps web", "logs web/m", "exec web/m -- x", "join web -- x", "cp web/m:/x -", "attach web/m", "wait web/m"} {
		if code, out, errs := cli(t, strings.Fields(args)...); code != exitFailed || out != "" || !strings.Contains(errs, `no sandbox "web"`) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", args, code, out, errs)
		}
	}
	// The flag goes before the environment.
	away := filepath.Join(dir, "away")
	if code, _, errs := cli(t, "--state", away, "ls"); code != exitFailed || !strings.Contains(errs, away+"/sandboxd.sock") || strings.Count(errs, "\n") != 1 {
		t.Errorf("ls without a state directory: exit code %d, stderr %q", code, errs)
	}
}

// A daemon that is stopped has a socket that takes connections, and never answers.
func TestDaemonStopped(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SANDBOXD_ADDRESS", "")
	t.Setenv("SANDBOXD_STATE", dir)
	l, err := net.Listen("unix", filepath.Join(dir, "sandboxd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.MkdirAll(filepath.Join(dir, rootLink, eventsDir), 0o700); err != nil {
		t.Fatal(err)
	}
	const said = "sandboxd: the daemon has not answered for 2s: read from "
	for _, tt := range []struct {
		args string
		code int
		out  string
		errs string // in the second line of stderr
	}{
		{"ls -o json", 0, "[]\n", ""},
		{"ps -o json", 0, "[]\n", ""},
		{"ps web", exitFailed, "", `no sandbox "web"`},
		{"inspect web", exitFailed, "", `no sandbox "web"`},
		{"inspect web/m", exitFailed, "", `no sandbox "web"`},
		{"events", 0, "", ""},
		{"wait web/m", exitFailed, "", `no sandbox "web"`},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
			defer cancel()
			var out, errs bytes.Buffer
			code := run(ctx, strings.Fields(tt.args), strings.NewReader(""), &out, &errs)
			first, rest, _ := strings.Cut(errs.String(), "\n")
			if code != tt.code || out.String() != tt.out || !strings.HasPrefix(first, said+dir) || !strings.Contains(rest, tt.errs) || strings.Count(rest, "\n") > 1 {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, out.String(), errs.String())
			}
		})
	}
}

// What follows something ends with its reader, though nothing happens.
func TestReaderGone(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SANDBOXD_ADDRESS", "")
	t.Setenv("SANDBOXD_STATE", dir)
	if err := os.MkdirAll(filepath.Join(dir, rootLink, eventsDir), 0o700); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	var errs bytes.Buffer
	if code := run(ctx, []string{"events", "-f"}, strings.NewReader(""), w, &errs); code != int(errReaderGone) || errs.Len() > 0 {
		t.Errorf("exit code %d, stderr %q", code, errs.String())
	}
}
