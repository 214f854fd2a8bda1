//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/sandbox"
)

// events returns what `sandboxd events` shows.
func (r *rig) events(args ...string) []sandbox.Event {
	r.Helper()
	var es []sandbox.Event
	for line := range strings.Lines(r.ok(append([]string{"events", "-o", "json"}, args...)...)) {
		var e sandbox.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			r.Fatalf("%v in %q", err, line)
		}
		es = append(es, e)
	}
	return es
}

// wholeEvents reads the journal of a daemon with no sandbox left and returns it,
// after it has checked that it tells the life of everything that ever was, without gaps,
// each change once, to the end.
func (r *rig) wholeEvents() []sandbox.Event {
	r.Helper()
	es := r.events()
	type life struct {
		rev   uint64
		state string
		exits int
	}
	lives := map[string]*life{}
	last := uint64(0)
	for _, e := range es {
		if last != 0 && e.Seq != last+1 {
			r.Errorf("event %d follows %d", e.Seq, last)
		}
		last = e.Seq
		if e.Rev == 0 {
			continue
		}
		object := e.SandboxName + "/" + e.MemberName + " (" + e.Object() + ")"
		l := lives[object]
		if l == nil {
			l = new(life)
			lives[object] = l
		}
		if e.Rev != l.rev+1 {
			r.Errorf("event %d: revision %d of %s follows %d", e.Seq, e.Rev, object, l.rev)
		}
		l.rev = e.Rev
		switch e.Type {
		case "state", "exit", "removed":
			if e.From != l.state || e.From == e.To {
				r.Errorf("event %d: %s from %q to %q, and it was %q", e.Seq, object, e.From, e.To, l.state)
			}
			l.state = e.To
		}
		if e.Type == "exit" {
			if l.exits++; l.exits > 1 || e.Exit == nil {
				r.Errorf("event %d: exit number %d of %s: %+v", e.Seq, l.exits, object, e.Exit)
			}
		}
	}
	for object, l := range lives {
		if l.state != "" {
			r.Errorf("nothing tells that %s, which was %s, is gone", object, l.state)
		}
	}
	return es
}

func TestEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "web", "--net", "none")
	r.run("web", "app", "exit 3")
	r.exited("web/app")
	middle := r.events()[len(r.events())-1].Seq
	r.ok("rm", "-f", "web")
	es := r.wholeEvents()
	var got []string
	for _, e := range es {
		got = append(got, strings.Trim(fmt.Sprintf("%s %s/%s %s>%s %s", e.Type, e.SandboxName, e.MemberName, e.From, e.To, e.Attrs["action"]), " "))
	}
	want := []string{
		"daemon / >", "state web/ >Creating", "state web/ Creating>Ready",
		"state web/app >Creating", "state web/app Creating>Created", "state web/app Created>Running",
		"exit web/app Running>Exited", "custody web/app > taken",
		"collection web/app >", "state web/ Ready>Deleting", "custody web/app > released", "removed web/app Exited>", "removed web/ Deleting>",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("events\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	with := func(daemon string) {
		if got := r.events("--since", fmt.Sprint(middle)); len(got) != len(es)-int(middle) || got[0].Seq != middle+1 {
			t.Errorf("%s: since %d there are %d events, from %+v", daemon, middle, len(got), got[0])
		}
		if got := r.events("--since", "1h", "--filter", "type=exit", "--filter", "sandbox=web"); len(got) != 1 || got[0].Exit.Code != 3 {
			t.Errorf("%s: exits %+v", daemon, got)
		}
		if line := r.ok("events", "-o", "text", "--filter", "type=exit"); !strings.Contains(line, "exit") || !strings.Contains(line, "web/app Running → Exited code 3 (Error)") {
			t.Errorf("%s: for people %q", daemon, line)
		}
		r.fails(125, "the last one is", "events", "--since", "99999")
		r.fails(125, "unknown key", "events", "--filter", "colour=red")
		r.fails(125, "unknown type", "events", "--filter", "type=red")
		r.fails(125, "not the number of an event", "events", "--since", "yesterday")
	}
	with("with a daemon")
	// One that follows goes on without.
	follow := r.command("events", "-f", "--since", fmt.Sprint(middle), "-o", "json")
	out, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(out)
	next := middle
	read := func(until uint64) {
		for next < until {
			var e sandbox.Event
			if err := dec.Decode(&e); err != nil || e.Seq != next+1 {
				t.Fatalf("followed to %d: %d, %v", next, e.Seq, err)
			}
			next = e.Seq
		}
	}
	read(es[len(es)-1].Seq)
	r.kill()
	with("without a daemon")
	r.mustServe()
	r.ok("create", "again", "--net", "none")
	es = r.events()
	read(es[len(es)-1].Seq)
	follow.Process.Kill()
	follow.Wait()
	r.ok("rm", "again")
	r.wholeEvents()
}

// TestEventsOverKills has a reader that comes back again and again, while the
// daemon is killed a hundred times in the middle of its work.
func TestEventsOverKills(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	const kills = 100
	done := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dial := func() *api.Client {
		c, err := api.Dial("unix://" + r.d.state + "/sandboxd.sock")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	var load, reader sync.WaitGroup
	for w := range 2 {
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				// Each of these may be cut off anywhere. A client that has lost its
				// daemon waits a while before it tries again, a new one does not.
				c := dial()
				name := fmt.Sprintf("w%d-%d", w, n)
				if _, err := c.Create(ctx, sandbox.Config{Name: name, Network: "none"}); err != nil {
					time.Sleep(5 * time.Millisecond)
				} else if n%2 == 0 {
					if _, err := c.Add(ctx, name, sandbox.MemberConfig{Name: "m", Rootfs: r.rootfs, Args: []string{"true"}}); err == nil {
						c.Start(ctx, name+"/m")
					}
				}
				c.Remove(ctx, name, true)
				c.Close()
			}
		})
	}
	var seen []uint64
	stop := make(chan uint64, 1) // the last number
	reader.Go(func() {
		last, end := uint64(0), uint64(0)
		for {
			c := dial()
			for e, err := range c.Events(ctx, sandbox.EventQuery{After: &last, Follow: end == 0}) {
				if err != nil {
					if !errors.Is(err, api.ErrUnavailable) {
						t.Errorf("after %d: %v", last, err)
						return
					}
					break
				}
				seen, last = append(seen, e.Seq), e.Seq
			}
			c.Close()
			select {
			case end = <-stop:
			case <-time.After(2 * time.Millisecond):
			}
			if end != 0 && last >= end || ctx.Err() != nil {
				return
			}
		}
	})
	for range kills {
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		r.kill()
		r.mustServe()
	}
	close(done)
	load.Wait()
	for _, box := range r.list() {
		r.ok("rm", "-f", box.Name)
	}
	es := r.wholeEvents()
	stop <- es[len(es)-1].Seq
	r.kill() // ends the reader's stream
	r.mustServe()
	reader.Wait()
	// The last daemon has told that it began.
	if len(seen) < len(es) {
		t.Fatalf("the reader has seen %d of %d events", len(seen), len(es))
	}
	for i, e := range es {
		if seen[i] != e.Seq {
			t.Fatalf("event %d: the reader saw %d, the journal has %d", i, seen[i], e.Seq)
		}
	}
	t.Logf("%d events, %d kills", len(es), kills)
}

// pastEvents adds segments of so many bytes to the journal, as if a year had passed, and
// returns the number of the last event.
func (r *rig) pastEvents(segments, bytes int) uint64 {
	r.Helper()
	dir := filepath.Join(r.d.root, "events")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		r.Fatal(err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		r.Fatal(err)
	}
	seq := uint64(1000)
	if es := r.cli("events", "-o", "json").out; es != "" {
		var last sandbox.Event
		lines := strings.Split(strings.TrimSpace(es), "\n")
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
			r.Fatal(err)
		}
		seq = last.Seq
	}
	for range segments {
		var b strings.Builder
		fmt.Fprintf(&b, "{\"journal\":1,\"first\":%d,\"prev\":%d,\"boot\":%q}\n", seq+1, seq, strings.TrimSpace(string(boot)))
		name := fmt.Sprintf("%020d.jsonl", seq+1)
		for b.Len() < bytes-1100 {
			seq++
			fmt.Fprintf(&b, "{\"seq\":%d,\"time\":\"2026-01-01T00:00:00Z\",\"type\":\"network\",\"reason\":%q}\n", seq, strings.Repeat("x", 1000))
		}
		seq++
		end := fmt.Sprintf("{\"seq\":%d,\"time\":\"2026-01-01T00:00:00Z\",\"type\":\"network\",\"reason\":\"\"}\n", seq)
		end = strings.Replace(end, `""`, `"`+strings.Repeat("x", bytes-b.Len()-len(end))+`"`, 1)
		b.WriteString(end)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(b.String()), 0o600); err != nil {
			r.Fatal(err)
		}
	}
	return seq
}

// TestEventsAreBounded has a small journal and much to tell.
func TestEventsAreBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.d.flags = append(r.d.flags, "--events-max", "2m")
	seq := r.pastEvents(3, 1<<20)
	r.mustServe()
	es := r.events()
	first := es[0].Seq
	if first <= 1001 || es[len(es)-1].Seq != seq+1 {
		t.Errorf("events from %d to %d; want fewer than from 1001 to %d", first, es[len(es)-1].Seq, seq+1)
	}
	r.fails(125, fmt.Sprintf("ask for those since %d", first-1), "events", "--since", "1001")
	if got := r.events("--since", fmt.Sprint(first-1)); got[0].Seq != first {
		t.Errorf("the first is %d, want %d", got[0].Seq, first)
	}
	r.kill()
	r.fails(125, fmt.Sprintf("ask for those since %d", first-1), "events", "--since", "1001")
	r.mustServe()
}
