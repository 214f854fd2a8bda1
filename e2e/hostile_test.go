//go:build e2e

package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// The test binary is also the attacker: it is copied into root file systems, and
// runs there with the name of an attack in this variable. An attack writes a line
// for each thing that it got at.
const attackVar = "SANDBOXD_E2E_ATTACK"

func init() {
	name := os.Getenv(attackVar)
	if name == "" {
		return
	}
	attack, ok := attacks[name]
	if !ok {
		fmt.Println("no such attack:", name)
		os.Exit(2)
	}
	attack(os.Args[1:])
	os.Exit(0)
}

var attacks = map[string]func(args []string){
	"write":   attackWrite,
	"process": attackProcess,
	"flight":  attackFlight,
	"swap":    attackSwap,
	"exe":     attackExe,
	"tty":     attackTTY,
	"keyring": attackKeyring,
	"idle":    func([]string) { time.Sleep(time.Hour) },
	"euid":    func([]string) { fmt.Println(os.Geteuid()) },
}

// attacker copies the test binary into a root file system, as /attacker.
func attacker(t *testing.T, rootfs string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b[:4096], []byte("ld-linux")) {
		t.Fatal("the test binary is dynamically linked and does not run in a member: build it with CGO_ENABLED=0")
	}
	if err := os.WriteFile(filepath.Join(rootfs, "attacker"), b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// control runs an attack here on the host, where nothing stands in its way.
func control(t *testing.T, attack string, args ...string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), attackVar+"="+attack)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", attack, err, out)
	}
	return string(out)
}

// hostileRootfs returns a busybox with the attacker, and a file of the host whose
// name and contents nobody inside may ever see.
func hostileRootfs(t *testing.T) (rootfs, secret string) {
	t.Helper()
	testenv.Root(t)
	rootfs = testenv.Busybox(t)
	attacker(t, rootfs)
	secret = filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("the host's secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return rootfs, secret
}

// isNull reports whether fd is /dev/null, which masks files.
func isNull(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// attackWrite opens files for writing, or for reading those after "-r", and says
// which it could. It writes nothing.
func attackWrite(args []string) {
	flags, verb := unix.O_WRONLY, "wrote"
	for _, path := range args {
		if path == "-r" {
			flags, verb = unix.O_RDONLY, "read"
			continue
		}
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		b := make([]byte, 1)
		if isNull(fd) {
			continue
		}
		if n, err := unix.Read(fd, b); flags == unix.O_RDONLY && (err != nil || n == 0) {
			continue
		}
		fmt.Println(verb, path)
	}
}

// What is the whole host's in /proc and /sys is masked or read-only.
func TestHostFilesOfProcAreOutOfReach(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	paths := []string{
		"/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hostname",
		"/proc/sys/vm/drop_caches", "/proc/sys/fs/binfmt_misc/register", "/proc/sys/net/ipv4/ip_forward", "/proc/irq/0/smp_affinity", "/proc/bus/pci/devices",
		"/sys/kernel/uevent_helper", "/sys/kernel/mm/ksm/run", "/sys/power/state", "/sys/fs/cgroup/cgroup.procs",
		"/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup/memory/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs",
		"-r", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi/scsi", "/sys/firmware/acpi/tables/DSDT",
	}
	for _, caps := range [][]string{nil, {"--cap-add", "SYS_PTRACE"}, {"--cap-add", "NET_ADMIN"}} {
		args := append([]string{"run", "web", "--rootfs", rootfs, "--rm", "-e", attackVar + "=write"}, caps...)
		if got := d.must(t, append(append(args, "--", "/attacker"), paths...)...); got != "" {
			t.Errorf("with %v a member got at:\n%s", caps, got)
		}
	}
	got := control(t, "write", paths...)
	for _, must := range []string{"wrote /proc/sys/kernel/core_pattern", "read /proc/keys"} {
		if !strings.Contains(got, must) {
			t.Errorf("the control has not: %s\n%s", must, got)
		}
	}
}

// attackProcess tries everything that /proc shows of the processes given.
func attackProcess(args []string) {
	for _, pid := range args {
		dir := "/proc/" + pid + "/"
		for _, link := range []string{"exe", "cwd", "root", "ns/net", "ns/mnt", "ns/pid", "ns/user"} {
			if to, err := os.Readlink(dir + link); err == nil {
				fmt.Println(pid, link, to)
			}
		}
		for _, file := range []string{"mem", "environ", "maps", "auxv", "stack", "syscall", "io", "pagemap"} {
			f, err := os.Open(dir + file)
			if err != nil {
				continue
			}
			// Of environ and others only the reading is refused, of mem the opening.
			if n, err := f.Read(make([]byte, 16)); file == "mem" || err == nil && n > 0 {
				fmt.Println(pid, file)
			}
			f.Close()
		}
		if ents, err := os.ReadDir(dir + "fd"); err == nil {
			fmt.Println(pid, "fd", len(ents))
		}
		if n, err := strconv.Atoi(pid); err == nil {
			if err := unix.PtraceSeize(n); err == nil {
				fmt.Println(pid, "ptrace")
			}
			if pidfd, err := unix.PidfdOpen(n, 0); err == nil {
				for fd := range 40 {
					if _, err := unix.PidfdGetfd(pidfd, fd, 0); err == nil {
						fmt.Println(pid, "got descriptor", fd)
					}
				}
			}
		}
	}
}

// In a shared pid namespace the pause is process 1 for everybody. Nothing of it
// can be had, and monitors cannot even be seen.
func TestPauseIsOutOfReach(t *testing.T) {
	rootfs, secret := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "pod", "--share", "net,ipc,uts,pid")
	d.remove(t, "pod")
	d.must(t, append([]string{"run", "pod", "--rootfs", rootfs, "--name", "victim", "-d"}, sh("echo $$; exec sleep 1000")...)...)
	d.must(t, append([]string{"run", "pod", "--rootfs", rootfs, "--name", "evil", "-d", "-e", attackVar + "=process"}, sh("exec sleep 1000")...)...)
	victim := strings.TrimSpace(d.must(t, "logs", "pod/victim"))

	// That it has no descriptors may be known.
	if got := d.must(t, "exec", "pod/evil", "--", "/attacker", "1"); got != "1 fd 0\n" {
		t.Errorf("of pause a member got:\n%s", got)
	}
	got := d.must(t, "exec", "pod/evil", "--", "/attacker", victim)
	for _, must := range []string{"exe /bin/busybox", "root /", "mem", "environ", "fd 3", "ptrace"} {
		if !strings.Contains(got, victim+" "+must) {
			t.Errorf("the control, an equal process, did not give %q:\n%s", must, got)
		}
	}

	// With CAP_SYS_PTRACE it can be looked into; there is nothing of the host there.
	d.must(t, append([]string{"run", "pod", "--rootfs", rootfs, "--name", "ptracer", "--cap-add", "SYS_PTRACE", "-d", "-e", attackVar + "=process"}, sh("exec sleep 1000")...)...)
	if got := d.must(t, "exec", "pod/ptracer", "--", "/attacker", "1"); !strings.Contains(got, "1 root /") || !strings.Contains(got, "1 fd 0") || strings.Contains(got, "descriptor") {
		t.Errorf("of pause CAP_SYS_PTRACE got:\n%s", got)
	}
	if got := d.must(t, "exec", "pod/ptracer", "--", "/attacker", victim); !strings.Contains(got, "got descriptor 1") {
		t.Errorf("of the control, an equal process, CAP_SYS_PTRACE got:\n%s", got)
	}
	d.must(t, "exec", "pod/ptracer", "--", "/bin/touch", "/dev/shm/mine")
	for _, dir := range []string{"/proc/1/root", "/proc/1/cwd"} {
		if got := d.must(t, "exec", "pod/ptracer", "--", "/bin/ls", "-A", dir); got != "mine\n" {
			t.Errorf("%s holds:\n%s", dir, got)
		}
		if _, _, code := d.run(t, "exec", "pod/ptracer", "--", "/bin/cat", dir+"/.."+secret); code == 0 {
			t.Errorf("%s leads to the host", dir)
		}
	}

	script := `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done`
	if got := d.must(t, append([]string{"exec", "pod/ptracer"}, sh(script)...)...); !strings.Contains(got, "sandboxd-pause") || strings.Contains(got, "sandboxd-monitor") {
		t.Errorf("a member sees:\n%s", got)
	}
	if out, err := exec.Command("sh", "-c", script).Output(); err != nil || !strings.Contains(string(out), "sandboxd-monitor") {
		t.Errorf("the host does not see a monitor: %v", err)
	}
	d.must(t, "exec", "pod/ptracer", "--", "/bin/rm", "/dev/shm/mine")
}

// TestForgedPause: a member that bears the name and the mark of its sandbox's pause
// does not take its place, in which its root would be the /dev/shm of other members.
func TestForgedPause(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	if err := os.Rename(filepath.Join(rootfs, "attacker"), filepath.Join(rootfs, "bin/sandboxd-pause")); err != nil {
		t.Fatal(err)
	}
	r := newRigOn(t, rootfs)
	r.mustServe()
	r.ok("create", "s")
	pause := r.sandbox("s").PausePID
	argv, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pause))
	if err != nil {
		t.Fatal(err)
	}
	mark := strings.Split(string(argv), "\x00")[1]
	r.ok("run", "s", "-d", "--name", "forger", "--rootfs", rootfs, "-e", attackVar+"=idle", "--", "sh", "-c",
		"echo mine >/planted; exec sandboxd-pause "+mark+" mode=1777")
	forger := r.member("s/forger").PID
	r.eventually("the forger has its name", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", forger))
		return bytes.HasPrefix(b, []byte("sandboxd-pause\x00"))
	})
	before := r.killPause("s")
	r.eventually("there is a new pause", func() bool {
		now := r.sandbox("s").PausePID
		return now != 0 && now != before.PausePID
	})
	if now := r.sandbox("s").PausePID; now == forger {
		r.Errorf("the member is the pause")
	}
	if out := r.ok("run", "s", "--rm", "--rootfs", rootfs, "--", "ls", "/dev/shm"); out != "" {
		r.Errorf("in /dev/shm is %s", out)
	}
	r.ok("rm", "-f", "s")
}

// attackFlight looks at every process that appears, for as many seconds as the
// first argument says, and tells what it could get at, once each. The second is
// the name of a file that only the host has.
func attackFlight(args []string) {
	runtime.LockOSThread() // a tracer is a thread
	seconds, _ := strconv.Atoi(args[0])
	canary := args[1]
	told := map[string]bool{}
	tell := func(a ...any) {
		if s := fmt.Sprintln(a...); !told[s] {
			told[s] = true
			fmt.Print(s)
		}
	}
	self := os.Getpid()
	known := map[int]bool{}
	fd, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		tell("open /proc:", err)
		return
	}
	pids := func(yield func(int)) {
		unix.Seek(fd, 0, io.SeekStart)
		buf := make([]byte, 1<<16)
		for {
			n, err := unix.Getdents(fd, buf)
			if err != nil || n <= 0 {
				return
			}
			_, _, names := unix.ParseDirent(buf[:n], -1, nil)
			for _, name := range names {
				if pid, err := strconv.Atoi(name); err == nil {
					yield(pid)
				}
			}
		}
	}
	pids(func(pid int) { known[pid] = true })
	for end := time.Now().Add(time.Duration(seconds) * time.Second); time.Now().Before(end); {
		pids(func(pid int) {
			if pid == self || known[pid] {
				return
			}
			dir := fmt.Sprintf("/proc/%d/", pid)
			exe, err := os.Readlink(dir + "exe")
			switch {
			case errors.Is(err, os.ErrPermission):
				tell("refused exe") // in flight, and seen to be
			case err == nil && exe != "/bin/busybox" && exe != "/attacker":
				tell("ESCAPE exe", exe)
			case err == nil:
				tell("exe", exe)
				known[pid] = true // it has arrived
			}
			if f, err := os.OpenFile(dir+"exe", os.O_WRONLY, 0); err == nil {
				tell("ESCAPE exe for writing", exe)
				f.Close()
			}
			if _, err := os.Stat(dir + "root" + canary); err == nil {
				tell("ESCAPE root")
			}
			if _, err := os.Stat(dir + "cwd/../../../../../../../.." + canary); err == nil {
				tell("ESCAPE cwd")
			}
			if f, err := os.OpenFile(dir+"mem", os.O_RDWR, 0); err == nil {
				// Whose memory it is, is known only now.
				if exe, err := os.Readlink(dir + "exe"); err == nil && exe != "/bin/busybox" && exe != "/attacker" {
					tell("ESCAPE mem", exe)
				}
				f.Close()
			}
			ents, _ := os.ReadDir(dir + "fd")
			for _, e := range ents {
				if to, err := os.Readlink(dir + "fd/" + e.Name()); err == nil {
					if n, _ := strconv.Atoi(e.Name()); n > 2 && !strings.HasPrefix(to, "/proc/") {
						tell("ESCAPE fd", e.Name(), to)
					}
				}
				if _, err := os.Stat(dir + "fd/" + e.Name() + canary); err == nil {
					tell("ESCAPE fd leads to the host")
				}
			}
			if err := unix.PtraceSeize(pid); err == nil {
				if exe, err := os.Readlink(dir + "exe"); err == nil && exe != "/bin/busybox" && exe != "/attacker" {
					tell("ESCAPE ptrace", exe)
				}
				// Let go of it, or whoever waits for its end waits for ours.
				unix.PtraceInterrupt(pid)
				unix.Wait4(pid, nil, unix.WALL, nil)
				unix.PtraceDetach(pid)
			}
		})
	}
}

// A member watches the processes of a shared pid namespace while the host starts
// others there by every way there is, and never catches one on which something of
// the host hangs.
func TestNothingIsCaughtInFlight(t *testing.T) {
	rootfs, secret := hostileRootfs(t)
	evil := filepath.Join(rootfs, "evil")
	// What the kernel executes for it is the executable of who executes it
	// (CVE-2019-5736).
	if err := os.WriteFile(evil, []byte("#!/proc/self/exe\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := sum(t, binary)
	d := startWarm(t, rootfs)
	d.must(t, "create", "pod", "--share", "net,ipc,uts,pid")
	d.remove(t, "pod")
	d.must(t, append([]string{"run", "pod", "--rootfs", rootfs, "--name", "victim", "-d"}, sh("exec sleep 1000")...)...)
	const seconds = 6
	d.must(t, "run", "pod", "--rootfs", rootfs, "--name", "evil", "-d", "-e", attackVar+"=flight", "--", "/attacker", strconv.Itoa(seconds), secret)
	n := 0
	for end := time.Now().Add((seconds - 1) * time.Second); time.Now().Before(end); n++ {
		d.must(t, "exec", "pod/victim", "--", "/bin/true")
		d.run(t, "exec", "pod/evil", "--", "/bin/true") // it may have ended
		d.must(t, "exec", "-w", "/tmp", "-u", "1000", "pod/victim", "--", "/bin/sleep", "0.01")
		d.must(t, "join", "pod/victim", "--", "/bin/true")
		d.must(t, "run", "pod", "--rootfs", rootfs, "--rm", "--", "/bin/true")
	}
	d.run(t, "wait", "pod/evil")
	got := d.must(t, "logs", "pod/evil")
	t.Logf("in %d rounds:\n%s", n, got)
	if strings.Contains(got, "ESCAPE") {
		t.Errorf("in %d rounds a member got at:\n%s", n, got)
	}
	// It saw them, and at the time at which there was something to be had.
	for _, must := range []string{"exe /bin/busybox\n", "refused exe\n"} {
		if !strings.Contains(got, must) {
			t.Errorf("the attacker was too slow: in %d rounds there was no %q", n, must)
		}
	}
	for range 3 {
		if _, _, code := d.run(t, "exec", "pod/victim", "--", "/evil"); code == 0 {
			t.Error("the interpreter /proc/self/exe did something")
		}
	}
	if sum(t, binary) != before {
		t.Errorf("%s was changed", binary)
	}
	d.must(t, "exec", "pod/victim", "--", "/bin/true")
}

func sum(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// attackExe tries to write to what the process given is executing.
func attackExe(args []string) {
	for _, pid := range args {
		f, err := os.OpenFile("/proc/"+pid+"/exe", os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			fmt.Println("wrote to the executable of", pid)
		}
	}
}

// The executables of pause and monitor are nobody's to change, not even root's on
// the host, whose control is a file like theirs without seals.
func TestExecutablesAreSealed(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "pod", "--share", "pid")
	d.remove(t, "pod")
	d.must(t, append([]string{"run", "pod", "--rootfs", rootfs, "--name", "m", "-d"}, sh("exec sleep 1000")...)...)
	out, err := exec.Command("sh", "-c", `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -q "^sandboxd-\(pause\|monitor\) " && echo ${p#/proc/}; done`).Output()
	pids := strings.Fields(string(out))
	if len(pids) < 2 {
		t.Fatalf("found %v: %v", pids, err)
	}
	if got := control(t, "exe", pids...); got != "" {
		t.Error(got)
	}
	fd, err := unix.MemfdCreate("control", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Errorf("the control cannot be written: %v", err)
	}
}

// Everything that is started has descriptors 0, 1 and 2 and no other, whatever
// the one who starts it has open.
func TestNoDescriptorLeaks(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "dead"}, sh("exit 0")...)...)
	host, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	const list = "ls /proc/self/fd | tr '\\n' ' '"
	const want = "0 1 2 3 " // the last is ls's own
	for _, args := range [][]string{
		append([]string{"run", "web", "--rootfs", rootfs, "--rm"}, sh(list)...),
		append([]string{"run", "-i", "web", "--rootfs", rootfs, "--rm"}, sh(list)...),
		append([]string{"exec", "web/up"}, sh(list)...),
		append([]string{"exec", "-i", "web/up"}, sh(list)...),
		append([]string{"join", "web/up"}, sh(list)...),
		append([]string{"join", "web/dead"}, sh(list)...),
		append([]string{"join", "web"}, sh(list)...),
		append([]string{"join", "--rootfs", rootfs, "--ns", "pid=member:up", "web"}, sh("mount -t proc p /proc && "+list)...),
	} {
		cmd := d.command(args...)
		cmd.ExtraFiles = []*os.File{host, nil, host, host}
		out, err := cmd.CombinedOutput()
		if args[1] == "--rootfs" {
			continue // a plain chroot has no mounts of its own to make
		}
		if err != nil || string(out) != want {
			t.Errorf("%q: %q, %v; want %q", args, out, err, want)
		}
	}
	cmd := exec.Command("/bin/sh", "-c", list)
	cmd.ExtraFiles = []*os.File{host}
	if out, err := cmd.CombinedOutput(); err != nil || string(out) == want {
		t.Errorf("the control, which has one more, shows %q, %v", out, err)
	}
}

// A working directory that leads through a descriptor leads nowhere
// (CVE-2024-21626).
func TestWorkingDirectoryIsInside(t *testing.T) {
	rootfs, secret := hostileRootfs(t)
	for n := range 40 {
		if err := os.Symlink(fmt.Sprintf("/proc/self/fd/%d", n), filepath.Join(rootfs, fmt.Sprintf("fd%d", n))); err != nil {
			t.Fatal(err)
		}
	}
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	// The caller itself has the host's root open, at many numbers.
	host, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	var open []*os.File
	for range 9 {
		open = append(open, host)
	}
	script := `for up in . .. ../.. ../../.. ../../../../../../../..; do cat "$up$0" && exit 0; done 2>/dev/null; exit 9`
	for n := range 48 {
		for _, dir := range []string{fmt.Sprintf("/proc/self/fd/%d", n), fmt.Sprintf("/fd%d", n), fmt.Sprintf("/proc/self/fd/%d/../..", n)} {
			for _, args := range [][]string{
				append([]string{"exec", "-w", dir, "web/up"}, append(sh(script), secret)...),
				append([]string{"run", "-w", dir, "web", "--rootfs", rootfs, "--rm"}, append(sh(script), secret)...),
			} {
				if n > 12 && dir[0:3] != "/pr" || n > 12 && args[0] == "run" && n%2 == 0 {
					continue // enough of each
				}
				cmd := d.command(args...)
				cmd.ExtraFiles = open
				if out, err := cmd.Output(); err == nil || bytes.Contains(out, []byte("secret")) {
					t.Errorf("%s -w %s leads to the host: %q", args[0], dir, out)
				}
			}
		}
	}
	cmd := exec.Command("/bin/sh", append(sh(script)[2:], secret)...)
	cmd.Dir = "/usr"
	if out, err := cmd.Output(); err != nil || !strings.Contains(string(out), "secret") {
		t.Errorf("the control, with a directory of the host, finds nothing: %v", err)
	}
}

// attackSwap exchanges two names until it is killed.
func attackSwap(args []string) {
	fmt.Println("swapping")
	for {
		if err := unix.Renameat2(unix.AT_FDCWD, args[0], unix.AT_FDCWD, args[1], unix.RENAME_EXCHANGE); err != nil {
			fmt.Println(err)
			return
		}
	}
}

// A member that exchanges directories for links to the host's, while files are
// copied out of and into them, gets nothing read and nothing written there.
func TestCopiesAreNotLedOut(t *testing.T) {
	rootfs, secret := hostileRootfs(t)
	outside := filepath.Dir(secret)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "m", "-d", "-e", attackVar + "=swap"},
		append(sh(`mkdir -p /d/dir /d/deep/a/b && echo inside >/d/dir/secret && echo inside >/d/deep/a/b/secret && ln -s "$0" /d/link && ln -s ../../../../../../../.."$0" /d/deep/a/up || exit
			/attacker /d/dir /d/link &
			exec /attacker /d/deep/a/b /d/deep/a/up`), outside)...)...)
	init := memberPID(t, d, "web/m")
	from := filepath.Join(t.TempDir(), "planted")
	if err := os.WriteFile(from, []byte("planted"), 0o644); err != nil {
		t.Fatal(err)
	}
	led, copied, rounds := 0, 0, 0
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); rounds++ {
		for _, path := range []string{"/d/dir/secret", "/d/dir", "/d", "/d/dir/.", "/d/deep/a/b/secret", "/d/deep"} {
			to := filepath.Join(t.TempDir(), "out")
			d.run(t, "cp", "-q", "web/m:"+path, to)
			filepath.WalkDir(to, func(path string, e os.DirEntry, err error) error {
				if err != nil || !e.Type().IsRegular() {
					return nil
				}
				if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte("host")) {
					t.Errorf("a copy of %s holds %q", path, b)
				} else if string(b) == "inside\n" {
					copied++
				}
				return nil
			})
		}
		d.run(t, "cp", "-q", from, "web/m:/d/dir/")
		d.run(t, "cp", "-q", from, "web/m:/d/deep/a/b/secret")
		d.run(t, "cp", "-q", filepath.Dir(from), "web/m:/d/dir")
		// The control: who follows the path of the process's root is led out.
		for range 50 {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/d/dir/secret", init)); err == nil && bytes.Contains(b, []byte("host")) {
				led++
			}
		}
	}
	if ents, err := os.ReadDir(outside); err != nil || len(ents) != 1 {
		t.Errorf("outside there is %v, %v; want the secret alone", ents, err)
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "the host's secret\n" {
		t.Errorf("the secret is %q, %v", b, err)
	}
	if led == 0 || copied == 0 {
		t.Errorf("in %d rounds the control was led out %d times and %d files were copied: some of each were expected", rounds, led, copied)
	}
	t.Logf("%d rounds: %d files copied; the control was led out %d times", rounds, copied, led)
}

// memberPID returns the pid of a member's init on the host.
func memberPID(t *testing.T, d *daemon, ref string) int {
	t.Helper()
	for line := range strings.Lines(d.must(t, "inspect", ref)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), `"pid": `); ok {
			pid, err := strconv.Atoi(strings.TrimSuffix(v, ","))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("inspect %s shows no pid", ref)
	return 0
}

// An image whose mount points are links to somewhere else is mounted on inside,
// or refused; nothing outside is touched.
func TestHostileImages(t *testing.T) {
	rootfs, secret := hostileRootfs(t)
	outside := t.TempDir()
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--rm"}, sh("exit 0")...)...) // makes what a sandbox has once
	link := func(name, to string) func(*testing.T, string) {
		return func(t *testing.T, root string) {
			if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	up := strings.Repeat("../", 20)
	fifo := func(name string) func(*testing.T, string) {
		return func(t *testing.T, root string) {
			os.Remove(filepath.Join(root, name))
			if err := unix.Mkfifo(filepath.Join(root, name), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, root string)
		args    []string
		want    []string // of the error; nil: it must run
	}{
		{"dev to the host", link("dev", outside), nil, []string{"/dev"}},
		{"dev upwards", link("dev", up+outside), nil, []string{"/dev"}},
		{"proc to tmp", link("proc", "/tmp"), nil, []string{"/proc"}},
		{"proc to the root", link("proc", "/"), nil, []string{"/proc"}},
		{"proc below a link", func(t *testing.T, root string) {
			link("sys", "/")(t, root)
			link("proc", "/sys")(t, root)
		}, nil, []string{"/proc"}},
		{"proc to itself", link("proc", "/proc"), nil, []string{"/proc"}},
		{"sys upwards", link("sys", up), nil, []string{"/sys"}},
		{"etc to the host", link("etc", outside), nil, nil},
		{"passwd is a fifo", fifo("etc/passwd"), []string{"-u", "joe"}, []string{"/etc/passwd", "not a regular file"}},
		{"group is a fifo", fifo("etc/group"), []string{"-u", "0:joe"}, []string{"/etc/group", "not a regular file"}},
		{"passwd is the host's", link("etc/passwd", "/etc/passwd"), []string{"-u", "daemon"}, []string{"daemon"}},
		{"passwd is upwards", link("etc/passwd", up+"etc/passwd"), []string{"-u", "daemon"}, []string{"daemon"}},
		{"passwd is a secret", link("etc/passwd", secret), []string{"-u", "joe"}, []string{"joe"}},
		{"passwd is of a process", link("etc/passwd", "/proc/self/root/etc/passwd"), []string{"-u", "daemon"}, []string{"daemon"}},
		{"passwd is endless", func(t *testing.T, root string) {
			if err := os.Truncate(filepath.Join(root, "etc/passwd"), 1<<30); err != nil {
				t.Fatal(err)
			}
		}, []string{"-u", "joe"}, []string{"/etc/passwd", "larger"}},
		{"passwd is a directory", func(t *testing.T, root string) {
			os.Remove(filepath.Join(root, "etc/passwd"))
			os.Mkdir(filepath.Join(root, "etc/passwd"), 0o755)
		}, []string{"-u", "joe"}, []string{"/etc/passwd", "not a regular file"}},
		{"a volume on a link to the host", link("vol", outside), []string{"-v", "/etc:/vol/deep/er"}, []string{"/vol/deep/er"}},
		{"a volume on a link upwards", link("vol", up+outside), []string{"-v", "/etc:/vol/deep"}, []string{"/vol/deep"}},
		{"a volume on a link that leads inside", func(t *testing.T, root string) {
			if err := os.MkdirAll(root+outside, 0o755); err != nil {
				t.Fatal(err)
			}
			link("vol", outside)(t, root)
		}, []string{"-v", "/etc:/vol/deep/er"}, nil},
		{"a volume on a link of a process", link("vol", "/proc/1/root"), []string{"-v", "/etc:/vol/deep"}, []string{"/vol"}},
		{"a tmpfs on a link to the host", link("vol", outside), []string{"--tmpfs", "/vol/x"}, []string{"/vol/x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			if out, err := exec.Command("cp", "-a", rootfs, root).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			tt.prepare(t, root)
			w := d.look(t)
			args := append(append([]string{"run", "web", "--rootfs", root, "--rm"}, tt.args...), "--", "/bin/true")
			stdout, stderr, code := d.run(t, args...)
			if code != 0 {
				checkRefusal(t, refusal{want: tt.want, code: code}, stdout, stderr, code)
			}
			if (code == 0) != (tt.want == nil) {
				t.Errorf("exit code %d, %s", code, stderr)
			}
			w.unchanged(t)
			if ents, err := os.ReadDir(outside); err != nil || len(ents) != 0 {
				t.Errorf("outside there is %v, %v", ents, err)
			}
			if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(outside)) {
				t.Error("something is mounted outside")
			}
		})
	}
}

// attackTTY types into the terminal that is its stdin, and tries to make it its own.
func attackTTY([]string) {
	c := byte('x')
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, 0, unix.TIOCSTI, uintptr(unsafe.Pointer(&c))); e == 0 {
		fmt.Println("typed")
	}
	for arg := range 2 {
		if err := unix.IoctlSetInt(0, unix.TIOCSCTTY, arg); err == nil {
			fmt.Println("took the terminal")
		}
	}
	if fd, err := unix.Open("/dev/tty", unix.O_RDWR, 0); err == nil {
		fmt.Println("has a terminal")
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCSTI, uintptr(unsafe.Pointer(&c))); e == 0 {
			fmt.Println("typed")
		}
	}
}

// openPty returns the two ends of a terminal of the host.
func openPty(t *testing.T) (master, slave *os.File) {
	t.Helper()
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if err := unix.IoctlSetPointerInt(int(m.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(m.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	s, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return m, s
}

// Who runs a command in a member from a terminal does not give it that terminal to
// type on, although it is its stdin.
func TestTerminalOfTheCallerIsNotTaken(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	inTerminal := func(cmd *exec.Cmd) string {
		_, slave := openPty(t)
		var out bytes.Buffer
		cmd.Env = append(cmd.Env, attackVar+"=") // for the attacker alone
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, &out, &out
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
		if err := cmd.Run(); err != nil {
			t.Fatalf("%q: %v: %s", cmd.Args, err, out.String())
		}
		return out.String()
	}
	for _, args := range [][]string{
		{"exec", "-i", "-e", attackVar + "=tty", "web/up", "--", "/attacker"},
		{"join", "-i", "-e", attackVar + "=tty", "web/up", "--", "/attacker"},
	} {
		if got := inTerminal(d.command(args...)); got != "" {
			t.Errorf("%s: a member got:\n%s", args[0], got)
		}
	}
	cmd := exec.Command("/bin/sh", "-c", attackVar+"=tty exec "+filepath.Join(rootfs, "attacker"))
	cmd.Env = os.Environ()
	if got := inTerminal(cmd); !strings.Contains(got, "has a terminal") {
		t.Errorf("the control, in the same terminal, got:\n%s", got)
	}
}

// What a member writes is data, whatever it looks like: it forges no line of the
// log, and takes nothing from others.
func TestLogIsOnlyData(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	forged := "2020-01-01T00:00:00.000000000Z stderr F forged"
	script := `printf '\033]0;owned\007\n%s\n\r\0\n' "$0"`
	_, _, code := d.run(t, append(append([]string{"run", "web", "--rootfs", rootfs, "--name", "m"}, sh(script)...), forged)...)
	if code != 0 {
		t.Fatal(code)
	}
	if got, want := d.must(t, "logs", "web/m"), "\x1b]0;owned\a\n"+forged+"\n\r\x00\n"; got != want {
		t.Errorf("logs are %q, want %q", got, want)
	}
	for line := range strings.Lines(d.must(t, "logs", "--timestamps", "web/m")) {
		if strings.HasPrefix(line, "2020") {
			t.Errorf("a forged line is taken for true: %q", line)
		}
	}
	// A member that reads from its own stdout takes from its own log, at most.
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "thief", "-d"}, sh(`while :; do timeout 1 head -c 1 </dev/stdout; done >/dev/null 2>&1`)...)...)
	if got := d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "other"}, sh("echo mine")...)...); got != "mine\n" {
		t.Errorf("another member's output is %q", got)
	}
}

// A member that forks without end, and minds no signal, is stopped all the same.
func TestForkBomb(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	// A shell that cannot fork exits, and with init the member: it only waits.
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--name", "bomb", "--pids-limit", "60", "-d"}, sh(`trap '' TERM HUP INT
		i=0; while [ $i -lt 50 ]; do sleep 1000 & i=$((i+1)); done; f() { f | f & f; }; (while :; do (f) 2>/dev/null; done) & exec sleep 1000`)...)...)
	deadline := time.Now().Add(ready)
	for n := 0; n < 50; {
		n = processes(t, filepath.Join(d.parent))
		if time.Now().After(deadline) {
			t.Fatalf("the bomb has only %d processes", n)
		}
	}
	if n := processes(t, d.parent); n > 70 {
		t.Errorf("there are %d processes, the limit is 60", n)
	}
	begin := time.Now()
	d.must(t, "stop", "--time", "1s", "web/bomb")
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("it took %s to stop", took)
	}
	// Pause and monitor.
	if n := processes(t, d.parent); n > 2 {
		t.Errorf("%d processes are left", n)
	}
}

// processes counts those in the cgroups below parent, in the hierarchy that has
// the most.
func processes(t *testing.T, parent string) int {
	t.Helper()
	dirs, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	most := 0
	for _, dir := range dirs {
		n := 0
		filepath.WalkDir(filepath.Join(dir, parent), func(path string, e os.DirEntry, err error) error {
			if err == nil && e.Name() == "cgroup.procs" {
				if b, err := os.ReadFile(path); err == nil {
					n += bytes.Count(b, []byte("\n"))
				}
			}
			return nil
		})
		most = max(most, n)
	}
	return most
}

// The sandbox's /dev/shm and a tmpfs end where they were told to.
func TestMemoryOfFilesIsBounded(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web", "--shm-size", "1m")
	d.remove(t, "web")
	out := d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--tmpfs", "/mnt:size=1m"}, sh(`for f in /dev/shm/x /mnt/x; do dd if=/dev/zero of=$f bs=64k count=64 2>/dev/null; stat -c %s $f; done; dd if=/dev/zero of=/tmp/x bs=64k count=64 2>/dev/null; stat -c %s /tmp/x`)...)...)
	if want := "1048576\n1048576\n4194304\n"; out != want {
		t.Errorf("files have %q bytes, want %q: the last, on the root, is the control", out, want)
	}
}

// A member that may mount hides what it has, and cannot lead those who come from
// the host out of its root.
func TestMountingMember(t *testing.T) {
	rootfs, secret := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "--cap-add", "SYS_ADMIN", "--name", "m", "-d"}, append(sh(`
		mkdir -p /fake/self /fake/1 /x &&
		ln -s "$0" /fake/self/fd && ln -s / /fake/1/root && mount --bind /fake /proc && mount -t tmpfs t /x &&
		ln -s "$0" /x/link && mkdir /x/etc && mount --bind /x/etc /etc && ln -s "$0" /etc/passwd && ln -s "$0" /etc/group &&
		mount -t tmpfs t /dev && ln -s "$0" /dev/pts && ln -s "$0" /dev/null && echo done; exec sleep 1000`), secret)...)...)
	for deadline := time.Now().Add(ready); !strings.Contains(d.must(t, "logs", "web/m"), "done"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the member could not mount: %s", d.must(t, "logs", "web/m"))
		}
	}
	for _, args := range [][]string{
		{"cp", "web/m:/x/link", "-"},
		{"cp", "web/m:/etc/passwd", "-"},
		{"cp", "web/m:/x/link/", "-"},
		{"cp", "web/m:/proc/1/root" + secret, "-"},
		{"cp", "web/m:/proc/self/fd", "-"},
		{"exec", "-u", "daemon", "web/m", "--", "/bin/cat", "/etc/passwd"},
		{"exec", "web/m", "--", "/bin/cat", "/x/link"},
		{"exec", "web/m", "--", "/bin/cat", "/proc/1/root" + secret},
		{"join", "web/m", "--", "/bin/cat", "/proc/self/fd"},
		{"exec", "-w", "/proc/1/root", "web/m", "--", "/bin/cat", "." + secret},
	} {
		if out, stderr, _ := d.run(t, args...); strings.Contains(out+stderr, "the host's secret") {
			t.Errorf("%q is led out: %q", args, out)
		}
	}
	// The control: who follows the path of the process's root is led out.
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/x/link", memberPID(t, d, "web/m"))); err != nil || !bytes.Contains(b, []byte("the host's secret")) {
		t.Errorf("the control reads %q, %v", b, err)
	}
	// It is all still usable.
	if got := d.must(t, "exec", "web/m", "--", "/bin/echo", "in"); got != "in\n" {
		t.Errorf("exec: %q", got)
	}
	d.must(t, "kill", "web/m")
	d.run(t, "wait", "web/m")
	if got := d.must(t, "join", "web/m", "--", "/bin/ls", "/x"); got != "etc\nlink\n" {
		t.Errorf("join: %q", got)
	}
}

func TestNoNewPrivileges(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	if err := unix.Chmod(filepath.Join(rootfs, "attacker"), 0o4755); err != nil {
		t.Fatal(err)
	}
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	for nnp, want := range map[bool]string{true: "1000\n", false: "0\n"} {
		dir := bundle(t, rootfs, func(c map[string]any) {
			p := c["process"].(map[string]any)
			p["args"], p["env"] = []any{"/attacker"}, []any{attackVar + "=euid"}
			p["user"], p["noNewPrivileges"] = map[string]any{"uid": 1000, "gid": 1000}, nnp
		})
		if got := d.must(t, "run", "web", "--bundle", dir, "--rm"); got != want {
			t.Errorf("with noNewPrivileges %t a setuid program is user %q, want %q", nnp, got, want)
		}
	}
}

// A device node that a member makes is of no use to it.
func TestMadeDevicesAreRefused(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	// Kernel log, loop devices and memory are nobody's; /dev/zero is everybody's.
	script := `for n in "1 11 kmsg" "10 237 loop-control" "1 1 mem" "1 5 zero"; do set -- $n; mknod node-$3 c $1 $2 && (exec 3<node-$3) 2>/dev/null && echo opened $3; rm -f node-$3; done; true`
	if got := d.must(t, append([]string{"run", "web", "--rootfs", rootfs, "-w", "/tmp"}, sh(script)...)...); got != "opened zero\n" {
		t.Errorf("a member has:\n%s", got)
	}
	for name, rules := range map[string][]any{
		"no rules":              nil,
		"no device for anybody": {map[string]any{"allow": false, "access": "rwm"}},
	} {
		dir := bundle(t, rootfs, func(c map[string]any) {
			p := c["process"].(map[string]any)
			p["args"], p["cwd"], p["env"] = []any{"/bin/sh", "-c", script}, "/mnt", []any{"PATH=/bin"}
			caps := []any{"CAP_MKNOD", "CAP_SYSLOG", "CAP_SYS_RAWIO", "CAP_DAC_OVERRIDE"}
			p["capabilities"] = map[string]any{"bounding": caps, "effective": caps, "permitted": caps}
			c["mounts"] = append(c["mounts"].([]any), map[string]any{"destination": "/mnt", "type": "tmpfs", "source": "t"})
			c["linux"].(map[string]any)["resources"] = map[string]any{"devices": rules}
		})
		if got := d.must(t, "run", "web", "--bundle", dir, "--rm"); got != "opened zero\n" {
			t.Errorf("with a bundle of %s a member has:\n%s", name, got)
		}
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "opened kmsg") {
		t.Errorf("the control, on the host, has:\n%s%v", out, err)
	}
}

const secretKey = "sandboxd-e2e-secret"

// attackKeyring looks for a key of the host's.
func attackKeyring([]string) {
	for _, ring := range []int{-1, -2, -3, -4, -5} { // thread, process, session, user, user session (keyctl(2))
		if id, err := unix.KeyctlSearch(ring, "user", secretKey, 0); err == nil {
			fmt.Println("found the key", id > 0, ring == -3)
		}
	}
}

// The keys of who started the daemon are not the members', also without seccomp.
func TestKeyringIsNotShared(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	d := startWarm(t, rootfs)
	d.must(t, "create", "web")
	d.remove(t, "web")
	dir := bundle(t, rootfs, func(c map[string]any) {
		p := c["process"].(map[string]any)
		p["args"], p["env"] = []any{"/attacker"}, []any{attackVar + "=keyring"}
	})
	// A session keyring with a key in it, which the daemon and all others that are
	// started from here inherit. It is the thread's, and goes with it.
	runtime.LockOSThread()
	if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.AddKey("user", secretKey, []byte("x"), unix.KEY_SPEC_SESSION_KEYRING); err != nil {
		t.Fatal(err)
	}
	d.kill(t)
	d.start(t)
	if got := control(t, "keyring"); !strings.Contains(got, "found") {
		t.Fatal("the control does not find the key")
	}
	if got := d.must(t, "run", "web", "--bundle", dir, "--name", "m"); got != "" {
		t.Errorf("run: a member %s", got)
	}
	if got := d.must(t, "join", "web/m", "--", "/attacker"); got != "" {
		t.Errorf("join: a member %s", got)
	}
}

// In a user namespace a member's root is nobody on the host, and has what its
// range of ids has.
func TestUserNamespace(t *testing.T) {
	rootfs, _ := hostileRootfs(t)
	testenv.Kernel(t, testenv.UserNS)
	testenv.Kernel(t, testenv.IDMap)
	d := startWarm(t, rootfs)
	d.must(t, "create", "box", "--share", "user,net,ipc,uts")
	d.remove(t, "box")
	vol := t.TempDir()
	for name, uid := range map[string]int{"root": 0, "user": 1000, "unmapped": 70000} {
		path := filepath.Join(vol, name)
		if err := os.WriteFile(path, []byte(name+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	out := d.must(t, append([]string{"run", "box", "--rootfs", rootfs, "--name", "m", "-v", vol + ":/mnt"},
		sh(`cat /mnt/root /mnt/user; cat /mnt/unmapped 2>/dev/null; chown 0 /mnt/unmapped 2>/dev/null && echo taken; touch /mnt/made; su -s /bin/sh nobody -c true; id -u; mknod /tmp/n b 7 0 2>/dev/null && echo node; chown 70000 /mnt/made 2>/dev/null && echo given; true`)...)...)
	if want := "root\nuser\n0\n"; out != want {
		t.Errorf("the member wrote %q, want %q", out, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(vol, "made"), &st); err != nil || st.Uid != 0 {
		t.Errorf("the file that its root made belongs to %d, %v; a volume is idmapped: want 0", st.Uid, err)
	}
	d.must(t, append([]string{"run", "box", "--rootfs", rootfs, "--name", "up", "-d"}, sh("exec sleep 1000")...)...)
	if err := unix.Stat(fmt.Sprintf("/proc/%d", memberPID(t, d, "box/up")), &st); err != nil || st.Uid < 1<<16 {
		t.Errorf("its root is user %d on the host, %v", st.Uid, err)
	}
	// The control has no user namespace, and its root is root.
	d.must(t, "create", "plain")
	d.remove(t, "plain")
	if out := d.must(t, append([]string{"run", "plain", "--rootfs", rootfs, "-v", vol + ":/mnt:ro"}, sh("cat /mnt/unmapped")...)...); out != "unmapped\n" {
		t.Errorf("the control wrote %q", out)
	}
}
