package member

import (
	"encoding/binary"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Output is what a monitor has counted of its member's output.
type Output struct {
	Bytes          uint64 // read from stdout and stderr
	LogErrors      uint64 // lines that could not be written to the log, or would have exceeded its limit
	ClientsDropped uint64 // attached clients that did not read fast enough
}

// ReadOutput reads the counters of a status page, and only them: it is called
// for every member whenever metrics are read.
func ReadOutput(dir string) (Output, error) {
	path := filepath.Join(dir, statusName)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return Output{}, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var b [104]byte
	n, err := unix.Pread(fd, b[:], 0)
	if err != nil {
		return Output{}, fmt.Errorf("read %s: %w", path, err)
	}
	le := binary.LittleEndian
	if n < len(b) || le.Uint32(b[0:]) != statusMagic || le.Uint32(b[4:]) != statusVersion {
		return Output{}, fmt.Errorf("%s is not a status page yet", path)
	}
	return Output{
		Bytes:          le.Uint64(b[72:]) + le.Uint64(b[80:]),
		LogErrors:      le.Uint64(b[88:]),
		ClientsDropped: le.Uint64(b[96:]),
	}, nil
}
