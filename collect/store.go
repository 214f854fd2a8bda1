package collect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// Names in the collection directory.
const (
	manifestFile = "manifest.json"
	archiveFile  = "files.tar.zst"
	tempPrefix   = ".tmp-"
	trashPrefix  = ".rm-"
	reserveFile  = ".reserve"
)

// reserveSize is the room that is kept for manifests when the disk is full.
const reserveSize = 256 << 10

// ErrNotFound means that there is no such collection.
var ErrNotFound = errors.New("no such collection")

// Options are the parts of a [Store] that have a sensible default.
type Options struct {
	MaxTotal int64            // bytes on disk of all collections; 0: no limit
	Keep     time.Duration    // how long a collection is kept; 0: as long as there is room
	Log      *slog.Logger     // default: discard
	Now      func() time.Time // default: time.Now
	Host     *cgroup.Host     // where counters are read; needed by Collect alone
}

// Store is a collection directory.
type Store struct {
	o    Options
	path string
	root *os.Root
	// slots bounds how many archives are packed at the same time: each takes
	// some MiB and a CPU. One that takes long gives its slot back, so that files
	// that do not answer hold up nobody else's.
	slots    chan struct{}
	slotTime time.Duration
	// limit is how long the files of one member may take altogether. A file that has
	// been begun is finished; what has not ended after grace is waited for no longer.
	limit, grace time.Duration
	// fitting is held from when there is room for a collection until it is counted,
	// so that two do not take the same room. Before mu.
	fitting sync.Mutex

	mu     sync.Mutex
	total  int64      // bytes on disk, as far as this process knows; -1: not counted yet. Guarded by mu.
	making []*archive // those that are being made; guarded by mu
}

// Open opens a collection directory, which is made if need be. The caller closes
// the Store.
func Open(dir string, o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("collection directory: %w", err)
	}
	return open(dir, o)
}

// OpenExisting is Open for a directory that is only looked at and cleared: it is
// neither made nor given a reserve.
func OpenExisting(dir string) (*Store, error) {
	return open(dir, Options{Log: slog.New(slog.DiscardHandler), Now: time.Now})
}

func open(dir string, o Options) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("collection directory: %w", err)
	}
	return &Store{
		o: o, path: dir, root: root, total: -1,
		slots: make(chan struct{}, 2), slotTime: 10 * time.Second, limit: 10 * time.Minute, grace: time.Minute,
	}, nil
}

// Close lets go of the directory.
func (s *Store) Close() error { return s.root.Close() }

// Path returns the directory.
func (s *Store) Path() string { return s.path }

// wanted reports whether anything is to be kept of an exit: the files of a
// collector whose condition is met, or, of a failure, at least the manifest.
func wanted(sub *Subject) (manifest, files bool) {
	for _, c := range sub.Collect {
		files = files || Applies(c.On, *sub.Exit)
	}
	return files || failed(sub.Exit), files
}

// Collect takes down what is known of a member that has exited, with the files
// that its collectors name. It returns the name of the collection, the one that
// there is already if there is one, or "" if nothing is to be kept of such an
// exit. A full disk, and files that cannot be read, are no errors: the manifest
// says so. If ctx ends, nothing is left; but if it has ended for a cause of its own
// ([context.WithCancelCause]), only the files are lost, and that is why.
func (s *Store) Collect(ctx context.Context, sub *Subject) (name string, err error) {
	if sub.Exit == nil {
		return "", errors.New("the member has not exited")
	}
	want, files := wanted(sub)
	if !want {
		return "", nil
	}
	if files {
		release, err := s.slot(ctx)
		switch {
		case err == nil:
			defer release()
		case cutOff(ctx) == nil:
			return "", err
		}
	}
	if name, err := s.find(sub); name != "" || err != nil {
		return name, err
	}
	tight := !s.reserve()
	defer s.reserve() // anew, if it was needed
	tmp := tempPrefix + sub.MemberID
	unlock, err := s.begin(tmp)
	if err != nil {
		return "", err
	}
	defer unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.root.RemoveAll(tmp))
		}
	}()
	m := Gather(s.o.Host, sub, s.o.Now().Round(0).UTC())
	m.State = ""
	for _, c := range sub.Collect {
		m.Collectors = append(m.Collectors, Collector{Collect: c, Applied: Applies(c.On, *sub.Exit)})
	}
	switch {
	case tight:
		if shrink(m); files {
			m.Archive = &Archive{Err: unix.ENOSPC.Error()}
		}
	case files && cutOff(ctx) != nil:
		lost(m, cutOff(ctx))
	case files:
		// In case that this is the last thing that succeeds.
		m.Archive = &Archive{Err: "the collection was interrupted"}
		if err := s.writeManifest(tmp, m); err != nil {
			return "", err
		}
		crash.Point("collect manifest after")
		a := &archive{s: s}
		defer s.made(a)
		if err := s.writeArchive(ctx, tmp, sub, m, a); err != nil {
			return "", err
		}
		crash.Point("collect archive after")
	}
	s.fitting.Lock()
	defer s.fitting.Unlock()
	if err := s.makeRoom(tmp, m); err != nil {
		return "", err
	}
	return s.publish(tmp, sub, m)
}

// slot waits until there is room for one more who packs.
func (s *Store) slot(ctx context.Context) (release func(), err error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	release = sync.OnceFunc(func() { <-s.slots })
	time.AfterFunc(s.slotTime, release)
	return release, nil
}

// begin makes an empty directory of that name, and locks it.
func (s *Store) begin(tmp string) (unlock func(), err error) {
	crash.Point("collect temp before")
	s.mu.Lock() // no sweep comes between the directory and its lock
	defer s.mu.Unlock()
	if err := s.root.RemoveAll(tmp); err != nil { // of a crash
		return nil, err
	}
	if err := s.spare(func() error { return s.root.Mkdir(tmp, 0o700) }); err != nil {
		return nil, err
	}
	d, err := s.root.Open(tmp)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.Close()
		return nil, os.NewSyscallError("flock", err)
	}
	crash.Point("collect temp after")
	return func() { d.Close() }, nil
}

// isFull reports whether err means that the disk is full.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// reserve keeps some room on the disk for manifests. It reports whether there is
// that much; a file system that cannot tell is taken to have it.
func (s *Store) reserve() bool {
	f, err := s.root.OpenFile(reserveFile, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return !isFull(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() == reserveSize {
		return true
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	if err != nil {
		f.Truncate(0) // it may have got a part
	}
	return !isFull(err)
}

// spare does something small that must not fail for want of room.
func (s *Store) spare(do func() error) error {
	err := do()
	if isFull(err) {
		s.root.Remove(reserveFile)
		err = do()
	}
	return err
}

// writeManifest writes a manifest; on a disk that is full, at the cost of the
// archive, and without what it can do without.
func (s *Store) writeManifest(tmp string, m *Manifest) error {
	write := func(m *Manifest) error { return statefile.Write(s.root, tmp+"/"+manifestFile, m) }
	err := write(m)
	if isFull(err) && m.Archive != nil && m.Archive.Err == "" {
		s.root.Remove(tmp + "/" + archiveFile)
		lost(m, err)
		err = write(m)
	}
	if !isFull(err) {
		return err
	}
	shrink(m)
	if err := s.spare(func() error { return write(m) }); err != nil {
		return fmt.Errorf("collection directory %s: %w", s.path, err)
	}
	return nil
}

// shrink takes out of a manifest what it can do without.
func shrink(m *Manifest) {
	m.Log.Lines, m.Log.Cut = lastLines(m.Log.Lines, smallLog), true
	m.Samples, m.Files, m.FilesMore = nil, []File{}, m.FilesMore+len(m.Files)
	m.Unknown = append(m.Unknown, "most of the log, samples, list of files: left out, the disk is full")
}

// smallLog is how many bytes of a log are kept on a disk that is full.
const smallLog = 2 << 10

// lastLines returns those at the end of lines that have at most so many bytes.
func lastLines(lines []LogLine, most int) []LogLine {
	for i := len(lines) - 1; i >= 0; i-- {
		if most -= len(lines[i].Text); most < 0 {
			return lines[i+1:]
		}
	}
	return lines
}

// cutOff returns the cause of its own that ctx has ended for, nil if there is none.
func cutOff(ctx context.Context) error {
	if cause := context.Cause(ctx); cause != ctx.Err() {
		return cause
	}
	return nil
}

// writeArchive packs the files. Only ctx's error is returned: others cost the
// archive, and m says so.
func (s *Store) writeArchive(ctx context.Context, tmp string, sub *Subject, m *Manifest, a *archive) error {
	err := s.fill(ctx, tmp, sub, m, a)
	if lost := s.complete(a); lost != nil {
		err = lost
	}
	switch cause := cutOff(ctx); {
	case cause != nil && err != nil:
		err = cause
	case cause == nil && ctx.Err() != nil:
		return ctx.Err()
	}
	if err != nil {
		s.root.Remove(tmp + "/" + archiveFile)
		s.made(a)
		lost(m, err)
		s.o.Log.Warn("Files not collected", "sandbox", sub.SandboxID, "member", sub.MemberID, "err", err)
	}
	return nil
}

// fill makes the archive, by a goroutine that is left to itself if a file system
// keeps it waiting: nothing can end that.
func (s *Store) fill(ctx context.Context, tmp string, sub *Subject, m *Manifest, a *archive) error {
	m.Archive = new(Archive)
	f, err := s.root.OpenFile(tmp+"/"+archiveFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	s.mu.Lock()
	a.f, s.making = f, append(s.making, a)
	s.mu.Unlock()
	part := &Manifest{Archive: new(Archive), Collectors: []Collector{}, Files: []File{}}
	done := make(chan error, 1)
	go func() {
		err := pack(ctx, sub, part, a, time.Now().Add(s.limit))
		if err == nil {
			err = f.Sync()
		}
		if fi, serr := f.Stat(); serr == nil {
			part.Archive.Bytes = fi.Size()
		}
		f.Close() // before anybody counts on the room that it takes
		done <- err
	}()
	select {
	case err := <-done:
		copy(m.Collectors, part.Collectors) // those after an error had no turn
		m.Files, m.FilesMore, m.Archive = part.Files, part.FilesMore, part.Archive
		return err
	case <-ctx.Done():
		select {
		case <-done:
		case <-time.After(time.Second):
		}
		return ctx.Err()
	case <-time.After(s.limit + s.grace):
		return fmt.Errorf("files could not be read to their end within %s", s.limit+s.grace)
	}
}

// lost makes m say that there is no archive.
func lost(m *Manifest, err error) {
	if e := new(os.PathError); errors.As(err, &e) {
		err = e.Err // the path is that of a temporary file
	}
	m.Archive = &Archive{Err: err.Error()}
	for i := range m.Collectors {
		m.Collectors[i].Taken, m.Collectors[i].Bytes = 0, 0
	}
	for i := range m.Files {
		m.Files[i].Taken, m.Files[i].Bytes, m.Files[i].LinkOf = false, 0, ""
	}
}

// publish gives a complete collection its name.
func (s *Store) publish(tmp string, sub *Subject, m *Manifest) (string, error) {
	for {
		n, err := s.next(sub.Sandbox, sub.Member)
		if err != nil {
			return "", err
		}
		name := sub.Sandbox + "/" + sub.Member + "-" + strconv.Itoa(n)
		// The name is in the manifest for those who get it without its directory.
		m.Name = name
		if err := s.writeManifest(tmp, m); err != nil {
			return "", err
		}
		size := s.size(tmp)
		crash.Point("collect rename before")
		err = s.spare(func() error {
			if err := s.root.Mkdir(sub.Sandbox, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			return s.root.Rename(tmp, name)
		})
		switch {
		case errors.Is(err, fs.ErrExist), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, fs.ErrNotExist):
			continue // another process was faster, or has just removed the directory
		case err != nil:
			return "", err
		}
		crash.Point("collect rename after")
		s.mu.Lock()
		if s.total >= 0 {
			s.total += size
		}
		s.mu.Unlock()
		return name, cmp.Or(statefile.SyncDir(s.root, sub.Sandbox), statefile.SyncDir(s.root, "."))
	}
}

// next returns the number of the next collection of a member of that name.
func (s *Store) next(sandbox, member string) (int, error) {
	ns, err := s.numbers(sandbox, member)
	if len(ns) == 0 {
		return 1, err
	}
	return ns[len(ns)-1] + 1, nil
}

// numbers returns the numbers of a member's collections, in order.
func (s *Store) numbers(sandbox, member string) ([]int, error) {
	ents, err := s.readDir(sandbox)
	if err != nil {
		return nil, err
	}
	var ns []int
	for _, e := range ents {
		if m, n, ok := split(e.Name()); ok && m == member {
			ns = append(ns, n)
		}
	}
	slices.Sort(ns)
	return ns, nil
}

// readDir lists a directory; one that is not there is empty, and so is what is none.
func (s *Store) readDir(name string) ([]fs.DirEntry, error) {
	if fi, err := s.root.Lstat(name); err == nil && !fi.IsDir() {
		return nil, nil
	}
	ents, err := fs.ReadDir(s.root.FS(), name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return ents, err
}

// split takes "MEMBER-N" apart.
func split(name string) (member string, n int, ok bool) {
	i := strings.LastIndexByte(name, '-')
	if i < 1 {
		return "", 0, false
	}
	n, err := strconv.Atoi(name[i+1:])
	return name[:i], n, err == nil && n > 0 && strconv.Itoa(n) == name[i+1:]
}

// recent is how many collections of one name are looked through for one of the
// very same member: the one that a daemon made which was killed before it could
// note that.
const recent = 8

// find returns the name of the collection that there is of sub already, or "".
func (s *Store) find(sub *Subject) (string, error) {
	ns, err := s.numbers(sub.Sandbox, sub.Member)
	if err != nil {
		return "", err
	}
	for _, n := range slices.Backward(ns[max(0, len(ns)-recent):]) {
		name := sub.Sandbox + "/" + sub.Member + "-" + strconv.Itoa(n)
		if m, err := ReadManifest(s.root, name); err == nil && m.MemberID == sub.MemberID {
			return name, nil
		}
	}
	return "", nil
}

// Entry is a collection.
type Entry struct {
	Name string `json:"name"` // SANDBOX/MEMBER-N
	Size int64  `json:"size"` // bytes on disk
	*Manifest
}

// List returns all collections, the oldest first. One whose manifest cannot be
// read has none, and comes first. A directory without a manifest is none: it is
// somebody else's.
func (s *Store) List() ([]Entry, error) {
	entries := []Entry{}
	boxes, err := s.readDir(".")
	if err != nil {
		return nil, err
	}
	for _, b := range boxes {
		if !b.IsDir() || strings.HasPrefix(b.Name(), ".") {
			continue
		}
		ents, err := s.readDir(b.Name())
		if err != nil {
			return nil, err
		}
		for _, e := range ents {
			if _, _, ok := split(e.Name()); !ok || !e.IsDir() {
				continue
			}
			name := b.Name() + "/" + e.Name()
			m, err := ReadManifest(s.root, name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			entries = append(entries, Entry{Name: name, Size: s.size(name), Manifest: m})
		}
	}
	slices.SortFunc(entries, func(a, b Entry) int {
		return cmp.Or(a.when().Compare(b.when()), strings.Compare(a.Name, b.Name))
	})
	return entries, nil
}

func (e Entry) when() time.Time {
	if e.Manifest == nil {
		return time.Time{}
	}
	return e.CollectedAt
}

// failed reports whether e tells of a failure. What cannot be read does not.
func (e Entry) failed() bool { return e.Manifest != nil && failed(e.Exit) }

// size is what a collection takes on disk.
func (s *Store) size(name string) int64 {
	var sum int64
	for _, p := range []string{name, name + "/" + manifestFile, name + "/" + archiveFile} {
		fi, err := s.root.Lstat(p)
		if err != nil {
			continue
		}
		if st, ok := fi.Sys().(*unixStat); ok {
			sum += st.Blocks * 512
		}
	}
	return sum
}

// manifestSize is about what a manifest takes that is not written yet.
const manifestSize = 16 << 10

// makeRoom removes collections until the one in tmp fits. One that cannot fit
// loses its files.
func (s *Store) makeRoom(tmp string, m *Manifest) error {
	if s.o.MaxTotal <= 0 {
		return nil
	}
	need := s.size(tmp) + manifestSize
	if need > s.o.MaxTotal && m.Archive != nil && m.Archive.Err == "" {
		if err := s.root.Remove(tmp + "/" + archiveFile); err != nil {
			return err
		}
		lost(m, errTooLarge)
		need = s.size(tmp) + manifestSize
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= 0 && s.total+need <= s.o.MaxTotal {
		return nil
	}
	entries, err := s.List()
	if err != nil {
		return err
	}
	s.total = 0
	for _, e := range entries {
		s.total += e.Size
	}
	slices.SortStableFunc(entries, func(a, b Entry) int {
		return cmp.Compare(b2i(a.failed()), b2i(b.failed()))
	})
	for _, e := range entries {
		if s.total+need <= s.o.MaxTotal {
			break
		}
		if err := s.remove(e.Name); err != nil {
			return err
		}
		s.total -= e.Size
		s.o.Log.Info("Collection removed to make room", "collection", e.Name, "bytes", e.Size)
	}
	return nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Remove removes a collection.
func (s *Store) Remove(name string) error {
	if err := s.check(name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total = -1
	return s.remove(name)
}

// remove takes the name of a collection away first, so that nobody sees half of it.
func (s *Store) remove(name string) error {
	trash := trashPrefix + strings.ReplaceAll(name, "/", "-")
	if err := s.root.RemoveAll(trash); err != nil {
		return err
	}
	if err := s.root.Rename(name, trash); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.root.RemoveAll(trash); err != nil {
		return err
	}
	s.root.Remove(path.Dir(name)) // fails as long as there are others in it
	return nil
}

// check fails unless there is a collection of that name.
func (s *Store) check(name string) error {
	box, rest, ok := strings.Cut(name, "/")
	_, _, numbered := split(rest)
	if !ok || box == "" || strings.HasPrefix(box, ".") || strings.Contains(rest, "/") || !numbered {
		return fmt.Errorf("%.100q is not SANDBOX/MEMBER-N", name)
	}
	for _, p := range []string{box, name} {
		if fi, err := s.root.Lstat(p); errors.Is(err, fs.ErrNotExist) || err == nil && !fi.IsDir() {
			return fmt.Errorf("%w: %s", ErrNotFound, name)
		} else if err != nil {
			return err
		}
	}
	if _, err := s.root.Lstat(name + "/" + manifestFile); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s is a directory without a manifest", ErrNotFound, name)
	} else if err != nil {
		return err
	}
	return nil
}

// Manifest returns the manifest of a collection.
func (s *Store) Manifest(name string) (*Manifest, error) {
	if err := s.check(name); err != nil {
		return nil, err
	}
	m, err := ReadManifest(s.root, name)
	if err != nil {
		return nil, fmt.Errorf("collection %s: %w", name, err)
	}
	m.Name = name
	return m, nil
}

// Latest returns the newest collection of a member, by the names of sandbox and
// member, or the ids. It fails with [ErrNotFound].
func (s *Store) Latest(sandbox, member string) (*Manifest, error) {
	if strings.HasPrefix(sandbox, ".") || strings.Contains(sandbox+member, "/") {
		return nil, fmt.Errorf("%w: nothing was collected of %.100q", ErrNotFound, sandbox+"/"+member)
	}
	ns, err := s.numbers(sandbox, member)
	if err != nil {
		return nil, err
	}
	for _, n := range slices.Backward(ns) {
		m, err := s.Manifest(sandbox + "/" + member + "-" + strconv.Itoa(n))
		if !errors.Is(err, ErrNotFound) {
			return m, err
		}
	}
	entries, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, e := range slices.Backward(entries) {
		if m := e.Manifest; m != nil && (m.Sandbox == sandbox || m.SandboxID == sandbox) && (m.Member == member || m.MemberID == member) {
			m.Name = e.Name
			return m, nil
		}
	}
	return nil, fmt.Errorf("%w: nothing was collected of %s/%s", ErrNotFound, sandbox, member)
}

// Sweep finds what a crash has left and what has been kept for long enough, and
// removes it unless dry is set.
func (s *Store) Sweep(_ context.Context, dry bool) ([]garbage.Finding, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []garbage.Finding
	note := func(name string, since time.Time, reason string, remove func() error) {
		f := garbage.Finding{Kind: garbage.Collection, Name: filepath.Join(s.path, name), Since: since, Reason: reason, Action: garbage.WouldRemove}
		if !dry {
			crash.Point("gc " + string(f.Kind) + " before")
			f.Done(remove())
			crash.Point("gc " + string(f.Kind) + " after")
			s.total = -1
		}
		found = append(found, f)
	}
	ents, err := s.readDir(".")
	if err != nil {
		return nil, err
	}
	for _, e := range ents {
		temp := isTemp(e.Name())
		if !e.IsDir() || !temp && !strings.HasPrefix(e.Name(), trashPrefix) || s.locked(e.Name()) {
			continue
		}
		var since time.Time
		if fi, err := e.Info(); err == nil {
			since = fi.ModTime().UTC()
		}
		reason := "it was about to be removed"
		if temp {
			reason = "it was never finished"
		}
		note(e.Name(), since, reason, func() error { return s.root.RemoveAll(e.Name()) })
	}
	if s.o.Keep <= 0 {
		return found, nil
	}
	entries, err := s.List()
	if err != nil {
		return found, err
	}
	for _, e := range entries {
		at := e.when()
		if e.Manifest == nil { // its manifest cannot be read, which makes it no younger
			fi, err := s.root.Lstat(e.Name)
			if err != nil {
				continue
			}
			at = fi.ModTime().UTC()
		}
		if s.o.Now().Sub(at) > s.o.Keep {
			note(e.Name, at, fmt.Sprintf("it is older than %s (--collect-keep)", s.o.Keep), func() error { return s.remove(e.Name) })
		}
	}
	return found, nil
}

// isTemp reports whether a directory of that name is one in which a collection is made.
func isTemp(name string) bool {
	id, ok := strings.CutPrefix(name, tempPrefix)
	return ok && len(id) == 16 && strings.Trim(id, "0123456789abcdef") == ""
}

// locked reports whether somebody is at work in a directory.
func (s *Store) locked(name string) bool {
	d, err := s.root.Open(name)
	if err != nil {
		return true // gone, or not ours to judge
	}
	defer d.Close()
	return unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}
