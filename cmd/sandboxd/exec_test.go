package main

import (
	"bytes"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/sandboxd/sandboxd/sandbox"
)

func TestCappedBuffer(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", sandbox.ExecOutputMax/16+1)
	for name, tt := range map[string]struct {
		r    io.Reader
		want string
		more bool
	}{
		"nothing":         {strings.NewReader(""), "", false},
		"a word":          {strings.NewReader("word"), "word", false},
		"byte by byte":    {iotest.OneByteReader(strings.NewReader(long[:3000])), long[:3000], false},
		"an end with it":  {iotest.DataErrReader(strings.NewReader("word")), "word", false},
		"more than kept":  {strings.NewReader(long), long[:sandbox.ExecOutputMax], true},
		"as much as kept": {strings.NewReader(long[:sandbox.ExecOutputMax]), long[:sandbox.ExecOutputMax], false},
	} {
		var c cappedBuffer
		n, err := io.Copy(&c, struct{ io.Reader }{tt.r})
		if !bytes.Equal(c.b, []byte(tt.want)) || c.more != tt.more || n < int64(len(tt.want)) || err != nil {
			t.Errorf("%s: copied %d, %v; kept %d bytes, more %t", name, n, err, len(c.b), c.more)
		}
	}
}

// A probe says a word or nothing, and there is one every second on every member.
func TestCappedBufferIsSmall(t *testing.T) {
	const runs = 100
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range runs {
		var c cappedBuffer
		io.Copy(&c, struct{ io.Reader }{strings.NewReader("word")})
	}
	runtime.ReadMemStats(&after)
	if got := (after.TotalAlloc - before.TotalAlloc) / runs; got > 4096 {
		t.Errorf("the output of a word takes %d bytes", got)
	}
}
