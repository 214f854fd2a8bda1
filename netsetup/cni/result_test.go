package cni

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/sandboxd/sandboxd/internal/network"
)

func TestAttachmentOf(t *testing.T) {
	tests := []struct {
		name, in string
		want     string
		err      string
	}{
		{"1.1.0", `{"cniVersion":"1.1.0","interfaces":[{"name":"br0","mac":"02:00:00:00:00:01","mtu":9000},{"name":"eth0","mac":"02:00:00:00:00:02","mtu":1400,"sandbox":"/x"},{"name":"eth0","mac":"02:00:00:00:00:03"}],
			"ips":[{"address":"10.0.0.2/24","gateway":"10.0.0.1","interface":1},{"address":"fd00::2/64","gateway":"fd00::1","interface":1},{"address":"10.0.0.1/24","interface":0}],
			"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"},{"dst":"10.9.0.0/16","gw":"10.0.0.9"}],"dns":{"nameservers":["10.0.0.53","junk"],"search":["a"],"domain":"b","options":["ndots:2"]}}`,
			`{"name":"a","interface":"eth0","addresses":["10.0.0.2/24","fd00::2/64"],"mac":"02:00:00:00:00:02","mtu":1400,` +
				`"routes":[{"dst":"0.0.0.0/0","gw":"10.0.0.1"},{"dst":"::/0","gw":"fd00::1"},{"dst":"10.9.0.0/16","gw":"10.0.0.9"}],"gateway":["10.0.0.1","fd00::1"],` +
				`"dns":{"servers":["10.0.0.53"],"search":["a"],"options":["ndots:2"]},"ports":[]}`, ""},
		{"0.3.1, no interfaces", `{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.2/24"}],"dns":{"domain":"d"}}`,
			`{"name":"a","interface":"eth0","addresses":["10.0.0.2/24"],"mac":"","mtu":0,"routes":[],"gateway":[],"dns":{"search":["d"]},"ports":[]}`, ""},
		{"lines in DNS", `{"cniVersion":"1.0.0","dns":{"search":["a\nnameserver 10.0.0.66","b#"],"options":["ndots:2\r\noptions","\u0085"],"domain":"c"}}`,
			`{"name":"a","interface":"eth0","addresses":[],"mac":"","mtu":0,"routes":[],"gateway":[],"dns":{"search":["a","nameserver","10.0.0.66"],"options":["ndots:2","options"]},"ports":[]}`, ""},
		{"no addresses", `{"cniVersion":"1.0.0"}`,
			`{"name":"a","interface":"eth0","addresses":[],"mac":"","mtu":0,"routes":[],"gateway":[],"dns":{},"ports":[]}`, ""},
		{"an interface that is not there", `{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24","interface":7},{"address":"10.0.0.3/24","interface":-1}],"interfaces":[null]}`,
			`{"name":"a","interface":"eth0","addresses":[],"mac":"","mtu":0,"routes":[],"gateway":[],"dns":{},"ports":[]}`, ""},
		{"nulls", `{"cniVersion":"1.0.0","ips":[null],"routes":[null],"interfaces":[null]}`,
			`{"name":"a","interface":"eth0","addresses":[],"mac":"","mtu":0,"routes":[],"gateway":[],"dns":{},"ports":[]}`, ""},
		{"an address without one", `{"cniVersion":"1.0.0","ips":[{}]}`, "", "is not an address"},
		{"a route to nowhere", `{"cniVersion":"1.0.0","routes":[{}]}`, "", "is not the destination of a route"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := create.CreateFromBytes([]byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			a, err := attachmentOf(attachment{Network: "a", Interface: "eth0"}, r)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := json.Marshal(a); err != nil || string(got) != tt.want {
				t.Errorf("got  %s, %v\nwant %s", got, err, tt.want)
			}
		})
	}
}

// FuzzResult reads what plugins may print.
func FuzzResult(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/x","mac":"m","mtu":1}],"ips":[{"address":"10.0.0.2/24","gateway":"10.0.0.1","interface":0}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{"nameservers":["1.1.1.1"]}}`))
	f.Add([]byte(`{"cniVersion":"0.4.0","ips":[{"version":"6","address":"::ffff:10.0.0.1/120"}]}`))
	f.Add([]byte(`{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/24","routes":[{"dst":"0.0.0.0/0"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := create.CreateFromBytes(data)
		if err != nil {
			return
		}
		a, err := attachmentOf(attachment{Network: "a", Interface: "eth0"}, r)
		if err != nil {
			return
		}
		text, err := json.Marshal(a)
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		var again network.Attachment
		if err := json.Unmarshal(text, &again); err != nil {
			t.Errorf("%q became %s: %v", data, text, err)
		}
	})
}

func TestParseStat(t *testing.T) {
	for in, want := range map[string]process{
		"12 (a) b) S 1 10 9 0": {group: 10, session: 9},
		"12 (sh) S 1 10 9":     {group: 10, session: 9},
		"12 (sh) S 1 x 9":      {},
		"12 (sh":               {},
		"12 (sh) S":            {},
		"":                     {},
	} {
		got, err := parseStat([]byte(in))
		if got != want && err == nil || (err == nil) != (want != process{}) {
			t.Errorf("parseStat(%q) = %+v, %v; want %+v", in, got, err, want)
		}
	}
}
