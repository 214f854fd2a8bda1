package probe

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestHost(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	Host(dir) // warm up: descriptors that are opened once
	testenv.NoFDLeak(t)
	rs := Host(filepath.Join(dir, "not", "there"))
	for _, r := range rs {
		t.Logf("%-50s ok=%-5v %s", r.Name, r.OK, r.Detail)
		if r.Required && !r.OK {
			t.Errorf("%s: %s; this host runs the tests, so it must have it", r.Name, r.Detail)
		}
		if r.OK != (r.Lost == "") {
			t.Errorf("%s: ok=%v and lost=%q", r.Name, r.OK, r.Lost)
		}
		if strings.Contains(r.Detail, "probe is done") {
			t.Errorf("%s: detail %q", r.Name, r.Detail)
		}
	}
	ents, err := os.ReadDir(dir)
	if err != nil || len(ents) > 0 {
		t.Errorf("left in %s: %v, %v", dir, ents, err)
	}
}

// A probe that cannot fail tells nothing.
func TestProbesFail(t *testing.T) {
	testenv.Root(t)
	if _, err := controller("nonsense"); err == nil {
		t.Error("controller nonsense: found")
	}
	if err := unshare(1 << 3); err == nil {
		t.Error("unshare of an unknown flag: no error")
	}
	if _, err := overlay("/proc"); err == nil {
		t.Error("overlay on /proc: no error")
	}
	if err := idmap("/proc"); err == nil {
		t.Error("idmapped mount of /proc: no error")
	}
	if err := detached("nonsensefs", nil); err == nil {
		t.Error("mount of nonsensefs: no error")
	}
}

func TestExisting(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct{ in, want string }{
		{dir, dir},
		{dir + "/a/b", dir},
		{"/nonsense/x", "/"},
	} {
		if got := existing(tt.in); got != tt.want {
			t.Errorf("existing(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}
