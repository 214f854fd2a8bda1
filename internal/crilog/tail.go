package crilog

import (
	"bytes"
	"io"
	"os"
)

// headSize is more than the time, stream and tag of a line take: enough to tell
// a part of a line from the end of one.
const headSize = 128

// tailOffset returns where the last n lines of f begin. It reads blocks from
// the end backwards, no more of them than it needs. What cannot be parsed
// counts as a line. Where the parts of both streams' lines are mixed, earlier
// parts of the first line may be left out.
func tailOffset(f *os.File, n int) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	const block = 64 << 10
	buf := make([]byte, block+headSize)
	next := int64(-1) // where the line after the one looked at begins; -1 before the last line feed is found
	for end := fi.Size(); end > 0; {
		begin := max(0, end-block)
		m, err := f.ReadAt(buf[:end-begin+headSize], begin)
		if err != nil && err != io.EOF {
			return 0, err
		}
		b := buf[:m]
		if m < int(end-begin) { // it has become shorter; what is left is all there is
			end = begin + int64(m)
		}
		for i := int(end - begin); ; {
			i = bytes.LastIndexByte(b[:i], '\n')
			if i < 0 && begin > 0 {
				break
			}
			// A line begins behind the line feed, or at the file's beginning.
			head := b[i+1 : min(len(b), i+1+headSize)]
			switch {
			case next < 0 && i < 0:
				return 0, nil
			case next < 0:
				if n == 0 {
					return begin + int64(i) + 1, nil
				}
			case isPart(head):
			case n == 0:
				return next, nil
			default:
				n--
			}
			next = begin + int64(i) + 1
			if i < 0 {
				return 0, nil
			}
		}
		end = begin
	}
	return 0, nil
}

func isPart(head []byte) bool {
	if i := bytes.IndexByte(head, '\n'); i >= 0 {
		head = head[:i]
	}
	l, err := Parse(head)
	return err == nil && l.Partial
}
