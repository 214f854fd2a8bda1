package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/crilog"
	"github.com/sandboxd/sandboxd/member"
)

// catchUp shows from a member's log what the connection to its monitor did not
// bring: a monitor waits for no client, and cuts off one that is slower than the
// member. The files are opened before the connection is made, and outlive the
// member's removal.
type catchUp struct {
	log    *os.File
	status *member.StatusPage
	exit   func(context.Context) // returns when no more is written
	from   member.Position       // where the connection began
}

// openCatchUp returns nil if there is no log to read. The log may be a file that
// others have written to before.
func openCatchUp(logPath, dir string, exit func(context.Context)) *catchUp {
	// No link is followed: who is logged may be able to make one.
	fd, err := unix.Openat2(unix.AT_FDCWD, logPath, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil
	}
	log := os.NewFile(uintptr(fd), logPath)
	if st, err := log.Stat(); err == nil && st.Mode().IsRegular() {
		if status, err := member.OpenStatus(dir); err == nil {
			return &catchUp{log: log, status: status, exit: exit}
		}
	}
	log.Close()
	return nil
}

// begin says where the connection began. It reports whether the log can be
// read from there.
func (c *catchUp) begin(p *member.Position) bool {
	if p == nil {
		return false
	}
	c.from = *p
	_, err := c.log.Seek(p.Log, io.SeekStart)
	return err == nil
}

func (c *catchUp) close() {
	c.log.Close()
	c.status.Close()
}

// run puts everything behind the seen[0] bytes of stdout and the seen[1] of
// stderr that the connection has brought, until the member has exited. It reports
// whether nothing is missing.
func (c *catchUp) run(ctx context.Context, seen [2]uint64, put func(stream int, data []byte)) (bool, error) {
	var logged [2]uint64 // bytes that the lines so far stand for
	for i := range seen {
		seen[i] += c.from.Bytes[i]
		logged[i] = c.from.Bytes[i] - c.from.Unlogged[i]
	}
	var wrote [2]uint64 // bytes that the member had written, when last looked
	show := func(line []byte) error {
		l, err := crilog.Parse(line)
		if err != nil {
			return err
		}
		i := 0
		if l.Stream == "stderr" {
			i = 1
		}
		b := l.Content
		if !l.Partial {
			// A last line has a line feed in the log that the member did not write.
			end := logged[i] + uint64(len(b)) + 1
			if end > wrote[i] {
				s, err := c.status.Read()
				if err != nil {
					return err
				}
				wrote = [2]uint64{s.Stdout, s.Stderr}
			}
			if end <= wrote[i] {
				b = append(b, '\n')
			}
		}
		from := logged[i]
		logged[i] += uint64(len(b))
		if logged[i] > seen[i] {
			put(i+1, b[max(seen[i], from)-from:])
		}
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		c.exit(ctx)
	}()
	r := bufio.NewReaderSize(c.log, crilog.MaxLine)
	var line []byte
	for {
		// Looked at before the end is looked for: what was written until then is found.
		ended := false
		select {
		case <-exited:
			ended = true
		default:
		}
		for {
			b, err := r.ReadSlice('\n')
			line = append(line, b...)
			if errors.Is(err, io.EOF) {
				break
			}
			if errors.Is(err, bufio.ErrBufferFull) {
				continue
			}
			if err == nil {
				err = show(line[:len(line)-1])
			}
			if err != nil {
				return false, err
			}
			line = line[:0]
		}
		if ended {
			s, err := c.status.Read()
			return logged == [2]uint64{s.Stdout, s.Stderr}, err
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-exited:
		case <-time.After(pollInterval):
		}
	}
}
