package cni

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/nsthread"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// BenchmarkChain attaches and detaches bridge, host-local and portmap, in turn
// by the driver and by libcni alone, so that both see the same machine. The
// times of each are in its metrics; that of an iteration is of both.
func BenchmarkChain(b *testing.B) {
	testenv.Root(b)
	r := newRig(b, testenv.CNIPlugins(b))
	r.config("a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[
		{"type":"bridge","bridge":"cbr0","isGateway":true,"ipMasq":true,
		 "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
		{"type":"portmap","capabilities":{"portMappings":true}}]}`)
	req := network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}}
	alone := libcni.NewCNIConfigWithCacheDir(r.opts.BinDirs, filepath.Join(r.dir, "alone"), nil)
	var took [4]time.Duration // attach and detach of each
	i := 0
	step := func(into *time.Duration, fn func() error) {
		start := time.Now()
		if err := fn(); err != nil {
			b.Fatal(err)
		}
		*into += time.Since(start)
	}
	driver := func() {
		ns, err := nsthread.NewNet()
		if err != nil {
			b.Fatal(err)
		}
		defer ns.Close()
		id := fmt.Sprintf("%016x", i)
		plan := r.plan(id, req) // part of a create
		step(&took[0], func() error { _, err := r.Attach(b.Context(), id, r.plan(id, req), ns); return err })
		step(&took[1], func() error { return r.Detach(b.Context(), id, plan, ns) })
	}
	libcniAlone := func() {
		ns, err := nsthread.NewNet()
		if err != nil {
			b.Fatal(err)
		}
		defer ns.Close()
		id := fmt.Sprintf("%016x", i)
		p, err := readPlan(r.plan(id, req))
		if err != nil {
			b.Fatal(err)
		}
		list, err := p.Networks[0].list()
		if err != nil {
			b.Fatal(err)
		}
		rt := p.Networks[0].runtimeConf(id, nsPath(ns))
		step(&took[2], func() error { _, err := alone.AddNetworkList(b.Context(), list, rt); return err })
		step(&took[3], func() error { return alone.DelNetworkList(b.Context(), list, rt) })
	}
	for b.Loop() {
		i++
		if i%2 == 0 {
			driver()
			libcniAlone()
		} else {
			libcniAlone()
			driver()
		}
	}
	for n, name := range []string{"attach", "detach", "libcni-add", "libcni-del"} {
		b.ReportMetric(float64(took[n].Microseconds())/1000/float64(i), name+"-ms")
	}
	b.ReportMetric(float64(took[0])/float64(took[2]), "attach/libcni")
	b.ReportMetric(float64(took[1])/float64(took[3]), "detach/libcni")
}
