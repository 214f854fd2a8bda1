package member

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

var testCaps = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE"}

// testSpec is a specification such as container users know it.
func testSpec(args ...string) *specs.Spec {
	return &specs.Spec{
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: testCaps, Effective: testCaps, Permitted: testCaps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			MaskedPaths:   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/nowhere", "/proc/timer_list", "/proc/scsi", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

func private(kinds ...namespace.Kind) map[namespace.Kind]Join {
	m := map[namespace.Kind]Join{}
	for _, k := range kinds {
		m[k] = Join{Private: true}
	}
	return m
}

// goldenInput is a member with an overlay over /image and nothing of this host.
func goldenInput() *Input {
	return &Input{
		Spec:        testSpec("sh", "-c", "true"),
		Namespaces:  private(namespace.Net, namespace.IPC, namespace.UTS, namespace.PID, namespace.Mnt, namespace.Cgroup),
		Root:        &Root{Path: "/image", Overlay: true},
		DataDir:     "/data/m",
		CgroupProcs: []string{"/sys/fs/cgroup/sandboxd/s/m/cgroup.procs"},
		Cgroups:     []CgroupHierarchy{{Unified: true}},
		IsDir:       func(name string) (bool, error) { return !strings.HasSuffix(name, ".conf"), nil },
	}
}

// realInput is one that can be run here, in a root file system with busybox.
func realInput(t *testing.T, args ...string) *Input {
	t.Helper()
	in := goldenInput()
	in.Spec = testSpec(args...)
	in.CgroupProcs, in.IsDir = nil, nil
	in.Cgroups = hostCgroups(t)
	in.Root.Path = busyboxRoot(t)
	in.DataDir = t.TempDir()
	for _, d := range []string{"rw/upper", "rw/work", "lower", "rootfs"} {
		if err := os.MkdirAll(filepath.Join(in.DataDir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return in
}

// busyboxRoot makes a root file system of busybox and empty directories.
func busyboxRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(root, 0o755); err != nil { // TempDir's mode is 0700
		t.Fatal(err)
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("busybox-static is needed: %v", err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "cat", "id", "ls", "mount", "grep", "stat", "readlink", "tty", "true", "df", "touch", "sleep", "umask", "stty", "hostname", "dd"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func hostCgroups(t *testing.T) []CgroupHierarchy {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []CgroupHierarchy{{Unified: true}}
	}
	return []CgroupHierarchy{{Dir: "memory", Options: []string{"memory"}}, {Dir: "pids", Options: []string{"pids"}}}
}

// run compiles and executes in, and returns what it wrote.
func run(t *testing.T, in *Input) (string, error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	in.Stdout, in.Stderr = w, w
	p, err := Compile(in)
	if err != nil {
		return "", err
	}
	proc, err := launch.Start(p, launch.Options{Created: func(int) error { return nil }})
	if err != nil {
		return "", err
	}
	w.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	st, _, err := proc.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if st.ExitStatus() != 0 {
		return string(out), errors.New("exit status is not 0")
	}
	return string(out), nil
}

func mustRun(t *testing.T, in *Input) string {
	t.Helper()
	out, err := run(t, in)
	if err != nil {
		t.Fatalf("%v; output:\n%s", err, out)
	}
	return out
}

func TestMemberIsAContainer(t *testing.T) {
	testenv.Root(t)
	out := mustRun(t, realInput(t, "sh", "-c", `echo pid $$; id; cat /proc/self/status | grep -E "Cap|NoNew|Sig[BI]"; ls -l /proc/self/fd; mount; ls -la / /dev /sys/fs/cgroup; hostname`))
	t.Log(out)
	_ = bytes.NewReader
}
