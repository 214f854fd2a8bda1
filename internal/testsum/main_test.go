package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	if err := os.WriteFile(missing, []byte("# comment\ncgroup2   the machine has v1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const pass = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"pass","Package":"p","Test":"TestA"}
`
	skip := func(why string) string {
		return pass + `{"Action":"run","Package":"p","Test":"TestS"}
{"Action":"output","Package":"p","Test":"TestS","Output":"=== RUN   TestS\n"}
{"Action":"output","Package":"p","Test":"TestS","Output":"    x_test.go:1: ` + why + `\n"}
{"Action":"skip","Package":"p","Test":"TestS"}
{"Action":"pass","Package":"p","Elapsed":1.5}
`
	}
	for _, tt := range []struct {
		name   string
		in     string
		args   []string
		code   int
		counts string
		want   string
	}{
		{"pass", pass + `{"Action":"pass","Package":"p","Elapsed":1.5}`, nil, 0, "1 0 0", "pass p 1.5s"},
		{"nothing", "", nil, 1, "0 0 0", "0 passed"},
		{"fail", pass + `{"Action":"run","Package":"p","Test":"TestF"}
{"Action":"output","Package":"p","Test":"TestF","Output":"because\n"}
{"Action":"fail","Package":"p","Test":"TestF"}
{"Action":"fail","Package":"p"}`, nil, 1, "1 1 0", "FAIL p TestF\nbecause\n"},
		{"package alone fails", pass + `{"Action":"output","Package":"p","Output":"left behind\n"}
{"Action":"fail","Package":"p"}`, nil, 1, "1 1 0", "left behind"},
		{"build fails", pass + `{"Action":"build-output","ImportPath":"q","Output":"undefined: x\n"}
{"Action":"build-fail","ImportPath":"q"}
{"Action":"fail","Package":"q"}`, nil, 1, "1 1 0", "undefined: x"},
		{"cut off", pass + `{"Action":"run","Package":"p","Test":"TestH"}`, nil, 1, "1 1 0", "DID NOT END p TestH"},
		{"package ends within a test", pass + `{"Action":"run","Package":"p","Test":"TestH"}
{"Action":"fail","Package":"p"}`, nil, 1, "1 1 0", "DID NOT END p TestH"},
		{"skip", skip("needs root: uid"), nil, 0, "1 0 1", "skip p TestS: x_test.go:1: needs root: uid"},
		{"skip that is allowed", skip("needs cgroup2: none"), []string{"--skips", missing}, 0, "1 0 1", "needs cgroup2"},
		{"skip that is not allowed", skip("needs root: uid"), []string{"--skips", missing}, 1, "1 1 0", "which nothing allows"},
		{"other text", "go: downloading x\n" + pass, nil, 0, "1 0 0", "go: downloading x\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(dir, "counts")
			var out strings.Builder
			code, err := run(append(tt.args, "--counts", file), strings.NewReader(tt.in), &out)
			if err != nil || code != tt.code {
				t.Errorf("exit code %d, %v, want %d", code, err, tt.code)
			}
			if !strings.Contains(out.String(), tt.want) {
				t.Errorf("no %q in %q", tt.want, out.String())
			}
			if b, _ := os.ReadFile(file); strings.TrimSpace(string(b)) != tt.counts {
				t.Errorf("counts %q, want %q", b, tt.counts)
			}
		})
	}
}
