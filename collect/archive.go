package collect

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
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

// limitTime is how long the files of one member may take altogether. A file that
// has been begun is finished.
const limitTime = 10 * time.Minute

// errTooLarge means that an archive would take more than the whole directory may.
var errTooLarge = errors.New("the archive is larger than the collection directory may be (--collect-max-total)")

// pack writes the files that the collectors of s name to w, and what became of
// them into m. most bounds what is written. An error means that the archive is of
// no use; ctx's is returned as such.
func pack(ctx context.Context, s *Subject, e exit.Record, m *Manifest, w io.Writer, most int64) error {
	root, err := s.Root()
	if err != nil {
		return err
	}
	defer root.Close()
	buf := bufio.NewWriterSize(&capped{w: w, left: most}, 64<<10)
	z, err := zstd.NewWriter(buf, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	p := &packer{m: m, archive: tarstream.NewArchive(z), root: root, ids: s.IDs, index: map[string]int{}, until: time.Now().Add(limitTime)}
	for _, c := range s.Collect {
		p.c, p.spent = Collector{Collect: c, Applied: Applies(c.On, e)}, 0
		if p.c.Applied {
			if err := p.collect(ctx); err != nil {
				return err
			}
		}
		m.Collectors = append(m.Collectors, p.c)
	}
	return cmp.Or(p.archive.Close(), z.Close(), buf.Flush())
}

// capped is a writer that takes so many bytes and no more.
type capped struct {
	w    io.Writer
	left int64
}

func (c *capped) Write(b []byte) (int, error) {
	if c.left -= int64(len(b)); c.left < 0 {
		return 0, errTooLarge
	}
	return c.w.Write(b)
}

// packer takes files into an archive, collector by collector.
type packer struct {
	m       *Manifest
	archive *tarstream.Archive
	root    *os.File
	ids     *tarstream.IDs
	until   time.Time
	c       Collector      // the one whose turn it is
	spent   int64          // of its limit
	listed  int            // bytes of what m.Files says
	index   map[string]int // in m.Files, by the name in the archive
}

func (p *packer) collect(ctx context.Context) error {
	paths, more, err := tarstream.Glob(ctx, p.root, p.c.Path, maxMatches)
	if err != nil {
		return err
	}
	switch {
	case len(paths) == 0:
		p.c.Why = "nothing is there"
	case more:
		p.c.Why = fmt.Sprintf("only the first %d matches are taken", maxMatches)
	}
	o := tarstream.Options{IDs: p.ids, Note: p.note, Admit: p.admit}
	for _, path := range paths {
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
		p.c.Why = fmt.Sprintf("it took longer than %s", limitTime)
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
	p.listed += len(f.Path) + len(f.Why)
	p.index[e.Name] = len(p.m.Files)
	p.m.Files = append(p.m.Files, f)
}

// note is told of what is not as it was.
func (p *packer) note(name, what string) {
	what = strings.TrimPrefix(what, "left out: ")
	if n := len(what) - maxWhy; n > 0 {
		what = "…" + strings.ToValidUTF8(what[n:], "") // names come first, and what is wrong last
	}
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
