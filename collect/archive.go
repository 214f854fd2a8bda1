package collect

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/tarstream"
)

const (
	// entryCost is what an entry counts at least beside its content: a header, more
	// or less. Else empty files without number would cost nothing.
	entryCost = 1 << 10
	// maxWhy is how much is said of one file.
	maxWhy = 300
	// maxMatches is how many paths a glob may match; each is looked up by itself.
	maxMatches = 10_000
	// zstdWindow bounds the memory of whoever packs or unpacks.
	zstdWindow = 1 << 20
)

var (
	// errTooLarge means that an archive would take more than the whole directory may.
	errTooLarge = errors.New("the archive is larger than the collection directory may be (--collect-max-total)")
	// errCrowded means the same of all that are being made, of which it was the largest.
	errCrowded = errors.New("archives that were being made at the same time were larger than the collection directory may be (--collect-max-total)")
)

// archive is a files.tar.zst that is being made. Until its collection is counted
// among the others, it is counted among those in the making.
type archive struct {
	s *Store
	f *os.File
	// Guarded by s.mu.
	size  int64 // what it has been given
	whole bool  // it is complete
	lost  bool  // it has made room for others, or is waited for no longer
}

// Write writes what there is room for.
func (a *archive) Write(b []byte) (int, error) {
	if err := a.s.grow(a, int64(len(b))); err != nil {
		return 0, err
	}
	return a.f.Write(b)
}

// grow takes room for n bytes of a. All that are being made may be as large
// together as all that is kept; beyond that the largest is lost, at once: it may be
// one that is kept waiting.
func (s *Store) grow(a *archive, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.lost {
		return errCrowded
	}
	a.size += n
	if s.o.MaxTotal <= 0 {
		return nil
	}
	if a.size > s.o.MaxTotal {
		return errTooLarge
	}
	for {
		var sum int64
		largest := a
		for _, x := range s.making {
			if sum += x.size; x.size > largest.size && !x.whole {
				largest = x
			}
		}
		if sum <= s.o.MaxTotal {
			return nil
		}
		largest.size, largest.lost = 0, true
		largest.f.Truncate(0)
		if largest == a {
			return errCrowded
		}
	}
}

// complete says that nothing more is written to a, unless a has been lost before.
func (s *Store) complete(a *archive) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.lost {
		return errCrowded
	}
	a.whole = true
	return nil
}

// made takes a out of those in the making. If it is not complete it takes no room any
// more, and what is still written to it is in vain.
func (s *Store) made(a *archive) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.lost = true; a.f != nil && !a.whole {
		a.f.Truncate(0) // its file may be open for as long as a file system does not answer
	}
	s.making = slices.DeleteFunc(s.making, func(x *archive) bool { return x == a })
}

// pack writes the files that the collectors of s name to w until that time, and
// what became of them into m. An error means that the archive is of no use; ctx's is
// returned as such.
func pack(ctx context.Context, s *Subject, m *Manifest, w io.Writer, until time.Time) error {
	if s.Keep != nil {
		keep, err := s.Keep()
		if err != nil {
			return err
		}
		defer keep.Close()
	}
	root, err := s.Root()
	if err != nil {
		return err
	}
	defer root.Close()
	buf := bufio.NewWriterSize(w, 64<<10)
	z, err := zstd.NewWriter(buf, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	p := &packer{m: m, archive: tarstream.NewArchive(z), root: root, ids: s.IDs, index: map[string]int{}, begun: time.Now(), until: until}
	for _, c := range s.Collect {
		p.c, p.spent = Collector{Collect: c, Applied: Applies(c.On, *s.Exit)}, 0
		if p.c.Applied {
			if err := p.collect(ctx); err != nil {
				return err
			}
		}
		m.Collectors = append(m.Collectors, p.c)
	}
	return cmp.Or(p.archive.Close(), z.Close(), buf.Flush())
}

// packer takes files into an archive, collector by collector.
type packer struct {
	m       *Manifest
	archive *tarstream.Archive
	root    *os.File
	ids     *tarstream.IDs
	begun   time.Time
	until   time.Time
	c       Collector      // the one whose turn it is
	spent   int64          // of its limit
	listed  int            // bytes of what m.Files says
	index   map[string]int // in m.Files, by the name in the archive
}

func (p *packer) collect(ctx context.Context) error {
	timed, cancel := context.WithDeadline(ctx, p.until)
	defer cancel()
	found, err := tarstream.Glob(timed, p.root, p.c.Path, maxMatches)
	switch {
	case errors.Is(err, tarstream.ErrPseudo):
		p.c.Why = "what is in proc, sysfs and cgroup file systems is not collected"
	case err != nil && timed.Err() != nil && ctx.Err() == nil:
		p.c.Why = p.tooLong()
		return nil
	case err != nil:
		return err
	case found.Unread != nil:
		p.c.Why = "not all could be looked through: " + last(found.Unread.Error())
	case len(found.Paths) == 0:
		p.c.Why = "nothing is there"
	case found.More:
		p.c.Why = fmt.Sprintf("only the first %d matches are taken", maxMatches)
	}
	o := tarstream.Options{IDs: p.ids, Note: p.note, Admit: p.admit}
	for _, path := range found.Paths {
		if p.has(path) {
			continue // another collector took it
		}
		err := p.archive.Add(ctx, p.root, path, o)
		switch {
		case errors.Is(err, tarstream.ErrEnough):
			return nil
		case errors.Is(err, unix.ENOENT):
			p.c.Why = "some was removed before it was taken"
		case err != nil:
			return err
		}
	}
	return nil
}

func (p *packer) tooLong() string {
	return fmt.Sprintf("it took longer than %s", duration(p.until.Sub(p.begun)))
}

// has reports whether path is in the archive already.
func (p *packer) has(path string) bool {
	name := strings.TrimPrefix(path, "/")
	i, ok := p.index[name]
	return ok && p.m.Files[i].Taken
}

// admit decides whether an entry is taken.
func (p *packer) admit(e tarstream.Entry) error {
	cost := e.Size + max(e.Extra, entryCost)
	switch {
	case time.Now().After(p.until):
		p.c.Why = p.tooLong()
		return tarstream.ErrEnough
	case p.spent+entryCost > p.c.Max:
		p.c.Why = fmt.Sprintf("the limit of %s is reached", size(p.c.Max))
		p.file(e, false, "the collector's limit is reached")
		return tarstream.ErrEnough
	case p.spent+cost > p.c.Max:
		p.c.Why = fmt.Sprintf("some is more than fits into the limit of %s", size(p.c.Max))
		p.file(e, false, "")
		return fmt.Errorf("%s do not fit into what is left of the collector's limit", size(e.Size))
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFIFO, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFSOCK:
		p.file(e, false, "")
		return errors.New("it holds no data")
	}
	p.c.Taken++
	p.c.Bytes += e.Size
	p.spent += cost
	p.m.Archive.Entries++
	p.file(e, true, "")
	return nil
}

// full reports whether the list of files has what fits into a manifest.
func (p *packer) full() bool { return len(p.m.Files) == maxFiles || p.listed > maxFileBytes }

// file enters a file into the list, as far as that goes.
func (p *packer) file(e tarstream.Entry, taken bool, why string) {
	if !taken {
		p.c.Skipped++
	}
	if p.full() {
		p.m.FilesMore++
		return
	}
	f := File{Path: "/" + strings.TrimPrefix(e.Name, "./"), Type: entryType(e.Mode), Taken: taken, Why: why}
	if e.Name == "." {
		f.Path = "/"
	}
	if taken {
		f.Bytes = e.Size
	}
	if e.Link != "" {
		f.LinkOf = "/" + strings.TrimPrefix(e.Link, "./")
	}
	p.listed += len(f.Path) + len(f.Why)
	p.index[e.Name] = len(p.m.Files)
	p.m.Files = append(p.m.Files, f)
}

// note is told of what is not as it was.
func (p *packer) note(name, what string) {
	what = last(strings.TrimPrefix(what, "left out: "))
	if i, ok := p.index[name]; ok {
		p.m.Files[i].Why = what
		return
	}
	if p.full() { // counted already, or not one that was admitted
		if p.c.Why == "" {
			p.c.Why = "some is left out, or not as it was, beyond what is listed: " + what
		}
		return
	}
	p.file(tarstream.Entry{Name: name}, false, what)
}

// last shortens what is said of a file: names come first, and what is wrong last.
func last(what string) string {
	if n := len(what) - maxWhy; n > 0 {
		return "…" + strings.ToValidUTF8(what[n:], "")
	}
	return what
}

func entryType(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "link"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "device"
	}
	return "unknown"
}

// size shows a number of bytes.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for ; v >= 1023.95 && i < len(units)-1; i++ {
		v /= 1024
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}
