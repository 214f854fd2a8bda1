// Command bench measures sandboxd beside its peers, in one interleaved run, and
// prints medians and ratios. `make bench` builds what it needs and starts it as
// root:
//
//	bench [--rounds 40] [--seed 1] [--standing 1,10,100,500] [--networks] [--net-standing 1,100,500] [--sandboxd PATH] [--runc PATH] [--crun PATH]
//
// Every case is run once per round, so that whatever else the machine does meets
// all of them alike, and in another order each time, so that none always pays for
// what the one before it leaves to the kernel: namespaces are taken apart behind
// the answer. It asserts nothing: figures are for people.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/sandbox"
)

// firstC is what the measured members run: nothing of a start is then a
// program's own.
//
//go:embed first.c
var firstC []byte

func main() {
	// SIGPIPE: nobody reads on, as with "| head". What there is must go all the same.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGPIPE)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	ctx      context.Context
	dir      string // everything the bench makes is below it
	bundle   string
	fifo     string // a started process opens it for writing first of all
	sandboxd string
	client   *api.Client
	daemon   *exec.Cmd
	order    *rand.Rand // of the cases in a round
	times    map[string][]time.Duration
}

// A testCase is measured once a round.
type testCase struct {
	name string
	run  func(round int) error
}

func run(ctx context.Context) (err error) {
	rounds := pflag.Int("rounds", 40, "how often each case is measured")
	seed := pflag.Uint64("seed", 1, "of the order of cases")
	standing := pflag.IntSlice("standing", []int{1, 10, 100, 500}, "numbers of standing sandboxes to measure create at")
	netStanding := pflag.IntSlice("net-standing", []int{1, 100, 500}, "numbers of standing sandboxes with the builtin network")
	onlyNetworks := pflag.Bool("networks", false, "measure networks and nothing else")
	bin := pflag.String("sandboxd", "build/sandboxd", "the daemon's `path`")
	runc := pflag.String("runc", "runc", "the peer's `path`; empty leaves it out")
	crun := pflag.String("crun", "crun", "the peer's `path`; empty leaves it out")
	pflag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("needs root")
	}
	if elsewhere, err := enterOwnNetwork(ctx); elsewhere || err != nil {
		return err
	}
	// The state directory is on a tmpfs, as /run is on every distribution: on a
	// disk, each record would cost an fsync.
	dir, err := os.MkdirTemp("/dev/shm", "sandboxd-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{ctx: ctx, dir: dir, order: rand.New(rand.NewPCG(*seed, 0)), times: make(map[string][]time.Duration)}
	if b.sandboxd, err = filepath.Abs(*bin); err != nil {
		return err
	}
	if err := b.makeBundle(); err != nil {
		return err
	}
	if err := b.startDaemon(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stopDaemon()) }()

	if *onlyNetworks {
		fmt.Printf("%s, %d CPUs, %d rounds, medians in milliseconds\n", kernel(), cpus(), *rounds)
		return b.networks(*rounds, *netStanding)
	}
	peers := map[string]string{}
	for name, path := range map[string]string{"runc": *runc, "crun": *crun} {
		if path == "" {
			continue
		}
		if err := b.peerWorks(path); err != nil {
			fmt.Printf("%s is left out: %v\n", name, err)
			continue
		}
		peers[name] = path
	}
	fmt.Printf("%s, %d CPUs, %d rounds, medians in milliseconds\n\n", kernel(), cpus(), *rounds)
	if err := b.rounds(*rounds, b.cases(peers)); err != nil {
		return err
	}
	b.report(peers)
	// Before those that stand weigh on the host.
	if err := b.networks(*rounds, *netStanding); err != nil {
		return fmt.Errorf("networks: %w", err)
	}
	return b.standing(*standing, *rounds)
}

// rounds runs every case n times, and a few times more to warm caches up.
func (b *bench) rounds(n int, cases []testCase) error {
	const warmUp = 3
	for i := range n + warmUp {
		if i == warmUp {
			clear(b.times)
		}
		b.order.Shuffle(len(cases), func(i, j int) { cases[i], cases[j] = cases[j], cases[i] })
		for _, c := range cases {
			if err := c.run(i); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) cases(peers map[string]string) []testCase {
	cases := []testCase{{"clone", func(int) error { return b.cloneOnce() }}, {"sandboxd", b.ours}}
	for _, name := range slices.Sorted(maps.Keys(peers)) {
		path := peers[name]
		cases = append(cases, testCase{name, func(i int) error {
			return b.peer(name, path, fmt.Sprintf("sandboxd-bench-%d-%s-%d", os.Getpid(), name, i))
		}})
	}
	return cases
}

// measure runs fn and adds its duration to what is known of name.
func (b *bench) measure(name string, fn func() error) error {
	start := time.Now()
	err := fn()
	b.times[name] = append(b.times[name], time.Since(start))
	return err
}

// cloneOnce is the bare cost that a sandbox cannot go below: a process, cloned
// with the namespaces that a sandbox has, that executes something small.
func (b *bench) cloneOnce() error {
	var pid int
	err := b.measure("clone", func() (err error) {
		pid, err = syscall.ForkExec("/bin/busybox", []string{"sleep", "60"}, &syscall.ProcAttr{
			Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNS},
		})
		return err
	})
	if err != nil {
		return err
	}
	unix.Kill(pid, unix.SIGKILL)
	_, err = unix.Wait4(pid, nil, 0, nil)
	return err
}

// ours measures a sandbox and a member through the API, exec through the CLI too,
// and what an exec in the same member cannot go below.
func (b *bench) ours(i int) error {
	ctx, c := b.ctx, b.client
	name := fmt.Sprintf("bench-%d", i)
	err := b.measure("sandboxd create", func() error {
		_, err := c.Create(ctx, sandbox.Config{Name: name})
		return err
	})
	if err != nil {
		return err
	}
	ref := name + "/m"
	var m sandbox.MemberInfo
	err = b.measureStart("sandboxd", func() (err error) {
		m, err = c.Run(ctx, name, sandbox.MemberConfig{Name: "m", Bundle: b.bundle})
		return err
	})
	if err != nil {
		return err
	}
	if err := b.bareOnce(m); err != nil {
		return err
	}
	err = b.measure("sandboxd exec", func() error {
		_, err := c.Exec(ctx, ref, sandbox.ExecRequest{Args: []string{"/bin/true"}})
		return err
	})
	if err == nil {
		err = b.measure("sandboxd exec command", func() error {
			return b.command(b.sandboxd, "--state", b.state(), "exec", ref, "--", "/bin/true")
		})
	}
	if err != nil {
		return err
	}
	if err := c.Kill(ctx, ref, unix.SIGKILL); err != nil {
		return err
	}
	if _, err := c.Wait(ctx, ref); err != nil {
		return err
	}
	if err := b.measure("sandboxd rm member", func() error { return c.RemoveMember(ctx, ref, false) }); err != nil {
		return err
	}
	return b.measure("sandboxd delete", func() error { return removeSandbox(ctx, c, name) })
}

// peer measures the same steps of an OCI runtime, on the same bundle.
func (b *bench) peer(name, path, id string) error {
	err := b.measureStart(name, func() error {
		if err := b.command(path, "create", "--bundle", b.bundle, id); err != nil {
			return err
		}
		return b.command(path, "start", id)
	})
	if err == nil {
		err = b.measure(name+" exec", func() error { return b.command(path, "exec", id, "/bin/true") })
	}
	if err == nil {
		err = b.command(path, "kill", id, "KILL")
	}
	for range 1000 { // delete refuses until the runtime sees that init is gone
		out, serr := exec.CommandContext(b.ctx, path, "state", id).Output()
		if serr != nil || strings.Contains(string(out), `"stopped"`) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return errors.Join(err, b.measure(name+" rm member", func() error { return b.command(path, "delete", "--force", id) }))
}

func (b *bench) peerWorks(path string) error {
	id := fmt.Sprintf("sandboxd-bench-%d-probe", os.Getpid())
	if err := b.command(path, "create", "--bundle", b.bundle, id); err != nil {
		b.command(path, "delete", "--force", id)
		return err
	}
	return b.command(path, "delete", "--force", id)
}

func (b *bench) command(name string, args ...string) error {
	cmd := exec.CommandContext(b.ctx, name, args...)
	// A file, not a pipe: a container inherits it, and nobody must wait for it.
	f, err := os.Create(filepath.Join(b.dir, "stderr"))
	if err != nil {
		return err
	}
	defer f.Close()
	cmd.Stderr = f
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(f.Name())
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, strings.TrimSpace(string(text)))
	}
	return nil
}

// measureStart measures how long it is from the call of fn, which starts the process
// in the bundle, until that has written to the fifo, the first thing that it does, and
// until fn has returned. Which of the two is first depends on who else is to run.
func (b *bench) measureStart(name string, fn func() error) error {
	// For reading and writing, so that whoever opens it for either does not wait.
	f, err := os.OpenFile(b.fifo, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	begin := time.Now()
	f.SetReadDeadline(begin.Add(30 * time.Second))
	var first time.Duration
	written := make(chan error, 1)
	go func() {
		_, err := f.Read(make([]byte, 1))
		first = time.Since(begin)
		written <- err
	}()
	if err := fn(); err != nil {
		f.SetReadDeadline(time.Now())
		<-written
		return err
	}
	answer := time.Since(begin)
	if err := <-written; err != nil {
		return fmt.Errorf("wait for the first instruction: %w", err)
	}
	b.times[name+" start"] = append(b.times[name+" start"], first)
	b.times[name+" start answer"] = append(b.times[name+" start answer"], answer)
	return nil
}

// confDir is where the daemon looks for CNI networks.
func (b *bench) confDir() string { return filepath.Join(b.dir, "net.d") }

func (b *bench) state() string { return filepath.Join(b.dir, "state") }

func (b *bench) startDaemon() error {
	address := "unix://" + filepath.Join(b.dir, "sock")
	if err := os.Mkdir(b.confDir(), 0o700); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(b.dir, "daemon.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	b.daemon = exec.Command(b.sandboxd, "serve", "--address", address, "--state", b.state(),
		"--root", filepath.Join(b.dir, "root"), "--cgroup-parent", "/"+filepath.Base(b.dir), "--log-level", "warn", "--network-default", "none",
		"--cni-conf-dir", b.confDir(), "--cni-bin-dir", "build/cni/bin",
		"--metrics-address", "unix://"+b.metrics())
	b.daemon.Stdout, b.daemon.Stderr = log, log
	if err := b.daemon.Start(); err != nil {
		return err
	}
	if b.client, err = api.Dial(address); err != nil {
		return err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		_, err := b.client.List(b.ctx)
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			text, _ := os.ReadFile(log.Name())
			return errors.Join(fmt.Errorf("daemon does not answer: %w: %s", err, text), b.stopDaemon())
		}
	}
}

// metrics is the socket of the daemon's metrics.
func (b *bench) metrics() string { return filepath.Join(b.dir, "metrics") }

// removeSandbox removes a sandbox, and its network as well.
func removeSandbox(ctx context.Context, c *api.Client, ref string) error {
	left, err := c.Remove(ctx, ref, true)
	if err == nil && left != "" {
		err = errors.New(left)
	}
	return err
}

// stopDaemon removes every sandbox, ends the daemon and removes its cgroup.
func (b *bench) stopDaemon() error {
	ctx := context.WithoutCancel(b.ctx)
	infos, err := b.client.List(ctx)
	for _, i := range infos {
		err = errors.Join(err, removeSandbox(ctx, b.client, i.ID))
	}
	err = errors.Join(err, b.client.Close(), b.daemon.Process.Signal(unix.SIGTERM))
	if werr := b.daemon.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("daemon: %w", werr))
	}
	parents, _ := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(b.dir))
	for _, p := range append(parents, "/sys/fs/cgroup/"+filepath.Base(b.dir)) {
		os.Remove(p)
	}
	return err
}

// makeBundle makes a bundle with the defaults that `runc spec` gives, whose
// process reports its first instruction and then sleeps.
func (b *bench) makeBundle() error {
	b.bundle = filepath.Join(b.dir, "bundle")
	out := filepath.Join(b.dir, "out")
	bin := filepath.Join(b.bundle, "rootfs", "bin")
	for _, d := range []string{bin, out} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w (package busybox-static)", err)
	}
	if err := os.WriteFile(filepath.Join(bin, "busybox"), busybox, 0o755); err != nil {
		return err
	}
	if err := os.Symlink("busybox", filepath.Join(bin, "true")); err != nil {
		return err
	}
	if err := errors.Join(b.compile(firstC, filepath.Join(bin, "first")), b.compile(bareC, b.bare())); err != nil {
		return err
	}
	b.fifo = filepath.Join(out, "fifo")
	if err := unix.Mkfifo(b.fifo, 0o666); err != nil {
		return err
	}
	config, err := json.MarshalIndent(bundleSpec(out), "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.bundle, "config.json"), config, 0o644)
}

func (b *bench) median(name string) float64 {
	return milliseconds(median(b.times[name]))
}

func median(ds []time.Duration) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	s := slices.Clone(ds)
	slices.Sort(s)
	return s[len(s)/2]
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (b *bench) report(peers map[string]string) {
	row := func(what string, ms float64, ratios ...string) {
		fmt.Printf("%-44s %9.2f   %s\n", what, ms, strings.Join(ratios, "   "))
	}
	ratio := func(a, c, target string) string {
		if b.median(c) == 0 {
			return ""
		}
		s := fmt.Sprintf("%.2f × %s", b.median(a)/b.median(c), c)
		if target != "" {
			s += " (to reach: " + target + ")"
		}
		return s
	}
	row("clone of a process in new net,ipc,uts,mnt", b.median("clone"))
	row("sandbox create", b.median("sandboxd create"), ratio("sandboxd create", "clone", "2.5"))
	row("sandbox delete", b.median("sandboxd delete"))
	for _, op := range []struct{ name, peers, what, runc, crun string }{
		{"start", "start", "member create+start to its first instruction", "0.10", "0.25"},
		{"start answer", "start answer", "member create+start to the answer", "", ""},
		{"exec", "exec", "exec of true, by a client of the API", "0.10", ""},
		{"exec command", "exec", "exec of true, by the command `sandboxd exec`", "", ""},
		{"rm member", "rm member", "member delete", "", ""},
	} {
		var ratios []string
		for _, p := range []struct{ name, target string }{{"runc", op.runc}, {"crun", op.crun}} {
			if peers[p.name] != "" {
				ratios = append(ratios, ratio("sandboxd "+op.name, p.name+" "+op.peers, p.target))
			}
		}
		if op.name == "exec" {
			ratios = append(ratios, ratio("sandboxd exec", "bare exec", ""))
		}
		row(op.what, b.median("sandboxd "+op.name), ratios...)
		if op.name != op.peers {
			continue
		}
		if op.name == "exec" {
			var ratios []string
			if peers["runc"] != "" {
				ratios = append(ratios, ratio("bare exec", "runc exec", ""))
			}
			row("  bare: join, fork, execve of the same", b.median("bare exec"), ratios...)
			row("  bare: the same alone, joining nothing", b.median("bare true"))
		}
		for _, p := range []string{"runc", "crun"} {
			if peers[p] != "" {
				row("  "+p, b.median(p+" "+op.name))
			}
		}
	}
	fmt.Println()
}

// standing measures create and delete among n other sandboxes, each with a
// running member, and what all of them weigh.
func (b *bench) standing(levels []int, rounds int) error {
	fmt.Printf("%-10s %10s %10s %10s %12s   %s\n", "standing", "clone ms", "create ms", "delete ms", "create vs 1", "resident / of that anonymous / proportional KiB; a scrape of the metrics")
	var first float64
	made := 0
	for _, n := range levels {
		for ; made < n; made++ {
			name := fmt.Sprintf("standing-%d", made)
			if _, err := b.client.Create(b.ctx, sandbox.Config{Name: name}); err != nil {
				return err
			}
			err := b.measureStart("standing", func() error {
				_, err := b.client.Run(b.ctx, name, sandbox.MemberConfig{Name: "m", Bundle: b.bundle})
				return err
			})
			if err != nil {
				return err
			}
		}
		var create, remove []time.Duration
		delete(b.times, "clone")
		for i := range rounds {
			if err := b.cloneOnce(); err != nil {
				return err
			}
			name := fmt.Sprintf("extra-%d", i)
			start := time.Now()
			if _, err := b.client.Create(b.ctx, sandbox.Config{Name: name}); err != nil {
				return err
			}
			create = append(create, time.Since(start))
			start = time.Now()
			if err := removeSandbox(b.ctx, b.client, name); err != nil {
				return err
			}
			remove = append(remove, time.Since(start))
		}
		c := milliseconds(median(create))
		if first == 0 {
			first = c
		}
		memory, err := b.memory()
		if err != nil {
			return err
		}
		scrape, err := b.scrapes(rounds)
		if err != nil {
			return err
		}
		fmt.Printf("%-10d %10.2f %10.2f %10.2f %12.2f   %s; scrape %s\n", n, b.median("clone"), c, milliseconds(median(remove)), c/first, memory, scrape)
	}
	fmt.Println("\nto reach: create at 500 ≤ 1.3 × at 1; pause ≤ 16 KiB, monitor ≤ 32 KiB, daemon ≤ 30 MiB at 500; scrape ≤ 20 ms and 1 MiB at 500")
	return nil
}

// memory says what one pause, one monitor and the daemon take.
func (b *bench) memory() (string, error) {
	info, err := b.client.Inspect(b.ctx, "standing-0")
	if err != nil {
		return "", err
	}
	time.Sleep(5 * time.Second) // at rest, as it is nearly always
	var parts []string
	for _, p := range []struct {
		name string
		pid  int
	}{{"pause", info.PausePID}, {"monitor", info.Members[0].MonitorPID}, {"daemon", b.daemon.Process.Pid}} {
		m, err := rollup(p.pid)
		if err != nil {
			return "", err
		}
		parts = append(parts, fmt.Sprintf("%s %d/%d/%d", p.name, m["Rss"], m["Anonymous"], m["Pss"]))
	}
	return strings.Join(parts, ", "), nil
}

// rollup reads the sizes of a process in KiB (proc_pid_smaps(5)): Rss is what is
// resident, of which Anonymous is its own and the rest pages of files, which the
// kernel takes back when it needs them; of shared pages Pss has a share.
func rollup(pid int) (map[string]int, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return nil, err
	}
	sizes := make(map[string]int)
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "kB" {
			if sizes[strings.TrimSuffix(f[0], ":")], err = strconv.Atoi(f[1]); err != nil {
				return nil, fmt.Errorf("smaps_rollup: %q", line)
			}
		}
	}
	return sizes, nil
}

func kernel() string {
	var u unix.Utsname
	unix.Uname(&u)
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

func cpus() int {
	var s unix.CPUSet
	unix.SchedGetaffinity(0, &s)
	return s.Count()
}
