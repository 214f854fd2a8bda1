// Package crilog reads container logs in the format that the CRI prescribes for
// the files under a sandbox's log directory:
//
//	2026-01-02T15:04:05.123456789Z stdout F a whole line, or the end of one
//	2026-01-02T15:04:05.123456789Z stderr P a part of a line that goes on
//
// See "CRI: Log management for container stdout/stderr streams" of the
// Kubernetes design proposals. The monitor writes these files; nothing here does.
package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"time"
)

// MaxLine is the length of the longest line that is read. Writers split what
// they log at 16 KiB; anything longer than this is no line of such a file.
const MaxLine = 64 << 10

// Line is one line of a log file.
type Line struct {
	Time    time.Time
	Stream  string // "stdout" or "stderr"
	Partial bool   // the next line of the same stream goes on where this one ends
	Content []byte // without a line feed
}

// Parse parses one line without its line feed. The result's Content is a part
// of b. Nothing but the form above is accepted.
func Parse(b []byte) (Line, error) {
	if bytes.IndexByte(b, '\n') >= 0 {
		return Line{}, errors.New("a line feed in a line")
	}
	stamp, rest, ok := bytes.Cut(b, []byte{' '})
	if !ok {
		return Line{}, errors.New("no blank after the time")
	}
	t, err := time.Parse(time.RFC3339Nano, string(stamp))
	if err != nil {
		return Line{}, fmt.Errorf("time %.40q is not RFC 3339", stamp)
	}
	stream, rest, ok := bytes.Cut(rest, []byte{' '})
	if s := string(stream); !ok || s != "stdout" && s != "stderr" {
		return Line{}, fmt.Errorf("stream %.20q is neither stdout nor stderr", stream)
	}
	tag, content, ok := bytes.Cut(rest, []byte{' '})
	if s := string(tag); !ok || s != "F" && s != "P" {
		return Line{}, fmt.Errorf("tag %.20q is neither F nor P", tag)
	}
	return Line{t, string(stream), tag[0] == 'P', content}, nil
}

// Format returns l as it is in a file, with the line feed at its end. [Parse]
// is its inverse for every l that has one of the two streams, a year of four
// digits, an offset of whole minutes and no line feed in its content.
func Format(l Line) []byte {
	b := l.Time.AppendFormat(nil, time.RFC3339Nano)
	b = append(b, ' ')
	b = append(b, l.Stream...)
	if l.Partial {
		b = append(b, " P "...)
	} else {
		b = append(b, " F "...)
	}
	b = append(b, l.Content...)
	return append(b, '\n')
}

// Joiner puts the parts of lines together again, for each stream apart. Its
// zero value is ready for use.
type Joiner struct {
	// Max is the length at which a line is handed out unfinished, so that a
	// stream without line feeds cannot fill the memory. 0 means 1 MiB.
	Max   int
	parts map[string]*Line
}

// Add takes the next line of a file. It reports whether that finished one, and
// returns it; its time is that of its first part, and Partial is set if it is
// only handed out because it is too long.
func (j *Joiner) Add(l Line) (Line, bool) {
	limit := j.Max
	if limit <= 0 {
		limit = 1 << 20
	}
	whole := j.parts[l.Stream]
	if whole == nil {
		if !l.Partial {
			return l, true
		}
		if j.parts == nil {
			j.parts = make(map[string]*Line)
		}
		whole = &Line{Time: l.Time, Stream: l.Stream}
		j.parts[l.Stream] = whole
	}
	whole.Content = append(whole.Content, l.Content...)
	whole.Partial = l.Partial
	if l.Partial && len(whole.Content) < limit {
		return Line{}, false
	}
	delete(j.parts, l.Stream)
	return *whole, true
}

// Rest returns the lines that have not been finished, stdout's first.
func (j *Joiner) Rest() []Line {
	var ls []Line
	for _, s := range []string{"stdout", "stderr"} {
		if l := j.parts[s]; l != nil {
			ls = append(ls, *l)
		}
	}
	j.parts = nil
	return ls
}
