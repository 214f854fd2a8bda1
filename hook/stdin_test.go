package hook

import (
	"strings"
	"testing"
	"time"
)

// All of the input is there before the program runs, however long it is, so that
// a hook does not depend on who started it being alive.
func TestInputIsWhole(t *testing.T) {
	want := strings.Repeat("x", 30<<10)
	r := Run(t.Context(), &Command{
		Path: "/bin/sh", Args: []string{"sh", "-c", "cat; cat /proc/self/fd/0"}, Stdin: []byte(want), Timeout: time.Minute,
	})
	// The second one reads from the beginning, which a pipe has none of any more.
	if r.Err != nil || string(r.Output) != want+want {
		t.Errorf("%d bytes, %v, want %d", len(r.Output), r.Err, 2*len(want))
	}
}
