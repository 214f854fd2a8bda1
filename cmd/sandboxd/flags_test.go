package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
)

// parserTest is one call of a parser of one string. fails means that an error is wanted.
type parserTest[T any] struct {
	in    string
	want  T
	fails bool
}

func testParser[T any](t *testing.T, name string, parse func(string) (T, error), tests []parserTest[T]) {
	t.Helper()
	for _, tt := range tests {
		got, err := parse(tt.in)
		if tt.fails {
			if err == nil {
				t.Errorf("%s(%q) = %v, want an error", name, tt.in, got)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s(%q): %v", name, tt.in, err)
		} else if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s(%q) (-want +got):\n%s", name, tt.in, d)
		}
	}
}

func TestParseSize(t *testing.T) {
	testParser(t, "parseSize", parseSize, []parserTest[int64]{
		{in: "0", want: 0}, {in: "4096", want: 4096}, {in: "7b", want: 7}, {in: "1k", want: 1024},
		{in: "64m", want: 64 << 20}, {in: "64M", want: 64 << 20}, {in: "1g", want: 1 << 30}, {in: "2T", want: 2 << 40},
		{in: "9223372036854775807", want: 1<<63 - 1}, {in: "8388607t", want: 8388607 << 40},
		{in: "", fails: true}, {in: "m", fails: true}, {in: "nonsense", fails: true}, {in: "-1", fails: true},
		{in: "+1", fails: true}, {in: "64 m", fails: true},
		{in: "64mb", want: 64 << 20}, {in: "64Mi", want: 64 << 20}, {in: "64MiB", want: 64 << 20}, {in: "0.5g", want: 512 << 20}, {in: "1.25k", want: 1280},
		{in: "8388607.999999t", want: 8388607<<40 + 1099510528264},
		{in: "1.5", fails: true}, {in: "1.5b", fails: true}, {in: "1.g", fails: true}, {in: ".5g", fails: true}, {in: "1.2.3g", fails: true},
		{in: "0.1234567g", fails: true}, {in: "64mm", fails: true}, {in: "64bi", fails: true}, {in: "64bb", fails: true}, {in: "64ei", fails: true},
		{in: "0x10", fails: true}, {in: "1_000", fails: true}, {in: "9223372036854775808", fails: true},
		{in: "8388608t", fails: true}, {in: "1M\n", fails: true}, {in: "5\x02", fails: true},
	})
}

func TestParseCPUs(t *testing.T) {
	testParser(t, "parseCPUs", parseCPUs, []parserTest[int64]{
		{in: "1", want: 1e9}, {in: "0.5", want: 5e8}, {in: "1.25", want: 125e7}, {in: "0.000000001", want: 1}, {in: "16", want: 16e9},
		{in: "0", fails: true}, {in: "0.0", fails: true}, {in: "", fails: true}, {in: ".5", fails: true}, {in: "1.", fails: true},
		{in: "-1", fails: true}, {in: "1e3", fails: true}, {in: "0.0000000001", fails: true}, {in: "many", fails: true}, {in: "1.-5", fails: true}, {in: "1.2.3", fails: true},
	})
}

func TestParseTimeout(t *testing.T) {
	testParser(t, "parseTimeout", parseTimeout, []parserTest[time.Duration]{
		{in: "0", want: 0}, {in: "1", want: time.Second}, {in: "90", want: 90 * time.Second}, {in: "500ms", want: 500 * time.Millisecond},
		{in: "1m30s", want: 90 * time.Second}, {in: "", fails: true}, {in: "-1", fails: true}, {in: "-1s", fails: true},
		{in: "1.5", fails: true}, {in: "soon", fails: true}, {in: "99999999999", fails: true},
	})
}

func TestParseVolume(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	testParser(t, "parseVolume", parseVolume, []parserTest[request.Volume]{
		{in: "/a:/b", want: request.Volume{Source: "/a", Target: "/b"}},
		{in: "/a:/b:ro", want: request.Volume{Source: "/a", Target: "/b", ReadOnly: true}},
		{in: "/a:/b:rw", want: request.Volume{Source: "/a", Target: "/b"}},
		{in: "a:/b", want: request.Volume{Source: filepath.Join(wd, "a"), Target: "/b"}},
		{in: "", fails: true}, {in: "/a", fails: true}, {in: ":/b", fails: true}, {in: "/a:", fails: true},
		{in: "/a:b", fails: true}, {in: "/a:/b:", fails: true}, {in: "/a:/b:x", fails: true}, {in: "/a:/b:ro:rw", fails: true},
	})
}

func TestParseTmpfs(t *testing.T) {
	testParser(t, "parseTmpfs", parseTmpfs, []parserTest[request.Tmpfs]{
		{in: "/t", want: request.Tmpfs{Target: "/t"}},
		{in: "/t:size=16m", want: request.Tmpfs{Target: "/t", Size: 16 << 20}},
		{in: "", fails: true}, {in: "t", fails: true}, {in: "/t:", fails: true}, {in: "/t:size=", fails: true},
		{in: "/t:size=nonsense", fails: true}, {in: "/t:size=0", fails: true}, {in: "/t:mode=1", fails: true}, {in: "/t:size=1m:x", fails: true},
	})
}

func TestParseShare(t *testing.T) {
	testParser(t, "parseShare", parseShare, []parserTest[[]namespace.Kind]{
		{in: "", want: []namespace.Kind{}},
		{in: "net,pid", want: []namespace.Kind{namespace.Net, namespace.PID}},
		{in: "net,net", fails: true}, {in: "nett", fails: true}, {in: "net,", fails: true},
	})
}

func TestParseLevel(t *testing.T) {
	testParser(t, "parseLevel", parseLevel, []parserTest[slog.Level]{
		{in: "debug", want: slog.LevelDebug}, {in: "info", want: slog.LevelInfo}, {in: "warn", want: slog.LevelWarn}, {in: "error", want: slog.LevelError},
		{in: "", fails: true}, {in: "INFO+2", fails: true}, {in: "trace", fails: true},
	})
	testParser(t, "parseLogFormat", parseLogFormat, []parserTest[bool]{
		{in: "json", want: true}, {in: "text", want: false}, {in: "xml", fails: true},
	})
}

func TestParsePath(t *testing.T) {
	testParser(t, "parsePath", parsePath, []parserTest[string]{{in: "/a/../b", want: "/b"}, {in: "", fails: true}})
}

func TestParseEnv(t *testing.T) {
	env := map[string]string{"HERE": "x=y", "EMPTY": ""}
	lookup := func(k string) (string, bool) { v, ok := env[k]; return v, ok }
	for _, tt := range []struct {
		in, want string
		ok       bool
	}{
		{"A=b", "A=b", true}, {"A=", "A=", true}, {"A=b=c", "A=b=c", true}, {"A=two\nlines", "A=two\nlines", true},
		{"HERE", "HERE=x=y", true}, {"EMPTY", "EMPTY=", true}, {"AWAY", "AWAY=", false},
	} {
		got, ok, err := parseEnv(tt.in, lookup)
		if got != tt.want || ok != tt.ok || err != nil {
			t.Errorf("parseEnv(%q) = %q, %v, %v, want %q, %v", tt.in, got, ok, err, tt.want, tt.ok)
		}
	}
	for _, in := range []string{"", "=b", "A=\x00"} {
		if got, _, err := parseEnv(in, lookup); err == nil {
			t.Errorf("parseEnv(%q) = %q, want an error", in, got)
		}
	}
}

func TestParsePairs(t *testing.T) {
	for _, tt := range []struct {
		in    []string
		want  map[string]string
		fails bool
	}{
		{nil, nil, false},
		{[]string{"a=b", "c=", "d=e=f"}, map[string]string{"a": "b", "c": "", "d": "e=f"}, false},
		{[]string{"a"}, nil, true}, {[]string{"=b"}, nil, true}, {[]string{"a=b", "a=c"}, nil, true},
	} {
		got, err := parsePairs("label", tt.in)
		if d := cmp.Diff(tt.want, got); d != "" || (err != nil) != tt.fails {
			t.Errorf("parsePairs(%q) = %v, %v", tt.in, got, err)
		}
	}
}

func TestSplitCopy(t *testing.T) {
	for _, tt := range []struct {
		in, ref, path string
		ok            bool
	}{
		{"web/redis:/data", "web/redis", "/data", true}, {"web/redis:a:b", "web/redis", "a:b", true}, {"web/redis:", "web/redis", "", true},
		{"web:/data", "", "", false}, {"/a/b:c", "", "", false}, {"./a/b:c", "", "", false}, {"-", "", "", false}, {"", "", "", false},
	} {
		if ref, path, ok := splitCopy(tt.in); ref != tt.ref || path != tt.path || ok != tt.ok {
			t.Errorf("splitCopy(%q) = %q, %q, %v", tt.in, ref, path, ok)
		}
	}
}

func TestMergeEnv(t *testing.T) {
	base := []string{"A=1", "AB=2"}
	got := mergeEnv(base, []string{"A=3", "C=4"})
	if want := []string{"A=3", "AB=2", "C=4"}; !slices.Equal(got, want) || base[0] != "A=1" {
		t.Errorf("mergeEnv = %q, want %q; base is %q", got, want, base)
	}
}

func TestNamesPID(t *testing.T) {
	for in, want := range map[string]bool{"pid=host": true, "net=host,pid=member:x": true, "all=member:x": false, "": false, "net=member:pid=": false} {
		if got := namesPID(in); got != want {
			t.Errorf("namesPID(%q) = %v, want %v", in, got, want)
		}
	}
}

func TestAge(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m1s", 11*time.Minute + 5*time.Second: "11m",
		90 * time.Minute: "1h30m", 47 * time.Hour: "47h", 49 * time.Hour: "2d",
	} {
		if got := age(now, now.Add(-d)); got != want {
			t.Errorf("age of %s = %q, want %q", d, got, want)
		}
	}
	if got := age(now, time.Time{}); got != "" {
		t.Errorf("age of nothing = %q", got)
	}
}
