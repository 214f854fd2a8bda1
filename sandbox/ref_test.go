package sandbox

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

type named [2]string

func (n named) id() string   { return n[0] }
func (n named) name() string { return n[1] }

func TestFind(t *testing.T) {
	all := []named{
		{"0123456789abcdef", "web"}, {"0123aaaaaaaaaaaa", "db"}, {"feed000000000000", "0123456"}, {"abc0000000000000", "feed"},
	}
	tests := []struct {
		ref  string
		want string // name
		err  error
		text string
	}{
		{ref: "web", want: "web"},
		{ref: "0123456789abcdef", want: "web"},
		{ref: "01234567", want: "web"},
		{ref: "0123456", want: "0123456"}, // a name goes before a prefix
		{ref: "feed", want: "feed"},
		{ref: "feed0", want: "0123456"},
		{ref: "abc", want: "feed"},
		{ref: "ab", err: ErrNotFound, text: `"ab" (of an id, at least 3 characters are needed)`},
		{ref: "012", err: ErrInvalid, text: "0123456789abcdef (web), 0123aaaaaaaaaaaa (db)"},
		{ref: "ABC", err: ErrNotFound},
		{ref: "", err: ErrNotFound},
		{ref: "we", err: ErrNotFound, text: `"we"`},
		{ref: "web/app", err: ErrInvalid, text: "names a member"},
		{ref: strings.Repeat("x", 10000), err: ErrNotFound, text: "(10000 bytes)"},
	}
	for _, tt := range tests {
		got, err := find("sandbox", tt.ref, all, "")
		if !errors.Is(err, tt.err) || got.name() != tt.want || err != nil && !strings.Contains(err.Error(), tt.text) {
			t.Errorf("find(%.20q) = %q, %v; want %q, %v with %q", tt.ref, got.name(), err, tt.want, tt.err, tt.text)
		}
	}
}

func TestSplitRef(t *testing.T) {
	for _, bad := range []string{"", "web", "/", "web/", "/app", "a/b/c"} {
		if _, _, err := splitRef(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("splitRef(%q): %v", bad, err)
		}
	}
	if s, m, err := splitRef("web/app"); s != "web" || m != "app" || err != nil {
		t.Errorf("splitRef = %q %q %v", s, m, err)
	}
}

func TestNames(t *testing.T) {
	tests := []struct {
		in             string
		name, hostname bool
	}{
		{"a", true, true},
		{"web-1", true, true},
		{"web.example", true, true},
		{"Web_1", true, false},
		{"9", true, true},
		{"", false, false},
		{"-a", false, false},
		{"a-", true, false},
		{".a", false, false},
		{"a..b", true, false},
		{"a/b", false, false},
		{"a b", false, false},
		{"a\n", false, false},
		{"ä", false, false},
		{"0123456789abcdef", false, true},
		{strings.Repeat("a", 63), true, true},
		{strings.Repeat("a", 64), false, false},
	}
	for _, tt := range tests {
		if err := checkName("sandbox", tt.in); (err == nil) != tt.name || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("checkName(%q) = %v, want ok %v", tt.in, err, tt.name)
		}
		if err := checkHostname(tt.in); (err == nil) != tt.hostname || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("checkHostname(%q) = %v, want ok %v", tt.in, err, tt.hostname)
		}
	}
}

func TestCompleteSandbox(t *testing.T) {
	ks := func(s string) []namespace.Kind { k, _ := namespace.ParseKinds(s); return k }
	tests := []struct {
		name string
		in   Config
		bad  string // in the error's text; "" means it is accepted
	}{
		{"nothing said", Config{}, ""},
		{"host network", Config{Network: "host"}, ""},
		{"share nothing", Config{Share: []namespace.Kind{}}, ""},
		{"bad name", Config{Name: "a b"}, `"a b"`},
		{"bad network", Config{Network: "bridge"}, `"bridge"`},
		{"mnt", Config{Share: ks("mnt")}, "mount namespace"},
		{"twice", Config{Share: []namespace.Kind{"ipc", "ipc"}}, "ipc is named twice"},
		{"unknown kind", Config{Share: []namespace.Kind{"x"}}, `"x"`},
		{"net and host", Config{Network: "host", Share: ks("net,ipc")}, "net cannot be shared"},
		{"hostname without uts", Config{Share: ks("ipc"), Hostname: "h"}, "does not share uts"},
		{"bad hostname", Config{Hostname: "a_b"}, `"a_b"`},
		{"negative shm", Config{ShmSize: -1}, "-1"},
		{"sysctl", Config{Sysctls: map[string]string{"a\n": ""}}, "sysctl"},
		{"label", Config{Labels: map[string]string{"": "x"}}, "label"},
		{"annotation with lines", Config{Annotations: map[string]string{"a": "x\ny"}}, ""},
		{"annotation with NUL", Config{Annotations: map[string]string{"a": "\x00"}}, "annotation"},
		{"huge", Config{Annotations: map[string]string{"a": strings.Repeat("x", maxMetadata)}}, "annotations"},
	}
	for _, tt := range tests {
		c, err := completeSandbox(tt.in, "0123456789abcdef")
		if tt.bad == "" {
			holdsUTS := (&Record{Config: c}).Holds(namespace.UTS)
			if err != nil || c.Name == "" || c.Network == "" || c.Share == nil || c.ShmSize == 0 || holdsUTS != (c.Hostname != "") {
				t.Errorf("%s: %+v, %v", tt.name, c, err)
			}
			continue
		}
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.bad) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line with %q", tt.name, err, tt.bad)
		}
	}
}

// FuzzRecord reads arbitrary bytes as records. What is accepted is written and
// read again unchanged, and names no cgroup but its own.
func FuzzRecord(f *testing.F) {
	const sid, mid = "0123456789abcdef", "fedcba9876543210"
	good, err := json.Marshal(Record{Version: recordVersion, ID: sid, State: Ready, Cgroup: "/p/" + sid, Config: Config{Name: "web"}})
	if err != nil {
		f.Fatal(err)
	}
	goodMember, err := json.Marshal(MemberRecord{
		Version: recordVersion, ID: mid, Sandbox: sid, State: MemberExited, Cgroup: "/p/" + sid + "/" + mid,
		Config: MemberConfig{Name: "app"}, Exit: &Exit{}, Namespaces: namespace.Selection{"net": {From: namespace.Member, Member: "x"}},
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range [][]byte{good, goodMember, nil, []byte("{}"), []byte("null"), []byte(`{"version":2}`),
		[]byte(strings.Replace(string(good), "/p/"+sid, "/", 1)), []byte(strings.Replace(string(goodMember), `"exit":`, `"Exit":`, 1))} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		root, err := os.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		box := sid
		mem := sid + "/" + membersDir + "/" + mid
		if err := root.MkdirAll(mem, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{filepath.Join(box, sandboxFile), filepath.Join(mem, memberFile)} {
			if err := root.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if r, err := readRecord(root, box); err == nil {
			if !strings.HasSuffix(r.Cgroup, "/"+sid) || strings.Contains(r.Cgroup, "/../") {
				t.Errorf("accepted cgroup %q", r.Cgroup)
			}
			if err := statefile.Write(root, box+"/"+sandboxFile, r); err != nil {
				t.Fatal(err)
			}
			again, err := readRecord(root, box)
			if err != nil || asJSON(t, again) != asJSON(t, r) {
				t.Errorf("round trip: %+v, %v; want %+v", again, err, r)
			}
		}
		if r, err := readMemberRecord(root, mem); err == nil {
			if !strings.HasSuffix(r.Cgroup, "/"+sid+"/"+mid) || strings.Contains(r.Cgroup, "/../") {
				t.Errorf("accepted cgroup %q", r.Cgroup)
			}
			if err := statefile.Write(root, mem+"/"+memberFile, r); err != nil {
				t.Fatal(err)
			}
			again, err := readMemberRecord(root, mem)
			if err != nil || asJSON(t, again) != asJSON(t, r) {
				t.Errorf("round trip: %+v, %v; want %+v", again, err, r)
			}
		}
	})
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// There may be thousands of sandboxes, and nearly every request names one.
func TestNoneButTheNamedIsLookedAt(t *testing.T) {
	m := open(t, t.TempDir(), newFakeNode())
	web := must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	must[Info](t)(m.Create(t.Context(), Config{Name: "db"}))
	for _, ref := range []string{"web", web.ID} {
		n := testing.AllocsPerRun(10, func() {
			if b, err := m.box(ref); err != nil || b.id() != web.ID {
				t.Fatalf("box(%q) = %v, %v", ref, b, err)
			}
		})
		if n != 0 {
			t.Errorf("box(%q) makes %v allocations, as for a list", ref, n)
		}
	}
	check(t, m.Remove(t.Context(), "web", true))
	again := must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
	if b, err := m.box("web"); err != nil || b.id() != again.ID {
		t.Errorf("the name stands for %v (%v), want its second owner %s", b, err, again.ID)
	}
}

// Who looks for one sandbox in the state directory does not decode the records of
// all others.
func TestSandboxesOfRef(t *testing.T) {
	state := t.TempDir()
	m := open(t, state, newFakeNode())
	ids := map[string]string{}
	for _, name := range []string{"web", "web-2", "db"} {
		ids[name] = must[Info](t)(m.Create(t.Context(), Config{Name: name})).ID
	}
	root, err := os.OpenRoot(state)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := root.WriteFile(sandboxesDir+"/"+ids["db"]+"/"+sandboxFile, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		ref  string
		want []string
	}{
		{"web", []string{"web"}},
		{"web-2", []string{"web-2"}},
		{"nothing", nil},
		{ids["web"], []string{"web"}},
		{ids["db"][:8], []string{ids["db"]}}, // not to be read, and shown by its id
		{"", []string{"web", "web-2", ids["db"]}},
	} {
		var got []string
		for _, b := range sandboxes(root, tt.ref) {
			got = append(got, b.name())
		}
		slices.Sort(got)
		slices.Sort(tt.want)
		if !slices.Equal(got, tt.want) {
			t.Errorf("sandboxes(%q) = %v, want %v", tt.ref, got, tt.want)
		}
	}
}
