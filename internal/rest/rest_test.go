package rest

import (
	"runtime/debug"
	"testing"
	"time"
)

func TestGarbageIsCollectedLessWhileCallsCome(t *testing.T) {
	atRest := usual()
	is := func(when string, want int) {
		t.Helper()
		got := 0
		for end := time.Now().Add(after + 10*time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			got = debug.SetGCPercent(100)
			debug.SetGCPercent(got)
			if got == want {
				return
			}
		}
		t.Errorf("%s: garbage is collected at %d %%, want %d", when, got, want)
	}
	timer := NewTimer()
	is("at the beginning", 2*atRest)
	is("at rest", atRest)
	timer.Called()
	is("after a call", 2*atRest)
	timer.Called()
	timer.Stop()
	is("at the end", atRest)
}
