package etc

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sandboxd/sandboxd/internal/network"
)

func addrs(ss ...string) []netip.Addr {
	var as []netip.Addr
	for _, s := range ss {
		as = append(as, netip.MustParseAddr(s))
	}
	return as
}

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestParseResolv(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       network.DNS
	}{
		{"usual", "# by dhcp\nnameserver 10.0.0.1\nnameserver fd00::1\nsearch a.example b.example\noptions ndots:2 edns0\n",
			network.DNS{Servers: addrs("10.0.0.1", "fd00::1"), Search: []string{"a.example", "b.example"}, Options: []string{"ndots:2", "edns0"}}},
		{"the last search counts, options add up", "search a\ndomain b\noptions x\noptions y",
			network.DNS{Search: []string{"b"}, Options: []string{"x", "y"}}},
		{"comments", "nameserver 10.0.0.1 # mine\n;nameserver 10.0.0.2\n # nameserver 10.0.0.3\nsearch a ; b", network.DNS{Servers: addrs("10.0.0.1"), Search: []string{"a"}}},
		{"the root is no domain to search", "search .", network.DNS{}},
		{"nonsense", "nameserver\nnameserver x\nfoo bar\n\x00\n", network.DNS{}},
		{"zones", "nameserver fe80::1%eth0\n", network.DNS{Servers: addrs("fe80::1%eth0")}},
	} {
		if d := cmp.Diff(tt.want, ParseResolv(strings.NewReader(tt.text)), sameAddr, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
	}
	if got := Reachable(addrs("127.0.0.53", "::1", "10.0.0.1", "fe80::1%eth0")); len(got) != 1 || got[0].String() != "10.0.0.1" {
		t.Errorf("reachable: %v", got)
	}
}

func FuzzParseResolv(f *testing.F) {
	f.Add("nameserver 10.0.0.1\nsearch a b\noptions c\n")
	f.Fuzz(func(t *testing.T, text string) {
		d := ParseResolv(strings.NewReader(text))
		// What is made of it is read back as the same, and has no more lines.
		made := Resolv(d)
		if got := ParseResolv(bytes.NewReader(made)); len(made) < maxResolv && !cmp.Equal(got, d, sameAddr, cmpopts.EquateEmpty()) {
			t.Errorf("%q became %q, which is %+v and not %+v", text, made, got, d)
		}
		if n := bytes.Count(made, []byte("\n")); n > len(d.Servers)+2 {
			t.Errorf("%q became %q with %d lines", text, made, n)
		}
	})
}

func TestHosts(t *testing.T) {
	const local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	for _, tt := range []struct {
		name     string
		hostname string
		addrs    []netip.Addr
		asked    []network.Host
		members  []string
		want     string
	}{
		{"no network", "web", nil, nil, nil, "127.0.1.1\tweb\n"},
		{"both families, domain", "web.example", addrs("10.88.0.2", "fd00::2"), nil, nil, "10.88.0.2\tweb.example web\nfd00::2\tweb.example web\n"},
		{"members", "web", addrs("10.88.0.2"), nil, []string{"redis", "app"}, "10.88.0.2\tweb\n127.0.0.1\tredis app\n"},
		{"what was asked for comes first and alone", "web", addrs("10.88.0.2"),
			[]network.Host{{Name: "db", IP: addrs("10.1.1.1")[0]}, {Name: "redis", IP: addrs("10.1.1.2")[0]}}, []string{"redis", "web", "app"},
			"10.1.1.1\tdb\n10.1.1.2\tredis\n10.88.0.2\tweb\n127.0.0.1\tapp\n"},
		{"nameless", "", nil, nil, nil, ""},
	} {
		if d := cmp.Diff(local+tt.want, string(Hosts(tt.hostname, tt.addrs, tt.asked, tt.members))); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
	}
}

func TestMerge(t *testing.T) {
	got := Merge(network.DNS{Search: []string{"mine"}}, network.DNS{Servers: addrs("10.0.0.1")}, network.DNS{Servers: addrs("10.0.0.2"), Search: []string{"host"}, Options: []string{"o"}})
	want := network.DNS{Servers: addrs("10.0.0.1"), Search: []string{"mine"}, Options: []string{"o"}}
	if d := cmp.Diff(want, got, sameAddr); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestUpdate(t *testing.T) {
	path := t.TempDir()
	read := func() string {
		b, err := os.ReadFile(filepath.Join(path, "hosts"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if err := Update(path, "hosts", []byte("first\n")); err != nil {
		t.Fatal(err)
	}
	// Somebody has it mounted, which the open file stands for.
	f, err := os.Open(filepath.Join(path, "hosts"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, s := range []string{"second, longer\n", "3\n", ""} {
		if err := Update(path, "hosts", []byte(s)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, _ := f.ReadAt(b, 0)
		if read() != s || string(b[:n]) != s {
			t.Errorf("%q: the file has %q, who had it open sees %q", s, read(), b[:n])
		}
	}
	// Of a link neither the file nor the target is changed.
	target := filepath.Join(path, "target")
	if err := os.WriteFile(target, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(path, "hosts")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("target", filepath.Join(path, "hosts")); err != nil {
		t.Fatal(err)
	}
	if err := Update(path, "hosts", []byte("evil")); err == nil {
		t.Error("a link was followed")
	}
	if b, _ := os.ReadFile(target); string(b) != "keep" {
		t.Errorf("the target has %q", b)
	}
}

func TestDrop(t *testing.T) {
	const head = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n"
	for _, tt := range []struct{ name, hosts, drop, want string }{
		{"one of three", head + "127.0.0.1\ta b c\n", "b", head + "127.0.0.1\ta c\n"},
		{"the last one", head + "127.0.0.1\ta\n", "a", head},
		{"not there", head + "127.0.0.1\tab\n", "a", head + "127.0.0.1\tab\n"},
		{"not in the last line", head + "192.0.2.1\ta\n", "a", head + "192.0.2.1\ta\n"},
		{"localhost", "127.0.0.1\tlocalhost\n", "localhost", "127.0.0.1\tlocalhost\n"},
		{"empty", "", "a", ""},
		{"of somebody else", "garbage \x00", "a", "garbage \x00"},
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, "hosts")
		if err := os.WriteFile(file, []byte(tt.hosts), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := Drop(dir, tt.drop); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != tt.want {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
	if err := Drop(t.TempDir(), "a"); err != nil {
		t.Errorf("without a file: %v", err)
	}
}
