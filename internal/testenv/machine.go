package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Capability needs capability c, a unix.CAP_ constant, in the effective set. The
// requirement is called by capabilities(7)'s name in lower case, as
// "cap_sys_resource".
func Capability(tb testing.TB, c int) {
	tb.Helper()
	need(tb, capName(c), haveCap(c))
}

// haveCap reports whether the calling thread has c.
func haveCap(c int) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&hdr, &data[0])
	if err == nil && data[c/32].Effective&(1<<(c%32)) == 0 {
		err = errors.New("not in the effective set")
	}
	return err
}

// capName names the capabilities that some virtual machines and containers take
// from their root; any other one has only its number.
func capName(c int) string {
	switch c {
	case unix.CAP_NET_ADMIN:
		return "cap_net_admin"
	case unix.CAP_SYS_ADMIN:
		return "cap_sys_admin"
	case unix.CAP_SYS_PTRACE:
		return "cap_sys_ptrace"
	case unix.CAP_SYS_RESOURCE:
		return "cap_sys_resource"
	case unix.CAP_SYS_TIME:
		return "cap_sys_time"
	case unix.CAP_MKNOD:
		return "cap_mknod"
	case unix.CAP_SETFCAP:
		return "cap_setfcap"
	default:
		return fmt.Sprintf("cap_%d", c)
	}
}

// Feature is something of the kernel that not every supported one has, or that
// can be configured away. Its value is its name in the requirement
// "kernel:NAME".
type Feature string

// The features that tests ask for, with the version that brought them where it
// is newer than the oldest kernel supported, 5.10.
const (
	Overlay    Feature = "overlay"    // file system type overlay
	TimeNS     Feature = "timens"     // /proc/self/ns/time, CONFIG_TIME_NS
	UserNS     Feature = "userns"     // user namespaces, not limited to 0 of them
	CgroupKill Feature = "cgroupkill" // cgroup.kill in the v2 hierarchy (5.14)
	IDMap      Feature = "idmap"      // mount_setattr (5.12); the file system under it must support it too
	PIDFDInfo  Feature = "pidfdinfo"  // PIDFD_GET_INFO with the exit status (6.15)
	Seccomp    Feature = "seccomp"    // seccomp filters
	IPVLAN     Feature = "ipvlan"     // links of kind ipvlan
	CoreFile   Feature = "corefile"   // core_pattern is a relative name, so that cores are files of who dumps them

	FUSE            Feature = "fuse"        // /dev/fuse
	BridgeNetfilter Feature = "brnetfilter" // br_netfilter, built in or loaded
)

// Kernel needs feature f. It is tried, never derived from a version.
func Kernel(tb testing.TB, f Feature) {
	tb.Helper()
	need(tb, "kernel:"+string(f), probe(f))
}

func probe(f Feature) error {
	switch f {
	case Overlay:
		b, err := os.ReadFile("/proc/filesystems")
		if err == nil && !bytes.Contains(b, []byte("\toverlay\n")) {
			err = errors.New("overlay is not in /proc/filesystems")
		}
		return err
	case TimeNS:
		_, err := os.Stat("/proc/self/ns/time")
		return err
	case UserNS:
		b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
		if err == nil && strings.TrimSpace(string(b)) == "0" {
			err = errors.New("user.max_user_namespaces is 0")
		}
		return err
	case CgroupKill:
		return probeCgroupKill()
	case IDMap:
		// With an empty path and no attributes to change nothing happens, where
		// the call exists.
		err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{})
		if errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("mount_setattr: %w", err)
		}
		return nil
	case CoreFile:
		return probeCorePattern()
	case PIDFDInfo:
		return probePIDFDInfo()
	case FUSE:
		f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
		if err == nil {
			err = f.Close()
		}
		return err
	case BridgeNetfilter:
		_, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables")
		return err
	case Seccomp:
		_, err := os.Stat("/proc/sys/kernel/seccomp/actions_avail")
		return err
	case IPVLAN:
		// None is made of a parent that is not there. A kind that the kernel does
		// not know, and finds no module for, is EOPNOTSUPP.
		err := netlink.LinkAdd(&netlink.IPVlan{LinkAttrs: netlink.LinkAttrs{Name: "sandboxd-probe", ParentIndex: math.MaxInt32}})
		if !errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		return fmt.Errorf("link of kind ipvlan: %w", err)
	default:
		return fmt.Errorf("no such feature: %q", f)
	}
}

// probeCgroupKill looks for the file in a cgroup that is not the root, which
// never has it.
func probeCgroupKill() error {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		dir, err := os.MkdirTemp(root, "sandboxd-testenv-")
		if err != nil {
			return err
		}
		_, err = os.Stat(filepath.Join(dir, "cgroup.kill"))
		return errors.Join(err, os.Remove(dir))
	}
	return errors.New("the v2 hierarchy is not mounted")
}

// probePIDFDInfo asks for the exit status of a process that has been reaped.
func probeCorePattern() error {
	b, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		return err
	}
	if p := strings.TrimSpace(string(b)); p == "" || p[0] == '|' || p[0] == '/' {
		return fmt.Errorf("core_pattern is %q", p)
	}
	return nil
}

func probePIDFDInfo() error {
	fd := -1
	cmd := exec.Command("true")
	cmd.SysProcAttr = &unix.SysProcAttr{PidFD: &fd}
	if err := cmd.Run(); err != nil {
		return err
	}
	defer unix.Close(fd)
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if err := unix.IoctlPidfdInfo(fd, &info); err != nil {
		return fmt.Errorf("PIDFD_GET_INFO: %w", err)
	}
	if info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return errors.New("PIDFD_GET_INFO gives no exit status")
	}
	return nil
}

// Busybox needs a static busybox and returns a new directory with a root file
// system made of it: applets in /bin, /etc/passwd and /etc/group with root and
// nobody, empty /dev, /proc, /sys, /run, /root, /var, /mnt, and a /tmp for all.
// The files belong to root. It is removed with the test.
func Busybox(tb testing.TB) string {
	tb.Helper()
	rootfs := filepath.Join(tb.TempDir(), "rootfs")
	bin := Program(tb, "busybox")
	if err := makeBusybox(rootfs, bin); err != nil {
		tb.Fatalf("making a root file system of %s: %v", bin, err)
	}
	return rootfs
}

func makeBusybox(rootfs, bin string) error {
	for _, dir := range []string{"bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			return err
		}
	}
	// Not in MkdirAll's mode, which the umask narrows.
	if err := os.Chmod(filepath.Join(rootfs, "tmp"), 0o777|os.ModeSticky); err != nil {
		return err
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), b, 0o755); err != nil {
		return err
	}
	applets, err := exec.Command(bin, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", bin, err)
	}
	for name := range strings.FieldsSeq(string(applets)) {
		if name == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(rootfs, "bin", name)); err != nil {
			return err
		}
	}
	files := map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"etc/group":  "root:x:0:\nnogroup:x:65534:\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(rootfs, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// MountFUSE mounts a file system at dir that never answers. It ends when dev, which is
// /dev/fuse, is closed.
func MountFUSE(dev *os.File, dir string) error {
	return unix.Mount("hangs", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev.Fd()))
}
