package tarstream

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// part is a part of a file that holds data.
type part struct{ offset, length int64 }

// maxParts bounds the map of a sparse file. Readers keep it in memory, and Go's
// refuses one of more than 1 MiB. Behind the last part there are no holes.
const maxParts = 8192

// dataParts finds where f, which is size bytes long, holds data (lseek(2)). It
// returns nil if the file has no holes, or the file system does not tell.
func dataParts(f *os.File, size int64) []part {
	var parts []part
	for at := int64(0); at < size; {
		begin, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO { // a hole to the end
			break
		}
		if err != nil {
			return nil
		}
		if begin >= size {
			break
		}
		end, err := unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return nil
		}
		if end = min(end, size); len(parts) == maxParts-1 {
			end = size
		}
		parts = append(parts, part{begin, end - begin})
		at = end
	}
	if len(parts) == 1 && parts[0] == (part{0, size}) {
		return nil
	}
	return append(parts, part{size, 0}) // says how long the file is, also if it ends in a hole
}

// sparse writes the entry of a file with holes in the format of GNU tar, "PAX
// format, version 1.0": records that say so, and before the data a map of it.
// archive/tar reads that but cannot write it, so the three blocks are made here.
func (t *writer) sparse(r *os.File, h *tar.Header, parts []part) error {
	if err := t.tar.Flush(); err != nil { // it writes behind nothing unfinished from here on
		return err
	}
	var m bytes.Buffer
	fmt.Fprintf(&m, "%d\n", len(parts))
	packed := int64(0)
	for _, p := range parts {
		fmt.Fprintf(&m, "%d\n%d\n", p.offset, p.length)
		packed += p.length
	}
	pad(&m)
	packed += int64(m.Len())

	records := map[string]string{
		"GNU.sparse.major":    "1",
		"GNU.sparse.minor":    "0",
		"GNU.sparse.name":     h.Name,
		"GNU.sparse.realsize": strconv.FormatInt(h.Size, 10),
		"mtime":               fmt.Sprintf("%d.%09d", h.ModTime.Unix(), h.ModTime.Nanosecond()),
		"uid":                 strconv.Itoa(h.Uid),
		"gid":                 strconv.Itoa(h.Gid),
		"size":                strconv.FormatInt(packed, 10),
	}
	if h.ModTime.Unix() < 0 { // the fraction of a negative number counts the other way
		records["mtime"] = strconv.FormatInt(h.ModTime.Unix(), 10)
	}
	maps.Copy(records, h.PAXRecords)
	var x bytes.Buffer
	for _, k := range slices.Sorted(maps.Keys(records)) {
		x.WriteString(paxRecord(k, records[k]))
	}
	n := int64(x.Len())
	pad(&x)

	base := path.Base(h.Name)
	var head bytes.Buffer
	head.Write(ustar("PaxHeaders.0/"+base, 0o644, 0, 0, n, 'x'))
	head.Write(x.Bytes())
	head.Write(ustar("GNUSparseFile.0/"+base, h.Mode, h.Uid, h.Gid, packed, '0'))
	head.Write(m.Bytes())
	if _, err := t.out.Write(head.Bytes()); err != nil {
		return err
	}
	for _, p := range parts {
		if err := t.copy(t.out, r, h.Name, p); err != nil {
			return err
		}
	}
	return writeZeros(t.out, make([]byte, block), -packed&(block-1))
}

const block = 512

func pad(b *bytes.Buffer) { b.Write(make([]byte, -b.Len()&(block-1))) }

// paxRecord is "LENGTH KEY=VALUE\n", where the length counts itself.
func paxRecord(k, v string) string {
	rest := " " + k + "=" + v + "\n"
	n := len(rest)
	for n != len(rest)+len(strconv.Itoa(n)) {
		n = len(rest) + len(strconv.Itoa(n))
	}
	return strconv.Itoa(n) + rest
}

// ustar is a header block. What does not fit is cut: PAX records say it.
func ustar(name string, mode int64, uid, gid int, size int64, typ byte) []byte {
	b := make([]byte, block)
	copy(b[:100], name)
	octal := func(field []byte, n int64) {
		if n >= 1<<(3*(len(field)-1)) {
			n = 0
		}
		copy(field, fmt.Sprintf("%0*o", len(field)-1, n))
	}
	octal(b[100:108], mode)
	octal(b[108:116], int64(uid))
	octal(b[116:124], int64(gid))
	octal(b[124:136], size)
	octal(b[136:148], 0)
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	copy(b[148:156], "        ")
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

var zeros [4096]byte

// writeSparse copies r to f, which is empty, and leaves holes where there are
// only zeros. It returns the number of bytes.
func writeSparse(f *os.File, r io.Reader, buf []byte, check func() error) (int64, error) {
	at := int64(0)
	for {
		if err := check(); err != nil {
			return at, err
		}
		n, err := io.ReadFull(r, buf)
		for b := buf[:n]; len(b) > 0; {
			// A run of blocks that all are zeros, or that all are not.
			run, isZero := 0, false
			for run < len(b) {
				blk := b[run:min(run+len(zeros), len(b))]
				z := bytes.Equal(blk, zeros[:len(blk)])
				if run > 0 && z != isZero {
					break
				}
				isZero = z
				run += len(blk)
			}
			if !isZero {
				if _, err := f.WriteAt(b[:run], at); err != nil {
					return at, err
				}
			}
			at += int64(run)
			b = b[run:]
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF && n < len(buf) {
			// archive/tar says ErrUnexpectedEOF itself if the stream is cut; the
			// caller compares the length.
			return at, f.Truncate(at)
		}
		if err != nil {
			return at, err
		}
	}
}
