// Package idrange finds ranges of user and group ids that nobody uses, for user
// namespaces.
package idrange

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Size is the number of ids in a range that [Free] returns: as many as programs
// with 16-bit ids know, nobody (65534) among them.
const Size = 65536

// Ids are given out from first up to, not including, end: the range that
// systemd's UIDS-GIDS.md sets aside for containers. Below are those of people
// and services, above is what signed 32-bit integers cannot hold, and a margin.
const (
	first = 0x00080000
	end   = 0x70000000
)

// ErrNone means that every range is in use.
var ErrNone = errors.New("no free range of user ids")

// Range is the ids Start to Start+Size-1, of users and groups alike.
type Range struct {
	Start uint32 `json:"start"`
	Size  uint32 `json:"size"`
}

// Overlaps reports whether some id is in both r and s.
func (r Range) Overlaps(s Range) bool {
	return r.Size > 0 && s.Size > 0 && uint64(r.Start) < uint64(s.Start)+uint64(s.Size) && uint64(s.Start) < uint64(r.Start)+uint64(r.Size)
}

// Free returns the lowest range of [Size] ids that starts at a multiple of Size
// and overlaps neither a range of used nor one of subids. These are the contents
// of /etc/subuid and /etc/subgid (subuid(5)); what a host lacks is left out.
func Free(used []Range, subids ...io.Reader) (Range, error) {
	taken := append([]Range(nil), used...)
	for _, r := range subids {
		rs, err := parse(r)
		if err != nil {
			return Range{}, err
		}
		taken = append(taken, rs...)
	}
next:
	for start := uint64(first); start+Size <= end; start += Size {
		r := Range{uint32(start), Size}
		for _, t := range taken {
			if r.Overlaps(t) {
				continue next
			}
		}
		return r, nil
	}
	return Range{}, ErrNone
}

// parse reads lines of NAME:START:COUNT. A line that is not one gives nobody
// ids, as in shadow's own reader, so it is passed over.
func parse(r io.Reader) ([]Range, error) {
	var rs []Range
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Split(strings.TrimSpace(sc.Text()), ":")
		if len(f) != 3 {
			continue
		}
		start, err := strconv.ParseUint(f[1], 10, 32)
		if err != nil {
			continue
		}
		size, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		rs = append(rs, Range{uint32(start), uint32(size)})
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read subordinate ids: %w", err)
	}
	return rs, nil
}
