//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/testenv"
	"github.com/sandboxd/sandboxd/sandbox"
)

// netRig is a rig whose daemon has a network namespace of its own for a host, so
// that the machine's network is never touched. It has an uplink, up0, behind which
// nobody is.
type netRig struct {
	*rig
	cniConf string // directory
}

// newNetRig makes the namespace before anything is counted, and a rig on it.
func newNetRig(t *testing.T) *netRig {
	t.Helper()
	testenv.Root(t)
	return newNetRigOn(t, testenv.Busybox(t))
}

func newNetRigOn(t *testing.T, rootfs string) *netRig {
	t.Helper()
	testenv.Root(t)
	ns := newHost(t)
	conf, bin := t.TempDir(), t.TempDir()
	r := newRigWith(t, rootfs, func(d *daemon) {
		d.netns = ns
		// What libcni makes and leaves, and plugins of tests do.
		for _, dir := range []string{"network/cni/results", "one", "two"} {
			if err := os.MkdirAll(filepath.Join(d.root, dir), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		d.flags = append(d.flags, "--network-default", "builtin", "--subnet6", "fd00:88::/64", "--cni-conf-dir", conf, "--cni-bin-dir", bin)
	})
	r.plugins = bin
	return &netRig{r, conf}
}

// newHost returns a network namespace that looks like a host's: it has an uplink,
// up0, behind which nobody is.
func newHost(t *testing.T) *os.File {
	t.Helper()
	ns := newNetNS(t)
	do := func(lines ...string) {
		t.Helper()
		for _, line := range lines {
			if out, err := inNetNS(ns, strings.Fields(line)...); err != nil {
				t.Fatalf("%s: %v: %s", line, err, out)
			}
		}
	}
	do("ip link set lo up",
		"ip link add up0 type veth peer name up1",
		"ip link set up0 addrgenmode none", "ip link set up1 addrgenmode none", // addresses would come later
		"ip link set up1 up", "ip link set up0 up")
	wait := func(text string, args ...string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			out, err := inNetNS(ns, args...)
			if err == nil && strings.Contains(out, text) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("no %q in what %v shows: %v: %s", text, args, err, out)
			}
		}
	}
	// The kernel notices the carrier when it has time, which can be a second later
	// (net/core/link_watch.c), and makes the routes of IPv6 addresses then, again if
	// they are there. Of those that come afterwards it makes them once, soon.
	wait("state UP", "ip", "link", "show", "up0")
	do("ip addr add 192.0.2.1/24 dev up0",
		"ip -6 addr add 2001:db8::1/64 dev up0 nodad",
		"ip route add default via 192.0.2.254")
	wait("local 2001:db8::1 ", "ip", "-6", "route", "show", "table", "local")
	return ns
}

// newNetNS returns a network namespace that is nobody's. It ends with the test.
func newNetNS(t *testing.T) *os.File {
	t.Helper()
	// The shell waits for the end of its input.
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// startIn starts cmd in a network namespace.
func startIn(ns *os.File, cmd *exec.Cmd) error {
	return nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, cmd.Start)
}

// inNetNS runs a program in a network namespace and returns what it wrote.
func inNetNS(ns *os.File, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := startIn(ns, cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// host runs a program on what is the host for the daemon; it must succeed.
func (r *netRig) host(line string) string {
	r.Helper()
	out, err := inNetNS(r.d.netns, strings.Fields(line)...)
	if err != nil {
		r.Fatalf("%s: %v: %s", line, err, out)
	}
	return strings.TrimSpace(out)
}

// fetch gets a page on the host, or returns what was wrong.
func (r *netRig) fetch(address string) string {
	out, err := inNetNS(r.d.netns, "busybox", "timeout", "3", "busybox", "wget", "-q", "-O", "-", "http://"+address+"/")
	if err != nil {
		return err.Error() + ": " + out
	}
	return out
}

// fetchIn is fetch in a member.
func (r *netRig) fetchIn(member, address string) string {
	res := r.cli("exec", member, "--", "busybox", "timeout", "3", "busybox", "wget", "-q", "-O", "-", "http://"+address+"/")
	if res.code != 0 {
		return res.String()
	}
	return res.out
}

// web runs a member that serves a page with text on port 80, of both families.
func (r *netRig) web(box, text string) {
	r.Helper()
	r.run(box, "web", "mkdir /www; echo "+text+" >/www/index.html; exec httpd -f -p 80 -h /www")
	r.eventually("the page of "+box+" is served", func() bool { return r.fetchIn(box+"/web", "127.0.0.1") == text+"\n" })
}

// address is a sandbox's first IPv4 address.
func (r *netRig) address(box string) string {
	r.Helper()
	i := r.sandbox(box)
	if len(i.Network.Networks) != 1 || len(i.Network.Networks[0].Addresses) == 0 {
		r.Fatalf("%s has the network %+v", box, i.Network)
	}
	return i.Network.Networks[0].Addresses[0].Addr().String()
}

func TestPublishedPort(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.mustServe()
	r.ok("create", "--publish", "8080:80", "--publish", "192.0.2.1:8081:80/tcp", "--dns", "192.0.2.53", "--add-host", "db:192.0.2.9", "a")
	r.ok("create", "b")
	r.ok("create", "--isolated", "c")
	r.web("a", "hello")
	r.web("b", "bonjour")
	r.web("c", "hola")
	a, b, c := r.address("a"), r.address("b"), r.address("c")

	check := func(when string) {
		t.Helper()
		for _, at := range []string{"127.0.0.1:8080", "192.0.2.1:8080", "192.0.2.1:8081", a + ":80"} {
			if got := r.fetch(at); got != "hello\n" {
				t.Errorf("%s: on the host from %s: %q", when, at, got)
			}
		}
		for _, at := range []string{"192.0.2.1:8080", a} {
			if got := r.fetchIn("b/web", at); got != "hello\n" {
				t.Errorf("%s: from another sandbox at %s: %q", when, at, got)
			}
			if got := r.fetchIn("a/web", at); got != "hello\n" {
				t.Errorf("%s: from the sandbox itself at %s: %q", when, at, got)
			}
		}
		for _, f := range []struct{ from, to string }{{"b/web", c}, {"c/web", b}} {
			if got := r.fetchIn(f.from, f.to); strings.Contains(got, "hola") || strings.Contains(got, "bonjour") {
				t.Errorf("%s: an isolated sandbox was reached from %s: %q", when, f.from, got)
			}
		}
		for _, box := range []string{"a", "b", "c"} {
			if res := r.cli("check", "--sandbox", box); res.code != 0 {
				t.Errorf("%s: %v", when, res)
			}
		}
	}
	check("at first")
	r.kill()
	r.mustServe()
	check("after a restart")
	r.host("ip link del sandboxd0")
	r.eventually("the bridge is there again", func() bool { return r.fetch("127.0.0.1:8080") == "hello\n" })
	check("after the bridge was deleted")
	r.kill()
	r.host("nft flush ruleset")
	r.mustServe()
	check("after the rules were flushed while no daemon ran")
	r.sig(r.sandbox("a").PausePID, unix.SIGKILL)
	r.eventually("pause is replaced", func() bool { return r.sandbox("a").PausePID > 0 && r.sandbox("a").State == "Ready" })
	check("after pause was killed")

	r.fails(125, "8080", "create", "--publish", "8080:80", "d")
	if i := r.cli("inspect", "d"); i.code == 0 {
		t.Error("a sandbox whose port is taken is there")
	}
	n := r.sandbox("a").Network.Networks[0]
	if n.Interface != "eth0" || n.MTU != 1500 || n.MAC == "" || len(n.Addresses) != 2 || len(n.Ports) != 2 || len(n.Routes) == 0 || len(n.Gateway) == 0 {
		t.Errorf("network %+v", n)
	}
	r.ok("rm", "-f", "a", "b", "c")
	r.ok("create", "--publish", "8080:80", "d") // free again
	r.ok("rm", "d")
}

// What members know by name, and that it follows who joins.
func TestNames(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.mustServe()
	r.ok("create", "--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "ndots:2", "--add-host", "db:192.0.2.9", "--add-host", "db6:2001:db8::9", "box")
	r.run("box", "one", "exec nc -ll -p 7777 -e echo from-one")
	addr := r.address("box")
	r.run("box", "two", "sleep 1000")
	for _, m := range []string{"box/one", "box/two"} {
		hosts := r.ok("exec", m, "--", "cat", "/etc/hosts")
		for _, want := range []string{"127.0.0.1\tlocalhost", "192.0.2.9\tdb", "2001:db8::9\tdb6", addr + "\tbox", "127.0.0.1\tone two"} {
			if !strings.Contains(hosts+"\n", want+"\n") && !strings.Contains(hosts, want+" ") {
				t.Errorf("%s has in its hosts\n%s\nand not %q", m, hosts, want)
			}
		}
		if got, want := r.ok("exec", m, "--", "cat", "/etc/resolv.conf", "/etc/hostname"), "nameserver 192.0.2.53\nsearch example.org\noptions ndots:2\nbox"; got != want {
			t.Errorf("%s has %q, want %q", m, got, want)
		}
	}
	r.eventually("members reach each other by localhost", func() bool {
		res := r.cli("exec", "box/two", "--", "nc", "127.0.0.1", "7777")
		return res.out == "from-one\n"
	})
	// A member can write to the files, and cannot make anybody follow a link.
	r.ok("exec", "box/two", "--", "sh", "-c", "echo 192.0.2.66 evil >>/etc/hosts; ! rm /etc/hosts 2>/dev/null; ! ln -sf /etc/passwd /etc/hosts 2>/dev/null")
	r.run("box", "three", "sleep 1000")
	if hosts := r.ok("exec", "box/two", "--", "cat", "/etc/hosts"); !strings.Contains(hosts, "three two") || strings.Contains(hosts, "evil") {
		t.Errorf("after another has joined: %s", hosts)
	}
	// Who is gone is known no more, also if another daemon has taken its place.
	r.ok("rm", "-f", "box/three")
	if hosts := r.ok("exec", "box/two", "--", "cat", "/etc/hosts"); strings.Contains(hosts, "three") || !strings.HasSuffix(hosts, "127.0.0.1\tone two") {
		t.Errorf("after one has gone: %s", hosts)
	}
	r.kill()
	r.mustServe()
	r.ok("rm", "-f", "box/one")
	if hosts := r.ok("exec", "box/two", "--", "cat", "/etc/hosts"); !strings.HasSuffix(hosts, "127.0.0.1\ttwo") {
		t.Errorf("after another has gone: %s", hosts)
	}
	// A root of a bundle, a read-only one, and one with a file of its own.
	if got := r.ok("run", "box", "--rootfs", r.rootfs, "--read-only", "--", "sh", "-c", "cat /etc/hosts 2>/dev/null; ls /etc"); strings.Contains(got, "db") {
		t.Errorf("a read-only root without the files: %q", got)
	}
	if _, err := os.Lstat(filepath.Join(r.rootfs, "etc/hosts")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the root file system was written to: %v", err)
	}
	r.ok("rm", "-f", "box")
}

// A member can take its own network apart. That is nobody else's matter.
func TestNetworkEmptiedFromInside(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.mustServe()
	r.ok("create", "--publish", "8080:80", "box")
	addr := r.address("box")
	r.ok("run", "box", "--rootfs", r.rootfs, "--cap-add", "NET_ADMIN", "--", "ip", "link", "del", "eth0")
	r.fails(125, "eth0", "check", "--sandbox", "box")
	r.ok("rm", "-f", "box")
	if left := r.host("ip -o link show type veth"); strings.Count(left, "\n") > 1 {
		t.Errorf("links: %s", left)
	}
	r.ok("create", "--publish", "8080:80", "--ip", addr, "box")
	r.ok("rm", "box")
}

// Two hundred sandboxes at once have two hundred addresses.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.mustServe()
	const n = 200
	var wg sync.WaitGroup
	slots := make(chan struct{}, 32)
	results := make([]result, n)
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			results[i] = r.cli("create", fmt.Sprint("s", i))
		})
	}
	wg.Wait()
	for _, res := range results {
		if res.code != 0 {
			t.Fatal(res)
		}
	}
	seen := map[string]string{}
	args := []string{"rm"}
	for _, i := range r.list() {
		for _, a := range i.Network.Networks[0].Addresses {
			if other, ok := seen[a.String()]; ok {
				t.Errorf("%s and %s both have %s", other, i.Name, a)
			}
			seen[a.String()] = i.Name
		}
		args = append(args, i.Name)
	}
	if len(seen) != 2*n {
		t.Errorf("%d addresses, want %d", len(seen), 2*n)
	}
	r.ok(args...)
}

// Two installations on one host have nothing to do with each other.
func TestTwoInstallations(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.mustServe()
	r.ok("create", "--publish", "8080:80", "a")
	r.web("a", "first")

	other := newDaemon(t)
	other.netns = r.d.netns
	other.flags = []string{"--network-default", "builtin", "--bridge", "sandboxd1", "--subnet", "10.89.0.0/16"}
	// The bridge, and the subnet, of the other one are refused.
	taken := newDaemon(t)
	taken.netns = r.d.netns
	taken.flags = []string{"--network-default", "builtin"}
	taken.start(t)
	if res := (&rig{T: t, d: taken}).cli("create", "x"); res.code != 125 || !strings.Contains(res.err, "sandboxd0") || strings.Count(res.err, "\n") != 1 {
		t.Errorf("%v; want the bridge to be another's", res)
	}
	taken.stop(t)

	other.start(t)
	o := &netRig{rig: &rig{T: t, d: other, rootfs: r.rootfs}}
	for _, port := range []string{"8080:80", "127.0.0.1:8080:80"} {
		o.fails(125, "of the host is taken by sandbox "+r.sandbox("a").ID+" of another installation", "create", "--publish", port, "x")
	}
	// Asked for at the same moment, one port is never published twice.
	for i := range 10 {
		var results [2]result
		var wg sync.WaitGroup
		for j, both := range []*netRig{r, o} {
			wg.Go(func() { results[j] = both.cli("create", "--publish", "8082:80", "x") })
		}
		wg.Wait()
		if results[0].code == 0 && results[1].code == 0 {
			t.Errorf("round %d: both publish the port", i)
		}
		for j, both := range []*netRig{r, o} {
			switch res := results[j]; {
			case res.code == 0:
				both.ok("rm", "x")
			case res.code != 125 || !strings.Contains(res.err, "of another installation"):
				t.Errorf("round %d: %v", i, res)
			}
		}
	}
	o.ok("create", "--publish", "8081:80", "a")
	o.web("a", "second")
	for at, want := range map[string]string{"127.0.0.1:8080": "first\n", "127.0.0.1:8081": "second\n"} {
		if got := r.fetch(at); got != want {
			t.Errorf("from %s: %q, want %q", at, got, want)
		}
	}
	r.ok("rm", "-f", "a")
	if got := r.fetch("127.0.0.1:8081"); got != "second\n" {
		t.Errorf("when the first has gone: %q", got)
	}
	o.ok("rm", "-f", "a")
	other.stop(t)
}

// plugin makes a CNI plugin of a few lines of shell. What it has allocated is a
// file in a directory below the root directory, where the oracle looks. While
// there is a file called fail-COMMAND beside it, COMMAND fails.
func (r *netRig) plugin(name string) {
	r.Helper()
	dir := filepath.Join(r.d.root, name)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		r.Fatal(err)
	}
	script := fmt.Sprintf(`#!/bin/busybox sh
cat >/dev/null
[ "$CNI_COMMAND" = VERSION ] && { echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}'; exit; }
mine=%[1]s/$CNI_CONTAINERID
[ "$CNI_COMMAND" = ADD ] && : >"$mine"
if [ -e %[2]s/fail-$CNI_COMMAND ]; then
	echo '{"cniVersion":"1.0.0","code":101,"msg":"%[3]s will not"}'
	exit 1
fi
[ "$CNI_COMMAND" = DEL ] && rm -f "$mine"
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"10.1.2.3/24","interface":0}]}'
exit 0
`, dir, r.plugins, name)
	// Not while a daemon could execute it, half written.
	if err := os.WriteFile(filepath.Join(r.plugins, name), []byte(script), 0o755); err != nil {
		r.Fatal(err)
	}
}

// chain configures a CNI network of those plugins.
func (r *netRig) chain(names ...string) {
	r.Helper()
	type plugin struct {
		Type string `json:"type"`
	}
	conf := struct {
		Version string   `json:"cniVersion"`
		Name    string   `json:"name"`
		Plugins []plugin `json:"plugins"`
	}{"1.0.0", "lan", nil}
	for _, n := range names {
		r.plugin(n)
		conf.Plugins = append(conf.Plugins, plugin{n})
	}
	b, err := json.Marshal(conf)
	if err == nil {
		err = os.WriteFile(filepath.Join(r.cniConf, "10-lan.conflist"), b, 0o644)
	}
	if err != nil {
		r.Fatal(err)
	}
}

// failPlugins makes a command of the rig's plugins, if it has any, fail, or no longer.
func (r *rig) failPlugins(command string, fails bool) {
	r.Helper()
	if r.plugins == "" {
		return
	}
	name := filepath.Join(r.plugins, "fail-"+command)
	err := os.Remove(name)
	if fails {
		err = os.WriteFile(name, nil, 0o644)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.Fatal(err)
	}
}

// A network that will not go down does not hold up the sandbox, is to be seen, and
// is taken down when that is possible again.
func TestTombstone(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.chain("one", "two")
	r.mustServe()
	r.ok("create", "--net", "cni", "box")
	n := r.sandbox("box").Network
	if n.Mode != "cni" || len(n.Networks) != 1 || n.Networks[0].Name != "lan" || n.Networks[0].Addresses[0].String() != "10.1.2.3/24" {
		t.Errorf("network %+v", n)
	}
	r.failPlugins("DEL", true)
	if res := r.cli("rm", "box"); res.code != 0 || strings.Count(res.err, "\n") != 1 || !strings.Contains(res.err, "box is removed; its network could not be taken down yet") ||
		!strings.Contains(res.err, "will not") || !strings.Contains(res.err, "ls -a") {
		t.Errorf("rm: %v", res)
	}
	if left := r.list(); len(left) > 0 {
		t.Errorf("ls shows %+v", left)
	}
	tomb := func() *sandbox.Info {
		all := decode[[]sandbox.Info](r.rig, "ls", "-a", "-o", "json")
		if len(all) == 0 {
			return nil
		}
		return &all[0]
	}
	i := tomb()
	if i == nil || i.Name != "box" || i.State != "Removed" || i.Network.Tombstone == nil || i.Network.Tombstone.Attempts == 0 || !strings.Contains(i.Reason, "will not") {
		t.Fatalf("ls -a shows %+v", i)
	}
	if out := r.ok("ls", "-a"); !strings.Contains(out, "REASON") || !strings.Contains(out, "will not") {
		t.Errorf("ls -a shows\n%s", out)
	}
	if out := r.ok("gc", "--dry-run"); !strings.Contains(out, "tombstone") || !strings.Contains(out, i.ID) {
		t.Errorf("gc --dry-run shows\n%s", out)
	}
	r.ok("create", "--net", "none", "box") // the name is free
	if res := r.cli("rm", "box"); res.code != 0 || res.err != "" {
		t.Errorf("rm of another one: %v", res)
	}
	r.kill() // it is on record
	// A configuration that is gone since does not matter.
	if err := os.Remove(filepath.Join(r.cniConf, "10-lan.conflist")); err != nil {
		t.Fatal(err)
	}
	r.mustServe()
	if i := tomb(); i == nil || i.Network.Tombstone == nil {
		t.Errorf("after a restart ls -a shows %+v", i)
	}
	r.failPlugins("DEL", false)
	if out := r.ok("gc"); strings.Contains(out, "will not") {
		t.Errorf("gc, when the plugin works again, says\n%s", out)
	}
	r.eventually("the network is taken down", func() bool { return tomb() == nil })
	for _, name := range []string{"one", "two"} {
		if left, _ := os.ReadDir(filepath.Join(r.d.root, name)); len(left) > 0 {
			t.Errorf("%s has %v", name, left)
		}
	}
	if out := r.ok("events", "--filter", "type=network", "-o", "json"); !strings.Contains(out, `"done"`) || !strings.Contains(out, `"failed"`) {
		t.Errorf("events: %s", out)
	}
}

// A plugin that fails after it has allocated is taken back.
func TestPluginFails(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.chain("one", "two")
	r.mustServe()
	r.failPlugins("ADD", true)
	r.fails(125, "one will not", "create", "--net", "cni", "box")
	r.fails(125, "nowhere", "create", "--net", "cni:nowhere", "box")
	if all := r.ok("ls", "-a", "-q"); all != "" {
		t.Errorf("ls -a shows %s", all)
	}
	if left, _ := os.ReadDir(filepath.Join(r.d.root, "one")); len(left) > 0 {
		t.Errorf("allocated is %v", left)
	}
	r.failPlugins("ADD", false)
	r.ok("create", "--net", "cni:lan", "box")
	r.ok("rm", "box")
	// With a configuration there, it is the default.
	other := newDaemon(t)
	other.netns = r.d.netns
	other.flags = []string{"--network-default", "cni", "--cni-conf-dir", r.cniConf, "--cni-bin-dir", r.plugins}
	other.start(t)
	o := &rig{T: t, d: other}
	o.ok("create", "box")
	if n := o.sandbox("box").Network; n.Mode != "cni" {
		t.Errorf("network %+v", n)
	}
	o.ok("rm", "box")
	other.stop(t)
}
