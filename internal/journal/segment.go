package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	segmentSuffix = ".jsonl"
	seqDigits     = 20 // of the largest uint64
	tempName      = "next.tmp"
	formatVersion = 1
	maxLine       = 64 << 10
)

// header is the first line of a segment.
type header struct {
	Version int    `json:"journal"`
	First   uint64 `json:"first"` // the number of the first event, as in the name
	Prev    uint64 `json:"prev"`  // the number of the event before that one; 0 if there is none
	Boot    string `json:"boot"`  // of the host
}

func segmentName(first uint64) string {
	return fmt.Sprintf("%0*d%s", seqDigits, first, segmentSuffix)
}

// segments returns the numbers of the first events of all segments in dir, ascending.
func segments(dir *os.Root) ([]uint64, error) {
	f, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var firsts []uint64
	for _, n := range names {
		digits, ok := strings.CutSuffix(n, segmentSuffix)
		if !ok || len(digits) != seqDigits {
			continue // not ours
		}
		if first, err := strconv.ParseUint(digits, 10, 64); err == nil && first > 0 {
			firsts = append(firsts, first)
		}
	}
	slices.Sort(firsts)
	return firsts, nil
}

// openSegment opens a segment; a FIFO in its place does not block.
func openSegment(dir *os.Root, first uint64, flag int) (*os.File, error) {
	f, err := dir.OpenFile(segmentName(first), flag|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "read", Path: segmentName(first), Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// lines reads the complete lines of a file that may be growing. What does not
// end in a line feed is not there yet.
type lines struct {
	f   io.ReaderAt
	off int64  // of the first byte in buf
	buf []byte // read and not returned
	pos int    // in buf
}

// next returns the next line, without its end, valid until the next call. It
// returns io.EOF if there is none for now.
func (l *lines) next() ([]byte, error) {
	searched := 0 // bytes after pos that hold no line feed
	for {
		if i := bytes.IndexByte(l.buf[l.pos+searched:], '\n'); i >= 0 {
			line := l.buf[l.pos : l.pos+searched+i]
			l.pos += searched + i + 1
			return line, nil
		}
		searched = len(l.buf) - l.pos
		if err := l.fill(); err != nil {
			return nil, err
		}
	}
}

// end is the offset of what next has not returned.
func (l *lines) end() int64 { return l.off + int64(l.pos) }

// fill reads more, behind what has not been returned.
func (l *lines) fill() error {
	const chunk = 64 << 10
	rest := copy(l.buf, l.buf[l.pos:])
	l.off += int64(l.pos)
	l.pos = 0
	l.buf = slices.Grow(l.buf[:rest], chunk)
	n, err := l.f.ReadAt(l.buf[rest:rest+chunk], l.off+int64(rest))
	if n > 0 {
		l.buf = l.buf[:rest+n]
		return nil
	}
	// An incomplete line may be cut off and written anew: it is read again.
	l.buf = l.buf[:0]
	return err
}

// readHeader returns the header of a segment, or if it is damaged what the name
// says.
func readHeader(f io.ReaderAt, first uint64) header {
	h := header{First: first, Prev: first - 1}
	l := lines{f: f}
	line, err := l.next()
	var is header
	if err == nil && json.Unmarshal(line, &is) == nil && is.First == first && is.Prev < first {
		h = is
	}
	return h
}

// scanned is what is in a segment.
type scanned struct {
	header header
	last   uint64 // the number of its last event; header.Prev if there is none
	end    int64  // after the last complete line
	lost   bool   // complete lines follow that are no events
}

// scan reads a segment. A line that is no event is passed over: a power cut can
// leave anything. each, which may be nil, is called for each event.
func scan(f io.ReaderAt, first uint64, each func(*Event)) (scanned, error) {
	l := lines{f: f}
	s := scanned{header: header{Version: formatVersion, First: first, Prev: first - 1}}
	s.last = s.header.Prev
	for n := 0; ; n++ {
		line, err := l.next()
		if err == io.EOF {
			return s, nil
		}
		if err != nil {
			return s, err
		}
		if n == 0 {
			var h header
			if json.Unmarshal(line, &h) == nil && h.Version != 0 {
				if h.Version != formatVersion {
					return s, fmt.Errorf("journal segment %s: unknown version %d", segmentName(first), h.Version)
				}
				if h.First == first && h.Prev < first {
					s.header, s.last, s.end = h, h.Prev, l.end()
				}
				continue
			}
		}
		var e Event
		if json.Unmarshal(line, &e) != nil || e.Seq <= s.last || e.Seq < first {
			s.lost = true
			continue
		}
		s.last, s.end, s.lost = e.Seq, l.end(), false
		if each != nil {
			each(&e)
		}
	}
}
