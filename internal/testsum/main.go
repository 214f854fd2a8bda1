// Command testsum reads the output of `go test -json` and writes what a person
// wants to know of it: a line for each package, the whole output of each test
// that failed, and why tests were skipped.
//
//	go test -json ./... | testsum [--counts FILE] [--skips FILE]
//
// It exits with 1 if a test failed or did not end, if a package could not be
// built, or if there was no test at all. With --skips a skip is a failure too,
// unless its reason is one that the file lists; see tools/ci/missing for its form.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

func main() {
	code, err := run(os.Args[1:], os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
	}
	os.Exit(code)
}

func run(args []string, in io.Reader, out io.Writer) (int, error) {
	flags := pflag.NewFlagSet("testsum", pflag.ContinueOnError)
	counts := flags.String("counts", "", "`file` to write \"PASSED FAILED SKIPPED\" to")
	skips := flags.String("skips", "", "`file` of what this machine may lack")
	if err := flags.Parse(args); err != nil {
		return 2, err
	}
	s := summary{out: out, tests: map[string]*test{}, output: map[string][]string{}}
	if *skips != "" {
		b, err := os.ReadFile(*skips)
		if err != nil {
			return 2, err
		}
		s.strict, s.missing = true, parseMissing(string(b))
	}
	if err := s.read(in); err != nil {
		return 2, err
	}
	s.end()
	if *counts != "" {
		if err := os.WriteFile(*counts, fmt.Appendf(nil, "%d %d %d\n", s.passed, s.failed, s.skipped), 0o644); err != nil {
			return 2, err
		}
	}
	if s.failed > 0 || s.passed == 0 {
		return 1, nil
	}
	return 0, nil
}

// parseMissing returns the first word of each line that is not a comment: the
// names of requirements of package testenv.
func parseMissing(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 0 && !strings.HasPrefix(f[0], "#") {
			names = append(names, f[0])
		}
	}
	return names
}

// event is one of test2json's; see go doc test2json.
type event struct {
	Action     string
	Package    string
	ImportPath string // of a build
	Test       string
	Output     string
	Elapsed    float64
}

type test struct {
	pkg, name string
	output    []string
	ended     bool
}

type summary struct {
	out     io.Writer
	strict  bool
	missing []string

	tests                   map[string]*test    // those that run, by package and name
	output                  map[string][]string // of packages and builds, outside of tests
	passed, failed, skipped int
	failures                map[string]int // by package
	reasons                 []string
}

func (s *summary) read(in io.Reader) error {
	s.failures = map[string]int{}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				fmt.Fprintf(s.out, "%s", line) // go's own words, such as those on downloads
			} else {
				s.event(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *summary) event(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		s.output[e.ImportPath] = append(s.output[e.ImportPath], e.Output)
	case "build-fail":
		fmt.Fprintf(s.out, "BUILD FAILED %s\n%s", e.ImportPath, strings.Join(s.output[e.ImportPath], ""))
	case "run":
		s.tests[key] = &test{pkg: e.Package, name: e.Test}
	case "output":
		if t := s.tests[key]; t != nil && !t.ended {
			t.output = append(t.output, e.Output)
		} else {
			s.output[e.Package] = append(s.output[e.Package], e.Output)
		}
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.packageEnd(e)
			return
		}
		if t := s.tests[key]; t != nil {
			t.ended = true
			s.testEnd(e.Action, t)
			delete(s.tests, key)
		}
	}
}

func (s *summary) testEnd(action string, t *test) {
	switch action {
	case "pass":
		s.passed++
	case "fail":
		s.fail(t, "FAIL")
	case "skip":
		text := strings.Join(t.output, "")
		if s.strict && !s.mayLack(text) {
			s.fail(t, "SKIPPED, which nothing allows:")
			return
		}
		s.skipped++
		s.reasons = append(s.reasons, fmt.Sprintf("%s %s: %s", t.pkg, t.name, reason(t.output)))
	}
}

func (s *summary) fail(t *test, word string) {
	s.failed++
	s.failures[t.pkg]++
	fmt.Fprintf(s.out, "%s %s %s\n%s", word, t.pkg, t.name, strings.Join(t.output, ""))
}

// mayLack reports whether text holds a reason that testenv gives for one of the
// requirements that this machine may lack.
func (s *summary) mayLack(text string) bool {
	return slices.ContainsFunc(s.missing, func(name string) bool { return strings.Contains(text, "needs "+name+": ") })
}

// reason is the line of a skipped test's output that is not the framework's.
func reason(output []string) string {
	for _, line := range output {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") && line != "" {
			return line
		}
	}
	return "gives no reason"
}

func (s *summary) packageEnd(e event) {
	for key, t := range s.tests {
		if t.pkg == e.Package {
			s.fail(t, "DID NOT END")
			delete(s.tests, key)
		}
	}
	// A package fails by itself if it cannot be built, or by what its TestMain
	// does, such as the leak oracle.
	if e.Action == "fail" && s.failures[e.Package] == 0 {
		s.failed++
		fmt.Fprintf(s.out, "FAIL %s\n%s", e.Package, strings.Join(s.output[e.Package], ""))
	}
	if e.Action != "skip" { // no test files
		fmt.Fprintf(s.out, "%-4s %s %.1fs\n", e.Action, e.Package, e.Elapsed)
	}
}

// end accounts for what never ended: the input was cut off.
func (s *summary) end() {
	for _, t := range s.tests {
		s.fail(t, "DID NOT END")
	}
	slices.Sort(s.reasons)
	for _, r := range s.reasons {
		fmt.Fprintln(s.out, "skip", r)
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
}
