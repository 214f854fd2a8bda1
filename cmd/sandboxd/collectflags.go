package main

import (
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/request"
)

// parseCollect reads PATH[,on=WHEN][,max=SIZE]. What it means for the member is
// checked by the daemon.
func parseCollect(s string) (request.Collect, error) {
	name, opts, more := strings.Cut(s, ",")
	c := request.Collect{Path: name}
	if !path.IsAbs(name) {
		return c, fmt.Errorf("collector %.100q is not PATH[,on=WHEN][,max=SIZE] with an absolute PATH", s)
	}
	given := map[string]bool{}
	for more {
		var opt string
		opt, opts, more = strings.Cut(opts, ",")
		key, val, _ := strings.Cut(opt, "=")
		if given[key] {
			return c, fmt.Errorf("collector %.100q: %s is given twice", s, key)
		}
		given[key] = true
		switch key {
		case "on":
			switch c.On = request.When(val); c.On {
			case request.OnAlways, request.OnFailure, request.OnOOM, request.OnSignal:
			default:
				return c, fmt.Errorf("collector %.100q: unknown condition %q (one of always, failure, oom, signal)", s, val)
			}
		case "max":
			var err error
			if c.Max, err = parseSize(val); err != nil {
				return c, fmt.Errorf("collector %.100q: %w", s, err)
			}
			if c.Max == 0 {
				return c, fmt.Errorf("collector %.100q: the limit is 0", s)
			}
		default:
			return c, fmt.Errorf("collector %.100q: unknown option %q (on, max; for a comma in the path write ?)", s, opt)
		}
	}
	return c, nil
}

// parseTTL reads a time that is not negative.
func parseTTL(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is no time such as 90s, 10m or 1h", s)
	}
	return d, nil
}
