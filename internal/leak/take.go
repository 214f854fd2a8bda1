package leak

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Take looks at the host. It needs root to see all of it; what it may not read,
// or what goes away while it looks, it leaves out.
func Take(o Options) (*Snapshot, error) {
	if o.Ancestor == 0 {
		o.Ancestor = os.Getpid()
	}
	o.Dirs = slices.Clone(o.Dirs)
	for i, dir := range o.Dirs {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		o.Dirs[i] = abs
	}
	t := &taker{o: o, things: map[Kind]map[string]string{}, mntns: map[string]int{}}
	if err := t.processes(); err != nil {
		return nil, err
	}
	t.mounts()
	if err := t.cgroups(); err != nil {
		return nil, err
	}
	if err := t.links(); err != nil {
		return nil, err
	}
	if err := t.network(); err != nil {
		return nil, err
	}
	if err := t.files(); err != nil {
		return nil, err
	}
	return &Snapshot{o, t.things, t.threads}, nil
}

type taker struct {
	o       Options
	things  map[Kind]map[string]string
	mntns   map[string]int // mount namespace → a process in it
	threads int            // of the process Options.PID
}

func (t *taker) add(k Kind, what, detail string) {
	m := t.things[k]
	if m == nil {
		m = map[string]string{}
		t.things[k] = m
	}
	if _, had := m[what]; !had {
		m[what] = detail
	}
}

// process is what is known of a process.
type process struct {
	pid, ppid int
	start     string // clock ticks since boot, field 22 of /proc/PID/stat
	zombie    bool
	argv      []string
	comm      string
	fds       []descriptor
}

type descriptor struct {
	num, target string
}

func (p *process) String() string {
	name := strings.Join(p.argv, " ")
	if name == "" {
		name = p.comm
	}
	if len(name) > 120 {
		name = name[:120] + "…"
	}
	return fmt.Sprintf("pid %d (%s)", p.pid, name)
}

func (t *taker) processes() error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	all := map[int]*process{}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p := readProcess(pid); p != nil {
			all[pid] = p
			pids = append(pids, pid)
		}
	}
	self := all[os.Getpid()]
	if self == nil {
		return errors.New("/proc does not show this process: it is of another pid namespace")
	}
	// Where the observer is was there before, whoever else is found there later.
	for _, ns := range namespaces("/proc/self/") {
		t.add(Namespace, ns, "the observer's")
	}
	for _, pid := range pids {
		p := all[pid]
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err == nil {
			if _, had := t.mntns[ns]; !had || p == self {
				t.mntns[ns] = pid
			}
		}
		if pid == t.o.PID {
			t.descriptors(p)
			tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
			t.threads = len(tasks)
		}
		if !t.ours(p, all) {
			continue
		}
		// The observer holds things too, but is not left behind.
		if p != self && pid != t.o.Ancestor {
			state := ""
			if p.zombie {
				state = "zombie, "
			}
			t.add(Process, fmt.Sprintf("%d@%s", pid, p.start), fmt.Sprintf("%schild of %d, %s", state, p.ppid, p))
		}
		t.held(p)
	}
	return nil
}

// readProcess returns nil if the process is gone or is a kernel thread.
func readProcess(pid int) *process {
	dir := fmt.Sprintf("/proc/%d/", pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return nil
	}
	// The name is in parentheses and may contain some itself, proc_pid_stat(5).
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return nil
	}
	f := strings.Fields(string(stat[end+1:]))
	if len(f) < 20 {
		return nil
	}
	const kthreadd = 2
	ppid, _ := strconv.Atoi(f[1])
	flags, _ := strconv.ParseUint(f[6], 10, 64)
	const pfKthread = 0x00200000 // PF_KTHREAD, include/linux/sched.h
	if pid == kthreadd || ppid == kthreadd || flags&pfKthread != 0 {
		return nil
	}
	p := &process{pid: pid, ppid: ppid, start: f[19], zombie: f[0] == "Z" || f[0] == "X", comm: string(stat[open+1 : end])}
	if b, err := os.ReadFile(dir + "cmdline"); err == nil {
		if s := strings.TrimRight(string(b), "\x00"); s != "" {
			p.argv = strings.Split(s, "\x00")
		}
	}
	fds, _ := os.ReadDir(dir + "fd")
	for _, e := range fds {
		if target, err := os.Readlink(dir + "fd/" + e.Name()); err == nil {
			p.fds = append(p.fds, descriptor{e.Name(), target})
		}
	}
	return p
}

func (t *taker) ours(p *process, all map[int]*process) bool {
	if t.descends(p, all) {
		return true
	}
	// A zombie that init has not reaped yet holds nothing and is not of ours to
	// reap.
	if p.zombie {
		return false
	}
	return t.o.Global || t.marked(p) || t.inCgroup(p) || t.hasOpen(p)
}

func (t *taker) descends(p *process, all map[int]*process) bool {
	for range 1000 { // pids may be reused while they are read: no endless chain
		if p == nil {
			return false
		}
		if p.pid == t.o.Ancestor {
			return true
		}
		p = all[p.ppid]
	}
	return false
}

// marked reports whether p's command line is that of a pause, monitor or launch
// of one of the installations.
func (t *taker) marked(p *process) bool {
	if len(p.argv) < 2 || !strings.HasPrefix(p.argv[0], "sandboxd-") {
		return false
	}
	mark, _, _ := strings.Cut(p.argv[1], ".")
	return slices.Contains(t.o.Marks, mark)
}

func (t *taker) inCgroup(p *process) bool {
	if t.o.CgroupParent == "" {
		return false
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		// hierarchy:controllers:path, cgroups(7)
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 && below(f[2], t.o.CgroupParent) {
			return true
		}
	}
	return false
}

func (t *taker) hasOpen(p *process) bool {
	for _, fd := range p.fds {
		if t.inDirs(fd.target) {
			return true
		}
	}
	for _, link := range []string{"cwd", "root", "exe"} {
		if target, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", p.pid, link)); err == nil && t.inDirs(target) {
			return true
		}
	}
	return false
}

func (t *taker) inDirs(path string) bool {
	return slices.ContainsFunc(t.o.Dirs, func(dir string) bool { return below(path, dir) })
}

// below reports whether path is dir or below it.
func below(path, dir string) bool {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return ok && (rest == "" || rest[0] == '/')
}

// held adds the namespaces and memfds that a process holds.
func (t *taker) held(p *process) {
	dir := fmt.Sprintf("/proc/%d/", p.pid)
	own := map[string]string{}
	for kind, ns := range namespaces(dir) {
		own[kind] = ns
		t.add(Namespace, ns, p.String())
	}
	tasks, _ := os.ReadDir(dir + "task")
	for _, task := range tasks {
		for kind, ns := range namespaces(dir + "task/" + task.Name() + "/") {
			// The first thread may have gone, with its namespaces.
			if ns == own[kind] || own[kind] == "" {
				continue
			}
			t.add(Thread, fmt.Sprintf("%s of %s", task.Name(), p), fmt.Sprintf("is in %s and not in %s", ns, own[kind]))
			t.add(Namespace, ns, fmt.Sprintf("thread %s of %s", task.Name(), p))
		}
	}
	for _, fd := range p.fds {
		if name, _, ok := strings.Cut(fd.target, ":["); ok && nsKind(name) {
			t.add(Namespace, fd.target, fmt.Sprintf("fd %s of %s", fd.num, p))
		}
		if name, ok := strings.CutPrefix(fd.target, "/memfd:"); ok {
			var st unix.Stat_t
			if unix.Stat(dir+"fd/"+fd.num, &st) == nil {
				t.add(Memfd, fmt.Sprintf("%s inode %d", strings.TrimSuffix(name, " (deleted)"), st.Ino), fmt.Sprintf("fd %s of %s", fd.num, p))
			}
		}
	}
}

// namespaces maps the links in dir/ns to namespaces, such as "net" to
// "net:[4026531840]".
func namespaces(dir string) map[string]string {
	m := map[string]string{}
	entries, _ := os.ReadDir(dir + "ns")
	for _, e := range entries {
		if ns, err := os.Readlink(dir + "ns/" + e.Name()); err == nil {
			m[e.Name()] = ns
		}
	}
	return m
}

func nsKind(name string) bool {
	switch name {
	case "cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts":
		return true
	}
	return false
}

// descriptors numbers the descriptors of one process within what they are, so
// that one socket more is a finding and a different socket is not.
func (t *taker) descriptors(p *process) {
	count := map[string]int{}
	for _, fd := range p.fds {
		class := fd.target
		if kind, _, ok := strings.Cut(class, ":["); ok && (kind == "socket" || kind == "pipe") {
			class = kind
		}
		count[class]++
		t.add(FD, fmt.Sprintf("%s, number %d of these", class, count[class]), fmt.Sprintf("fd %s of %s: %s", fd.num, p, fd.target))
	}
}

// mount is one line of /proc/PID/mountinfo, proc_pid_mountinfo(5).
type mount struct {
	root, point, fstype, source, options string
}

func parseMounts(text string) []mount {
	var ms []mount
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 3 {
			continue
		}
		ms = append(ms, mount{unescape(l[3]), unescape(l[4]), r[0], unescape(r[1]), unescape(r[2])})
	}
	return ms
}

// unescape undoes what the kernel does to blanks, newlines and backslashes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace(s)
}

func (t *taker) mounts() {
	for ns, pid := range t.mntns {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		if err != nil {
			continue
		}
		count := map[string]int{}
		for _, m := range parseMounts(string(b)) {
			if !t.o.Global && !t.inDirs(m.point) && !t.madeOf(m) {
				continue
			}
			count[m.point]++
			what := fmt.Sprintf("%s %s", ns, m.point)
			if n := count[m.point]; n > 1 {
				what += fmt.Sprintf(" (number %d there)", n)
			}
			t.add(Mount, what, fmt.Sprintf("%s of %s%s, seen by pid %d", m.fstype, m.source, m.root, pid))
			if m.fstype == "nsfs" {
				t.add(Namespace, m.root, "bind mount on "+m.point)
			}
		}
	}
}

// madeOf reports whether m shows something below our directories: as an
// overlay's layer, or as the root or source of a bind mount or image.
func (t *taker) madeOf(m mount) bool {
	// The root of a bind mount is a path only where the file system is that of /.
	if t.inDirs(m.source) || t.inDirs(m.root) {
		return true
	}
	for option := range strings.SplitSeq(m.options, ",") {
		_, value, _ := strings.Cut(option, "=")
		if slices.ContainsFunc(strings.Split(value, ":"), t.inDirs) {
			return true
		}
	}
	return false
}

func (t *taker) cgroups() error {
	if t.o.CgroupParent == "" && !t.o.Global {
		return nil
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, m := range parseMounts(string(b)) {
		if m.fstype != "cgroup" && m.fstype != "cgroup2" {
			continue
		}
		top := m.point
		if !t.o.Global {
			top = filepath.Join(m.point, t.o.CgroupParent)
		}
		err := walk(top, func(path string, d fs.DirEntry) {
			if d.IsDir() && path != m.point {
				procs, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
				t.add(Cgroup, path, fmt.Sprintf("%d processes", bytes.Count(procs, []byte("\n"))))
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// links reads the interface names of the observer's network namespace.
func (t *taker) links() error {
	if !t.o.Links && !t.o.Global {
		return nil
	}
	b, err := os.ReadFile("/proc/thread-self/net/dev")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			t.add(Link, strings.TrimSpace(name), "")
		}
	}
	return nil
}

func (t *taker) files() error {
	for _, dir := range t.o.Dirs {
		err := walk(dir, func(path string, d fs.DirEntry) {
			kept := slices.ContainsFunc(t.o.Keep, func(k string) bool { return below(path, k) })
			if path != dir && !kept {
				t.add(File, path, d.Type().String())
			}
		})
		if err != nil {
			return err
		}
	}
	if t.o.Global {
		return walk("/dev/shm", func(path string, _ fs.DirEntry) {
			if path != "/dev/shm" {
				t.add(Shm, path, "")
			}
		})
	}
	// A POSIX shared memory object is a file directly in there, shm_overview(7). A
	// directory is none and is not entered: somebody else works below it, whose
	// oracle would take this process for its own while it has that open.
	entries, err := os.ReadDir("/dev/shm")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), "sandboxd") {
			t.add(Shm, "/dev/shm/"+e.Name(), "")
		}
	}
	return nil
}

// walk visits top and all below it. What is not there, or goes away, is left out.
func walk(top string, visit func(path string, d fs.DirEntry)) error {
	return filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
			return nil
		case err != nil:
			return err
		}
		visit(path, d)
		return nil
	})
}
