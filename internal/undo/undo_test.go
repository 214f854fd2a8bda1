package undo

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestUnwind(t *testing.T) {
	busy := errors.New("busy")
	tests := []struct {
		name  string
		fails map[string]bool // in the first Unwind
		err   string
		again []string // what the second Unwind runs
	}{
		{name: "nothing fails"},
		{name: "one fails", fails: map[string]bool{"cgroup": true}, err: "cgroup: busy", again: []string{"cgroup"}},
		{name: "all fail", fails: map[string]bool{"data": true, "cgroup": true, "pause": true},
			err: "pause: busy\ncgroup: busy\ndata: busy", again: []string{"pause", "cgroup", "data"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var s Stack
			var ran []string
			for _, name := range []string{"data", "cgroup", "pause"} {
				s.Push(name, func(ctx context.Context) error {
					ran = append(ran, name)
					if _, ok := ctx.Deadline(); !ok {
						t.Errorf("%s may hang for ever", name)
					}
					if tt.fails[name] {
						return busy
					}
					return ctx.Err()
				})
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // the client is gone, and undo must not care

			err := s.Unwind(ctx)
			if got := errText(err); got != tt.err {
				t.Errorf("first Unwind = %q, want %q", got, tt.err)
			}
			if tt.err != "" && !errors.Is(err, busy) {
				t.Errorf("%v does not wrap its cause", err)
			}
			if want := []string{"pause", "cgroup", "data"}; !slices.Equal(ran, want) {
				t.Errorf("ran %v, want %v", ran, want)
			}
			ran, tt.fails = nil, nil
			if err := s.Unwind(ctx); err != nil || !slices.Equal(ran, tt.again) {
				t.Errorf("second Unwind ran %v, %v; want %v", ran, err, tt.again)
			}
		})
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
