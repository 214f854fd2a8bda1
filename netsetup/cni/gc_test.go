package cni

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/network"
)

const (
	alive = "aaaaaaaaaaaaaaaa"
	dead  = "dddddddddddddddd"
)

func (r *rig) gc(live map[string]json.RawMessage, dryRun bool) []garbage.Finding {
	r.t.Helper()
	fs, err := r.GC(r.t.Context(), func() map[string]json.RawMessage { return live }, dryRun)
	if err != nil {
		r.t.Fatal(err)
	}
	return fs
}

func TestGC(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one", "two")
	r.chain("b", "three")
	r.chain("c", "four")
	r.config("c.conflist", `{"cniVersion":"1.1.0","name":"c","disableGC":true,"plugins":[{"type":"four"}]}`)
	r.chain("d", "five")
	r.config("d.conflist", `{"cniVersion":"1.0.0","name":"d","plugins":[{"type":"five"}]}`)
	ns := newNS(t)
	live := map[string]json.RawMessage{}
	for _, a := range []struct{ id, network string }{{alive, "a"}, {"bbbbbbbbbbbbbbbb", "a"}, {alive, "c"}, {alive, "d"}, {dead, "a"}, {dead, "b"}} {
		plan := r.plan(a.id, network.Request{Attach: []network.Attach{{Network: a.network, Interface: a.network}}})
		r.attach(a.id, plan, ns)
		if a.id != dead {
			live[a.id+a.network] = plan // ids with a tail: several attachments of one id are one plan in truth
		}
	}
	// As the record has them.
	merge := func(ids ...string) map[string]json.RawMessage {
		out := map[string]json.RawMessage{}
		for _, id := range ids {
			var p plan
			for key, raw := range live {
				one, err := readPlan(raw)
				if err != nil {
					t.Fatal(err)
				}
				if strings.HasPrefix(key, id) {
					p.Networks = append(p.Networks, one.Networks...)
				}
			}
			raw, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			out[id] = raw
		}
		return out
	}
	records := merge(alive, "bbbbbbbbbbbbbbbb")
	junk := filepath.Join(r.opts.Root, "results", "a-x-eeeeeeeeeeeeeeee-eth0")
	cut := filepath.Join(r.opts.Root, "results", "a-"+alive+"-cut")
	for _, f := range []string{junk, cut} {
		if err := os.WriteFile(f, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	os.Remove(filepath.Join(r.dir, "calls"))
	// Without a cache entry an attachment is one all the same.
	os.Remove(filepath.Join(r.opts.Root, "results", "a-bbbbbbbbbbbbbbbb-a"))

	want := []string{"a-" + dead + "-a", "a-x-eeeeeeeeeeeeeeee-eth0", "b-" + dead + "-b"}
	check := func(fs []garbage.Finding, action string) {
		t.Helper()
		var got []string
		for _, f := range fs {
			got = append(got, filepath.Base(f.Name))
			if f.Kind != garbage.CNI || f.Action != action || f.Reason == "" || f.Since.IsZero() {
				t.Errorf("finding %+v", f)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("found %v, want %v", got, want)
		}
	}
	check(r.gc(records, true), "would remove")
	if got := r.read("calls"); got != "" {
		t.Errorf("a dry run calls plugins: %s", got)
	}
	check(r.gc(records, false), "removed")
	if got, want := r.read("calls"), "DEL two \nDEL one \nDEL three \nGC one \nGC two \n"; got != want {
		t.Errorf("calls %q, want %q", got, want)
	}
	valid := `[{"containerID":"` + alive + `","ifname":"a"},{"containerID":"bbbbbbbbbbbbbbbb","ifname":"a"}]`
	for _, key := range []string{"cni.dev/valid-attachments", "cni.dev/attachments"} {
		if got := r.read("one.GC"); !strings.Contains(got, `"`+key+`":`+valid) {
			t.Errorf("GC got %s, without %s", got, key)
		}
	}
	if got := len(r.held()); got != 2*2+1+1 {
		t.Errorf("held: %v", r.held())
	}
	want = nil
	check(r.gc(records, false), "")

	// Nobody left: nothing is sent, since an empty list means everything.
	os.Remove(filepath.Join(r.dir, "calls"))
	want = []string{"a-" + alive + "-a", "a-" + alive + "-cut", "c-" + alive + "-c", "d-" + alive + "-d"}
	check(r.gc(nil, false), "removed")
	if got := r.read("calls"); strings.Contains(got, "GC") {
		t.Errorf("calls %q", got)
	}
	if got := r.cached(); len(got) > 0 {
		t.Errorf("cached: %v", got)
	}
}

func TestGCFails(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one", "two")
	ns := newNS(t)
	plan := r.plan(dead, network.Request{})
	r.attach(dead, plan, ns)
	r.plugin("two", holder("two", `if [ $CNI_COMMAND != ADD ]; then echo '{"code":100,"msg":"not now"}'; exit 1; fi`))
	r.attach(alive, plan, ns)
	os.Remove(filepath.Join(r.dir, "calls"))
	// GC of the plugin fails too.
	fs, err := r.GC(t.Context(), func() map[string]json.RawMessage { return map[string]json.RawMessage{alive: plan} }, false)
	if err == nil || len(fs) != 1 || fs[0].Action != "kept" || !strings.Contains(fs[0].Err, "not now") {
		t.Errorf("found %+v, %v", fs, err)
	}
	// libcni's GC would run DEL again, in what is at the path of the namespace now.
	if got, want := r.read("calls"), "DEL two \nDEL one \nGC one \nGC two \n"; got != want {
		t.Errorf("calls %q, want %q", got, want)
	}
	r.plugin("two", holder("two", ""))
	r.detach(alive, plan, ns)
	r.plugin("two", holder("two", `if [ $CNI_COMMAND != ADD ]; then echo '{"code":100,"msg":"not now"}'; exit 1; fi`))
	live := map[string]json.RawMessage{dead: plan}
	if _, err := r.GC(t.Context(), func() map[string]json.RawMessage { return live }, false); err == nil || !strings.Contains(err.Error(), "network a: ") {
		t.Errorf("GC: %v", err)
	}
	// A plan that cannot be read: what it has must not be freed.
	os.Remove(filepath.Join(r.dir, "calls"))
	live[alive] = json.RawMessage(`[]`)
	if _, err := r.GC(t.Context(), func() map[string]json.RawMessage { return live }, false); err == nil || r.read("calls") != "" {
		t.Errorf("GC with a plan that is none: %v, calls %s", err, r.read("calls"))
	}
	r.chain("a", "one", "two")
	if fs := r.gc(nil, false); len(fs) != 1 || fs[0].Action != "removed" {
		t.Errorf("found %+v", fs)
	}
	r.wantNothingLeft()
}

// GC and what is being attached: neither is GC sent while ADD runs, nor is what
// was attached since taken for garbage.
func TestGCExcludesADD(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	r.plugin("one", holder("one", `case $CNI_COMMAND in
		ADD) : >$D/started; while [ ! -e $D/go ]; do sleep 0.01; done; echo "ADD ends" >>$D/calls ;;
		esac`))
	plan := r.plan(alive, network.Request{})
	added := make(chan error, 1)
	go func() { _, err := r.Attach(t.Context(), alive, plan, newNS(t)); added <- err }()
	eventually(t, func() bool { _, err := os.Stat(filepath.Join(r.dir, "started")); return err == nil }, func() string { return "not started" })
	collected := make(chan error, 1)
	asked := make(chan bool, 10)
	go func() {
		_, err := r.GC(t.Context(), func() map[string]json.RawMessage { asked <- true; return map[string]json.RawMessage{alive: plan} }, false)
		collected <- err
	}()
	<-asked
	select {
	case <-asked:
		t.Error("GC goes on while ADD runs")
	case <-time.After(100 * time.Millisecond): // what does not happen needs a time
	}
	if err := os.WriteFile(filepath.Join(r.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := <-added; err != nil {
		t.Error(err)
	}
	if err := <-collected; err != nil {
		t.Error(err)
	}
	if got, want := r.read("calls"), "ADD one ns\nADD ends\nGC one \n"; got != want {
		t.Errorf("calls %q, want %q", got, want)
	}
	r.detach(alive, plan, nil)
	r.wantNothingLeft()
}

// TestGCHangs: a plugin that hangs in GC does not keep other sandboxes from being
// removed in time.
func TestGCHangs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.chain("a", "one")
	r.chain("b", "two")
	ns := newNS(t)
	stays, goes := r.plan(alive, network.Request{}), r.plan(dead, network.Request{Attach: []network.Attach{{Network: "b"}}})
	r.attach(alive, stays, ns)
	r.attach(dead, goes, newNS(t))
	r.plugin("one", holder("one", `if [ $CNI_COMMAND = GC ]; then : >$D/hangs; sleep 1000; fi`))
	gone := make(chan error)
	go func() {
		_, err := r.GC(t.Context(), func() map[string]json.RawMessage { return map[string]json.RawMessage{alive: stays, dead: goes} }, false)
		gone <- err
	}()
	for ; ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(r.dir, "hangs")); err == nil {
			break
		}
	}
	begin := time.Now()
	r.detach(dead, goes, nil)
	if took := time.Since(begin); took > 2*gcPatience {
		t.Errorf("detached after %s", took)
	}
	if err := <-gone; err == nil || !strings.Contains(err.Error(), "failed to GC plugin one: killed") {
		t.Errorf("GC: %v", err)
	}
	r.detach(alive, stays, ns)
	r.wantNothingLeft()
}

// TestDELHangs: a plugin that hangs in DEL is found, and is no failure of GC. GC
// waits for it only if some plugin is to be asked.
func TestDELHangs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.chain("a", "one")
	r.chain("b", "two")
	r.config("c.conflist", `{"cniVersion":"1.0.0","name":"c","plugins":[{"type":"one"}]}`)
	stays, goes := r.plan(alive, network.Request{}), r.plan(dead, network.Request{Attach: []network.Attach{{Network: "b"}}})
	old := r.plan(alive, network.Request{Attach: []network.Attach{{Network: "c"}}})
	r.attach(alive, stays, newNS(t))
	r.attach(dead, goes, newNS(t))
	r.plugin("two", holder("two", `if [ $CNI_COMMAND = DEL ]; then : >$D/hangs; exec sleep 1000; fi`))
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { gone <- r.Detach(ctx, dead, goes, nil) }()
	eventually(t, func() bool { _, err := os.Stat(filepath.Join(r.dir, "hangs")); return err == nil }, func() string { return "DEL is not called" })
	begin := time.Now()
	if fs := r.gc(map[string]json.RawMessage{alive: old, dead: old}, false); len(fs) > 0 {
		t.Errorf("found %+v", fs)
	}
	if took := time.Since(begin); took > gcWait/2 {
		t.Errorf("GC, which has nothing to ask, has waited %s", took)
	}
	fs := r.gc(map[string]json.RawMessage{alive: stays, dead: goes}, false)
	if len(fs) != 1 || fs[0].Name != dead || fs[0].Action != garbage.Kept || !strings.Contains(fs[0].Reason, "still at work") {
		t.Errorf("found %+v", fs)
	}
	cancel()
	if err := <-gone; err == nil {
		t.Error("DEL that hangs has succeeded")
	}
	r.plugin("two", holder("two", ""))
	r.detach(dead, goes, nil)
	if fs := r.gc(map[string]json.RawMessage{alive: stays}, false); len(fs) > 0 {
		t.Errorf("found %+v", fs)
	}
	if !strings.Contains(r.read("calls"), "GC one") {
		t.Errorf("calls %s", r.read("calls"))
	}
}

func TestIDInName(t *testing.T) {
	for in, want := range map[string]string{
		"a-0123456789abcdef-eth0":    "0123456789abcdef",
		"a-b-0123456789abcdef-eth-0": "0123456789abcdef",
		"a-0123456789ABCDEF-eth0":    "",
		"a-0123456789abcdef0-eth0":   "",
		"":                           "",
	} {
		if got := idInName(in); got != want {
			t.Errorf("idInName(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestStatus(t *testing.T) {
	r := newRig(t)
	status := func(want string) {
		t.Helper()
		if err := r.Status(t.Context()); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("Status: %v, want %q", err, want)
		}
	}
	status("there is no CNI network in " + r.opts.ConfDir)
	r.config("a.conflist", "{")
	status("a.conflist: unexpected end of JSON input")
	r.config("b.conflist", `{"cniVersion":"1.1.0","name":"b","plugins":[{"type":"one"},{"type":"two"}]}`)
	status(`network b: there is no plugin "one" in ` + r.dir + "/bin")
	r.plugin("one", holder("one", ""))
	r.plugin("two", holder("two", `if [ $CNI_COMMAND = VERSION ]; then echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}'; exit; fi`))
	status("plugin " + r.dir + "/bin/two knows versions 0.4.0, 1.0.0, and not the configuration's 1.1.0")
	// A file of the same size.
	r.plugin("two", holder("two", `if [ $CNI_COMMAND = VERSION ]; then echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.0","1.0.0"]}'; exit; fi`))
	status("plugin " + r.dir + "/bin/two knows versions 0.3.0, 1.0.0, and not")
	r.plugin("two", holder("two", `if [ $CNI_COMMAND = STATUS ]; then echo '{"code":50,"msg":"not yet"}'; exit 1; fi`))
	status("network b: CNI error 50: not yet")
	r.plugin("two", holder("two", ""))
	status("")
	os.Remove(filepath.Join(r.dir, "calls"))
	status("")
	if got, want := r.read("calls"), "STATUS one \nSTATUS two \n"; got != want {
		t.Errorf("calls %q, want %q", got, want)
	}
	r.config("b.conflist", `{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"one"},{"type":"two"}]}`)
	os.Remove(filepath.Join(r.dir, "calls"))
	status("")
	if got := r.read("calls"); got != "" {
		t.Errorf("calls %q, want none: STATUS came with 1.1.0", got)
	}
}

func TestVerify(t *testing.T) {
	r := newRig(t)
	r.chain("a", "one")
	ns := newNS(t)
	in(t, ns, "ip", "link", "add", "eth0", "type", "bridge")
	plan := r.plan(id, network.Request{})
	r.attach(id, plan, ns)
	verify := func(want string) {
		t.Helper()
		if err := r.Verify(t.Context(), id, plan, ns); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("Verify: %v, want %q", err, want)
		}
	}
	verify("")
	if !strings.Contains(r.read("one.CHECK"), "prevResult") {
		t.Error("CHECK has not got the result of ADD")
	}
	r.plugin("one", holder("one", `if [ $CNI_COMMAND = CHECK ]; then echo '{"code":100,"msg":"route is gone"}'; exit 1; fi`))
	verify("network a: plugin one failed (check): CNI error 100: route is gone")
	for _, text := range []string{
		`{"cniVersion":"0.3.1","name":"a","plugins":[{"type":"one"}]}`,
		`{"cniVersion":"1.1.0","name":"a","disableCheck":true,"plugins":[{"type":"one"}]}`,
	} {
		r.config("a.conflist", text)
		plan = r.plan(id, network.Request{})
		verify("")
	}
	in(t, ns, "ip", "link", "del", "eth0")
	verify("there is no interface eth0 any more")
	if err := r.Verify(t.Context(), id, plan, nil); err == nil {
		t.Error("Verify without a namespace")
	}
}
