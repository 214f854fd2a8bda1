package member

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestHostDevices(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	for _, d := range []string{"pts", "snd", "shm"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []struct {
		name         string
		mode         uint32
		major, minor uint32
	}{
		{"fuse", unix.S_IFCHR | 0o666, 10, 229}, {"snd/seq", unix.S_IFCHR | 0o660, 116, 1}, {"sda", unix.S_IFBLK | 0o640, 8, 0},
		{"null", unix.S_IFCHR | 0o666, 1, 3}, {"console", unix.S_IFCHR | 0o600, 5, 1}, {"ptmx", unix.S_IFCHR | 0o666, 5, 2},
		{"pts/0", unix.S_IFCHR | 0o620, 136, 0}, {"initctl", unix.S_IFIFO | 0o600, 0, 0}, {"shm/x", unix.S_IFCHR | 0o600, 1, 5},
	} {
		if err := unix.Mknod(filepath.Join(dir, n.name), n.mode, int(unix.Mkdev(n.major, n.minor))); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, n.name), os.FileMode(n.mode&0o777)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("sda", filepath.Join(dir, "root")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(dir, "sda"), 0, 6); err != nil {
		t.Fatal(err)
	}
	devices, err := hostDevices(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range devices {
		got = append(got, fmt.Sprintf("%s %s %d:%d %o %d:%d", d.Path, d.Type, d.Major, d.Minor, *d.FileMode, *d.UID, *d.GID))
	}
	slices.Sort(got)
	want := []string{"/dev/fuse c 10:229 666 0:0", "/dev/sda b 8:0 640 0:6", "/dev/snd/seq c 116:1 660 0:0"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
}
