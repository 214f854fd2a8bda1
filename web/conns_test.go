package web

import (
	"bytes"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestNobodyIsKeptOut: connections that somebody holds open do not keep others from
// being answered, whatever has been asked by them.
func TestNobodyIsKeptOut(t *testing.T) {
	big := bytes.Repeat([]byte("x"), 16<<20) // more than sockets hold
	for name, request := range map[string]string{
		"nothing": "", "half a request": "GET /healthz HTTP/1.1\r\nHost:",
		"a request, and another to come": "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"an answer that is not read":     "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			address, _ := serve(t, Options{Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(big) })})
			host := strings.TrimPrefix(address, "http://")
			for range 2 * maxConns {
				c, err := net.Dial("tcp", host)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if _, err := c.Write([]byte(request)); err != nil {
					t.Fatal(err)
				}
			}
			client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
			res, err := client.Get("http://" + host + "/healthz")
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
		})
	}
}
