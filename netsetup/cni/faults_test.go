package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

const id = "0123456789abcdef"

// holder is the script of a plugin that holds something from ADD to DEL, and
// writes down how it was called, VERSION apart. before runs before anything else.
func holder(name, before string) string {
	return `[ $CNI_COMMAND = VERSION ] || echo "$CNI_COMMAND ` + name + ` ${CNI_NETNS:+ns}" >>$D/calls
echo "$CONF" >>$D/` + name + `.$CNI_COMMAND
HELD=$D/held/` + name + `-$CNI_CONTAINERID-$CNI_IFNAME
` + before + `
case $CNI_COMMAND in
ADD)
	mkdir -p $D/held && : >$HELD
	echo '{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"address":"10.1.2.3/24","interface":0}]}' ;;
DEL) rm -f $HELD ;;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}' ;;
esac`
}

// chain configures a network of holders, with text added to the first one.
func (r *rig) chain(network string, names ...string) {
	r.t.Helper()
	var plugins []string
	for _, n := range names {
		r.plugin(n, holder(n, ""))
		plugins = append(plugins, `{"type":"`+n+`"}`)
	}
	r.config(network+".conflist", `{"cniVersion":"1.1.0","name":"`+network+`","plugins":[`+strings.Join(plugins, ",")+`]}`)
}

func (r *rig) held() []string {
	files, _ := filepath.Glob(filepath.Join(r.dir, "held", "*"))
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	return files
}

func (r *rig) wantNothingLeft() {
	r.t.Helper()
	if l := slices.Concat(r.held(), r.cached(), r.leases()); len(l) > 0 {
		r.t.Errorf("left: %v", l)
	}
	// Those that were killed may be orphans that nobody has reaped yet, but not run.
	if ps := marked(r.opts.Mark + "."); len(ps) > 0 {
		r.t.Errorf("plugins run on: %v", ps)
	}
}

func TestFaultyADD(t *testing.T) {
	tests := []struct {
		name   string
		script string // of ADD of the second of three plugins; $HELD is what it is to hold
		want   string // in the error, which is one line
		code   uint
	}{
		{"fails", `echo '{"cniVersion":"1.1.0","code":111,"msg":"no luck","details":"none\\nat all"}'; echo oops >&2; exit 1`,
			"CNI error 111: no luck: none; at all: stderr: oops", 111},
		{"fails without a word", `exit 3`, "exit status 3", 0},
		{"fails with nonsense", `echo nonsense; exit 1`, `exit status 1: printed no error: "nonsense\n"`, 0},
		{"prints nonsense", `echo 'what?'; exit 0`, `printed no result: "what?\n"`, 0},
		{"prints nothing", `exit 0`, `printed no result: ""`, 0},
		{"prints half a result", `printf '{"cniVersion":"1.1.0","ips":[{"addr'; exit 0`, "printed no result", 0},
		{"prints another type", `echo '["a"]'; exit 0`, "cannot unmarshal array", 0},
		{"prints addresses that are none", `echo '{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.256/8"}]}'; exit 0`, "invalid CIDR", 0},
		{"prints an unknown version", `echo '{"cniVersion":"9.0.0"}'; exit 0`, `unsupported CNI result version "9.0.0"`, 0},
		{"prints without end", `exec yes`, "printed more than 1048576 bytes", 0},
		{"complains without end", `yes complaint | head -c 1000000 >&2; exit 1`, "exit status 1: stderr: …", 0},
		{"dies after it has allocated", `mkdir -p $D/held; : >$HELD; kill -9 $$`, "signal: killed", 0},
		{"leaves a child that allocates later", `mkdir -p $D/held; (sleep 0.2; : >$HELD) >/dev/null 2>&1 </dev/null & kill -9 $$`, "signal: killed", 0},
		{"hangs", `sleep 1000`, "took longer than", 0},
		{"hangs with a child in a session of its own", `setsid sh -c "sleep 1; : >$HELD" & sleep 1000`, "took longer than", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.exec.timeout = 5 * time.Second
			if strings.HasPrefix(tt.name, "hangs") {
				r.exec.timeout = 300 * time.Millisecond
			}
			r.chain("a", "one", "two", "three")
			r.plugin("two", holder("two", `if [ $CNI_COMMAND = ADD ]; then `+tt.script+`; fi`))
			ns := newNS(t)
			plan := r.plan(id, network.Request{})
			_, err := r.Attach(t.Context(), id, plan, ns)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), `network a: plugin type="two" failed (add)`) {
				t.Errorf("Attach: %v, want %q", err, tt.want)
			}
			if err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 3*maxStderr) {
				t.Errorf("the error is not one line, or has %d bytes", len(err.Error()))
			}
			if pe := new(PluginError); tt.code != 0 && (!errors.As(err, &pe) || pe.Code != tt.code) {
				t.Errorf("code of %#v, want %d", err, tt.code)
			}
			r.detach(id, plan, ns)
			if got, want := r.read("calls"), "ADD one ns\nADD two ns\nDEL three ns\nDEL two ns\nDEL one ns\n"; got != want {
				t.Errorf("called: %s", got)
			}
			r.wantNothingLeft()
		})
	}
}

// A configuration larger than a pipe does not get stuck on a plugin that does not read it.
func TestStdinClosed(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	r.config("a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"one","x":"`+strings.Repeat("x", 300<<10)+`"}]}`)
	script := "#!/bin/sh\nexec 0<&-\n" + `[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.1.0"}'` + "\n"
	if err := os.WriteFile(filepath.Join(r.dir, "bin/one"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	ns := newNS(t)
	plan := r.plan(id, network.Request{})
	r.attach(id, plan, ns)
	r.detach(id, plan, ns)
	r.wantNothingLeft()
}

// A child that a plugin leaves on purpose, with the plugin's output, is not waited for
// and not killed.
func TestPluginLeavesAServer(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	r.plugin("one", holder("one", `if [ $CNI_COMMAND = ADD ]; then setsid sh -c 'echo $$ >'$D'/pid; exec sleep 1000' & fi
		if [ $CNI_COMMAND = DEL ]; then kill $(cat $D/pid); fi`))
	ns := newNS(t)
	plan := r.plan(id, network.Request{})
	r.attach(id, plan, ns)
	eventually(t, func() bool { return r.read("pid") != "" }, func() string { return "the server did not start" })
	r.Close()
	r.open() // as another daemon would
	if len(marked(r.opts.Mark+".")) == 0 {
		t.Error("the server was killed")
	}
	r.detach(id, plan, ns)
	eventually(t, func() bool { return len(marked(r.opts.Mark+".")) == 0 }, func() string { return "the server is still there" })
	r.wantNothingLeft()
}

func TestCancel(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one", "two")
	r.plugin("two", holder("two", `if [ $CNI_COMMAND = ADD ]; then sleep 1000 & : >$D/started; wait; fi`))
	ns := newNS(t)
	plan := r.plan(id, network.Request{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for r.read("started") == "" {
			if _, err := os.Stat(filepath.Join(r.dir, "started")); err == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		cancel()
	}()
	if _, err := r.Attach(ctx, id, plan, ns); !errors.Is(err, context.Canceled) {
		t.Errorf("Attach: %v", err)
	}
	if _, err := r.Attach(ctx, id, plan, ns); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "not started") {
		t.Errorf("Attach when it is cancelled already: %v", err)
	}
	r.detach(id, plan, ns)
	r.wantNothingLeft()
}

// One plugin of the chain that cannot be called does not keep the others from
// freeing what they hold, and DEL can be called again when it is mended.
func TestDELGoesOn(t *testing.T) {
	for _, tt := range []struct {
		name, script string // of DEL of the second plugin; empty: it is not installed
		want         string
		deadline     time.Duration
	}{
		{"missing", "", `plugin two failed (delete): there is no plugin "two" in`, 0},
		{"fails", `echo '{"code":11,"msg":"try again"}'; exit 1`, "plugin two failed (delete): CNI error 11: try again", 0},
		{"hangs", "sleep 1000", "plugin two failed (delete): killed", 0},
		{"hangs until the caller's time is over", "sleep 1000", "plugin two failed (delete): killed", 3 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.exec.timeout = 500 * time.Millisecond
			r.chain("a", "one", "two", "three")
			r.chain("b", "four")
			ns := newNS(t)
			plan := r.plan(id, network.Request{Attach: []network.Attach{{Network: "b"}, {Network: "a"}}})
			r.exec.timeout = time.Minute
			r.attach(id, plan, ns)
			ctx := t.Context()
			if tt.deadline > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, tt.deadline)
				defer cancel()
			} else {
				r.exec.timeout = time.Second
			}
			if tt.script == "" {
				os.Remove(filepath.Join(r.dir, "bin/two"))
			} else {
				r.plugin("two", holder("two", `if [ $CNI_COMMAND = DEL ]; then `+tt.script+`; fi`))
			}
			err := r.Detach(ctx, id, plan, ns)
			if err == nil || !strings.Contains(err.Error(), "network a: "+tt.want) || strings.Contains(err.Error(), "network b") {
				t.Errorf("Detach: %v", err)
			}
			if got := r.held(); !slices.Equal(got, []string{"two-" + id + "-eth1"}) {
				t.Errorf("held: %v", got)
			}
			if got := r.cached(); !slices.Equal(got, []string{"a-" + id + "-eth1"}) {
				t.Errorf("cached: %v", got)
			}
			r.exec.timeout = time.Minute
			r.plugin("two", holder("two", ""))
			r.detach(id, plan, nil)
			if !strings.Contains(r.read("two.DEL"), "10.1.2.3/24") {
				t.Error("DEL has not got the previous result")
			}
			r.wantNothingLeft()
		})
	}
}

// An address is not given back before the rest of the chain is taken down: rules that
// others still have for it would be for whoever gets it next. It is when they have
// succeeded, also when the namespace has gone meanwhile, and when nobody waits for them any more.
func TestAddressWaits(t *testing.T) {
	eachSet(t, func(t *testing.T, dir, version string) {
		rules := func() string { return in(t, nil, "iptables-save") + ruleset(t) }
		for _, tt := range []struct {
			name string
			lost string // what has gone before DEL; the cache, the interface
			miss bool   // the other plugin is not installed; else it fails
			end  string // how it ends: the other plugin succeeds, or is given up
		}{
			{"fails", "", false, "mended"},
			{"missing", "", true, "mended"},
			{"fails, without a result of ADD", "cache", false, "mended"},
			{"fails, without an interface", "interface", false, "mended"},
			{"missing and given up", "", true, "forgotten"},
			{"fails and is given up", "", false, "forgotten"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				r := newRig(t, dir)
				// It passes on what it gets, as a chained plugin does.
				other := "echo \"$CONF\" | " + dir + "/tuning"
				r.plugin("other", other)
				r.config("10-a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[
					{"type":"bridge","bridge":"cbr0","isGateway":true,"ipMasq":true,"macspoofchk":true,
					 "ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/24"}]]}},
					{"type":"other"},{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`)
				ns := newNS(t)
				plan := r.plan(id, network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.TCP}}})
				r.attach(id, plan, ns)
				address := r.leases()[0]
				if rs := rules(); !strings.Contains(rs, address) || !strings.Contains(rs, "cni-br-iface-") {
					t.Fatalf("no rules: %s", rs)
				}
				switch tt.lost {
				case "cache":
					os.RemoveAll(r.opts.Root)
				case "interface":
					in(t, ns, "ip", "link", "del", "eth0")
				}
				if tt.miss {
					os.Remove(filepath.Join(r.dir, "bin/other"))
				} else {
					r.plugin("other", `if [ $CNI_COMMAND = DEL ]; then echo '{"code":100,"msg":"not now"}'; exit 1; fi; `+other)
				}
				for _, ns := range []*os.File{ns, nil} { // the removal, and the tombstone's attempts
					err := r.Detach(t.Context(), id, plan, ns)
					if err == nil || !strings.Contains(err.Error(), "plugin other failed") || !strings.Contains(err.Error(), "; plugin bridge waits") || strings.Contains(err.Error(), "\n") {
						t.Errorf("Detach: %v", err)
					}
					if got := r.leases(); !slices.Equal(got, []string{address}) {
						t.Errorf("leases are %v, want %s to be held", got, address)
					}
					if strings.Contains(rules(), "dport 8080") {
						t.Errorf("portmap was not called: %s", rules())
					}
				}
				ns.Close()
				if tt.end == "mended" {
					r.plugin("other", other)
					r.detach(id, plan, nil)
				} else {
					if err := r.Forget(t.Context(), id, plan); err == nil || !strings.Contains(err.Error(), "plugin other failed") || strings.Contains(err.Error(), "waits") {
						t.Errorf("Forget: %v", err)
					}
				}
				r.wantNothingLeft()
				if rs := rules(); strings.Contains(rs, address) || strings.Contains(rs, "cni-br-iface-") {
					t.Errorf("rules left: %s", rs)
				}
			})
		}
	})
}

// Error 3 says that there is nothing to clean up.
func TestDELUnknownContainer(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	r.plugin("one", holder("one", `if [ $CNI_COMMAND = DEL ]; then echo '{"code":3,"msg":"unknown"}'; rm $HELD; exit 1; fi`))
	plan := r.plan(id, network.Request{})
	r.attach(id, plan, newNS(t))
	r.detach(id, plan, nil)
	r.wantNothingLeft()
}

// What is not in the plan any more, or was cut by a crash, does not matter to DEL.
func TestDELUsesWhatADDUsed(t *testing.T) {
	change := map[string]func(r *rig){
		"changed": func(r *rig) {
			r.config("a.conflist", `{"cniVersion":"0.4.0","name":"a","plugins":[{"type":"three"}]}`)
		},
		"broken":  func(r *rig) { r.config("a.conflist", `{`) },
		"removed": func(r *rig) { os.RemoveAll(filepath.Join(r.dir, "conf")) },
		"renamed": func(r *rig) { r.config("a.conflist", `{"cniVersion":"1.1.0","name":"b","plugins":[{"type":"one"}]}`) },
		"cut cache": func(r *rig) {
			f := filepath.Join(r.opts.Root, "results", r.cached()[0])
			if err := os.Truncate(f, 100); err != nil {
				r.t.Fatal(err)
			}
		},
		"empty cache":   func(r *rig) { os.Truncate(filepath.Join(r.opts.Root, "results", r.cached()[0]), 0) },
		"no cache":      func(r *rig) { os.RemoveAll(r.opts.Root) },
		"other process": func(r *rig) { r.Close(); r.open() },
	}
	for name, do := range change {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.chain("a", "one", "two")
			r.config("a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[
				{"type":"one","mine":"as it was","capabilities":{"portMappings":true}},{"type":"two"}]}`)
			ns := newNS(t)
			plan := r.plan(id, network.Request{Ports: []network.Port{{HostPort: 8080, Port: 80, Protocol: network.UDP}}})
			r.attach(id, plan, ns)
			do(r)
			if err := r.Verify(t.Context(), id, plan, ns); err == nil {
				t.Error("Verify finds an interface that is not there")
			}
			r.detach(id, plan, ns)
			got := r.read("one.DEL")
			for _, want := range []string{`"mine":"as it was"`, `"hostPort":8080`, `"name":"a"`, `"cniVersion":"1.1.0"`} {
				if !strings.Contains(got, want) {
					t.Errorf("DEL of one got %s, without %s", got, want)
				}
			}
			if strings.Contains(r.read("two.DEL"), "runtimeConfig") {
				t.Error("a plugin that does not declare the capability gets its argument")
			}
			if want := !strings.Contains(name, "cache"); strings.Contains(got, "prevResult") != want {
				t.Errorf("DEL got %s, want a previous result: %t", got, want)
			}
			r.wantNothingLeft()
		})
	}
}

// What is forgotten is not garbage either: GC would run DEL again.
func TestForget(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	plan := r.plan(id, network.Request{})
	r.attach(id, plan, newNS(t))
	os.Remove(filepath.Join(r.dir, "bin", "one"))
	if err := r.Detach(t.Context(), id, plan, nil); err == nil {
		t.Fatal("DEL without its plugin")
	}
	for range 2 {
		if err := r.Forget(t.Context(), id, plan); err == nil || !strings.Contains(err.Error(), `there is no plugin "one"`) {
			t.Errorf("Forget: %v", err)
		}
	}
	if fs := r.gc(nil, false); len(fs)+len(r.cached()) > 0 {
		t.Errorf("found %+v, cached %v", fs, r.cached())
	}
}

// What a plugin gets: the environment and nothing of our descriptors.
func TestWhatAPluginGets(t *testing.T) {
	// What this process was started with, as the daemon does at its start.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	r.chain("a", "one")
	r.plugin("one", holder("one", `if [ $CNI_COMMAND = ADD ]; then env | grep ^CNI_ | sort >$D/env; for f in /proc/$$/fd/*; do readlink $f; done >$D/fds; readlink $CNI_NETNS >$D/netns; fi`))
	ns := newNS(t)
	r.attach(id, r.plan(id, network.Request{CNIArgs: [][2]string{{"K8S_POD_NAME", "p"}, {"X", "a=b"}}}), ns)
	want := "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=p;X=a=b\nCNI_COMMAND=ADD\nCNI_CONTAINERID=" + id + "\nCNI_IFNAME=eth0\nCNI_NETNS=" +
		nsPath(ns) + "\nCNI_PATH=" + r.dir + "/bin\n"
	if got := r.read("env"); got != want {
		t.Errorf("environment:\n%s\nwant\n%s", got, want)
	}
	var others []string
	for _, f := range strings.Fields(r.read("fds")) {
		if !strings.HasPrefix(f, "pipe:") && f != filepath.Join(r.dir, "bin/one") && f != filepath.Join(r.dir, "fds") {
			others = append(others, f)
		}
	}
	if len(others) > 0 || r.read("fds") == "" {
		t.Errorf("descriptors beside pipes: %v", others)
	}
	if got := r.read("netns"); !strings.HasPrefix(got, "net:[") {
		t.Errorf("namespace: %q", got)
	}
}

// A daemon that was killed while a plugin ran: the next one kills that before
// anything is detached.
func TestPluginOfAKilledDaemon(t *testing.T) {
	r := newRig(t)
	other := newRig(t)
	other.opts.Mark = "feedfeedfeedfeed"
	other.exec.mark = other.opts.Mark
	var plans []json.RawMessage
	for _, r := range []*rig{r, other} {
		r.chain("a", "one")
		r.plugin("one", holder("one", `if [ $CNI_COMMAND = ADD ]; then : >$D/started; sleep 1000; fi`))
		plan := r.plan(id, network.Request{})
		plans = append(plans, plan)
		done := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, err := r.Attach(ctx, id, plan, newNS(t)); done <- err }()
		t.Cleanup(func() { cancel(); <-done })
		eventually(t, func() bool { _, err := os.Stat(filepath.Join(r.dir, "started")); return err == nil }, func() string { return "not started" })
	}
	again, err := Open(r.opts)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Detach(t.Context(), id, plans[0], nil); err != nil {
		t.Error(err)
	}
	r.wantNothingLeft()
	if len(marked(other.opts.Mark+".")) == 0 {
		t.Error("the plugin of another installation was killed too")
	}
}

func TestHostLocal(t *testing.T) {
	eachSet(t, func(t *testing.T, dir, version string) {
		newHost := func(t *testing.T) *rig {
			r := newRig(t, dir)
			r.plugin("null", `if [ $CNI_COMMAND = ADD ] || [ $CNI_COMMAND = DEL ]; then echo "$CONF" | CNI_IFNAME=$CNI_IFNAME `+dir+`/host-local; fi`)
			r.config("a.conflist", `{"cniVersion":"`+version+`","name":"a","plugins":[{"type":"null",
				"ipam":{"type":"host-local","dataDir":"LEASES","ranges":[[{"subnet":"10.99.0.0/29"}]]}}]}`)
			return r
		}
		sid := func(i int) string { return fmt.Sprintf("%016x", i) }
		t.Run("exhausted", func(t *testing.T) {
			r := newHost(t)
			ns := newNS(t)
			plan := r.plan(id, network.Request{})
			for i := range 5 {
				r.attach(sid(i), plan, ns)
			}
			_, err := r.Attach(t.Context(), sid(5), plan, ns)
			if err == nil || !strings.Contains(err.Error(), "no IP addresses available in range set: 10.99.0.1-10.99.0.6") {
				t.Errorf("Attach: %v", err)
			}
			r.detach(sid(5), plan, ns)
			if got := len(r.leases()); got != 5 {
				t.Errorf("%d leases after the one that failed, want 5", got)
			}
			r.detach(sid(2), plan, ns)
			r.attach(sid(5), plan, ns)
			for i := range 6 {
				r.detach(sid(i), plan, nil)
			}
			r.wantNothingLeft()
		})
		t.Run("corrupt", func(t *testing.T) {
			r := newHost(t)
			if err := os.MkdirAll(filepath.Join(r.dir, "leases"), 0o755); err != nil {
				t.Fatal(err)
			}
			store := filepath.Join(r.dir, "leases", "a")
			if err := os.WriteFile(store, nil, 0o644); err != nil { // where a directory should be
				t.Fatal(err)
			}
			ns := newNS(t)
			plan := r.plan(id, network.Request{})
			if _, err := r.Attach(t.Context(), id, plan, ns); err == nil || !strings.Contains(err.Error(), store) {
				t.Errorf("Attach: %v", err)
			}
			if err := r.Detach(t.Context(), id, plan, ns); err == nil || !strings.Contains(err.Error(), store) {
				t.Errorf("Detach: %v", err)
			}
			os.Remove(store)
			r.detach(id, plan, ns)
			r.attach(id, plan, ns)
			// Which address was last does not matter if it cannot be read.
			for _, f := range []string{"last_reserved_ip.0", "10.99.0.3", "junk"} {
				if err := os.WriteFile(filepath.Join(store, f), []byte("\xff junk"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			res := r.attach(sid(1), plan, ns)
			if a := res.Networks[0].Addresses[0].Addr().String(); a == "10.99.0.3" || a == "10.99.0.2" {
				t.Errorf("address %s is another's", a)
			}
			r.detach(id, plan, ns)
			r.detach(sid(1), plan, ns)
			if got := r.leases(); !slices.Equal(got, []string{"10.99.0.3"}) {
				t.Errorf("leases: %v; one is not ours to free", got)
			}
		})
		t.Run("full", func(t *testing.T) {
			r := newHost(t)
			testenv.Root(t)
			small := filepath.Join(r.dir, "leases")
			mountTmpfs(t, small, "size=4k,nr_inodes=4")
			ns := newNS(t)
			plan := r.plan(id, network.Request{})
			var err error
			n := 0
			for ; n < 5 && err == nil; n++ {
				_, err = r.Attach(t.Context(), sid(n), plan, ns)
			}
			if err == nil || !strings.Contains(err.Error(), "no space left on device") {
				t.Errorf("Attach: %v", err)
			}
			for i := range n {
				r.detach(sid(i), plan, ns)
			}
			r.wantNothingLeft()
		})
	})
}
