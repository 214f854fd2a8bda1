package collect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/crilog"
	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/tarstream"
)

// Subject is a member about which something is to be found out.
type Subject struct {
	Sandbox, SandboxID string // name and id
	Member, MemberID   string
	State              string // for a manifest that is no collection's
	Command            []string
	Labels             map[string]string
	CreatedAt          time.Time
	StartedAt          time.Time
	Exit               *exit.Record
	StartError         string
	Cgroup             string // path, the same in every hierarchy
	LogPath            string
	LogDropped         int64 // lines that are missing in it
	// NetDev is a file in the form of /proc/net/dev that shows the sandbox's
	// interfaces; empty if the sandbox has none of its own.
	NetDev string
	// Root opens the member's root; the caller closes it.
	Root func() (*os.File, error)
	// Keep, if not nil, is called before Root while files are taken: until what it
	// returns is closed, what is mounted in the root stays, whoever else goes.
	Keep     func() (*os.File, error)
	RootFrom string   // whose the root is; see [Mount]
	Layer    string   // directory of its writable layer; empty if there is none
	Targets  []Target // where something is mounted in the root
	IDs      *tarstream.IDs
	Collect  []request.Collect
	Samples  *Samples
}

// Target is a place in a member's root where something is mounted.
type Target struct {
	Path  string // in the root, clean
	From  string // see [Mount]
	Tmpfs bool   // it is a file system in memory; else it is from elsewhere
}

// Gather finds out what there is to know of s now, its files apart. What it
// cannot find out the manifest names.
func Gather(host *cgroup.Host, s *Subject, now time.Time) *Manifest {
	m := &Manifest{
		Version: manifestVersion, Sandbox: s.Sandbox, SandboxID: s.SandboxID, Member: s.Member, MemberID: s.MemberID,
		State: s.State, Command: cutCommand(s.Command), Labels: s.Labels, CreatedAt: s.CreatedAt, StartedAt: s.StartedAt,
		CollectedAt: now, Exit: s.Exit, StartError: s.StartError, Samples: s.Samples,
		Network: []Interface{}, Mounts: []Mount{}, Collectors: []Collector{}, Files: []File{},
	}
	unknown := func(what string, err error) {
		if err != nil {
			m.Unknown = append(m.Unknown, what+": "+err.Error())
		}
	}
	var err error
	m.Counters, err = host.Usage(s.Cgroup)
	unknown("counters", err)
	if s.NetDev != "" {
		b, err := os.ReadFile(s.NetDev)
		unknown("network", err)
		m.Network = parseNetDev(string(b))
	}
	m.Log, err = lastWords(s.LogPath)
	unknown("log", err)
	m.Log.Dropped = s.LogDropped
	m.Mounts, err = Mounts(s)
	unknown("mounts", err)
	return m
}

// cutCommand keeps a command to a size that can be shown.
func cutCommand(args []string) []string {
	out, size := []string{}, 0
	for _, a := range args {
		if size += len(a); size > maxCommand {
			return append(out, "…")
		}
		out = append(out, a)
	}
	return out
}

// parseNetDev reads what /proc/net/dev shows (proc_pid_net(5)).
func parseNetDev(text string) []Interface {
	ifs := []Interface{}
	for line := range strings.Lines(text) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if !ok || len(f) < 12 {
			continue
		}
		n := make([]int64, len(f))
		for i := range f {
			n[i], _ = strconv.ParseInt(f[i], 10, 64)
		}
		i := Interface{
			Name: strings.TrimSpace(name), RxBytes: n[0], RxPackets: n[1], RxErrors: n[2], RxDropped: n[3],
			TxBytes: n[8], TxPackets: n[9], TxErrors: n[10], TxDropped: n[11],
		}
		if i.Name != "lo" {
			ifs = append(ifs, i)
		}
	}
	return ifs
}

// maxLogRead is how much of the end of a log is looked at. A member may have
// written without end and without a line feed.
const maxLogRead = 512 << 10

// lastWords reads the end of a log.
func lastWords(file string) (Log, error) {
	l := Log{Path: file, Lines: []LogLine{}}
	if file == "" {
		return l, nil
	}
	b, cut, err := tail(file, maxLogRead)
	if errors.Is(err, os.ErrNotExist) {
		return l, nil // it has never written anything
	}
	if cut {
		_, b, _ = bytes.Cut(b, []byte("\n")) // what is before it is not whole
	}
	l.Cut = cut
	j := crilog.Joiner{Max: maxLogLine}
	size := 0
	add := func(line crilog.Line) {
		text := string(line.Content)
		if len(text) > maxLogLine {
			text, l.Cut = text[:maxLogLine], true
		}
		text = strings.ToValidUTF8(text, "\uFFFD")
		l.Lines = append(l.Lines, LogLine{line.Time.UTC(), line.Stream, text})
		size += len(text)
		for size > maxLogBytes || len(l.Lines) > maxLogLines {
			size -= len(l.Lines[0].Text)
			l.Lines, l.Cut = l.Lines[1:], true
		}
	}
	for raw := range bytes.Lines(b) {
		line, perr := crilog.Parse(bytes.TrimSuffix(raw, []byte("\n")))
		if perr != nil {
			continue
		}
		if whole, ok := j.Add(line); ok {
			add(whole)
		}
	}
	for _, line := range j.Rest() {
		add(line)
	}
	return l, err
}

// tail reads the last bytes of a file, most of them at most; cut says that there
// are others. No link is followed: who is logged may be able to make one.
func tail(file string, most int64) (_ []byte, cut bool, err error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, file, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, false, &os.PathError{Op: "open", Path: file, Err: err}
	}
	f := os.NewFile(uintptr(fd), file)
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if !fi.Mode().IsRegular() {
		return nil, false, fmt.Errorf("%s is not a regular file", file)
	}
	from := max(0, fi.Size()-most)
	b, err := io.ReadAll(io.NewSectionReader(f, from, most))
	return b, from > 0, err
}

// limitLayer is how long a layer is looked through for its size.
const limitLayer = time.Second

// Mounts shows what is mounted in the root of s, as far as it is held. What is from
// elsewhere is not looked at: it would be held without s, and may not answer.
func Mounts(s *Subject) ([]Mount, error) {
	ms := []Mount{}
	if s.Root == nil {
		return ms, nil
	}
	root, err := s.Root()
	if err != nil {
		return ms, err
	}
	defer root.Close()
	top := Mount{Target: "/", Type: "bind", From: s.RootFrom}
	if s.Layer != "" {
		top.Type = "overlay"
		top.Used, err = layerSize(s.Layer)
	}
	ms = append(ms, top)
	for _, t := range s.Targets {
		if len(ms) == maxMountPoints {
			return ms, errors.Join(err, fmt.Errorf("there are more than %d", maxMountPoints))
		}
		m := Mount{Target: t.Path, Type: "bind", From: t.From}
		if t.Tmpfs {
			st, _, err := statfs(root, t.Path)
			if err != nil {
				continue // hidden by another, or taken away by the member
			}
			m.Type, m.Memory = "tmpfs", inMemory(st)
			m.Size, m.Used = int64(st.Blocks)*st.Frsize, int64(st.Blocks-st.Bfree)*st.Frsize
		}
		ms = append(ms, m)
	}
	return ms, err
}

// layerSize returns what a writable layer takes on disk.
func layerSize(dir string) (int64, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limitLayer)
	defer cancel()
	n, err := tarstream.Usage(ctx, f)
	if ctx.Err() != nil {
		err = errors.New("/: it is more than that: there are too many files to look at each")
	}
	return n, err
}

// Tmpfs returns how many bytes the file systems in memory hold that are mounted
// at the targets in root, each counted once.
func Tmpfs(root *os.File, targets []string) int64 {
	var sum int64
	seen := map[uint64]bool{}
	for _, target := range targets {
		st, dev, err := statfs(root, target)
		if err != nil || !inMemory(st) || seen[dev] {
			continue
		}
		seen[dev] = true
		sum += int64(st.Blocks-st.Bfree) * st.Frsize
	}
	return sum
}

// inMemory reports whether st is of a tmpfs with a limit; one without says
// nothing of what it holds.
func inMemory(st *unix.Statfs_t) bool { return st.Type == unix.TMPFS_MAGIC && st.Blocks > 0 }

// statfs shows the file system at target in root, which must be in memory, and its
// device. One that is not may not answer (FUSE, NFS), and who is waiting shows all
// members, or follows their exits.
func statfs(root *os.File, target string) (*unix.Statfs_t, uint64, error) {
	fd, err := openCached(int(root.Fd()), target)
	if err != nil {
		return nil, 0, err
	}
	defer unix.Close(fd)
	if !isTmpfs(fd) {
		return nil, 0, errors.New("not a tmpfs")
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return nil, 0, err
	}
	var is unix.Stat_t
	if err := unix.Fstat(fd, &is); err != nil {
		return nil, 0, err
	}
	return &st, uint64(is.Dev), nil
}

// openCached opens a path in root by what the kernel has in memory, without asking any
// file system on the way: a place where something is mounted is there, and so are the
// directories above it.
func openCached(root int, target string) (fd int, err error) {
	const resolveCached = 0x20 // RESOLVE_CACHED, which package unix does not have
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolveCached,
	}
	for range 5 { // a mount or rename elsewhere comes between
		if fd, err = unix.Openat2(root, target, &how); !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return openStepwise(root, target)
	case errors.Is(err, unix.EINVAL): // before Linux 5.12
		how.Resolve &^= resolveCached
		return unix.Openat2(root, target, &how)
	}
	return fd, err
}

// openStepwise does the same where the kernel has to ask: an overlay whose layers are
// idmapped never has in memory who may search a directory (ovl_get_acl), nor has any file
// system as long as nobody asked. So that is asked of the root's own file system and of
// those in memory; it goes through no other, nor links.
func openStepwise(root int, target string) (fd int, err error) {
	home, err := device(root)
	if err != nil {
		return -1, err
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	fd = root
	for name := range strings.SplitSeq(strings.Trim(target, "/"), "/") {
		if dev, err := device(fd); fd != root && (err != nil || dev != home) && !isTmpfs(fd) {
			unix.Close(fd)
			return -1, errors.New("there is another file system on the way")
		}
		next, err := unix.Openat2(fd, name, &how)
		if fd != root {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

// device returns what file system fd is in, without asking that.
func device(fd int) ([2]uint32, error) {
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	return [2]uint32{st.Dev_major, st.Dev_minor}, err
}

// isTmpfs reports whether fd is in a tmpfs, by the form of its file handles
// (shmem_encode_fh in mm/shmem.c), which the kernel makes by itself.
func isTmpfs(fd int) bool {
	const fileidIno32Gen = 1
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.ENOSYS) {
		return true // it has to be asked
	}
	return err == nil && h.Type() == fileidIno32Gen && h.Size() == 12
}
