package crilog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	at := time.Date(2026, 1, 2, 15, 4, 5, 123456789, time.UTC)
	const stamp = "2026-01-02T15:04:05.123456789Z"
	tests := []struct {
		name, in string
		want     *Line // nil: an error
	}{
		{"whole", stamp + " stdout F hello  world", &Line{at, "stdout", false, []byte("hello  world")}},
		{"part", stamp + " stderr P hel", &Line{at, "stderr", true, []byte("hel")}},
		{"empty content", stamp + " stdout F ", &Line{at, "stdout", false, []byte{}}},
		{"no blank after the tag", stamp + " stdout F", nil},
		{"empty", "", nil},
		{"time only", stamp, nil},
		{"bad time", "yesterday stdout F x", nil},
		{"bad stream", stamp + " stdin F x", nil},
		{"bad tag", stamp + " stdout FP x", nil},
		{"two blanks", stamp + "  stdout F x", nil},
		{"line feed", stamp + " stdout F x\ny", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Parse([]byte(tt.in))
			if tt.want == nil {
				if err == nil {
					t.Errorf("Parse(%q) = %v, want an error", tt.in, got)
				}
				return
			}
			if err != nil || !equal(got, *tt.want) {
				t.Errorf("Parse(%q) = %v, %v, want %v", tt.in, got, err, *tt.want)
			}
		})
	}
}

func equal(a, b Line) bool {
	return a.Time.Equal(b.Time) && a.Stream == b.Stream && a.Partial == b.Partial && bytes.Equal(a.Content, b.Content)
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("2026-01-02T15:04:05.123456789Z stdout F hello"))
	f.Add([]byte("2026-01-02T15:04:05+02:00 stderr P \x00\xff"))
	f.Add([]byte("  F "))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(bytes.TrimSuffix(Format(l), []byte{'\n'}))
		if err != nil || !equal(l, again) {
			t.Errorf("Parse(%q) = %v, formatted and parsed %v, %v", b, l, again, err)
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	f.Add(int64(1767366245123456789), true, true, []byte("x"))
	f.Fuzz(func(t *testing.T, ns int64, stderr, part bool, content []byte) {
		l := Line{time.Unix(0, ns).UTC(), "stdout", part, bytes.ReplaceAll(content, []byte("\n"), nil)}
		if stderr {
			l.Stream = "stderr"
		}
		got, err := Parse(bytes.TrimSuffix(Format(l), []byte{'\n'}))
		if err != nil || !equal(got, l) {
			t.Errorf("Parse(Format(%v)) = %v, %v", l, got, err)
		}
	})
}

func TestJoiner(t *testing.T) {
	j := Joiner{Max: 8}
	add := func(stream string, partial bool, content string) string {
		l, ok := j.Add(Line{Stream: stream, Partial: partial, Content: []byte(content)})
		return fmt.Sprintf("%v %s %v %s", ok, l.Stream, l.Partial, l.Content)
	}
	for _, step := range []struct{ got, want string }{
		{add("stdout", false, "one"), "true stdout false one"},
		{add("stdout", true, "ab"), "false  false "},
		{add("stderr", false, "err"), "true stderr false err"},
		{add("stdout", false, "cd"), "true stdout false abcd"},
		{add("stderr", true, "12345"), "false  false "},
		{add("stderr", true, "678"), "true stderr true 12345678"},
		{add("stderr", true, "9"), "false  false "},
	} {
		if step.got != step.want {
			t.Errorf("Add = %q, want %q", step.got, step.want)
		}
	}
	if rest := j.Rest(); len(rest) != 1 || string(rest[0].Content) != "9" {
		t.Errorf("Rest = %v", rest)
	}
}

func line(content string, partial bool) string {
	return string(Format(Line{time.Unix(1767366245, 5).UTC(), "stdout", partial, []byte(content)}))
}

func TestTail(t *testing.T) {
	long := strings.Repeat("x", 40<<10)
	var many strings.Builder
	for i := range 5000 {
		many.WriteString(line(fmt.Sprintf("%d %s", i, long[:100]), false))
	}
	tests := []struct {
		name string
		file string
		tail int
		want []string // prefixes
	}{
		{"all", line("a", false) + line("b", false), -1, []string{"a", "b"}},
		{"none", line("a", false), 0, nil},
		{"one", line("a", false) + line("b", false), 1, []string{"b"}},
		{"more than there are", line("a", false), 9, []string{"a"}},
		{"empty file", "", 3, nil},
		{"unfinished end", line("a", false) + line("b", false) + "2026-", 1, []string{"b"}},
		{"only unfinished", "2026-", 1, nil},
		{"parts count once", line("a", false) + line("b", true) + line("c", true) + line("d", false), 1, []string{"b", "c", "d"}},
		{"parts at the end", line("a", false) + line("b", false) + line("c", true), 1, []string{"b", "c"}},
		{"bad lines count", line("a", false) + "garbage\n" + line("b", false), 2, []string{"b"}},
		{"over blocks", many.String(), 3000, nil},
		{"long lines", line("a"+long, false) + line("b"+long, false) + line("c"+long, false), 2, []string{"b", "c"}},
	}
	// The head of the first part lies across the boundary between two blocks.
	rest := line(long[:16000], true) + line(long[:16000], true) + line(long[:16000], true)
	across := line("across", true)
	end := line("", false)
	end = line(long[:64<<10+10-len(across)-len(rest)-len(end)], false)
	tests = append(tests, tests[0])
	last := &tests[len(tests)-1]
	last.name, last.file, last.tail = "head across blocks", line("before", false)+across+rest+end, 1
	last.want = []string{"across", "x", "x", "x", "x"}
	for i := 2000; i < 5000; i++ {
		tests[10].want = append(tests[10].want, fmt.Sprintf("%d ", i))
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(path, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			var got []string
			err := Read(t.Context(), path, Options{Tail: tt.tail}, func(l Line) error {
				got = append(got, string(l.Content))
				return nil
			})
			if err != nil || !slices.EqualFunc(got, tt.want, strings.HasPrefix) {
				t.Errorf("Read = %.200q, %v, want %.200q", got, err, tt.want)
			}
		})
	}
}

func TestReadReportsBadLinesAndGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	huge := strings.Repeat("h", 3*MaxLine)
	file := line("a", false) + "garbage\n" + line(huge, false) + line("b", false) + "\n" + line("c", false)
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	var got, bad []string
	offsets := []int64{int64(len(line("a", false))), int64(len(line("a", false)) + 8), int64(len(file) - len(line("c", false)) - 1)}
	err := Read(t.Context(), path, Options{Tail: -1, Bad: func(e *LineError) {
		if want := offsets[len(bad)]; e.Offset != want {
			t.Errorf("%v is at byte %d, want %d", e, e.Offset, want)
		}
		bad = append(bad, strings.TrimPrefix(e.Error(), path))
	}}, func(l Line) error {
		got = append(got, string(l.Content))
		return nil
	})
	if err != nil || !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("Read = %q, %v", got, err)
	}
	want := []string{":2: no blank after the time", ":3: longer than 65536 bytes", ":5: no blank after the time"}
	if !slices.Equal(bad, want) {
		t.Errorf("bad lines %q, want %q", bad, want)
	}
}

func TestReadStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(line("a", false)+line("b", false)), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	n := 0
	if err := Read(t.Context(), path, Options{Tail: -1}, func(Line) error { n++; return stop }); err != stop || n != 1 {
		t.Errorf("Read = %v after %d lines, want fn's error after 1", err, n)
	}
	if err := Read(t.Context(), path+"x", Options{Tail: -1}, func(Line) error { return nil }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Read of no file = %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := Read(ctx, path, Options{Tail: -1, Follow: true}, func(Line) error { cancel(); return nil })
	if err != context.Canceled {
		t.Errorf("Read with a cancelled context = %v", err)
	}
}

// follower runs Read in the background.
type follower struct {
	t     *testing.T
	lines chan string
	err   chan error
}

func follow(t *testing.T, path string, tail int, done <-chan struct{}) *follower {
	f := &follower{t, make(chan string, 1000), make(chan error, 1)}
	go func() {
		f.err <- Read(t.Context(), path, Options{Tail: tail, Follow: true, Done: done}, func(l Line) error {
			f.lines <- string(l.Content)
			return nil
		})
	}()
	return f
}

func (f *follower) want(lines ...string) {
	f.t.Helper()
	for _, w := range lines {
		select {
		case got := <-f.lines:
			if got != w {
				f.t.Fatalf("got line %q, want %q", got, w)
			}
		case err := <-f.err:
			f.t.Fatalf("Read returned %v before line %q", err, w)
		case <-time.After(10 * time.Second):
			f.t.Fatalf("no line %q after 10 s", w)
		}
	}
}

func (f *follower) wantEnd() {
	f.t.Helper()
	select {
	case err := <-f.err:
		if err != nil {
			f.t.Fatalf("Read = %v", err)
		}
	case <-time.After(10 * time.Second):
		f.t.Fatal("Read goes on")
	}
	if len(f.lines) > 0 {
		f.t.Fatalf("unexpected line %q", <-f.lines)
	}
}

func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	open := func() *os.File {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	write := func(f *os.File, s string) {
		t.Helper()
		if _, err := f.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	log := open()
	write(log, line("old", false)+line("a", false))
	done := make(chan struct{})
	f := follow(t, path, 1, done)
	f.want("a")

	half := line("b", false)
	write(log, half[:20])
	write(log, half[20:])
	f.want("b")

	// Rotation: what is written to the old file before the new one is there
	// belongs before it.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	write(log, line("c", false))
	f.want("c")
	write(log, line("d", false))
	log = open()
	write(log, line("e, which is longer than what follows the truncation", false))
	f.want("d", "e, which is longer than what follows the truncation")

	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	write(log, line("f", false))
	f.want("f")

	// Written, then said to be the end: it must still be found.
	write(log, line("g", false))
	close(done)
	f.want("g")
	f.wantEnd()
}

func TestNextReadsTheOldFileOnceMore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	old, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	var got []string
	r := &reader{path: path, buf: make([]byte, 2*MaxLine), fn: func(l Line) error { got = append(got, string(l.Content)); return nil }}
	if err := errors.Join(r.open(), r.readToEnd(t.Context())); err != nil {
		t.Fatal(err)
	}
	defer func() { r.close() }()
	// Between the end that was seen and the look at the path.
	_, err = old.WriteString(line("late", false))
	if err := errors.Join(err, os.Rename(path, path+".1"), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if replaced, err := r.next(t.Context()); !replaced || err != nil || !slices.Equal(got, []string{"late"}) {
		t.Errorf("next = %v, %v after lines %q", replaced, err, got)
	}
}

func TestFollowBeginsBeforeTheFileAndEndsWithTheDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "m")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "log")
	f := follow(t, path, -1, nil)
	if err := os.WriteFile(path, []byte(line("a", false)), 0o600); err != nil {
		t.Fatal(err)
	}
	f.want("a")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	f.wantEnd()
}
