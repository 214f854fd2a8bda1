// Package signum reads the names of signals.
package signum

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The real-time signals that programs see; the C library keeps 32 and 33 for itself
// (signal(7)).
const (
	sigRTMin = 34
	sigRTMax = 64
)

// Parse returns the signal called s: a number from 1 to 64, or a name with
// or without SIG in any case, also RTMIN, RTMIN+n, RTMAX and RTMAX-n.
func Parse(s string) (unix.Signal, error) {
	bad := fmt.Errorf("unknown signal %q (a name such as TERM or RTMIN+3, or a number from 1 to %d)", s, sigRTMax)
	if s != "" && s[0] >= '0' && s[0] <= '9' {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > sigRTMax {
			return 0, bad
		}
		return unix.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	for _, rt := range []struct {
		name, sign string
		base, mul  int
	}{{"RTMIN", "+", sigRTMin, 1}, {"RTMAX", "-", sigRTMax, -1}} {
		rest, ok := strings.CutPrefix(name, rt.name)
		if !ok {
			continue
		}
		if rest == "" {
			return unix.Signal(rt.base), nil
		}
		digits, ok := strings.CutPrefix(rest, rt.sign)
		n, err := strconv.ParseUint(digits, 10, 8)
		if !ok || err != nil || n > sigRTMax-sigRTMin {
			return 0, bad
		}
		return unix.Signal(rt.base + rt.mul*int(n)), nil
	}
	if n := unix.SignalNum("SIG" + name); n != 0 {
		return n, nil
	}
	return 0, bad
}
