package collect

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

var (
	crashed   = exit.Record{Known: true, Code: 139, Signal: 11, Reason: "Signal", FinishedAt: time.Unix(1000, 0).UTC()}
	succeeded = exit.Record{Known: true, Reason: "Completed", FinishedAt: time.Unix(1000, 0).UTC()}
)

// member is a member with a root of its own, without processes and cgroup.
type member struct {
	*testing.T
	root string
	Subject
}

func newMember(t *testing.T, id string, e exit.Record, collectors ...request.Collect) *member {
	m := &member{T: t, root: t.TempDir()}
	m.Subject = Subject{
		Sandbox: "web", SandboxID: "00112233445566aa", Member: "app", MemberID: fmt.Sprintf("%016s", id),
		Command: []string{"app", "-x"}, CreatedAt: time.Unix(900, 0).UTC(), StartedAt: time.Unix(901, 0).UTC(),
		Exit: &e, Cgroup: "/none/of/ours", LogPath: filepath.Join(t.TempDir(), "log"), Collect: collectors,
		Root: func() (*os.File, error) { return os.OpenFile(m.root, unix.O_PATH|unix.O_DIRECTORY, 0) },
	}
	for i := range m.Collect {
		if m.Collect[i].On == "" {
			m.Collect[i].On = request.OnAlways
		}
		if m.Collect[i].Max == 0 {
			m.Collect[i].Max = request.DefaultCollectMax
		}
	}
	return m
}

func (m *member) file(name string, content string) {
	m.Helper()
	p := filepath.Join(m.root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		m.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		m.Fatal(err)
	}
}

func (m *member) link(to, name string) {
	m.Helper()
	p := filepath.Join(m.root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		m.Fatal(err)
	}
	if err := os.Symlink(to, p); err != nil {
		m.Fatal(err)
	}
}

func newStore(t *testing.T, o Options) *Store {
	t.Helper()
	host, err := cgroup.Detect()
	if err != nil {
		t.Skip(err)
	}
	o.Host = host
	s, err := Open(filepath.Join(t.TempDir(), "collected"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (s *Store) mustCollect(t *testing.T, sub *Subject) *Manifest {
	t.Helper()
	name, err := s.Collect(t.Context(), sub)
	if err != nil {
		t.Fatal(err)
	}
	if name == "" {
		t.Fatal("nothing was collected")
	}
	m, err := s.Manifest(name)
	if err != nil {
		t.Fatal(err)
	}
	conforms(t, m)
	return m
}

// archive returns what is in an archive: content of files, "-> TARGET" of links.
func (s *Store) archive(t *testing.T, name string) map[string]string {
	t.Helper()
	f, err := s.root.Open(name + "/" + archiveFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	got := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			b, err := io.ReadAll(io.LimitReader(r, 1<<20))
			if err != nil {
				t.Fatal(err)
			}
			got[h.Name] = string(b)
		case tar.TypeSymlink, tar.TypeLink:
			got[h.Name] = "-> " + h.Linkname
		default:
			got[h.Name] = string(h.Typeflag)
		}
	}
}

var schema = func() *jsonschema.Schema {
	s, err := jsonschema.NewCompiler().Compile("../docs/collect/manifest.schema.json")
	if err != nil {
		panic(err)
	}
	return s
}()

// conforms checks a manifest against its documentation.
func conforms(t *testing.T, m *Manifest) {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err == nil {
		err = schema.Validate(v)
	}
	if err != nil {
		t.Errorf("%.2000s", err.Error())
	}
}

// fill sets every field, so that one that is not documented is seen.
func fill(v reflect.Value) {
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		*x = time.Unix(1, 0).UTC()
		return
	case *request.When:
		*x = request.OnAlways
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString("00112233445566aa")
	case reflect.Int, reflect.Int64:
		v.SetInt(1)
	case reflect.Float64:
		v.SetFloat(0.5)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		v.Set(reflect.ValueOf(map[string]string{"k": "v"}))
	default:
		panic(v.Type())
	}
}

func TestManifestIsDocumented(t *testing.T) {
	var m Manifest
	fill(reflect.ValueOf(&m).Elem())
	m.Counters.IO[0].Device, m.Log.Lines[0].Stream, m.Files[0].Type = "8:0", "stdout", "file"
	conforms(t, &m)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseManifest(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&m, back); d != "" {
		t.Errorf("a manifest that is read back differs (-want +got):\n%s", d)
	}
}

func TestCollect(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("the host's"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newMember(t, "1", crashed,
		request.Collect{Path: "/scratch/*.core", On: request.OnSignal},
		request.Collect{Path: "/var/tree", On: request.OnAlways},
		request.Collect{Path: "/planted*/secret", On: request.OnAlways},
		request.Collect{Path: "/only/oom", On: request.OnOOM},
		request.Collect{Path: "/absent", On: request.OnFailure},
	)
	m.file("scratch/a.core", "core a")
	m.file("scratch/b.core", "core b")
	m.file("scratch/other", "no")
	m.file("var/tree/x", "1")
	m.file("var/tree/deep/y", "2")
	m.file("only/oom", "no")
	m.link(secret, "var/tree/away")
	m.link(filepath.Dir(secret), "planted") // absolute: inside, that is nothing
	m.link("../../../../../../../.."+filepath.Dir(secret), "planted2")
	m.link("/scratch", "planted3")
	m.file("scratch/secret", "the member's")
	if err := unix.Mkfifo(filepath.Join(m.root, "var/tree/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(m.root, "var/tree/x"), filepath.Join(m.root, "var/tree/x2")); err != nil {
		t.Fatal(err)
	}
	// Not by its whole path, which can be longer than that of a socket may be.
	d, err := os.Open(filepath.Join(m.root, "var/tree"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/sock", d.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	writeLog(t, m.LogPath, "hello", "last words")

	s := newStore(t, Options{})
	got := s.mustCollect(t, &m.Subject)
	if got.Name != "web/app-1" || got.MemberID != m.MemberID || *got.Exit != crashed {
		t.Errorf("manifest of %s, %s, %+v", got.Name, got.MemberID, got.Exit)
	}
	files := s.archive(t, got.Name)
	if first, second := files["var/tree/x"], files["var/tree/x2"]; first != "1" && second != "1" {
		t.Errorf("a file with two names is there as %q and %q", first, second)
	}
	delete(files, "var/tree/x")
	delete(files, "var/tree/x2")
	want := map[string]string{
		"scratch/a.core": "core a", "scratch/b.core": "core b",
		"var/tree/": "5", "var/tree/deep/": "5", "var/tree/deep/y": "2", "var/tree/away": "-> " + secret,
		"planted3/secret": "the member's",
	}
	if d := cmp.Diff(want, files); d != "" {
		t.Errorf("archive (-want +got):\n%s", d)
	}
	why := map[string]string{}
	for _, f := range got.Files {
		if !f.Taken {
			why[f.Path] = f.Type
		}
	}
	if d := cmp.Diff(map[string]string{"/var/tree/fifo": "fifo", "/var/tree/sock": "socket"}, why); d != "" {
		t.Errorf("left out (-want +got):\n%s", d)
	}
	for i, applied := range []bool{true, true, true, false, true} {
		if c := got.Collectors[i]; c.Applied != applied {
			t.Errorf("collector %s applied: %v", c.Path, c.Applied)
		}
	}
	if c := got.Collectors[4]; c.Why != "nothing is there" {
		t.Errorf("collector of what is absent: %q", c.Why)
	}
	if len(got.Log.Lines) != 2 || got.Log.Lines[1].Text != "last words" {
		t.Errorf("log %+v", got.Log)
	}
	if len(got.Unknown) != 1 || !strings.HasPrefix(got.Unknown[0], "counters") {
		t.Errorf("unknown: %q; want only the counters of a cgroup that is not there", got.Unknown)
	}

	// It is there once, however often it is asked for.
	again, err := s.Collect(t.Context(), &m.Subject)
	if err != nil || again != got.Name {
		t.Errorf("collected again: %q, %v; want %q", again, err, got.Name)
	}
	next := newMember(t, "2", crashed)
	if n := s.mustCollect(t, &next.Subject); n.Name != "web/app-2" || n.Archive != nil {
		t.Errorf("the next one is %s, with archive %+v", n.Name, n.Archive)
	}
	if e, err := os.ReadDir(s.path); err != nil || len(e) != 2 { // web and .reserve
		t.Errorf("the directory holds %v, %v", e, err)
	}

	t.Run("is read by tar", func(t *testing.T) {
		testenv.Program(t, "zstd")
		out, err := exec.Command("tar", "--zstd", "-tf", filepath.Join(s.path, got.Name, archiveFile)).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "scratch/a.core\n") {
			t.Errorf("tar: %v\n%s", err, out)
		}
	})
}

func writeLog(t *testing.T, path string, lines ...string) {
	t.Helper()
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "2026-01-02T03:04:05.000000006Z stdout F %s\n", l)
	}
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
}

// What is kept of which exit.
func TestWhatIsKept(t *testing.T) {
	oom := exit.Record{Known: true, Code: 137, Signal: 9, OOMKilled: true}
	child := exit.Record{Known: true, OOMKilled: true}
	unknown := exit.Record{Code: -1, Reason: "Unknown: x"}
	for _, tt := range []struct {
		name            string
		e               exit.Record
		on              request.When
		manifest, files bool
	}{
		{"success without collectors", succeeded, "", false, false},
		{"failure without collectors", crashed, "", true, false},
		{"unknown without collectors", unknown, "", true, false},
		{"success, always", succeeded, request.OnAlways, true, true},
		{"success, on failure", succeeded, request.OnFailure, false, false},
		{"failure, on oom", crashed, request.OnOOM, true, false},
		{"signal, on signal", crashed, request.OnSignal, true, true},
		{"unknown, on failure", unknown, request.OnFailure, true, true},
		{"unknown, on signal", unknown, request.OnSignal, true, false},
		{"oom, on oom", oom, request.OnOOM, true, true},
		{"a child's oom, on oom", child, request.OnOOM, true, true},
		{"a child's oom, on failure", child, request.OnFailure, false, false},
	} {
		s := &Subject{Exit: &tt.e}
		if tt.on != "" {
			s.Collect = []request.Collect{{Path: "/x", On: tt.on}}
		}
		if m, f := wanted(s); m != tt.manifest || f != tt.files {
			t.Errorf("%s: manifest %v, files %v; want %v, %v", tt.name, m, f, tt.manifest, tt.files)
		}
	}
}

// A manifest names also those collectors that had nothing to do, and those that lost
// what they took.
func TestAllCollectorsAreNamed(t *testing.T) {
	s := newStore(t, Options{})
	m := newMember(t, "1", crashed, request.Collect{Path: "/f", On: request.OnOOM, Max: 100})
	if got := s.mustCollect(t, &m.Subject); got.Archive != nil || len(got.Collectors) != 1 || got.Collectors[0].Applied || got.Collectors[0].Path != "/f" {
		t.Errorf("%+v, archive %+v", got.Collectors, got.Archive)
	}
	m = newMember(t, "2", crashed, request.Collect{Path: "/f"}, request.Collect{Path: "/g"}, request.Collect{Path: "/h", On: request.OnOOM})
	m.Root = func() (*os.File, error) { return nil, unix.EIO }
	if got := s.mustCollect(t, &m.Subject); got.Archive.Err == "" || len(got.Collectors) != 3 || !got.Collectors[1].Applied || got.Collectors[2].Applied {
		t.Errorf("%+v, archive %+v", got.Collectors, got.Archive)
	}
}

func TestLimits(t *testing.T) {
	m := newMember(t, "1", crashed,
		request.Collect{Path: "/big/*", Max: 100 << 10},
		request.Collect{Path: "/many", Max: 200 << 10},
		request.Collect{Path: "/sparse", Max: 1 << 20},
		request.Collect{Path: "/deep", Max: 1 << 20},
	)
	m.file("big/a", strings.Repeat("a", 60<<10))
	m.file("big/b", strings.Repeat("b", 60<<10)) // does not fit any more
	m.file("big/c", "c")                         // does
	for i := range 3000 {
		m.file(fmt.Sprintf("many/%04d", i), "")
	}
	m.file("sparse", "x")
	if err := os.Truncate(filepath.Join(m.root, "sparse"), 1<<40); err != nil {
		t.Fatal(err)
	}
	m.file(strings.Repeat("deep/", 100)+"x", "deep")
	s := newStore(t, Options{})
	got := s.mustCollect(t, &m.Subject)
	for i, want := range []Collector{{Taken: 2, Bytes: 60<<10 + 1, Skipped: 1}, {Taken: 200, Skipped: 1}, {Taken: 1}, {Taken: 101, Bytes: 4}} {
		c := got.Collectors[i]
		if c.Taken != want.Taken || c.Skipped != want.Skipped || i != 2 && c.Bytes != want.Bytes || (c.Why == "") != (i > 1) {
			t.Errorf("collector %s: %+v; want %+v", c.Path, c, want)
		}
	}
	if c := got.Collectors[2]; c.Bytes > 1<<20 {
		t.Errorf("of a file full of holes %d bytes are taken", c.Bytes)
	}
	if got.Archive.Bytes > 1<<20 || got.Archive.Err != "" {
		t.Errorf("archive %+v", got.Archive)
	}
}

// What takes room in an archive counts, also if it is no content.
func TestLimitsOfWhatHasNoContent(t *testing.T) {
	m := newMember(t, "1", crashed, request.Collect{Path: "/links", Max: 100 << 10}, request.Collect{Path: "/names", Max: 100 << 10})
	m.file("links/0", "x")
	for i := range 1000 {
		if err := os.Link(filepath.Join(m.root, "links/0"), filepath.Join(m.root, "links", fmt.Sprint(i+1))); err != nil {
			t.Fatal(err)
		}
	}
	long := filepath.Join("names", strings.Repeat("n", 250), strings.Repeat("n", 250), strings.Repeat("n", 250), strings.Repeat("n", 250))
	for i := range 100 {
		m.file(filepath.Join(long, strings.Repeat("n", 200)+fmt.Sprint(i)), "")
	}
	got := newStore(t, Options{}).mustCollect(t, &m.Subject)
	if c := got.Collectors[0]; c.Taken != 99 || c.Why == "" {
		t.Errorf("of 1001 names of one file: %+v", c)
	}
	if c := got.Collectors[1]; c.Taken < 60 || c.Taken > 90 || c.Why == "" {
		t.Errorf("of 100 files with long names: %+v", c)
	}
}

// A manifest can be read, whatever a member has called its files.
func TestManifestOfLongNames(t *testing.T) {
	m := newMember(t, "1", crashed, request.Collect{Path: "/d", Max: 64 << 20})
	m.file("d/x", "x")
	dir, err := unix.Open(filepath.Join(m.root, "d"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { unix.Close(dir) }()
	name := strings.Repeat("\x01", 250)
	for level := range 100 { // much deeper than a path can name
		for i := range 20 {
			if err := unix.Mknodat(dir, fmt.Sprint(name[3:], i), unix.S_IFREG|0o600, 0); err != nil {
				t.Fatal(level, err)
			}
		}
		if err := unix.Mkdirat(dir, name, 0o755); err != nil {
			t.Fatal(level, err)
		}
		next, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(level, err)
		}
		unix.Close(dir)
		dir = next
	}
	got := newStore(t, Options{}).mustCollect(t, &m.Subject)
	if c := got.Collectors[0]; !strings.Contains(c.Why, "left out") {
		t.Errorf("what is too long is not told of: %+v", c)
	}
	if n := len(got.Files); n < 50 || n+got.FilesMore < 1000 || got.Archive.Err != "" {
		t.Errorf("%d files are listed, %d more; archive %+v", n, got.FilesMore, got.Archive)
	}
}

// The list of files is bounded, the archive is not by that.
func TestMoreFilesThanAreListed(t *testing.T) {
	m := newMember(t, "1", crashed, request.Collect{Path: "/many", Max: 64 << 20})
	for i := range maxFiles + 500 {
		m.file(fmt.Sprintf("many/%05d", i), "")
	}
	got := newStore(t, Options{}).mustCollect(t, &m.Subject)
	if len(got.Files) != maxFiles || got.FilesMore != 501 || got.Archive.Entries != maxFiles+501 {
		t.Errorf("%d files are listed, %d more, %d are in the archive", len(got.Files), got.FilesMore, got.Archive.Entries)
	}
}

// The log of a member that writes what it wants.
func TestLastWordsOfTheHostile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	var b bytes.Buffer
	for range 1000 {
		fmt.Fprintf(&b, "2026-01-02T03:04:05.000000006Z stdout P %s\n", strings.Repeat("x", 10_000))
	}
	b.WriteString("no line at all\n2026-01-02T03:04:05.000000006Z stderr F \x1b[31m\xff\x00\nunfinished")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := lastWords(file)
	if err != nil {
		t.Fatal(err)
	}
	size := 0
	for _, x := range l.Lines {
		size += len(x.Text)
	}
	if !l.Cut || size > maxLogBytes || len(l.Lines) == 0 || len(l.Lines) > maxLogLines {
		t.Errorf("%d lines of %d bytes, cut %v", len(l.Lines), size, l.Cut)
	}
	if !slices.ContainsFunc(l.Lines, func(x LogLine) bool { return x.Stream == "stderr" && x.Text == "\x1b[31m\uFFFD\x00" }) {
		t.Errorf("stderr's line is missing in %q", l.Lines[len(l.Lines)-1])
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := lastWords(file); err == nil {
		t.Error("a FIFO is read as a log")
	}
}

// Room is made by the oldest successes first, then by the oldest failures.
func TestQuota(t *testing.T) {
	now := time.Unix(10_000, 0)
	s := newStore(t, Options{MaxTotal: 256 << 10, Now: func() time.Time { now = now.Add(time.Second); return now }})
	collect := func(id string, e exit.Record) string {
		t.Helper()
		m := newMember(t, id, e, request.Collect{Path: "/f"})
		// Not to be packed: each takes 56 KiB and a bit.
		m.file("f", noise(56<<10))
		return s.mustCollect(t, &m.Subject).Name
	}
	collect("f1", crashed)
	collect("a1", succeeded)
	collect("f2", crashed)
	collect("a2", succeeded) // it takes the place of a1
	collect("f3", crashed)   // of a2
	collect("f4", crashed)   // of f1
	var names []string
	entries, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	var total int64
	for _, e := range entries {
		names = append(names, strings.TrimLeft(e.MemberID, "0"))
		total += e.Size
	}
	if d := cmp.Diff([]string{"f2", "f3", "f4"}, names); d != "" {
		t.Errorf("what is left (-want +got):\n%s", d)
	}
	if total > s.o.MaxTotal {
		t.Errorf("%d bytes are kept, of %d at most", total, s.o.MaxTotal)
	}
	m := newMember(t, "b1", crashed, request.Collect{Path: "/f"})
	m.file("f", noise(300<<10))
	got := s.mustCollect(t, &m.Subject)
	if got.Archive.Err == "" || got.Archive.Entries != 0 || got.Files[0].Taken {
		t.Errorf("an archive larger than everything may be: %+v, %+v", got.Archive, got.Files)
	}
	if entries, _ := s.List(); len(entries) != 4 {
		t.Errorf("others made room for it: %d are left", len(entries))
	}
}

// Collections that are made at the same time do not take the same room.
func TestQuotaAtOnce(t *testing.T) {
	s := newStore(t, Options{MaxTotal: 256 << 10})
	for round := range 10 {
		var wg sync.WaitGroup
		for i := range 4 {
			m := newMember(t, fmt.Sprintf("%d%d", round, i), crashed, request.Collect{Path: "/f"})
			m.file("f", noise(56<<10))
			wg.Go(func() {
				if _, err := s.Collect(t.Context(), &m.Subject); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		entries, err := s.List()
		if err != nil {
			t.Fatal(err)
		}
		var total int64
		for _, e := range entries {
			total += e.Size
		}
		if total > s.o.MaxTotal || len(entries) < 3 {
			t.Fatalf("round %d: %d collections have %d bytes, of %d at most", round, len(entries), total, s.o.MaxTotal)
		}
	}
}

// noise is text that cannot be packed.
func noise(n int) string {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return string(b)
}

func TestSweep(t *testing.T) {
	now := time.Now()
	s := newStore(t, Options{Keep: time.Hour, Now: func() time.Time { return now }})
	old := newMember(t, "1", crashed)
	s.mustCollect(t, &old.Subject)
	now = now.Add(2 * time.Hour)
	fresh := newMember(t, "2", crashed)
	s.mustCollect(t, &fresh.Subject)
	unlock, err := s.begin(tempPrefix + "00000000000000b0")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	for _, d := range []string{tempPrefix + "00000000000000a0", trashPrefix + "web-app-9", "web/app-7", "web/app-8", "web/app-x", ".other", tempPrefix + "mine"} {
		if err := s.root.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.root.WriteFile("web/app-7/"+manifestFile, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dry := range []bool{true, false} {
		found, err := s.Sweep(t.Context(), dry)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range found {
			names = append(names, strings.TrimPrefix(f.Name, s.path+"/"))
			if f.Err != "" || f.Reason == "" || f.Since.IsZero() || (f.Action == "removed") == dry {
				t.Errorf("finding %+v", f)
			}
		}
		if d := cmp.Diff([]string{trashPrefix + "web-app-9", tempPrefix + "00000000000000a0", "web/app-7", "web/app-1"}, names); d != "" {
			t.Errorf("dry %v: found (-want +got):\n%s", dry, d)
		}
	}
	var left []string
	for _, glob := range []string{"*", ".[^.]*", "web/*"} {
		names, _ := filepath.Glob(filepath.Join(s.path, glob))
		for _, n := range names {
			left = append(left, strings.TrimPrefix(n, s.path+"/"))
		}
	}
	slices.Sort(left)
	want := slices.Compact(slices.Sorted(slices.Values([]string{".other", ".reserve", tempPrefix + "00000000000000b0", tempPrefix + "mine", "web", "web/app-2", "web/app-8", "web/app-x"})))
	if d := cmp.Diff(want, slices.Compact(left)); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
}

// What a daemon leaves that was killed while it collected is begun anew.
func TestCollectAfterACrash(t *testing.T) {
	s := newStore(t, Options{})
	m := newMember(t, "1", crashed, request.Collect{Path: "/f"})
	m.file("f", "content")
	tmp := tempPrefix + m.MemberID
	if err := s.root.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.root.WriteFile(tmp+"/"+archiveFile, []byte("half of it"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := s.mustCollect(t, &m.Subject)
	if d := cmp.Diff(map[string]string{"f": "content"}, s.archive(t, got.Name)); d != "" {
		t.Errorf("archive (-want +got):\n%s", d)
	}
	if _, err := s.root.Stat(tmp); err == nil {
		t.Error("what was left is still there")
	}
}

func TestCollectIsCutOff(t *testing.T) {
	s := newStore(t, Options{})
	m := newMember(t, "1", crashed, request.Collect{Path: "/f"})
	m.file("f", "content")
	ctx, cancel := context.WithCancel(t.Context())
	root := m.Root
	m.Root = func() (*os.File, error) {
		if _, err := s.root.Stat(tempPrefix + m.MemberID + "/" + archiveFile); err == nil {
			cancel() // the archive has been begun
		}
		return root()
	}
	if name, err := s.Collect(ctx, &m.Subject); !errors.Is(err, context.Canceled) {
		t.Errorf("%q, %v; want %v", name, err, context.Canceled)
	}
	if found, err := s.Sweep(t.Context(), true); err != nil || len(found) != 0 {
		t.Errorf("left: %+v, %v", found, err)
	}
	if entries, err := s.List(); err != nil || len(entries) != 0 {
		t.Errorf("collections: %+v, %v", entries, err)
	}
}

// A disk that is full costs the files, and in the end the log, not the manifest.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	host, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(dir, Options{Host: host})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newMember(t, "1", crashed, request.Collect{Path: "/f"})
	m.file("f", noise(2<<20))
	writeLog(t, m.LogPath, slices.Repeat([]string{strings.Repeat("y", 600)}, 90)...)
	got := s.mustCollect(t, &m.Subject)
	if got.Archive == nil || !strings.Contains(got.Archive.Err, "no space") || len(got.Log.Lines) != 90 {
		t.Errorf("archive %+v, %d lines of the log", got.Archive, len(got.Log.Lines))
	}
	if _, err := s.root.Stat(got.Name + "/" + archiveFile); err == nil {
		t.Error("half an archive is there")
	}
	// Somebody else fills the disk to the last block.
	if err := os.WriteFile(filepath.Join(dir, "full"), []byte(noise(1<<20)), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 9 {
		n := newMember(t, fmt.Sprintf("b%d", i), crashed, request.Collect{Path: "/f"})
		n.file("f", "small")
		n.LogPath = m.LogPath
		if got := s.mustCollect(t, &n.Subject); got.Exit == nil || got.Name == "" {
			t.Errorf("manifest %d on a full disk: %+v", i, got)
		}
	}
	if found, err := s.Sweep(t.Context(), true); err != nil || len(found) != 0 {
		t.Errorf("left: %+v, %v", found, err)
	}
}

func TestNames(t *testing.T) {
	s := newStore(t, Options{})
	m := newMember(t, "1", crashed)
	m.Member = "app-7"
	if got := s.mustCollect(t, &m.Subject); got.Name != "web/app-7-1" {
		t.Errorf("name %q", got.Name)
	}
	for _, name := range []string{"", "web", "web/", "web/app-7", "web/app-7-01", "../web/app-7-1", "web/../web/app-7-1", ".reserve", "web/app-7-1/manifest.json", "./app-7-1"} {
		if _, err := s.Manifest(name); err == nil {
			t.Errorf("%q names a collection", name)
		}
		if err := s.Remove(name); err == nil {
			t.Errorf("%q was removed", name)
		}
	}
	if got, err := s.Latest("web", "app-7"); err != nil || got.Name != "web/app-7-1" {
		t.Errorf("latest by name: %+v, %v", got, err)
	}
	if got, err := s.Latest(m.SandboxID, m.MemberID); err != nil || got.Name != "web/app-7-1" {
		t.Errorf("latest by id: %+v, %v", got, err)
	}
	if _, err := s.Latest("web", "app"); !errors.Is(err, ErrNotFound) {
		t.Errorf("latest of another: %v", err)
	}
	// What somebody else has put there is none, and does no harm.
	outside := t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(s.path, "foreign/app-1"), 0o700),
		os.WriteFile(filepath.Join(s.path, "foreign/app-1/readme"), nil, 0o600),
		os.Mkdir(filepath.Join(outside, "app-1"), 0o700),
		os.WriteFile(filepath.Join(outside, "app-1", manifestFile), []byte("{}"), 0o600),
		os.Symlink(outside, filepath.Join(s.path, "away")),
		os.Symlink(filepath.Join(outside, "app-1"), filepath.Join(s.path, "web/away-1")),
		os.WriteFile(filepath.Join(s.path, "file"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"foreign/app", "away/app", "web/away", "file/app"} {
		if err := s.Remove(name + "-1"); !errors.Is(err, ErrNotFound) {
			t.Errorf("remove %s-1: %v", name, err)
		}
		box, member, _ := strings.Cut(name, "/")
		if _, err := s.Latest(box, member); !errors.Is(err, ErrNotFound) {
			t.Errorf("latest of %s: %v", name, err)
		}
	}
	if _, err := s.Latest("..", "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("latest of ..: %v", err)
	}
	if entries, err := s.List(); err != nil || len(entries) != 1 {
		t.Errorf("%d collections, %v", len(entries), err)
	}
	if err := os.Remove(filepath.Join(s.path, "web/away-1")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := s.Export("web/app-7-1", &b); err != nil {
		t.Fatal(err)
	}
	h, err := tar.NewReader(&b).Next()
	if err != nil || h.Name != "web/app-7-1/manifest.json" {
		t.Errorf("exported %+v, %v", h, err)
	}
	if err := s.Remove("web/app-7-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.root.Stat("web"); err == nil {
		t.Error("the sandbox's empty directory is left")
	}
}

func FuzzParseManifest(f *testing.F) {
	var m Manifest
	fill(reflect.ValueOf(&m).Elem())
	b, _ := json.Marshal(m)
	f.Add(b)
	f.Add([]byte(`{"version":1,"sandbox":"a","member":"b","memberId":"c","samples":{"unixMs":[1,2,3],"cpuMicros":[1],"memoryBytes":[]}}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseManifest(b)
		if err != nil {
			return
		}
		r := NewReport(m, Custody{}, time.Unix(0, 0))
		var text, html bytes.Buffer
		if err := errors.Join(r.WriteText(&text), r.WriteHTML(&html)); err != nil {
			t.Fatal(err)
		}
		if i := strings.IndexFunc(text.String(), func(c rune) bool { return c < ' ' && c != '\n' || c == 0x7f || c == 0x9b }); i >= 0 {
			t.Errorf("the text has a control character at %d: %q", i, text.String())
		}
		if strings.Contains(html.String(), "<script") {
			t.Error("the page has a script")
		}
	})
}

// hang mounts a file system that does not answer in the member's root; it goes when
// the function that is returned is called, or at the end of the test.
func (m *member) hang(name string) (end func()) {
	m.Helper()
	testenv.Root(m.T)
	testenv.Kernel(m.T, testenv.FUSE)
	dir := filepath.Join(m.root, name)
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(os.MkdirAll(dir, 0o700), testenv.MountFUSE(dev, dir))
	}
	if err != nil {
		m.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		dev.Close() // whoever waits, waits no longer
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	m.Cleanup(end)
	return end
}

// What cannot be looked through is not said to be empty.
func TestDirectoryThatCannotBeRead(t *testing.T) {
	m := newMember(t, "1", crashed, request.Collect{Path: "/deep/*"})
	testenv.Root(t)
	testenv.Kernel(t, testenv.FUSE)
	dir := filepath.Join(m.root, "deep")
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(os.MkdirAll(dir, 0o700), testenv.MountFUSE(dev, dir), dev.Close()) // its server has died
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	got := newStore(t, Options{}).mustCollect(t, &m.Subject)
	if c := got.Collectors[0]; !strings.HasSuffix(c.Why, "/deep/: transport endpoint is not connected") || c.Taken != 0 {
		t.Errorf("collector: %+v", c)
	}
}

// Files that do not answer hold up nobody else's, and their own collection not for ever.
func TestFilesThatDoNotAnswer(t *testing.T) {
	s := newStore(t, Options{})
	s.slotTime, s.limit, s.grace = 100*time.Millisecond, 2*time.Second, time.Second
	type result struct {
		m   *Manifest
		err error
	}
	hung := make(chan result)
	for i := range cap(s.slots) {
		m := newMember(t, fmt.Sprintf("h%d", i), crashed, request.Collect{Path: "/f"}, request.Collect{Path: "/dir"})
		m.file("f", "content")
		m.hang("dir")
		go func() {
			name, err := s.Collect(context.Background(), &m.Subject)
			if err != nil {
				hung <- result{nil, err}
				return
			}
			x, err := s.Manifest(name)
			hung <- result{x, err}
		}()
	}
	begun := time.Now()
	for len(s.slots) < cap(s.slots) && time.Since(begun) < time.Second {
		time.Sleep(time.Millisecond)
	}
	m := newMember(t, "1", crashed, request.Collect{Path: "/f"})
	m.file("f", "content")
	if got := s.mustCollect(t, &m.Subject); got.Archive.Err != "" || time.Since(begun) > s.limit {
		t.Errorf("after %s: %+v", time.Since(begun), got.Archive)
	}
	for range cap(s.slots) {
		select {
		case r := <-hung:
			if r.err != nil || !strings.Contains(r.m.Archive.Err, "within 3s") || len(r.m.Collectors) != 2 || r.m.Exit == nil {
				t.Errorf("the one that hung: %+v, %v", r.m, r.err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("it waits for files that do not answer")
		}
	}
}

// A collection that is cut off does not wait for such files either.
func TestCutOffWhileFilesDoNotAnswer(t *testing.T) {
	s := newStore(t, Options{})
	m := newMember(t, "1", crashed, request.Collect{Path: "/dir"})
	m.hang("dir")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := s.Collect(ctx, &m.Subject)
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for files that do not answer")
	}
}

// One that is cut off for a cause keeps what can be had at once.
func TestCutOffForACause(t *testing.T) {
	cause := errors.New("the member was removed")
	for _, begun := range []bool{true, false} {
		s := newStore(t, Options{})
		m := newMember(t, "1", crashed, request.Collect{Path: "/f"}, request.Collect{Path: "/dir"})
		m.file("f", "content")
		m.hang("dir")
		ctx, cancel := context.WithCancelCause(t.Context())
		if begun {
			time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
		} else {
			cancel(cause)
		}
		done := make(chan error, 1)
		go func() {
			_, err := s.Collect(ctx, &m.Subject)
			done <- err
		}()
		select {
		case err := <-done:
			if got, merr := s.Manifest("web/app-1"); err != nil || merr != nil || got.Archive.Err != cause.Error() || got.Exit == nil || len(got.Collectors) != 2 {
				t.Errorf("begun %t: %+v, %v, %v", begun, got, err, merr)
			}
			if _, err := s.root.Stat("web/app-1/" + archiveFile); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("begun %t: the archive: %v", begun, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("it waits for files that do not answer")
		}
	}
}

// A glob is bounded in time like everything else.
func TestGlobTakesTooLong(t *testing.T) {
	s := newStore(t, Options{})
	s.limit = -time.Second
	m := newMember(t, "1", crashed, request.Collect{Path: "/none*"})
	if got := s.mustCollect(t, &m.Subject); !strings.HasPrefix(got.Collectors[0].Why, "it took longer than") {
		t.Errorf("%+v", got.Collectors)
	}
}

// What is being made is bounded too: the largest loses its archive, at once.
func TestQuotaOfWhatIsBeingMade(t *testing.T) {
	const most = 2 << 20
	s := newStore(t, Options{MaxTotal: most})
	big := newMember(t, "1", crashed, request.Collect{Path: "/f"}, request.Collect{Path: "/dir"})
	big.file("f", noise(most*3/4))
	end := big.hang("dir")
	done := make(chan error, 1)
	go func() {
		_, err := s.Collect(context.Background(), &big.Subject)
		done <- err
	}()
	file := tempPrefix + big.MemberID + "/" + archiveFile
	written := func() int64 {
		fi, err := s.root.Stat(file)
		if err != nil {
			return 0
		}
		return fi.Size()
	}
	for limit := time.Now().Add(20 * time.Second); written() < most/2; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%d bytes are written", written())
		}
	}
	small := newMember(t, "2", crashed, request.Collect{Path: "/f"})
	small.Member = "small"
	small.file("f", noise(most*5/8))
	if got := s.mustCollect(t, &small.Subject); got.Archive.Err != "" || got.Archive.Bytes < most/2 {
		t.Errorf("the smaller one: %+v", got.Archive)
	}
	if n := written(); n != 0 {
		t.Errorf("%d bytes of the larger one are still there", n)
	}
	end()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got, err := s.Manifest("web/app-1"); err != nil || got.Archive.Err != errCrowded.Error() || got.Files[0].Taken {
		t.Errorf("the larger one: %+v, %v", got, err)
	}
	if len(s.making) != 0 {
		t.Errorf("%d are still counted", len(s.making))
	}
	// Those that are complete are not lost any more.
	a, b := &archive{s: s, size: most - 10}, &archive{s: s}
	s.making = []*archive{a, b}
	if err := s.complete(a); err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	b.f = null
	if _, err := b.Write(make([]byte, 20)); !errors.Is(err, errCrowded) || a.lost || a.size == 0 {
		t.Errorf("%v; %+v", err, a)
	}
}
