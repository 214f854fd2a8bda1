package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/metrics"
)

const netDev = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  999999     100    0    0    0     0          0         0   999999     100    0    0    0     0       0          0
  eth0: 1000 10 0 0 0 0 0 0 2000 20 0 0 0 0 0 0
  eth1:1 1 0 0 0 0 0 0 2 2 0 0 0 0 0 0
`

func TestParseNetDev(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       metrics.Traffic
		ok         bool
	}{
		{"two interfaces and lo", netDev, metrics.Traffic{Received: 1001, Sent: 2002}, true},
		{"empty", "", metrics.Traffic{}, true},
		{"cut off", "  eth0: 1000 10 0", metrics.Traffic{}, false},
		{"no number", "  eth0: x 10 0 0 0 0 0 0 2000 20", metrics.Traffic{}, false},
	} {
		got, err := parseNetDev(strings.NewReader(tt.text))
		if (err == nil) != tt.ok || tt.ok && got != tt.want {
			t.Errorf("%s: %v, %v, want %v", tt.name, got, err, tt.want)
		}
	}
}

func FuzzParseNetDev(f *testing.F) {
	f.Add(netDev)
	f.Fuzz(func(t *testing.T, text string) {
		parseNetDev(strings.NewReader(text)) // it ends, and does not panic
	})
}

func TestListenWeb(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics")
	for _, tt := range []struct{ address, want string }{
		{"127.0.0.1:0", ""},
		{"[::1]:0", ""},
		{"unix://" + path, ""},
		{"unix://relative", "begins with /"},
		{"9477", "want HOST:PORT or unix://PATH"},
		{"127.0.0.1:", "want HOST:PORT or unix://PATH"},
		{"127.0.0.1:port", "port"},
	} {
		l, err := listenWeb(t.Context(), tt.address)
		switch {
		case err != nil && (tt.want == "" || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: %v, want %q", tt.address, err, tt.want)
		case err == nil && tt.want != "":
			t.Errorf("%s is listened on", tt.address)
		}
		if err != nil {
			continue
		}
		if _, ok := l.(*net.UnixListener); ok {
			if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("the socket is %v, %v", fi, err)
			}
		}
		l.Close()
	}
}

func TestExitsSince(t *testing.T) {
	dir := t.TempDir()
	j, err := journal.Open(dir, journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	now := time.Now().UTC()
	_, release := j.Hold()
	err = j.Append(
		journal.Event{Time: now.Add(-2 * time.Hour), Type: journal.Exit, SandboxName: "old", Exit: &exit.Record{}},
		journal.Event{Time: now, Type: journal.State, SandboxName: "box", To: "Ready"},
		journal.Event{Time: now, Type: journal.Exit, SandboxName: "box", MemberName: "m", Exit: &exit.Record{Known: true, Code: 3}})
	release()
	if err != nil {
		t.Fatal(err)
	}
	got, err := exitsSince(context.Background(), dir, now.Add(-time.Hour))
	if err != nil || len(got) != 1 || got[0].Sandbox != "box" || got[0].Member != "m" || got[0].Exit.Code != 3 {
		t.Errorf("exitsSince = %+v, %v, want box/m with code 3", got, err)
	}
}

// A daemon was killed, and for a moment its port is held by a child that it was
// about to make.
func TestListenWebAfterADeadDaemon(t *testing.T) {
	held, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { held.Close() })
	l, err := listenWeb(t.Context(), held.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
