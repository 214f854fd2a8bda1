package main

import (
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/internal/request"
)

func TestParseCollect(t *testing.T) {
	testParser(t, "parseCollect", parseCollect, []parserTest[request.Collect]{
		{in: "/tmp/core", want: request.Collect{Path: "/tmp/core"}},
		{in: "/tmp/*.[ch],on=oom", want: request.Collect{Path: "/tmp/*.[ch]", On: request.OnOOM}},
		{in: "/a,max=64m,on=signal", want: request.Collect{Path: "/a", On: request.OnSignal, Max: 64 << 20}},
		{in: "", fails: true}, {in: "a", fails: true}, {in: ",on=oom", fails: true}, {in: "/a,", fails: true}, {in: "/a,b", fails: true},
		{in: "/a,on=", fails: true}, {in: "/a,on=never", fails: true}, {in: "/a,on", fails: true}, {in: "/a,max=", fails: true},
		{in: "/a,max=0", fails: true}, {in: "/a,max=-1", fails: true}, {in: "/a,max=1,max=2", fails: true}, {in: "/a,on=oom,on=oom", fails: true},
		{in: "/a,ON=oom", fails: true}, {in: "/a, on=oom", fails: true},
	})
}

func TestParseTTL(t *testing.T) {
	testParser(t, "parseTTL", parseTTL, []parserTest[time.Duration]{
		{in: "0", want: 0}, {in: "1h", want: time.Hour}, {in: "1h30m", want: 90 * time.Minute}, {in: "100ms", want: 100 * time.Millisecond},
		{in: "", fails: true}, {in: "-1s", fails: true}, {in: "5", fails: true}, {in: "1d", fails: true}, {in: "99999999h", fails: true},
	})
}

func TestByteSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 1023: "1023", 1024: "1.0k", 716800: "700k", 1023 << 10: "1.0M", 64 << 20: "64M", 3 << 30: "3.0G"} {
		if got := byteSize(n); got != want {
			t.Errorf("byteSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func FuzzParseCollect(f *testing.F) {
	for _, s := range []string{"/a", "/a,on=oom,max=1k", "/a,,", "/a,max=9999999999999t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := parseCollect(s)
		if err == nil && (c.Path == "" || c.Path[0] != '/' || c.Max < 0) {
			t.Errorf("parseCollect(%q) = %+v", s, c)
		}
	})
}
