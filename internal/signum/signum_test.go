package signum

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	tests := []struct {
		in   string
		want unix.Signal
	}{
		{"TERM", unix.SIGTERM}, {"sigterm", unix.SIGTERM}, {"15", unix.SIGTERM}, {"1", 1}, {"64", 64},
		{"RTMIN", 34}, {"SIGRTMIN+3", 37}, {"rtmax", 64}, {"RTMAX-1", 63}, {"RTMIN+30", 64}, {"RTMAX-30", 34},
		{"", 0}, {"0", 0}, {"65", 0}, {"-1", 0}, {"RTMIN+31", 0}, {"RTMIN-1", 0}, {"RTMAX+1", 0}, {"RTMIN+", 0}, {"RTMIN+-1", 0},
		{"SIG", 0}, {"9999999999999999999999", 0}, {"SIGSIGTERM", 0}, {"1x", 0},
	}
	for _, tt := range tests {
		got, err := Parse(tt.in)
		if got != tt.want || (err != nil) != (tt.want == 0) {
			t.Errorf("Parse(%q) = %d, %v, want %d", tt.in, got, err, tt.want)
		}
	}
}
