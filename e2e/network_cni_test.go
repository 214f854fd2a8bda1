//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// configure writes a file of the daemon's CNI configuration.
func (r *netRig) configure(name, text string) {
	r.Helper()
	if err := os.WriteFile(filepath.Join(r.cniConf, name), []byte(text), 0o644); err != nil {
		r.Fatal(err)
	}
}

// The real plugins: two networks, a published port, and a member that deletes
// its interface, after which nothing of it stays on the host.
func TestRealPlugins(t *testing.T) {
	t.Parallel()
	plugins := testenv.CNIPlugins(t)
	r := newNetRig(t)
	leases := t.TempDir()
	r.d.flags = append(r.d.flags, "--cni-bin-dir", plugins)
	r.configure("10-lan.conflist", fmt.Sprintf(`{"cniVersion":"1.1.0","name":"lan","plugins":[
		{"type":"bridge","bridge":"lan0","isGateway":true,"ipMasq":true,"capabilities":{"ips":true},
		 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.97.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
		{"type":"portmap","backend":"nftables","capabilities":{"portMappings":true}}]}`, leases))
	r.configure("20-storage.conf", fmt.Sprintf(`{"cniVersion":"0.4.0","name":"storage","type":"bridge","bridge":"storage0",
		"ipam":{"type":"host-local","dataDir":%q,"subnet":"10.96.0.0/24"}}`, leases))
	r.configure("30-broken.conf", `{`)
	r.mustServe()
	rules := func() int { return strings.Count(r.host("nft list ruleset"), "10.97.0.9") }
	clean := func() {
		t.Helper()
		if all := r.ok("ls", "-a", "-q"); all != "" {
			t.Errorf("ls -a shows %s", all)
		}
		if n := rules(); n > 0 {
			t.Errorf("%d rules are left: %s", n, r.host("nft list ruleset"))
		}
		if left, _ := filepath.Glob(filepath.Join(leases, "*", "10.*")); len(left) > 0 {
			t.Errorf("leases are left: %v", left)
		}
	}

	r.ok("create", "--net", "cni:lan,storage:store0", "--ip", "10.97.0.9", "--publish", "8080:80", "box")
	ns := r.sandbox("box").Network.Networks
	if len(ns) != 2 || ns[0].Interface != "eth0" || ns[0].Addresses[0].String() != "10.97.0.9/24" || ns[0].MTU != 1500 || ns[1].Name != "storage" || ns[1].Interface != "store0" {
		t.Errorf("networks %+v", ns)
	}
	r.run("box", "web", "mkdir /tmp/www; echo hello >/tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www")
	r.eventually("the port is published", func() bool { return r.fetch("127.0.0.1:8080") == "hello\n" })
	r.ok("check", "--sandbox", "box")
	r.fails(125, "port 8080/tcp of the host is taken by sandbox "+r.sandbox("box").ID, "create", "--net", "cni", "--publish", "8080:80", "second")
	r.fails(125, "port 8080/tcp of the host is taken by sandbox", "create", "--net", "builtin", "--publish", "8080:80", "second")
	r.fails(125, "30-broken.conf", "create", "--net", "cni:nowhere", "second")
	if rules() == 0 {
		t.Error("no rules")
	}

	r.run("box", "vandal", "ip link del eth0", "--cap-add", "NET_ADMIN")
	r.ok("wait", "box/vandal")
	r.fails(125, "there is no interface eth0 any more", "check", "--sandbox", "box")
	r.kill()
	r.mustServe()
	r.ok("rm", "-f", "box")
	clean()

	// With its pause the pid namespace dies, and all in it; plugins are told of what
	// the network was, and its address and port are free.
	r.ok("create", "--net", "cni:lan,storage:store0", "--share", "net,ipc,uts,pid", "--ip", "10.97.0.9", "--publish", "8080:80", "box")
	r.run("box", "web", "sleep 1000")
	pause := r.sandbox("box").PausePID
	r.sig(pause, unix.SIGKILL)
	r.gone(pause)
	r.eventually("the sandbox is not ready", func() bool { return r.sandbox("box").State == "NotReady" })
	r.ok("rm", "-f", "box")
	clean()
	r.ok("create", "--net", "cni:lan", "--ip", "10.97.0.9", "--publish", "8080:80", "box")
	r.ok("rm", "box")
	clean()

	// Plugins leave these, the empty table of portmap, and forwarding.
	r.host("ip link del lan0")
	r.host("ip link del storage0")
	r.host("nft flush ruleset")
	r.host("sysctl -qw net.ipv4.ip_forward=0")
}

// A plugin that goes on after its daemon has been killed would allocate after it
// has been told to free.
func TestDaemonKilledWhilePluginRuns(t *testing.T) {
	t.Parallel()
	r := newNetRig(t)
	r.chain("one", "two")
	slow := fmt.Sprintf(`#!/bin/busybox sh
cat >/dev/null
case $CNI_COMMAND in
ADD) echo $$ >%[1]s/pid; mv %[1]s/pid %[1]s/started; sleep 5; : >%[1]s/late; echo '{"cniVersion":"1.0.0"}' ;;
DEL) [ -e "$CNI_NETNS" ] && : >%[1]s/inside; : >%[1]s/freed ;;
esac
`, r.cniConf)
	if err := os.WriteFile(filepath.Join(r.plugins, "two"), []byte(slow), 0o755); err != nil {
		t.Fatal(err)
	}
	there := func(name string) bool {
		_, err := os.Stat(filepath.Join(r.cniConf, name))
		return err == nil
	}
	r.mustServe()
	create := r.command("create", "--net", "cni", "box")
	if err := create.Start(); err != nil {
		t.Fatal(err)
	}
	r.eventually("the plugin runs", func() bool { return there("started") })
	r.kill()
	create.Wait() // fails, or not: its daemon is gone
	r.mustServe()
	r.eventually("the network is taken down", func() bool { return there("freed") && r.ok("ls", "-a", "-q") == "" })
	if !there("inside") {
		t.Error("the plugin was not given the namespace, which was there, to take down what is in it")
	}
	pid, err := os.ReadFile(filepath.Join(r.cniConf, "started"))
	if err != nil {
		t.Fatal(err)
	}
	env, _ := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/environ") // of a zombie it is empty
	if there("late") || strings.Contains(string(env), "CNI_COMMAND=ADD") {
		t.Error("the plugin went on, and will allocate, or has")
	}
	if left, _ := os.ReadDir(filepath.Join(r.d.root, "one")); len(left) > 0 {
		t.Errorf("one has %v", left)
	}
}
