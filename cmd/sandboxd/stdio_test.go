package main

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestDetachReader(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		err      error
	}{
		{"abc", "abc", nil},
		{"ab\x10\x11cd", "ab", errDetached},
		{"\x10\x11", "", errDetached},
		{"a\x10b", "a\x10b", nil},
		{"\x10\x10\x11", "\x10", errDetached},
		{"\x11\x10", "\x11\x10", nil},
	} {
		for name, r := range map[string]io.Reader{"whole": strings.NewReader(tt.in), "bytes": iotest.OneByteReader(strings.NewReader(tt.in))} {
			got, err := io.ReadAll(&detachReader{r: r})
			if string(got) != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("%s %q: read %q, %v, want %q, %v", name, tt.in, got, err, tt.want, tt.err)
			}
		}
	}
}

// blocked is a stdout that takes nothing until it is let go.
type blocked struct {
	bytes.Buffer
	letGo chan struct{}
}

func (b *blocked) Write(p []byte) (int, error) {
	<-b.letGo
	return b.Buffer.Write(p)
}

func TestQueueDoesNotWaitForWriter(t *testing.T) {
	q := newQueue()
	out := &blocked{letGo: make(chan struct{})}
	var errs bytes.Buffer
	done := make(chan error)
	go func() { done <- q.writeTo(out, &errs) }()
	buf := make([]byte, 16<<10)
	const n = 100
	for i := range n { // returns although nothing can be written
		for j := range buf {
			buf[j] = byte(i) // the queue must have its own copy
		}
		q.put(1, buf)
	}
	q.put(2, []byte("err"))
	close(out.letGo)
	q.close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if errs.String() != "err" || out.Len() != n*len(buf) {
		t.Errorf("stderr %q, %d bytes of stdout, want %d", errs.String(), out.Len(), n*len(buf))
	}
	for i, b := range out.Bytes() {
		if int(b) != i/len(buf) {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
}
