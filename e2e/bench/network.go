package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/sandbox"
)

// ownNetwork is in the environment of the bench that runs in a network namespace
// of its own: neither the machine's network nor what is in it matters then.
const ownNetwork = "SANDBOXD_BENCH_NETNS"

// enterOwnNetwork runs the bench again in a new network namespace, and says so, or
// prepares the namespace that it is in.
func enterOwnNetwork(ctx context.Context) (elsewhere bool, err error) {
	if os.Getenv(ownNetwork) == "" {
		cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), ownNetwork+"=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		return true, cmd.Run()
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return false, err
	}
	up := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "up1"}
	addr, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		return false, err
	}
	return false, errors.Join(netlink.LinkSetUp(lo), netlink.LinkAdd(up), netlink.AddrAdd(up, addr), netlink.LinkSetUp(up),
		netlink.RouteAdd(&netlink.Route{LinkIndex: up.Attrs().Index, Gw: net.IPv4(192, 0, 2, 254)}))
}

// chain is the CNI network that is measured, by plugins of this version.
const chain = `{"cniVersion":"1.0.0","name":"bench","plugins":[
 {"type":"bridge","bridge":"benchcni0","isGateway":true,"ipMasq":true,
  "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.97.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
 {"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`

// networks measures networks: interleaved, like everything.
func (b *bench) networks(rounds int, levels []int) error {
	plugins, err := filepath.Abs("build/cni/bin")
	if err != nil {
		return err
	}
	cni := true
	if _, err := os.Stat(filepath.Join(plugins, "bridge")); err != nil {
		fmt.Printf("CNI is left out: %v (make build/cni/bin)\n", err)
		cni = false
	}
	conf := fmt.Sprintf(chain, filepath.Join(b.dir, "ipam"))
	if err := os.WriteFile(filepath.Join(b.confDir(), "10-bench.conflist"), []byte(conf), 0o644); err != nil {
		return err
	}
	list, err := libcni.ConfListFromBytes([]byte(conf))
	if err != nil {
		return err
	}
	lib := libcni.NewCNIConfigWithCacheDir([]string{plugins}, filepath.Join(b.dir, "cache"), nil)
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "bare0"}}
	if err := errors.Join(netlink.LinkAdd(bridge), netlink.LinkSetUp(bridge)); err != nil {
		return err
	}
	defer netlink.LinkDel(bridge)

	clear(b.times)
	create := func(name string, mode sandbox.NetworkMode, ports int) testCase {
		return testCase{name, func(i int) error { return b.createWith(name, i, mode, ports) }}
	}
	bare := func(name string, fn func(ns *os.File, bridge netlink.Link, n int) error) testCase {
		return testCase{"bare netlink, " + name, func(i int) error {
			ns, err := newNetNS()
			if err != nil {
				return err
			}
			defer ns.Close()
			return b.measure(name, func() error { return fn(ns, bridge, i) })
		}}
	}
	cases := []testCase{
		create("none", network.ModeNone, 0), create("builtin", network.ModeBuiltin, 0),
		create("1 port", network.ModeBuiltin, 1), create("20 ports", network.ModeBuiltin, 20),
		bare("moved", bareMoved), bare("inside", bareInside),
	}
	if cni {
		cases = append(cases, create("cni", network.ModeCNI, 0),
			testCase{"CNI chain", func(i int) error { return b.chainAlone(lib, list, i) }})
	}
	if err := b.rounds(rounds, cases); err != nil {
		return err
	}
	b.reportNetworks(cni)
	if err := b.many(); err != nil {
		return err
	}
	return b.networksStanding(rounds, levels)
}

func (b *bench) reportNetworks(cni bool) {
	row := func(what, name, format string, args ...any) {
		fmt.Printf("%-46s %9.2f %9.2f   %s\n", what, b.median(name), milliseconds(slices.Min(b.times[name])), fmt.Sprintf(format, args...))
	}
	none, builtin := b.median("none"), b.median("builtin")
	fmt.Printf("\n%-46s %9s %9s\n", "", "median", "least")
	row("create, no network", "none", "")
	row("create, builtin", "builtin", "no network + %.2f × bare netlink (to reach: 1.5 × made and moved)", (builtin-none)/b.median("moved"))
	row("  bare netlink: made, moved, address, route", "moved", "")
	row("  bare netlink: made inside, address, route", "inside", "builtin is no network + %.2f × this", (builtin-none)/b.median("inside"))
	row("create, builtin, 1 port", "1 port", "")
	row("create, builtin, 20 ports", "20 ports", "%.2f × 1 port (to reach: the same transaction)", b.median("20 ports")/b.median("1 port"))
	row("delete, no network", "none delete", "")
	row("delete, builtin, to the answer", "builtin delete", "(to reach: 8 ms)")
	if cni {
		chain := b.median("chain")
		row("create, cni bridge+host-local+portmap", "cni", "%.2f × (chain alone + no network) (to reach: 1.10)", b.median("cni")/(chain+none))
		row("  ADD of the chain alone, by libcni", "chain", "builtin is %.2f × this (to reach: 0.12)", builtin/chain)
		row("delete, cni, to the answer", "cni delete", "%.2f × (chain alone + no network)", b.median("cni delete")/(b.median("chain delete")+b.median("none delete")))
		row("  DEL of the chain alone, by libcni", "chain delete", "")
	}
	fmt.Println()
}

// createWith measures the creation and removal of one sandbox.
func (b *bench) createWith(what string, i int, mode sandbox.NetworkMode, ports int) error {
	c := sandbox.Config{Name: fmt.Sprintf("net-%d", i), Network: mode}
	for p := range ports {
		c.Net.Ports = append(c.Net.Ports, network.Port{HostPort: uint16(20000 + p), Port: uint16(80 + p)})
	}
	err := b.measure(what, func() error { _, err := b.client.Create(b.ctx, c); return err })
	if err != nil {
		return err
	}
	return b.measure(what+" delete", func() error { return removeSandbox(b.ctx, b.client, c.Name) })
}

// chainAlone is what any caller of the plugins has to wait for.
func (b *bench) chainAlone(lib *libcni.CNIConfig, list *libcni.NetworkConfigList, i int) error {
	ns, err := newNetNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	rt := &libcni.RuntimeConf{ContainerID: fmt.Sprintf("bench%d", i), IfName: "eth0", NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())}
	err = b.measure("chain", func() error { _, err := lib.AddNetworkList(b.ctx, list, rt); return err })
	return errors.Join(err, b.measure("chain delete", func() error { return lib.DelNetworkList(context.WithoutCancel(b.ctx), list, rt) }))
}

// many makes a hundred sandboxes from sixteen clients.
func (b *bench) many() error {
	const n, clients = 100, 16
	for _, mode := range []sandbox.NetworkMode{network.ModeNone, network.ModeBuiltin} {
		errs := make([]error, n)
		slots := make(chan struct{}, clients)
		var wg sync.WaitGroup
		each := func(fn func(name string) error) time.Duration {
			start := time.Now()
			for i := range n {
				slots <- struct{}{}
				wg.Go(func() {
					defer func() { <-slots }()
					errs[i] = errors.Join(errs[i], fn(fmt.Sprintf("many-%d", i)))
				})
			}
			wg.Wait()
			return time.Since(start)
		}
		made := each(func(name string) error {
			_, err := b.client.Create(b.ctx, sandbox.Config{Name: name, Network: mode})
			return err
		})
		gone := each(func(name string) error { return removeSandbox(b.ctx, b.client, name) })
		if err := errors.Join(errs...); err != nil {
			return err
		}
		fmt.Printf("%d creates by %d clients, %-8s %8.1f ms each %6.2f; deletes each %6.2f\n", n, clients, mode, milliseconds(made), milliseconds(made)/n, milliseconds(gone)/n)
	}
	return nil
}

// networksStanding measures create among n sandboxes with the builtin network.
func (b *bench) networksStanding(rounds int, levels []int) error {
	fmt.Printf("\n%-10s %14s %14s %12s\n", "standing", "create ms", "delete ms", "create vs 1")
	var first float64
	made := 0
	for _, n := range levels {
		for ; made < n; made++ {
			if _, err := b.client.Create(b.ctx, sandbox.Config{Name: fmt.Sprintf("held-%d", made), Network: network.ModeBuiltin}); err != nil {
				return err
			}
		}
		clear(b.times)
		for i := range rounds {
			if err := b.createWith("builtin", i, network.ModeBuiltin, 0); err != nil {
				return err
			}
		}
		c := b.median("builtin")
		if first == 0 {
			first = c
		}
		fmt.Printf("%-10d %14.2f %14.2f %12.2f\n", n, c, b.median("builtin delete"), c/first)
	}
	fmt.Println("\nto reach: create with builtin at 500 ≤ 1.5 × at 1")
	for i := range made {
		if err := removeSandbox(b.ctx, b.client, fmt.Sprintf("held-%d", i)); err != nil {
			return err
		}
	}
	return nil
}

// newNetNS returns a network namespace that is nobody's.
func newNetNS() (*os.File, error) {
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer cmd.Wait()
	defer in.Close()
	return os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
}

// bareMoved makes a pair here, moves one end, and gives it an address and a route:
// what somebody would write who thinks of nothing but that.
func bareMoved(ns *os.File, bridge netlink.Link, n int) error {
	name := fmt.Sprintf("bare%dm", n)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	peer, err := netlink.LinkByName(name + "p")
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetNsFd(peer, int(ns.Fd())), netlink.LinkSetMaster(veth, bridge), netlink.LinkSetUp(veth)); err != nil {
		return err
	}
	return bareInNS(ns, name+"p", n)
}

// bareInside makes the pair with one end where it belongs, and with one queue, as ours have.
func bareInside(ns *os.File, bridge netlink.Link, n int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = fmt.Sprintf("bare%di", n), bridge.Attrs().Index
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd()), PeerNumTxQueues: 1, PeerNumRxQueues: 1}
	if err := errors.Join(netlink.LinkAdd(veth), netlink.LinkSetUp(veth)); err != nil {
		return err
	}
	return bareInNS(ns, "eth0", n)
}

func bareInNS(ns *os.File, name string, n int) error {
	return nsthread.Do(map[namespace.Kind]*os.File{namespace.Net: ns}, func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		peer, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if name != "eth0" {
			if err := h.LinkSetName(peer, "eth0"); err != nil {
				return err
			}
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 98, byte(n>>8), byte(n)+1), Mask: net.CIDRMask(16, 32)}}
		if err := errors.Join(h.LinkSetUp(peer), h.AddrAdd(peer, addr)); err != nil {
			return err
		}
		return h.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: net.IPv4(10, 98, 255, 254)})
	})
}
