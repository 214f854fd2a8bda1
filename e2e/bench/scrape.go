package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// scrapes reads the daemon's metrics some times and says how long that took, how
// much was read, and how much the daemon has allocated for one.
func (b *bench) scrapes(rounds int) (string, error) {
	client := http.Client{Transport: &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", b.metrics())
		},
	}}
	defer client.CloseIdleConnections()
	var times []time.Duration
	var text string
	var first float64
	for i := range rounds + 1 {
		start := time.Now()
		res, err := client.Get("http://localhost/metrics")
		if err != nil {
			return "", err
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil {
			return "", err
		}
		text = string(body)
		if i == 0 { // it fills caches
			first = allocated(text)
			continue
		}
		times = append(times, time.Since(start))
	}
	each := (allocated(text) - first) / float64(rounds)
	return fmt.Sprintf("%.1f ms, %d KiB, allocates %.0f KiB", milliseconds(median(times)), len(text)>>10, each/1024), nil
}

// allocated is what a Go process says that it has allocated in all, in bytes.
func allocated(text string) float64 {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, "go_memstats_alloc_bytes_total "); ok {
			n, _ := strconv.ParseFloat(strings.TrimSpace(v), 64)
			return n
		}
	}
	return 0
}
