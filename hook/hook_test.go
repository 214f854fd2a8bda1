package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/request"
)

func TestMain(m *testing.M) {
	// As the daemon does: what this process was given is nobody else's.
	unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC)
	goleak.VerifyTestMain(m)
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want request.Hook
		err  string // a part of it
	}{
		{"poststop=/bin/true", request.Hook{Stage: "poststop", Path: "/bin/true"}, ""},
		{"poststop=/x,arg=a,arg=b=c,arg=,env=K=V,env=L=,timeout=1m30s,retries=3", request.Hook{
			Stage: "poststop", Path: "/x", Args: []string{"/x", "a", "b=c", ""}, Env: []string{"K=V", "L="}, Timeout: 90 * time.Second, Retries: 3}, ""},
		{`prestart=/x,"arg=a,b","env=K=""q"""`, request.Hook{Stage: "prestart", Path: "/x", Args: []string{"/x", "a,b"}, Env: []string{`K="q"`}}, ""},
		{"oci-poststop=/x", request.Hook{Stage: "oci-poststop", Path: "/x"}, ""},
		{"", request.Hook{}, "want STAGE=PATH"},
		{"poststop", request.Hook{}, "want STAGE=PATH"},
		{"never=/x", request.Hook{}, `stage "never"`},
		{"poststop=x", request.Hook{}, "absolute"},
		{"poststop=/x/../y", request.Hook{}, "absolute"},
		{"poststop=/", request.Hook{}, "absolute"},
		{"poststop=", request.Hook{}, "absolute"},
		{"poststop=/x\x00", request.Hook{}, "absolute"},
		{"poststop=/x,arg", request.Hook{}, "want arg="},
		{"poststop=/x,what=1", request.Hook{}, "want arg="},
		{"poststop=/x,env=V", request.Hook{}, "K=V"},
		{"poststop=/x,env==V", request.Hook{}, "K=V"},
		{"poststop=/x,timeout=soon", request.Hook{}, "duration"},
		{"poststop=/x,timeout=0s", request.Hook{}, "above 0"},
		{"poststop=/x,timeout=-1s", request.Hook{}, "above 0"},
		{"poststop=/x,timeout=61m", request.Hook{}, "at most 1h"},
		{"poststop=/x,timeout=1s,timeout=2s", request.Hook{}, "twice"},
		{"poststop=/x,retries=101", request.Hook{}, "0 to 100"},
		{"poststop=/x,retries=-1", request.Hook{}, "0 to 100"},
		{"poststop=/x,retries=many", request.Hook{}, "number"},
		{"poststop=/x\npoststop=/y", request.Hook{}, "want STAGE=PATH"},
		{`poststop=/x,"arg=a`, request.Hook{}, "want STAGE=PATH"},
		{"poststop=/x,arg=" + strings.Repeat("a", maxWords+1), request.Hook{}, "more than"},
	} {
		got, err := Parse(tt.in)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Parse(%.40q) = %v, want an error of one line with %q", tt.in, err, tt.err)
			}
			continue
		}
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("Parse(%q) = %+v, %v, want %+v", tt.in, got, err, tt.want)
		}
	}
}

func TestCheckProgram(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"runs": 0o755, "data": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o777); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir + "/runs": "", dir + "/data": "not executable", dir + "/none": "no such file", dir: "not a regular file", dir + "/fifo": "not a regular file",
	} {
		err := CheckProgram(request.Hook{Stage: request.Poststop, Path: path})
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	if err := CheckProgram(request.Hook{Stage: request.StartContainer, Path: dir + "/none"}); err != nil {
		t.Errorf("a program of the member's: %v", err)
	}
}

func TestFromSpec(t *testing.T) {
	five, none := 5, 0
	h := func(path string) []specs.Hook {
		return []specs.Hook{{Path: path, Args: []string{"a0", "x"}, Env: []string{"K=V"}, Timeout: &five}}
	}
	hs, err := FromSpec(&specs.Hooks{
		Poststop: h("/6"), Poststart: h("/5"), StartContainer: h("/4"), CreateContainer: h("/3"), CreateRuntime: h("/2"),
		//lint:ignore SA1019 deprecated, and used
		Prestart: []specs.Hook{{Path: "/1"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range hs {
		got = append(got, fmt.Sprintf("%s %s %s", h.Path, h.Stage, h.Timeout))
	}
	want := []string{"/1 oci-prestart 1h0m0s", "/2 createRuntime 5s", "/3 createContainer 5s", "/4 startContainer 5s", "/5 poststart 5s", "/6 oci-poststop 5s"}
	if !slices.Equal(got, want) {
		t.Errorf("hooks %q, want %q", got, want)
	}
	if hs, err := FromSpec(nil); hs != nil || err != nil {
		t.Errorf("no hooks: %v, %v", hs, err)
	}
	if _, err := FromSpec(&specs.Hooks{Poststop: []specs.Hook{{Path: "/x"}, {Path: "/x", Timeout: &none}}}); err == nil || !strings.Contains(err.Error(), "hooks.poststop[1]: timeout 0") {
		t.Errorf("a hook without time: %v", err)
	}
}

// run runs a shell script.
func run(ctx context.Context, timeout time.Duration, script string) Result {
	return Run(ctx, &Command{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"K=V"}, Stdin: []byte("input\n"), Timeout: timeout})
}

func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		code         int
		output, err  string
	}{
		{"success", `read x; echo "$x $K $(pwd)"; echo err >&2`, 0, "input V /\nerr\n", ""},
		{"failure", "echo why; exit 7", 7, "why\n", "exit code 7"},
		{"signal", "kill -TERM $$", 143, "", "signal 15 (SIGTERM)"},
		{"not reading its input", "exit 0", 0, "", ""},
		{"a search path", "command -v true >/dev/null && echo $PATH", 0, strings.TrimPrefix(defaultPath, "PATH=") + "\n", ""},
		{"a session of its own", `[ "$(cut -d' ' -f6 /proc/$$/stat)" = $$ ] && echo yes`, 0, "yes\n", ""},
		{"no descriptors of ours", "ls /proc/$$/fd; exit", 0, "0\n1\n2\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := run(t.Context(), time.Minute, tt.script)
			if r.Code != tt.code || string(r.Output) != tt.output || r.Truncated || (r.Err == nil) != (tt.err == "") || r.Err != nil && !strings.Contains(r.Err.Error(), tt.err) {
				t.Errorf("%+v %v %q, want %d, %q, %q", r, r.Err, r.Output, tt.code, tt.output, tt.err)
			}
		})
	}
}

func TestRunCannot(t *testing.T) {
	for path, want := range map[string]string{"/no/such/program": "cannot be executed: no such file", "/etc/passwd": "cannot be executed: permission denied"} {
		if r := Run(t.Context(), &Command{Path: path, Timeout: time.Minute}); r.Code != -1 || r.Err == nil || !strings.Contains(r.Err.Error(), want) || strings.Contains(r.Err.Error(), "fork") {
			t.Errorf("%s: %+v, want %q", path, r, want)
		}
	}
}

// A hook that hangs is killed with what it has started.
func TestRunTimeout(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	r := run(t.Context(), 300*time.Millisecond, "sleep 1000 & echo $! > "+pids+"; echo waiting; wait")
	if r.Code != -1 || r.Err == nil || !errors.Is(r.Err, context.DeadlineExceeded) || !strings.Contains(r.Err.Error(), "timeout of 300ms") || string(r.Output) != "waiting\n" {
		t.Errorf("%+v %v", r, r.Err)
	}
	gone(t, pids)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	if r := run(ctx, time.Hour, "sleep 1000"); r.Code != -1 || !errors.Is(r.Err, context.Canceled) {
		t.Errorf("cancelled: %+v", r)
	}
}

// A hook that leaves a child with its output open has ended all the same.
func TestRunBackground(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	r := run(t.Context(), time.Minute, "sleep 1000 & echo $! > "+pids+"; echo done")
	if r.Code != 0 || r.Err != nil || string(r.Output) != "done\n" {
		t.Errorf("%+v %v", r, r.Err)
	}
	var pid int
	b, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Sscan(string(b), &pid)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil { // it is there
		t.Errorf("the child: %v", err)
	}
}

// gone waits until the process that file names has ended.
func gone(t *testing.T, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid := strings.TrimSpace(string(b))
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		st, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(st), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %s is there: %s", pid, st)
		}
	}
}

func TestRunMuchOutput(t *testing.T) {
	r := run(t.Context(), time.Minute, "head -c 100000000 /dev/zero | tr '\\0' x; echo end")
	if r.Code != 0 || !r.Truncated || len(r.Output) != OutputMax || !bytes.HasSuffix(r.Output, []byte("xxx"+"end\n")) {
		t.Errorf("code %d, %v, truncated %t, %d bytes", r.Code, r.Err, r.Truncated, len(r.Output))
	}
}

func TestTail(t *testing.T) {
	for _, sizes := range [][]int{{0}, {1}, {OutputMax}, {OutputMax + 1}, {OutputMax, 1}, {3 * OutputMax}, {OutputMax - 1, OutputMax, OutputMax + 7, 1, 0}} {
		var tail Tail
		var all []byte
		for n, size := range sizes {
			p := bytes.Repeat([]byte{byte('a' + n)}, size)
			all = append(all, p...)
			if w, err := tail.Write(p); w != size || err != nil {
				t.Fatalf("Write = %d, %v", w, err)
			}
		}
		got, more := tail.Bytes()
		want := all[max(0, len(all)-OutputMax):]
		if !bytes.Equal(got, want) || more != (len(all) > OutputMax) {
			t.Errorf("writes of %v: %d bytes, more %t", sizes, len(got), more)
		}
	}
}

func TestJoined(t *testing.T) {
	j := &Joined{Stdin: []byte("in"), Timeout: time.Minute, Run: func(_ context.Context, in, out *os.File) (int, error) {
		b := make([]byte, 10)
		n, _ := in.Read(b)
		fmt.Fprintf(out, "read %s", b[:n])
		return 3, nil
	}}
	if r := j.Do(t.Context()); r.Code != 3 || string(r.Output) != "read in" || r.Err == nil {
		t.Errorf("%+v", r)
	}
	// It reads nothing, and its output stays open.
	var kept *os.File
	j = &Joined{Stdin: make([]byte, 1<<20), Timeout: time.Minute, Run: func(_ context.Context, in, out *os.File) (int, error) {
		fd, err := unix.Dup(int(out.Fd()))
		kept = os.NewFile(uintptr(fd), "kept")
		return 0, err
	}}
	if r := j.Do(t.Context()); r.Code != 0 || r.Err != nil {
		t.Errorf("%+v", r)
	}
	kept.Close()
	j.Timeout, j.Run = time.Millisecond, func(ctx context.Context, _, _ *os.File) (int, error) { <-ctx.Done(); return 125, ctx.Err() }
	if r := j.Do(t.Context()); r.Code != -1 || !strings.Contains(r.Err.Error(), "timeout of 1ms") {
		t.Errorf("%+v", r)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("poststop=/bin/true,arg=a,timeout=10s,retries=3,env=K=V")
	f.Add(`prestart=/x,"arg=a,b"`)
	f.Fuzz(func(t *testing.T, s string) {
		h, err := Parse(s)
		if err != nil {
			return
		}
		// What is accepted can be put on record and read back.
		b, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		var again request.Hook
		if err := json.Unmarshal(b, &again); err != nil || fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", h) {
			t.Errorf("%+v is %+v on record: %v", h, again, err)
		}
	})
}
