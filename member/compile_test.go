package member

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
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
		CgroupTasks: []string{"/sys/fs/cgroup/pids/sandboxd/s/m/tasks"},
		Cgroups:     []CgroupHierarchy{{Unified: true}},
		IsDir:       func(name string) (bool, error) { return !strings.HasSuffix(name, ".conf"), nil },
	}
}

// realInput is one that can be run here, in a root file system with busybox.
func realInput(t testing.TB, args ...string) *Input {
	t.Helper()
	in := goldenInput()
	in.Spec = testSpec(args...)
	in.CgroupTasks, in.IsDir = nil, nil
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
func busyboxRoot(t testing.TB) string {
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

func hostCgroups(t testing.TB) []CgroupHierarchy {
	t.Helper()
	host, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	return CgroupHierarchies(host.Hierarchies())
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

// sh runs script in a member of the default form that edit, if not nil, changes.
func sh(t *testing.T, script string, edit func(*Input)) string {
	t.Helper()
	in := realInput(t, "sh", "-c", script)
	if edit != nil {
		edit(in)
	}
	return mustRun(t, in)
}

func TestMemberIsAContainer(t *testing.T) {
	testenv.Root(t)
	tests := []struct {
		name   string
		script string
		edit   func(*Input)
		want   string
	}{
		{"it is process 1 of a private pid namespace", `echo $$`, nil, "1\n"},
		{"it has the capabilities of the specification and no more",
			`grep -E "^Cap|NoNewPrivs" /proc/self/status`, nil,
			"CapInh:\t0000000000000000\nCapPrm:\t00000000000004eb\nCapEff:\t00000000000004eb\nCapBnd:\t00000000000004eb\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n"},
		{"it has all five sets", `grep ^Cap /proc/self/status`, func(in *Input) {
			in.Spec.Process.User.UID = 5
			in.Spec.Process.NoNewPrivileges = false
			in.Spec.Process.Capabilities = &specs.LinuxCapabilities{
				Bounding: []string{"CAP_KILL", "CAP_CHOWN"}, Effective: []string{"CAP_KILL"}, Permitted: []string{"CAP_KILL"},
				Inheritable: []string{"CAP_KILL", "CAP_CHOWN"}, Ambient: []string{"CAP_KILL"},
			}
		}, "CapInh:\t0000000000000021\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\nCapBnd:\t0000000000000021\nCapAmb:\t0000000000000020\n"},
		{"it has the ids of the specification", `id; grep Groups /proc/self/status; umask`, func(in *Input) {
			u := uint32(0o027)
			in.Spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7, 9}, Umask: &u}
		}, "uid=1000 gid=1001 groups=7,9\nGroups:\t7 9 \n0027\n"},
		{"it has no descriptors but 0, 1, 2", `ls /proc/1/fd; true`, nil, "0\n1\n2\n"},
		{"no signal is blocked or ignored", `exec grep -E "Sig(Blk|Ign)" /proc/self/status`, nil, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"},
		{"masked paths are empty", `cat /proc/keys /proc/timer_list; ls -A /proc/acpi /sys/firmware; dd if=/dev/zero of=/proc/acpi/x count=1 2>/dev/null || echo no`, nil, "/proc/acpi:\n\n/sys/firmware:\nno\n"},
		{"masks without a /dev of its own do not use the image's /dev/null", `cat /proc/keys`, func(in *Input) {
			in.Spec.Mounts = in.Spec.Mounts[:1]
			if err := os.WriteFile(filepath.Join(in.Root.Path, "dev/null"), []byte("not null"), 0o666); err != nil {
				t.Fatal(err)
			}
		}, ""},
		{"read-only paths are read-only", `(echo 1 >/proc/sys/kernel/panic) 2>/dev/null || echo no`, nil, "no\n"},
		{"the root is writable and its directory is not", `echo x >/etc/new; cat /etc/new`, nil, "x\n"},
		{"a read-only root is read-only", `(echo x >/etc/new) 2>/dev/null || echo no; grep " / " /proc/mounts | grep -c overlay || true`, func(in *Input) {
			in.Root.ReadOnly = true
		}, "no\n0\n"},
		{"a bundle's read-only root still gets its mount points", `(echo x >/etc/new) 2>/dev/null || echo no; echo y >/a/b/c/f; cat /a/b/c/f`, func(in *Input) {
			in.Root.ReadOnly, in.Root.Overlay = true, false
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/a/b/c", Type: "tmpfs"})
		}, "no\ny\n"},
		{"a tmpfs has its size", `df -k /tmp | grep -c " 16384 "; stat -c %a /tmp`, func(in *Input) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"size=16m", "mode=1777"}})
		}, "1\n1777\n"},
		{"binds, of files, read-only, one in another", `cat /v/in/f; (echo x >/v/in/g) 2>/dev/null || echo no; cat /etc/hosts; echo z >/v/w; cat /v/w`, func(in *Input) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "f"), []byte("file\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			in.Spec.Mounts = append(in.Spec.Mounts,
				specs.Mount{Destination: "/v", Source: t.TempDir(), Options: []string{"rbind"}},
				specs.Mount{Destination: "/v/in", Source: dir, Options: []string{"rbind", "ro"}},
				specs.Mount{Destination: "/etc/hosts", Source: filepath.Join(dir, "f"), Options: []string{"bind", "rro"}})
		}, "file\nno\nfile\nz\n"},
		{"a private uts namespace has its own name", `hostname`, func(in *Input) { in.Spec.Hostname = "box" }, "box\n"},
		{"sysctls of private namespaces", `cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni`, func(in *Input) {
			in.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "kernel.shmmni": "77"}
		}, "0\n77\n"},
		{"rlimits", `ulimit -n; ulimit -Hn`, func(in *Input) {
			in.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 20, Hard: 30}}
		}, "20\n30\n"},
		{"the working directory", `pwd`, func(in *Input) { in.Spec.Process.Cwd = "/etc" }, "/etc\n"},
		{"a working directory that is missing", `pwd; stat -c "%a %u" .`, func(in *Input) { in.Spec.Process.Cwd = "/new/dir" }, "/new/dir\n755 0\n"},
		{"devices", `stat -c "%F %a %u %t:%T" /dev/x/loop`, func(in *Input) {
			mode, uid := os.FileMode(0o640), uint32(3)
			in.Spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x/loop", Type: "b", Major: 7, Minor: 300, FileMode: &mode, UID: &uid}}
		}, "block special file 640 3 7:12c\n"},
		{"all cgroup hierarchies, read-only", `grep -cE "^cgroup /sys/fs/cgroup[^ ]* cgroup2? ro," /proc/mounts`, nil,
			fmt.Sprintf("%d\n", len(hostCgroups(t)))},
		{"options that say what is so anyway", `touch /tmp/x && grep -c " /tmp " /proc/mounts`, func(in *Input) {
			opts := []string{"async", "loud", "silent", "noiversion", "nolazytime", "nomand"}
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: opts},
				specs.Mount{Destination: "/tmp", Source: "/tmp", Options: append(opts, "bind")})
		}, "2\n"},
		{"root propagation", `grep " / / " /proc/self/mountinfo | grep -o shared`, func(in *Input) { in.Spec.Linux.RootfsPropagation = "shared" }, "shared\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := sh(t, tt.script, tt.edit); got != tt.want {
				t.Errorf("output\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// A daemon that was started by nohup has SIGHUP ignored, and Go leaves it so.
func TestSignalsThatTheStarterIgnoresAreReset(t *testing.T) {
	testenv.Root(t)
	ignored := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU}
	signal.Ignore(ignored...)
	defer signal.Reset(ignored...)
	if got := sh(t, "exec grep SigIgn /proc/self/status", nil); got != "SigIgn:\t0000000000000000\n" {
		t.Error(got)
	}
}

// A user namespace of ids 100000… is the sandbox's; nothing on the host is
// owned by them.
func TestUserNamespace(t *testing.T) {
	testenv.Root(t)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	in := realInput(t, "sh", "-c", `
		stat -c "%u:%g %n" /bin/busybox /vol/f /tmp /dev /dev/null /dev/shm /dev/pts/ptmx
		echo x >/etc/new; echo x >/vol/new; echo x >/tmp/new; echo x >/dev/null
		stat -c "%u:%g %n" /etc/new /vol/new /tmp/new
		cat /proc/self/uid_map; id; grep CapEff /proc/self/status
		cat /proc/keys; umount /proc/keys 2>/dev/null || echo locked
		mount -t tmpfs none /etc && echo its own; exec ls /proc/self/fd`)
	vol := t.TempDir()
	if err := os.Chmod(vol, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(vol, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	in.UserNS, in.UIDs, in.GIDs = userNS(t, ids), ids, ids
	in.Namespaces[namespace.User] = Join{File: in.UserNS}
	caps := append([]string{"CAP_SYS_ADMIN"}, testCaps...)
	in.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	in.Spec.Mounts = append(in.Spec.Mounts,
		specs.Mount{Destination: "/vol", Source: vol, Options: []string{"rbind"}},
		specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"uid=7", "mode=1777"}})
	got := mustRun(t, in)
	want := `0:0 /bin/busybox
0:0 /vol/f
7:0 /tmp
0:0 /dev
0:0 /dev/null
0:0 /dev/shm
0:0 /dev/pts/ptmx
0:0 /etc/new
0:0 /vol/new
0:0 /tmp/new
         0     100000      65536
uid=0 gid=0
CapEff:	00000000002004eb
locked
its own
0
1
2
3
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
	for _, name := range []string{filepath.Join(vol, "new"), filepath.Join(in.DataDir, "rw/upper/etc/new")} {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil || st.Uid != 0 || st.Gid != 0 {
			t.Errorf("%s belongs to %d:%d on the host, want 0:0 (%v)", name, st.Uid, st.Gid, err)
		}
	}
}

// userNS makes a user namespace with the map ids.
func userNS(t *testing.T, ids []specs.LinuxIDMapping) *os.File {
	t.Helper()
	var m []syscall.SysProcIDMap
	for _, e := range ids {
		m = append(m, syscall.SysProcIDMap{ContainerID: int(e.ContainerID), HostID: int(e.HostID), Size: int(e.Size)})
	}
	cmd := exec.Command("/bin/busybox", "cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: m, GidMappings: m, GidMappingsEnableSetgroups: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	stdin.Close()
	cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// Whatever number the terminal's descriptors get: files that are mounted leave
// other ones free.
func TestTerminal(t *testing.T) {
	testenv.Root(t)
	for n := range 5 {
		t.Run(fmt.Sprintf("%d files", n), func(t *testing.T) { testTerminal(t, n) })
	}
}

func testTerminal(t *testing.T, files int) {
	in := realInput(t, "sh", "-c", "tty; stty size; ls -1 /proc/1/fd; stat -c '%u %a' /dev/pts/0; echo console >/dev/console; exec stat -c %t:%T /dev/console")
	in.Spec.Process.Terminal = true
	in.Spec.Process.User.UID = 12
	in.Spec.Process.Capabilities = nil
	in.Spec.Process.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	in.Files = map[string]string{}
	for i := range files {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		in.Files[fmt.Sprintf("/etc/file%d", i)] = file
	}
	p, err := Compile(in)
	if err != nil {
		t.Fatal(err)
	}
	var master *os.File
	proc, err := launch.Start(p, launch.Options{Created: func(pid int) error {
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		defer unix.Close(pidfd)
		fd, err := unix.PidfdGetfd(pidfd, launch.MasterFD, 0)
		master = os.NewFile(uintptr(fd), "master")
		return err
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	out, err := io.ReadAll(master)
	if !errors.Is(err, unix.EIO) { // what a master says when the other side is gone
		t.Error(err)
	}
	if st, _, err := proc.Wait(); err != nil || st.ExitStatus() != 0 {
		t.Errorf("Wait = %v, %v", st, err)
	}
	want := "/dev/pts/0\r\n33 77\r\n0\r\n1\r\n2\r\n12 620\r\nconsole\r\n88:0\r\n"
	if got := string(out); got != want {
		t.Errorf("output %q, want %q", got, want)
	}
}

func TestPrivateNetworkHasLo(t *testing.T) {
	testenv.Root(t)
	in := realInput(t, "cat", "/sys/class/net/lo/flags")
	in.Namespaces[namespace.Net] = Join{Private: true}
	if got := mustRun(t, in); got != "0x9\n" { // up, and a loopback device
		t.Errorf("flags of lo: %q", got)
	}
}

// A member whose mount namespace is another's starts in that one's root.
func TestJoinedRoot(t *testing.T) {
	testenv.Root(t)
	in := realInput(t, "cat")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	in.Stdin = r
	in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/kept", Type: "tmpfs"})
	p, err := Compile(in)
	if err != nil {
		t.Fatal(err)
	}
	proc, err := launch.Start(p, launch.Options{Created: func(int) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	ns := map[string]*os.File{}
	for _, name := range []string{"ns/mnt", "ns/pid", "root"} {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/%s", proc.PID, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if name == "root" {
			unix.Close(fd)
			fd, err = unix.Open(fmt.Sprintf("/proc/%d/%s", proc.PID, name), unix.O_PATH|unix.O_CLOEXEC, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		ns[name] = os.NewFile(uintptr(fd), name)
		defer ns[name].Close()
	}
	join := &Input{
		Spec:       testSpec("sh", "-c", "echo x >/kept/f; ls /kept; cat /proc/1/comm; (cat </etc/passwd) 2>/dev/null || echo not the host"),
		Namespaces: map[namespace.Kind]Join{namespace.Mnt: {File: ns["ns/mnt"]}, namespace.PID: {File: ns["ns/pid"]}},
		RootFD:     ns["root"],
	}
	join.Spec.Mounts, join.Spec.Linux = nil, nil
	if got, want := mustRun(t, join), "f\ncat\nnot the host\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	w.Close()
	if _, _, err := proc.Wait(); err != nil {
		t.Fatal(err)
	}
}

// What is mounted on the host below a slave, a root or a bind mount, later, is seen.
func TestSlavesSeeWhatTheHostMounts(t *testing.T) {
	testenv.Root(t)
	in := realInput(t, "sh", "-c", "cat; ls /tmp /live/sub")
	in.Root.Overlay = false
	in.Spec.Linux.RootfsPropagation = "slave"
	live := t.TempDir()
	if err := os.Mkdir(filepath.Join(live, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/live", Source: live, Options: []string{"rbind", "rslave"}})
	for _, dir := range []string{in.Root.Path, live} {
		for _, flags := range []uintptr{unix.MS_BIND, unix.MS_SHARED} {
			if err := unix.Mount(dir, dir, "", flags, ""); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out, wout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in.Stdin, in.Stdout, in.Stderr = r, wout, wout
	p, err := Compile(in)
	if err != nil {
		t.Fatal(err)
	}
	proc, err := launch.Start(p, launch.Options{Created: func(int) error { return nil }})
	wout.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Join(in.Root.Path, "tmp"), filepath.Join(live, "sub")} {
		if err := unix.Mount("late", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		if err := os.WriteFile(filepath.Join(dir, "late"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	got, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := proc.Wait(); err != nil {
		t.Fatal(err)
	}
	if want := "/live/sub:\nlate\n\n/tmp:\nlate\n"; string(got) != want {
		t.Errorf("output %q, want %q", got, want)
	}
}

// A volume that is read-only is so with all that is mounted in it.
func TestReadOnlyVolume(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("sub", filepath.Join(dir, "sub"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "sub"), unix.MNT_DETACH) })
	in := realInput(t, "sh", "-c", "touch /v/x; touch /v/sub/x; ls /v/sub")
	r, err := Resolve(&request.Member{Rootfs: in.Root.Path, Args: in.Spec.Process.Args, Volumes: []request.Volume{{Source: dir, Target: "/v", ReadOnly: true}}}, facts())
	if err != nil {
		t.Fatal(err)
	}
	in.Spec.Mounts = append(in.Spec.Mounts, r.Spec.Mounts[len(r.Spec.Mounts)-1])
	if got, want := mustRun(t, in), "touch: /v/x: Read-only file system\ntouch: /v/sub/x: Read-only file system\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}
}

// A file system that is on files of the host is mounted where these are seen.
func TestMountOfFilesOfTheHost(t *testing.T) {
	testenv.Root(t)
	a, b := t.TempDir(), t.TempDir()
	for _, f := range []string{a + "/1", b + "/2"} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got := sh(t, "ls /tmp", func(in *Input) {
		in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/tmp", Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + a + ":" + b}})
	})
	if got != "1\n2\n" {
		t.Errorf("ls: %q, want 1 and 2", got)
	}
}

func TestOverlayLeavesTheImageAlone(t *testing.T) {
	testenv.Root(t)
	in := realInput(t, "sh", "-c", "echo x >/etc/new")
	in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/not/there", Type: "tmpfs"})
	mustRun(t, in)
	for _, name := range []string{"etc/new", "not"} {
		if _, err := os.Lstat(filepath.Join(in.Root.Path, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s in the image: %v", name, err)
		}
		if _, err := os.Lstat(filepath.Join(in.DataDir, "rw/upper", name)); err != nil {
			t.Errorf("%s is not in the writable layer: %v", name, err)
		}
	}
}

// A destination that goes through a symlink of the image stays in the root.
func TestMountDestinationCannotEscape(t *testing.T) {
	testenv.Root(t)
	in := realInput(t, "sh", "-c", "mount | grep -o ' on /tmp/[^ ]* type tmpfs'; ls -d /esc/deep /tmp/escape/deep")
	outside := filepath.Join(t.TempDir(), "host")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"data": "/../../../../tmp/escape", "esc": "../../../../../../../tmp/escape", "abs": outside} {
		if err := os.Symlink(target, filepath.Join(in.Root.Path, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(in.Root.Path, "tmp/escape"), 0o755); err != nil {
		t.Fatal(err)
	}
	in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/data/deep", Type: "tmpfs"})
	if got, want := mustRun(t, in), " on /tmp/escape/deep type tmpfs\n/esc/deep\n/tmp/escape/deep\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}

	in.Spec.Mounts[len(in.Spec.Mounts)-1].Destination = "/abs/deep" // its target is not in the root
	_, err := run(t, in)
	if err == nil || err.Error() != "make mount point /abs/deep: no such file or directory" {
		t.Errorf("run = %v", err)
	}
	if fs, _ := os.ReadDir(outside); len(fs) > 0 {
		t.Errorf("%s was written to: %v", outside, fs)
	}
}

// A read-only root is not written to, and has the mount points that it lacks.
func TestMissingMountPoints(t *testing.T) {
	testenv.Root(t)
	in := realInput(t, "sh", "-c", `for d in /no/where /new /run/x; do echo $d >$d/f && cat $d/f; done
cat /etc/conf; stat -c "%n %a %u" / /run /etc /no
(echo x >/no/f || echo x >/etc/f || echo x >/bin/f || mount -o remount,rw /) 2>/dev/null || echo read-only
ls /abs/deep 2>/dev/null || echo none`)
	in.Root.ReadOnly = true
	root := in.Root.Path
	outside := t.TempDir()
	conf := filepath.Join(t.TempDir(), "conf")
	err := errors.Join(
		os.WriteFile(conf, []byte("configured\n"), 0o644),
		os.Remove(filepath.Join(root, "sys")), // which the cgroup mounts need too
		os.Mkdir(filepath.Join(root, "run"), 0o700), os.Chown(filepath.Join(root, "run"), 7, 7), os.Chmod(filepath.Join(root, "run"), 0o1775|os.ModeSticky),
		os.Mkdir(filepath.Join(root, "var"), 0o755), os.Symlink("/../../run", filepath.Join(root, "var/run")),
		os.Symlink(outside, filepath.Join(root, "abs")),
	)
	if err != nil {
		t.Fatal(err)
	}
	in.Spec.Mounts = append(in.Spec.Mounts,
		specs.Mount{Destination: "/no/where", Type: "tmpfs"},
		specs.Mount{Destination: "/new", Source: t.TempDir(), Options: []string{"rbind"}},
		specs.Mount{Destination: "/var/run/x", Type: "tmpfs"},
		specs.Mount{Destination: "/etc/conf", Source: conf, Options: []string{"bind"}},
	)
	tree := func() string {
		var names []string
		for _, dir := range []string{root, outside} {
			if err := filepath.WalkDir(dir, func(name string, _ os.DirEntry, err error) error { names = append(names, name); return err }); err != nil {
				t.Fatal(err)
			}
		}
		return strings.Join(names, "\n")
	}
	before := tree()
	if in.Root.Points, err = MakeMountPoints(root, filepath.Join(in.DataDir, "rw/upper"), in.Spec.Mounts); err != nil || !in.Root.Points {
		t.Fatalf("MakeMountPoints = %t, %v", in.Root.Points, err)
	}
	want := "/no/where\n/new\n/run/x\nconfigured\n/ 755 0\n/run 1775 7\n/etc 755 0\n/no 755 0\nread-only\nnone\n"
	if got := mustRun(t, in); got != want {
		t.Errorf("output\n%s\nwant\n%s", got, want)
	}
	if after := tree(); after != before {
		t.Errorf("the root was written to:\n%s\nand before:\n%s", after, before)
	}
	// A link that leads nowhere is not followed: the mount fails, as before.
	in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/abs/deep", Type: "tmpfs"})
	if _, err := MakeMountPoints(root, filepath.Join(in.DataDir, "rw/upper"), in.Spec.Mounts); err != nil {
		t.Error(err)
	}
	if _, err := run(t, in); err == nil || !strings.HasPrefix(err.Error(), "make mount point /abs/deep: ") {
		t.Errorf("run = %v", err)
	}
	if after := tree(); after != before {
		t.Errorf("something was written to:\n%s\nand before:\n%s", after, before)
	}
	// Nothing is made where nothing is missing.
	in = realInput(t, "true")
	layer := filepath.Join(in.DataDir, "rw/upper")
	if made, err := MakeMountPoints(in.Root.Path, layer, in.Spec.Mounts); made || err != nil {
		t.Errorf("MakeMountPoints = %t, %v", made, err)
	}
	if es, err := os.ReadDir(layer); len(es) > 0 || err != nil {
		t.Errorf("the layer has %v, %v", es, err)
	}
}

func TestFailuresNameTheThing(t *testing.T) {
	testenv.Root(t)
	tests := []struct {
		name    string
		edit    func(*Input)
		want    string
		command bool
	}{
		{"command", func(in *Input) { in.Spec.Process.Args = []string{"nosuch"} }, `command "nosuch" not found in $PATH: no such file or directory`, true},
		{"command with a path", func(in *Input) { in.Spec.Process.Args = []string{"/bin/nosuch"} }, `command "/bin/nosuch": no such file or directory`, true},
		{"not executable", func(in *Input) { in.Spec.Process.Args = []string{"/proc/self/status"} }, `command "/proc/self/status": permission denied`, true},
		{"neither a program nor a script", func(in *Input) {
			if err := os.WriteFile(filepath.Join(in.Root.Path, "bin/words"), []byte("words\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			in.Spec.Process.Args = []string{"words"}
		}, "execute words from $PATH: exec format error", true},
		{"cwd", func(in *Input) { in.Spec.Process.Cwd, in.Root.ReadOnly = "/nowhere", true }, "change to working directory /nowhere: no such file or directory", false},
		{"tmpfs size", func(in *Input) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"size=many"}})
		}, `mount tmpfs on /tmp: option "size=many": invalid argument`, false},
		{"read-only root without the mount point", func(in *Input) {
			in.Root.ReadOnly = true
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/no/where", Type: "tmpfs"})
		}, "make mount point /no/where: read-only file system", false},
		{"file system type", func(in *Input) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/tmp", Type: "nofs"})
		}, "mount nofs on /tmp: no such device", false},
		{"root", func(in *Input) { in.Root.Path = "/nowhere" }, "clone root file system /nowhere: no such file or directory", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := realInput(t, "true")
			tt.edit(in)
			_, err := run(t, in)
			var se *launch.StepError
			if !errors.As(err, &se) || err.Error() != tt.want || se.Command != tt.command {
				t.Errorf("run = %v (%+v), want %s", err, se, tt.want)
			}
		})
	}
}

// BenchmarkStart is a member from nothing to the end of a command that does
// nothing, without its cgroups.
func BenchmarkStart(b *testing.B) {
	testenv.Root(b)
	in := realInput(b, "/bin/busybox", "true")
	p, err := Compile(in)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		proc, err := launch.Start(p, launch.Options{})
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := proc.Wait(); err != nil {
			b.Fatal(err)
		}
	}
}

// The sandbox's /dev/shm comes out of pause's mount namespace, which belongs to
// the sandbox's user namespace if it has one.
func TestSharedShm(t *testing.T) {
	testenv.Root(t)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	for _, user := range []bool{false, true} {
		t.Run(fmt.Sprintf("user=%v", user), func(t *testing.T) {
			// A member without a mount but its root stands for pause.
			shared := busyboxRoot(t)
			holder := realInput(t, "/bin/busybox", "cat")
			holder.Root = &Root{Path: shared}
			holder.Spec.Mounts = nil
			holder.Spec.Linux = nil
			in := realInput(t, "sh", "-c", "echo hello >/dev/shm/f; grep -o ' /dev/shm .*nosuid' /proc/mounts; stat -c %u /dev/shm/f")
			if user {
				for _, i := range []*Input{holder, in} {
					i.UserNS, i.UIDs, i.GIDs = userNS(t, ids), ids, ids
					i.Namespaces[namespace.User] = Join{File: i.UserNS}
				}
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			holder.Stdin = r
			p, err := Compile(holder)
			if err != nil {
				t.Fatal(err)
			}
			proc, err := launch.Start(p, launch.Options{Created: func(int) error { return nil }})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				w.Close()
				if _, _, err := proc.Wait(); err != nil {
					t.Error(err)
				}
			}()
			open := func(name string) *os.File {
				f, err := os.Open(name)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { f.Close() })
				return f
			}
			in.Shm, in.HostMnt = open(fmt.Sprintf("/proc/%d/ns/mnt", proc.PID)), open("/proc/self/ns/mnt")
			out := mustRun(t, in)
			if !strings.HasPrefix(out, " /dev/shm ") || !strings.HasSuffix(out, "\n0\n") {
				t.Errorf("output %q", out)
			}
			b, err := os.ReadFile(filepath.Join(shared, "f"))
			if err != nil || string(b) != "hello\n" {
				t.Errorf("what the member wrote is not in the shared directory: %q, %v", b, err)
			}
		})
	}
}

// What a member is given as its /etc/hosts and the like is there whatever its
// image has in that place, and nothing is written to where nothing may be.
// Letting go of a mount that has no place takes the kernel an RCU grace period.
func TestFilesWithoutAPlaceAreNotMounted(t *testing.T) {
	for _, there := range []bool{false, true} {
		in := goldenInput()
		in.Root = &Root{Path: t.TempDir()}
		mkdir(t, in.Root.Path+"/etc")
		if there {
			link(t, "elsewhere", in.Root.Path+"/etc/hosts")
		}
		in.Files = map[string]string{"/etc/hosts": "/srv/hosts"}
		p, err := Compile(in)
		if err != nil {
			t.Fatal(err)
		}
		var text strings.Builder
		if err := p.Dump(&text); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(text.String(), "/srv/hosts"); got != there {
			t.Errorf("with a place %t the file is mounted %t", there, got)
		}
	}
}

func TestFiles(t *testing.T) {
	testenv.Root(t)
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("given\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("outside\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const script = "cat /etc/hosts 2>/dev/null; grep -o ' /etc[^ ]*' /proc/mounts; grep -o ' /lib/hosts' /proc/mounts; true"
	for _, tt := range []struct {
		name string
		edit func(t *testing.T, in *Input, etc string)
		want string
	}{
		{"nothing there", func(*testing.T, *Input, string) {}, "given\n /etc/hosts\n"},
		{"no directory", func(t *testing.T, _ *Input, etc string) { remove(t, etc) }, "given\n /etc/hosts\n"},
		{"a file", func(t *testing.T, _ *Input, etc string) { write(t, etc+"/hosts", "image\n") }, "given\n /etc/hosts\n"},
		{"a link in the image", func(t *testing.T, in *Input, etc string) {
			mkdir(t, in.Root.Path+"/lib")
			write(t, in.Root.Path+"/lib/hosts", "image\n")
			link(t, "../lib/hosts", etc+"/hosts")
		}, "given\n /lib/hosts\n"},
		{"a link to the host", func(t *testing.T, _ *Input, etc string) { link(t, outside, etc+"/hosts") }, "given\n /etc/hosts\n"},
		{"a link to nowhere", func(t *testing.T, _ *Input, etc string) { link(t, "../run/none/hosts", etc+"/hosts") }, "given\n /etc/hosts\n"},
		{"a directory that leads nowhere", func(t *testing.T, _ *Input, etc string) {
			remove(t, etc)
			link(t, outside+"/none", etc)
		}, ""},
		{"a directory", func(t *testing.T, _ *Input, etc string) { mkdir(t, etc+"/hosts") }, ""},
		{"a mount of one's own", func(t *testing.T, in *Input, _ string) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/etc/hosts", Source: outside, Options: []string{"bind"}})
		}, "outside\n /etc/hosts\n"},
		{"a mount above", func(t *testing.T, in *Input, _ string) {
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/etc", Type: "tmpfs"})
		}, " /etc\n"},
		{"read-only and nothing there", func(_ *testing.T, in *Input, _ string) { in.Root.ReadOnly = true }, ""},
		{"read-only and a file", func(t *testing.T, in *Input, etc string) {
			in.Root.ReadOnly = true
			write(t, etc+"/hosts", "image\n")
		}, "given\n /etc/hosts\n"},
		{"a bundle's root and nothing there", func(_ *testing.T, in *Input, _ string) { in.Root.Overlay = false }, ""},
		{"a bundle's root and a link into a mount", func(t *testing.T, in *Input, etc string) {
			in.Root.Overlay = false
			lib := t.TempDir()
			write(t, lib+"/hosts", "mounted\n")
			in.Spec.Mounts = append(in.Spec.Mounts, specs.Mount{Destination: "/lib", Source: lib, Options: []string{"bind"}})
			link(t, "../lib/hosts", etc+"/hosts")
		}, "given\n /lib/hosts\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := realInput(t, "sh", "-c", script)
			in.Files = map[string]string{"/etc/hosts": hosts}
			etc := filepath.Join(in.Root.Path, "etc")
			tt.edit(t, in, etc)
			before, _ := os.ReadDir(etc)
			if got := mustRun(t, in); got != tt.want {
				t.Errorf("output %q, want %q", got, tt.want)
			}
			if after, _ := os.ReadDir(etc); len(after) != len(before) {
				t.Errorf("the image's /etc has %v, and had %v", after, before)
			}
			if b, err := os.ReadFile(outside); err != nil || string(b) != "outside\n" {
				t.Errorf("the file of the host has %q, %v", b, err)
			}
		})
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, name string) {
	t.Helper()
	if err := os.Mkdir(name, 0o755); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, name string) {
	t.Helper()
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

// Whether its hierarchies are clones of the host's mounts or new ones, a member
// sees the same, and nothing above its own cgroup.
func TestCgroupsLookAlike(t *testing.T) {
	testenv.Root(t)
	testenv.Cgroup1(t) // the unified hierarchy alone is always mounted anew
	host, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/sandboxd-test-%d", os.Getpid())
	if err := errors.Join(host.MakeSandbox(path), host.MakeMember(path+"/m", nil)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Remove(context.Background(), path); err != nil {
			t.Error(err)
		}
	})
	const script = `grep " /sys/fs/cgroup" /proc/self/mountinfo | busybox cut -d" " -f4-6 | busybox sort
		cat /sys/fs/cgroup/*/../*/tasks /sys/fs/cgroup/unified/cgroup.procs 2>&1 | busybox sort -u
		ls -d /sys/fs/cgroup/* /sys/fs/cgroup/*/../m
		for d in /sys/fs/cgroup/*; do busybox mkdir $d/x; done
		cat /proc/self/cgroup; busybox umount /sys/fs/cgroup/pids`
	var out [2]string
	for i, own := range []string{"", path + "/m"} {
		out[i] = sh(t, script+"\ntrue", func(in *Input) {
			in.CgroupTasks = host.Tasks(path + "/m")
			if in.CgroupDir, err = host.TrackingDir(path + "/m"); err != nil {
				t.Fatal(err)
			}
			for k, h := range host.Hierarchies() {
				if own != "" {
					in.Cgroups[k].Own = filepath.Join(h.Mount, own)
				}
			}
		})
	}
	if diff := cmp.Diff(out[0], out[1]); diff != "" {
		t.Errorf("new mounts and clones are not the same (-new +clones):\n%s", diff)
	}
	if n := strings.Count(out[1], " /sys/fs/cgroup/"); n < len(host.Hierarchies()) {
		t.Errorf("%d hierarchies are mounted, of %d:\n%s", n, len(host.Hierarchies()), out[1])
	}
}
