package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ownNetworkVar is set in the process that OwnNetwork has started.
const ownNetworkVar = "SANDBOXD_TEST_OWN_NETWORK"

// OwnNetwork runs a TestMain's tests in a network namespace that plays the host, with lo
// up, and in a mount namespace with the /sys and the /run of its own that belong to
// it, so that neither the machine nor a test of another package notices. It
// starts the test binary again for that; without root it just calls run.
//
//	func TestMain(m *testing.M) { os.Exit(testenv.OwnNetwork(m.Run)) }
func OwnNetwork(run func() int) int {
	switch {
	case os.Getenv(ownNetworkVar) == "" && os.Geteuid() == 0:
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), ownNetworkVar+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		// Threads of this process do not end before it does: none is ever locked.
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			fmt.Fprintf(os.Stderr, "testenv: a network namespace for the tests: %v\n", err)
			return 1
		}
		if code := cmd.ProcessState.ExitCode(); code >= 0 {
			return code
		}
		return 1
	case os.Getenv(ownNetworkVar) == "1":
		// The fuzzer's workers are in it already.
		os.Setenv(ownNetworkVar, "2")
		if err := furnish(); err != nil {
			fmt.Fprintf(os.Stderr, "testenv: a network namespace for the tests: %v\n", err)
			return 1
		}
	}
	return run()
}

// furnish makes the namespaces that this process was started in a host's.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	// What sysfs shows of the network is that of the namespace it was mounted in.
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("/sys: %w", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("/run: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("lo: %w: %s", err, out)
	}
	return nil
}

// CNIPluginsVar is the environment variable that says where the CNI plugins
// are, on a machine that cannot build them.
const CNIPluginsVar = "SANDBOXD_TEST_CNI_PLUGINS"

// CNIPlugins needs the plugins of containernetworking/plugins in the version of
// tools/cni/go.mod, and returns their directory, build/cni/bin. It builds them if
// they are not up to date. The requirement is called "cni-plugins".
func CNIPlugins(tb testing.TB) string {
	tb.Helper()
	dir, err := cniPlugins()
	need(tb, "cni-plugins", err)
	return dir
}

var cniPlugins = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv(CNIPluginsVar); dir != "" {
		_, err := os.Stat(filepath.Join(dir, "host-local"))
		return dir, err
	}
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/sandboxd/sandboxd").Output()
	if err != nil {
		return "", fmt.Errorf("go list: %w", err)
	}
	top := strings.TrimSpace(string(out))
	dir := filepath.Join(top, "build/cni/bin")
	cmd := exec.Command("make", "-s", "-C", top, "build/cni/bin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build/cni/bin: %w: %s", err, out)
	}
	return dir, nil
})

// DebianCNIPlugins needs the plugins of Debian's containernetworking-plugins,
// which are years older, and returns their directory. The requirement is called "debian-cni-plugins".
func DebianCNIPlugins(tb testing.TB) string {
	tb.Helper()
	const dir = "/usr/lib/cni"
	_, err := os.Stat(filepath.Join(dir, "host-local"))
	need(tb, "debian-cni-plugins", err)
	return dir
}
