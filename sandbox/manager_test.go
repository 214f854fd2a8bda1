package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/internal/procid"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestWholeLife(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	i := must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	if i.State != "Ready" || i.Hostname != "web" || i.PausePID == 0 || i.Namespaces[namespace.Net].Inode == 0 {
		t.Errorf("created %+v", i)
	}
	must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	if mi := must[MemberInfo](t)(m.Start(ctx, "web/app")); mi.State != "Running" || mi.PID == 0 {
		t.Errorf("started %+v", mi)
	}
	if _, err := m.Start(ctx, i.ID[:5]+"/app"); err != nil {
		t.Errorf("second start: %v", err)
	}
	if err := m.Remove(ctx, "web", false); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "-f") {
		t.Errorf("remove with a running member: %v", err)
	}
	if err := m.RemoveMember(ctx, "web/app", false); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "-f") {
		t.Errorf("remove of a running member: %v", err)
	}
	check(t, m.Stop(ctx, "web", time.Minute))
	e := must[Exit](t)(m.Wait(ctx, "web/app"))
	if !e.Known || e.Signal != 15 {
		t.Errorf("exit %+v, want SIGTERM", e)
	}
	if i := must[Info](t)(m.Inspect("web")); i.State != "Stopped" || i.PausePID == 0 || !i.Members[0].Custody.Held {
		t.Errorf("stopped %+v", i)
	}
	if _, err := m.Add(ctx, "web", member("b")); !errors.Is(err, ErrState) {
		t.Errorf("add to a stopped sandbox: %v", err)
	}
	check(t, m.Remove(ctx, "web", false))
	check(t, n.empty())
	if err := m.Remove(ctx, "web", false); !errors.Is(err, ErrNotFound) {
		t.Errorf("second remove: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(m.path, sandboxesDir)); len(left) != 0 {
		t.Errorf("left in the state directory: %v", left)
	}
}

// What a sandbox was made with is shown by inspect, by the daemon and without it, and not in lists.
func TestInspectShowsRequest(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := open(t, state, n)
	net := network.Request{
		DNS: network.DNS{Search: []string{"example.org"}}, Hosts: []network.Host{{Name: "db", IP: netip.MustParseAddr("192.0.2.9")}},
		MAC: "02:00:00:00:00:01", Bandwidth: network.Bandwidth{Ingress: 8000},
	}
	must[Info](t)(m.Create(t.Context(), Config{
		Name: "web", Network: network.ModeBuiltin, Net: net, Sysctls: map[string]string{"net.core.somaxconn": "99"}, ShmSize: 5 << 20,
		Share: []namespace.Kind{namespace.Net, namespace.IPC, namespace.User},
	}))
	must[Info](t)(m.Create(t.Context(), Config{Name: "bare", Network: network.ModeNone}))
	dir := must[*Dir](t)(OpenDir(state, n))
	for name, info := range map[string]Info{"daemon": must[Info](t)(m.Inspect("web")), "directory": must[Info](t)(dir.Sandbox("web"))} {
		q := info.Network.Requested
		if q == nil || !slices.Equal(q.DNS.Search, net.DNS.Search) || !slices.Equal(q.Hosts, net.Hosts) || q.MAC != net.MAC || q.Bandwidth != net.Bandwidth {
			t.Errorf("%s: the network asked for is %+v", name, q)
		}
		if info.Sysctls["net.core.somaxconn"] != "99" || info.ShmSize != 5<<20 || info.IDs == nil || info.IDs.Size == 0 {
			t.Errorf("%s: sysctls %v, shm %d, ids %v", name, info.Sysctls, info.ShmSize, info.IDs)
		}
	}
	if i := must[Info](t)(m.Inspect("bare")); i.Network.Requested != nil || len(i.Sysctls) > 0 || i.IDs != nil {
		t.Errorf("nothing was asked for, and inspect shows %+v", i)
	}
	for name, infos := range map[string][]Info{"daemon": m.List(), "directory": must[[]Info](t)(dir.List())} {
		for _, i := range infos {
			if i.Network.Requested != nil || i.Sysctls != nil || i.ShmSize != 0 || i.IDs != nil {
				t.Errorf("%s: a list has %+v", name, i)
			}
		}
	}
}

// Ids are random; who reads a list expects the newest at its end.
func TestMembersAreListedByAge(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := open(t, state, n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	var want []string
	for i := range 9 {
		want = append(want, fmt.Sprintf("m%d", 9-i))
		must[MemberInfo](t)(m.Add(ctx, "web", member(want[i])))
	}
	for name, info := range map[string]Info{"daemon": must[Info](t)(m.Inspect("web")), "directory": must[Info](t)(must[*Dir](t)(OpenDir(state, n)).Sandbox("web"))} {
		var got []string
		for _, mi := range info.Members {
			got = append(got, mi.Name)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

func TestOneDaemon(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	open(t, state, n)
	_, err := Open(t.Context(), state, n, testOptions(n))
	if want := fmt.Sprintf("pid %d", os.Getpid()); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), want) {
		t.Errorf("second Open = %v, want one that names %s", err, want)
	}
}

func TestFreeWithAFIFO(t *testing.T) {
	state := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(state, lockFile), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- Free(state) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Free is blocked")
	}
}

// A daemon was killed, and for a moment its lock is held by a child that it was
// about to make.
func TestLockOfADeadDaemon(t *testing.T) {
	state := t.TempDir()
	dead := exec.Command("true")
	check(t, dead.Run())
	f := must[*os.File](t)(os.Create(filepath.Join(state, lockFile)))
	must[int](t)(fmt.Fprintln(f, dead.Process.Pid))
	check(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	time.AfterFunc(50*time.Millisecond, func() { f.Close() })
	open(t, state, newFakeNode())
}

func TestStopTimeout(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	mi := must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	n.with(func() { n.unkillable[mi.Sandbox+"/"+mi.ID] = true })

	gone, cancel := context.WithCancel(ctx)
	stopped := make(chan error, 1)
	go func() { stopped <- m.StopMember(gone, "web/app", time.Hour) }()
	cancel()
	if err := <-stopped; !errors.Is(err, context.Canceled) {
		t.Errorf("stop of a client that left: %v", err)
	}
	if mi := must[MemberInfo](t)(m.InspectMember("web/app")); mi.State != "Running" {
		t.Errorf("after a cancelled stop: %s", mi.State)
	}
	// A forced removal does not wait for a patient stop.
	go func() { stopped <- m.StopMember(ctx, "web/app", time.Hour) }()
	check(t, m.RemoveMember(ctx, "web/app", true))
	if err := <-stopped; err != nil && !errors.Is(err, ErrNotFound) {
		t.Errorf("stop beside a removal: %v", err)
	}

	mi = must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	n.with(func() { n.unkillable[mi.Sandbox+"/"+mi.ID] = true })
	check(t, m.StopMember(ctx, "web/app", time.Millisecond))
	if e := must[Exit](t)(m.Wait(ctx, "web/app")); e.Signal != 9 {
		t.Errorf("exit %+v, want SIGKILL", e)
	}
	check(t, m.Remove(ctx, "web", true))
	check(t, n.empty())
}

func TestPastIsBounded(t *testing.T) {
	var p past
	for i := range pastMax + 10 {
		p.add(fmt.Sprint(i), Exit{Code: i})
	}
	_, oldest := p.exits["9"]
	if e, ok := p.exits["10"]; oldest || !ok || e.Code != 10 || len(p.exits) != pastMax || len(p.order) != pastMax {
		t.Errorf("%d exits, %d in order; the oldest but ten is %+v", len(p.exits), len(p.order), e)
	}
}

func TestAutoRemoveAnswersWaiters(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	c := member("app")
	c.AutoRemove = true
	mi := must[MemberInfo](t)(m.Add(ctx, "web", c))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	got := make(chan Exit, 8)
	var wg sync.WaitGroup
	_, mb, err := m.member("web/app")
	check(t, err)
	for range cap(got) {
		wg.Go(func() {
			e, err := m.Wait(ctx, "web/app")
			if err != nil {
				// It was not waiting yet when the member went.
				<-mb.over
				e = *mb.rec.Load().Exit
			}
			got <- e
		})
	}
	n.with(func() { n.exitInit(mi.Sandbox+"/"+mi.ID, Exit{Known: true, Code: 3}) })
	wg.Wait()
	close(got)
	for e := range got {
		if e.Code != 3 {
			t.Errorf("exit %+v, want code 3", e)
		}
	}
	soon(t, func() error {
		if _, err := m.InspectMember("web/app"); !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("after the exit: %v", err)
		}
		return nil
	})
	if e, err := m.Wait(ctx, mi.Sandbox+"/"+mi.ID); err != nil || e.Code != 3 {
		t.Errorf("asked too late: %+v, %v, want code 3", e, err)
	}
	if _, err := m.Wait(ctx, "web/app"); !errors.Is(err, ErrNotFound) {
		t.Errorf("by its name, which may be another's: %v", err)
	}
}

func TestStartError(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	n.with(func() { n.faults["execve"] = fails })
	_, err := m.Start(ctx, "web/app")
	var se *StartError
	if !errors.As(err, &se) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Start = %v, want a StartError", err)
	}
	if e := must[Exit](t)(m.Wait(ctx, "web/app")); e.Code != 127 {
		t.Errorf("exit %+v, want 127", e)
	}
}

func TestRun(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	if mi := must[MemberInfo](t)(m.Run(ctx, "web", member("app"))); mi.State != "Running" {
		t.Errorf("the member is %s, want Running", mi.State)
	}
	if _, err := m.Run(ctx, "web", member("app")); !errors.Is(err, ErrExists) {
		t.Errorf("Run of one that is there = %v, want ErrExists", err)
	}
	n.with(func() { n.faults["execve"] = fails })
	var se *StartError
	if _, err := m.Run(ctx, "web", member("bad")); !errors.As(err, &se) {
		t.Errorf("Run = %v, want a StartError", err)
	}
	if _, err := m.InspectMember("web/bad"); !errors.Is(err, ErrNotFound) {
		t.Errorf("what could not be started is there: %v", err)
	}
}

// What a sandbox needs is recorded, and looked up, as seldom as possible: each
// record and each look at a process is a good part of what a creation takes.
func TestCreateIsShort(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	var looks int
	alive := m.o.alive
	m.o.alive = func(id procid.ID) bool { looks++; return alive(id) }
	must[Info](t)(m.Create(t.Context(), Config{Name: "web", Network: network.ModeNone}))
	if looks > 1 {
		t.Errorf("Create asked %d times whether a process is alive", looks)
	}
	var writes []string
	m.o.Observer = stepObserver{m.o.Observer, func(op, step string) {
		if strings.HasSuffix(step, "record") || step == "ready" {
			writes = append(writes, step)
		}
	}}
	must[Info](t)(m.Create(t.Context(), Config{Name: "db", Network: network.ModeNone}))
	must[Info](t)(m.Create(t.Context(), Config{Name: "net", Network: "builtin"}))
	want := []string{"record", "ready", "record", "pause record", "ready"}
	if !slices.Equal(writes, want) {
		t.Errorf("records were written for %q, want %q", writes, want)
	}
}

// Namespaces are made while the record and the cgroup are.
func TestCreateDoesTwoThingsAtOnce(t *testing.T) {
	n := newFakeNode()
	begun := make(chan struct{})
	n.onStartPause = func() { close(begun) }
	n.onMakeCgroup = func() {
		select {
		case <-begun:
		case <-time.After(5 * time.Second):
			t.Error("the namespaces wait for the cgroup")
		}
	}
	m := open(t, t.TempDir(), n)
	must[Info](t)(m.Create(t.Context(), Config{Name: "web"}))
}

// stepObserver tells of steps that begin.
type stepObserver struct {
	Observer
	begun func(op, step string)
}

func (o stepObserver) Step(op, step string) func(error) {
	o.begun(op, step)
	return o.Observer.Step(op, step)
}

// A daemon that is killed before it could record that a member runs finds it
// running, or what became of it; one that only waits for its start is taken down.
func TestRunThatWasCutOff(t *testing.T) {
	tests := []struct {
		name  string
		begin func(*Manager, context.Context, string, MemberConfig) (MemberInfo, error)
		then  func(*fakeNode, string)
		want  string // "": there is no such member
	}{
		{"it runs", (*Manager).Run, func(*fakeNode, string) {}, "Running"},
		{"it has exited", (*Manager).Run, func(n *fakeNode, k string) { n.exitInit(k, Exit{Known: true, Code: 3, Reason: "Error"}) }, "Exited"},
		{"it was only added", (*Manager).Add, func(*fakeNode, string) {}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n, state := newFakeNode(), t.TempDir()
			m := open(t, state, n)
			ctx := t.Context()
			must[Info](t)(m.Create(ctx, Config{Name: "web"}))
			before := must[MemberInfo](t)(tt.begin(m, ctx, "web", member("app")))
			check(t, m.Close())
			file := filepath.Join(state, sandboxesDir, before.Sandbox, membersDir, before.ID, memberFile)
			var r MemberRecord
			check(t, json.Unmarshal(must[[]byte](t)(os.ReadFile(file)), &r))
			r.State, r.Monitor, r.Init, r.Inodes, r.Complete = MemberCreating, procid.ID{}, procid.ID{}, nil, false
			check(t, os.WriteFile(file, must[[]byte](t)(json.Marshal(r)), 0o600))
			n.with(func() { tt.then(n, before.Sandbox+"/"+before.ID) })

			m = open(t, state, n)
			mi, err := m.InspectMember("web/app")
			if tt.want == "" {
				if !errors.Is(err, ErrNotFound) {
					t.Errorf("the member is there: %v, %v", mi, err)
				}
				return
			}
			check(t, err)
			if mi.State != tt.want || mi.MonitorPID != before.MonitorPID || mi.State == "Running" && mi.PID != before.PID {
				t.Errorf("the member is %s, pid %d, monitor %d; want %s, %d, %d", mi.State, mi.PID, mi.MonitorPID, tt.want, before.PID, before.MonitorPID)
			}
			if mi.Exit != nil && mi.Exit.Code != 3 {
				t.Errorf("it exited with %+v", mi.Exit)
			}
		})
	}
}

func TestKillWithoutASignal(t *testing.T) {
	m := open(t, t.TempDir(), newFakeNode())
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	for _, sig := range []unix.Signal{-9, -1, 0, 65, 1 << 30} {
		if err := m.Kill(ctx, "web/app", sig); !errors.Is(err, ErrInvalid) {
			t.Errorf("Kill with signal %d = %v, want ErrInvalid", sig, err)
		}
	}
}

// What a caller names can be anything, and errors are shown on terminals.
// An error names the finest step that is known, once.
func TestOpErrorNamesTheStep(t *testing.T) {
	no := errors.New("no")
	for want, err := range map[string]error{
		"add web/app: monitor: no":                 &StepError{"monitor", no},
		"add web/app: make mount point /x: no":     &StepError{"monitor", &StepError{"make mount point /x", no}},
		"add web/app: createRuntime hook /bin: no": &StepError{"monitor", &StepError{Err: errors.New("createRuntime hook /bin: no")}},
	} {
		if got := opError("add", "web/app", err, nil).Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestOpErrorQuotesReferences(t *testing.T) {
	for ref, want := range map[string]string{
		"web/app":                  "start web/app: no",
		"\x1b[2J/app":              `start "\x1b[2J/app": no`,
		"a\xff":                    `start "a\xff": no`,
		strings.Repeat("a", 3<<20): `start "` + strings.Repeat("a", 80) + `"... (3145728 bytes): no`,
	} {
		if got := (&OpError{Op: "start", Ref: ref, Err: errors.New("no")}).Error(); got != want {
			t.Errorf("error %.200q, want %q", got, want)
		}
	}
}

func TestCreateWaitsForItsTwin(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	n.mu.Lock() // the first one hangs in MakeCgroup
	type result struct {
		i   Info
		err error
	}
	got := make(chan result, 2)
	for range cap(got) {
		go func() {
			i, err := m.Create(t.Context(), Config{Name: "web"})
			got <- result{i, err}
		}()
	}
	soon(t, func() error {
		if len(m.all()) == 0 {
			return errors.New("nothing is being created")
		}
		return nil
	})
	if _, err := m.Create(t.Context(), Config{Name: "web", Hostname: "other"}); !errors.Is(err, ErrExists) {
		t.Errorf("another one with the name: %v", err)
	}
	n.mu.Unlock()
	a, b := <-got, <-got
	if a.err != nil && !errors.Is(a.err, ErrExists) || b.err != nil && !errors.Is(b.err, ErrExists) || a.err == nil && b.err == nil && a.i.ID != b.i.ID {
		t.Errorf("twins got %s, %v and %s, %v", a.i.ID, a.err, b.i.ID, b.err)
	}
	if len(m.all()) != 1 {
		t.Errorf("%d sandboxes", len(m.all()))
	}
}

func TestPauseAndMonitorKilled(t *testing.T) {
	for _, share := range []string{"net,ipc,uts", "net,pid"} {
		t.Run(share, func(t *testing.T) {
			n := newFakeNode()
			m := open(t, t.TempDir(), n)
			ctx := t.Context()
			ks := must[[]namespace.Kind](t)(namespace.ParseKinds(share))
			before := must[Info](t)(m.Create(ctx, Config{Name: "web", Share: ks}))
			mi := must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
			must[MemberInfo](t)(m.Start(ctx, "web/app"))
			k := mi.Sandbox + "/" + mi.ID
			n.with(func() { n.killMonitor(k) })
			soon(t, func() error {
				if now, err := m.InspectMember("web/app"); err != nil || now.MonitorPID == 0 || now.MonitorPID == mi.MonitorPID || now.State != "Running" {
					return fmt.Errorf("after the monitor was killed: %+v, %v", now, err)
				}
				return nil
			})
			n.with(func() { n.killPause(before.ID) })
			want := "Ready"
			if share == "net,pid" {
				want = "NotReady"
			}
			soon(t, func() error {
				now, err := m.Inspect("web")
				if err != nil || now.State != want || now.PausePID == before.PausePID || want == "Ready" && now.PausePID == 0 || (want == "NotReady") != (now.Reason != "") {
					return fmt.Errorf("after pause was killed: %+v, %v", now, err)
				}
				if want == "Ready" && now.Namespaces[namespace.Net].Inode != before.Namespaces[namespace.Net].Inode {
					return fmt.Errorf("another namespace: %+v", now)
				}
				return nil
			})
			n.with(func() { n.exitInit(k, Exit{Known: true, Code: 5}) })
			if e := must[Exit](t)(m.Wait(ctx, "web/app")); e.Code != 5 {
				t.Errorf("exit %+v, want 5", e)
			}
		})
	}
}

func TestUnreadableRecordsAreSetAside(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := open(t, state, n)
	ctx := t.Context()
	bad := must[Info](t)(m.Create(ctx, Config{Name: "bad"}))
	must[MemberInfo](t)(m.Add(ctx, "bad", member("app")))
	good := must[Info](t)(m.Create(ctx, Config{Name: "good"}))
	gm := must[MemberInfo](t)(m.Add(ctx, "good", member("app")))
	must[MemberInfo](t)(m.Add(ctx, "good", member("fine")))
	check(t, m.Close())

	dir := filepath.Join(state, sandboxesDir)
	check(t, os.WriteFile(filepath.Join(dir, bad.ID, sandboxFile), []byte(`{"version":99}`), 0o600))
	check(t, os.WriteFile(filepath.Join(dir, good.ID, membersDir, gm.ID, memberFile), []byte("{"), 0o600))
	check(t, os.WriteFile(filepath.Join(dir, good.ID, sandboxFile+".tmp"), nil, 0o600))
	check(t, os.WriteFile(filepath.Join(dir, "garbage"), []byte("x"), 0o600))
	check(t, os.Mkdir(filepath.Join(dir, "0123456789abcdef"), 0o700))

	// What cannot be taken down stays, visible, and is not touched.
	n.with(func() { n.faults["KillPause"] = fails })
	m = open(t, state, n)
	if i := must[Info](t)(m.Inspect(bad.ID)); i.State != "Unclean" || !strings.Contains(i.Reason, "injected") {
		t.Errorf("unreadable and not taken down: %+v", i)
	}
	check(t, m.Close())
	n.with(func() { clear(n.faults) })
	m = open(t, state, n)

	is := m.List()
	if len(is) != 1 || is[0].Name != "good" || len(is[0].Members) != 1 || is[0].Members[0].Name != "fine" {
		t.Errorf("recovered %+v", is)
	}
	set := must[[]os.DirEntry](t)(os.ReadDir(filepath.Join(state, quarantineDir)))
	if len(set) != 3 {
		t.Errorf("set aside %v", set)
	}
	if b, err := os.ReadFile(filepath.Join(state, quarantineDir, bad.ID, sandboxFile)); err != nil || string(b) != `{"version":99}` {
		t.Errorf("quarantined record is %q, %v", b, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*/*.tmp")); left != nil {
		t.Errorf("temporary files: %v", left)
	}
	check(t, m.Remove(ctx, "good", true))
	check(t, n.empty())
}

func TestDirShowsTheSame(t *testing.T) {
	state := t.TempDir()
	n := newFakeNode()
	m := open(t, state, n)
	ctx := t.Context()
	i := must[Info](t)(m.Create(ctx, Config{Name: "web", Labels: map[string]string{"a": "b"}}))
	must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	d := must[*Dir](t)(OpenDir(state, n))
	d.view.alive = n.alive
	got, want := must[Info](t)(d.Sandbox(i.ID[:4])), must[Info](t)(m.Inspect("web"))
	if a, b := must[[]byte](t)(json.Marshal(got)), must[[]byte](t)(json.Marshal(want)); string(a) != string(b) {
		t.Errorf("without a daemon\n %s\nwith one\n %s", a, b)
	}
	check(t, m.Close())
	n.with(func() { n.exitInit(i.ID+"/"+got.Members[0].ID, Exit{Known: true, Code: 4}); n.killPause(i.ID) })
	mi := must[MemberInfo](t)(d.Member("web/app"))
	if mi.State != "Exited" || mi.Exit == nil || mi.Exit.Code != 4 || !mi.Custody.Held {
		t.Errorf("exited without a daemon: %+v", mi)
	}
	if l := must[[]Info](t)(d.List()); len(l) != 1 || l[0].State != "NotReady" {
		t.Errorf("pause died without a daemon: %+v", l)
	}
	r, mr, dir, sib, err := d.Records("web/app")
	if err != nil || r.ID != i.ID || mr.Config.Name != "app" || dir == "" || len(sib) != 0 {
		t.Errorf("Records = %v %v %q %v %v", r, mr, dir, sib, err)
	}
	var part struct{ Process struct{ Args []string } }
	if err := d.MemberConfig(mr, &part); err != nil || !slices.Equal(part.Process.Args, []string{"true"}) {
		t.Errorf("MemberConfig = %v, %v", part, err)
	}
}

func TestOrphanedInitIsNotLost(t *testing.T) {
	n := newFakeNode()
	m := open(t, t.TempDir(), n)
	ctx := t.Context()
	must[Info](t)(m.Create(ctx, Config{Name: "web"}))
	mi := must[MemberInfo](t)(m.Add(ctx, "web", member("app")))
	must[MemberInfo](t)(m.Start(ctx, "web/app"))
	k := mi.Sandbox + "/" + mi.ID
	n.with(func() { n.faults["ReplaceMonitor"] = fails; n.killMonitor(k) })
	soon(t, func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if !n.monitors[k].orphaned {
			return errors.New("the node was not told of the orphan")
		}
		return nil
	})
	n.with(func() { n.exitInit(k, Exit{Known: true, Code: 7}) })
	if e := must[Exit](t)(m.Wait(ctx, "web/app")); !e.Known || e.Code != 7 {
		t.Errorf("exit %+v, want code 7", e)
	}
	if mi := must[MemberInfo](t)(m.InspectMember("web/app")); mi.Custody.Held {
		t.Error("custody is said to be held by a monitor that was killed")
	}
}
