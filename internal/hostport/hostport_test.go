package hostport

import (
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/network"
)

func port(s string) network.Port {
	var p network.Port
	addr, proto, _ := strings.Cut(s, "/")
	host, num, err := net.SplitHostPort(addr)
	if err != nil {
		panic(err)
	}
	if host != "" {
		p.HostIP = netip.MustParseAddr(host)
	}
	n, err := strconv.ParseUint(num, 10, 16)
	if err != nil {
		panic(err)
	}
	p.HostPort, p.Port, p.Protocol = uint16(n), 80, network.Protocol(proto)
	return p
}

func ports(list string) (ps []network.Port) {
	for s := range strings.FieldsSeq(list) {
		ps = append(ps, port(s))
	}
	return ps
}

func TestClaim(t *testing.T) {
	tests := []struct {
		name, has, wants string
		err              string
	}{
		{"same", ":80/tcp", ":80/tcp", "port 80/tcp of the host is taken by sandbox a"},
		{"second of two", ":80/tcp", ":81/tcp :80/tcp", "port 80/tcp"},
		{"other port", ":80/tcp", ":81/tcp", ""},
		{"other protocol", ":80/tcp", ":80/udp :80/sctp", ""},
		{"other address", "127.0.0.1:80/tcp", "127.0.0.2:80/tcp", ""},
		{"same address", "127.0.0.1:80/tcp", "127.0.0.1:80/tcp", "port 127.0.0.1:80/tcp"},
		{"one of all addresses", ":80/tcp", "[::1]:80/tcp", "port [::1]:80/tcp"},
		{"all addresses and one of them", "[::1]:80/tcp", ":80/tcp", "port 80/tcp"},
		{"all addresses of a family", "0.0.0.0:80/tcp", "127.0.0.1:80/tcp", "port 127.0.0.1:80/tcp"},
		{"other family", "0.0.0.0:80/tcp", "[::]:80/tcp", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var r Registry
			if err := r.Claim("a", ports(tt.has)); err != nil {
				t.Fatal(err)
			}
			if err := r.Claim("a", ports(tt.has)); err != nil {
				t.Errorf("its own again: %v", err)
			}
			err := r.Claim("b", ports(tt.wants))
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("Claim: %v, want %q", err, tt.err)
			}
			r.Release("b")
			r.Release("a")
			r.Release("a")
			if len(r.ports)+len(r.ids) > 0 {
				t.Errorf("left: %v %v", r.ports, r.ids)
			}
		})
	}
}

// What cannot be claimed changes nothing.
func TestClaimFails(t *testing.T) {
	var r Registry
	if err := r.Claim("a", ports(":80/tcp")); err != nil {
		t.Fatal(err)
	}
	if err := r.Claim("b", ports(":81/tcp")); err != nil {
		t.Fatal(err)
	}
	if err := r.Claim("b", ports(":82/tcp :80/tcp")); err == nil {
		t.Fatal("the port of another")
	}
	if err := r.Claim("c", ports(":82/tcp")); err != nil {
		t.Error(err)
	}
	if err := r.Claim("c", ports(":81/tcp")); err == nil {
		t.Error("b has lost its port")
	}
}

func TestChoose(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := uint16(l.Addr().(*net.TCPAddr).Port)
	var r Registry
	want := "is taken by " + filepathBase(os.Args[0])
	for _, ip := range []string{"127.0.0.1", "0.0.0.0", ""} {
		p := network.Port{HostPort: taken, Port: 80, Protocol: network.TCP}
		if ip != "" {
			p.HostIP = netip.MustParseAddr(ip)
		}
		if err := r.Choose("a", []network.Port{p}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "(pid "+strconv.Itoa(os.Getpid())+")") {
			t.Errorf("%s: %v, want %q", ip, err, want)
		}
	}
	ps := ports(":0/tcp :0/tcp 127.0.0.1:0/udp [::1]:0/tcp")
	if err := r.Choose("a", ps); err != nil {
		t.Fatal(err)
	}
	if err := r.Claim("a", ps); err != nil {
		t.Fatal(err)
	}
	for i, p := range ps {
		if p.HostPort == 0 || Overlap(p, ps[(i+1)%len(ps)]) {
			t.Errorf("chosen: %v", ps)
		}
	}
	if err := r.Choose("b", []network.Port{ps[0]}); err == nil || !strings.Contains(err.Error(), "is taken by sandbox a") {
		t.Errorf("another sandbox's: %v", err)
	}
	if err := r.Choose("b", ports("192.0.2.1:8080/tcp")); err == nil || !strings.Contains(err.Error(), "the host has no address 192.0.2.1") {
		t.Errorf("another host's: %v", err)
	}
}

// filepathBase is a command's name as the kernel has it.
func filepathBase(s string) string {
	s = s[strings.LastIndexByte(s, '/')+1:]
	return s[:min(len(s), 15)]
}

// TestChooseAtOnce: who asks before another one has claimed what was chosen for it
// gets other ports.
func TestChooseAtOnce(t *testing.T) {
	var r Registry
	seen := map[uint16]string{}
	for _, id := range []string{"a", "b", "c"} {
		ps := make([]network.Port, 500)
		for i := range ps {
			ps[i] = network.Port{Port: 80, Protocol: network.TCP}
		}
		if err := r.Choose(id, ps); err != nil {
			t.Fatal(err)
		}
		for _, p := range ps {
			if by, ok := seen[p.HostPort]; ok {
				t.Errorf("port %d was chosen for %s and %s", p.HostPort, by, id)
			}
			seen[p.HostPort] = id
		}
	}
	// Nobody is kept from asking for one of them.
	port := network.Port{HostPort: slices.Min(slices.Collect(maps.Keys(seen))), Port: 80, Protocol: network.TCP}
	if err := r.Claim("d", []network.Port{port}); err != nil {
		t.Error(err)
	}
	r.Release("d")
	if !r.choose("e", port) {
		t.Error("a port that was released is not chosen")
	}
}

func TestCheck(t *testing.T) {
	tests := []struct{ ports, err string }{
		{":80/tcp :80/udp :0/tcp :0/tcp 127.0.0.1:81/tcp [::1]:81/tcp", ""},
		{":80/tcp 127.0.0.1:80/tcp", "port 127.0.0.1:80/tcp is published twice"},
		{":80/icmp", `protocol "icmp" of port 80 is none of tcp, udp, sctp`},
		{"224.0.0.1:80/tcp", "port 224.0.0.1:80/tcp: not an address"},
		{"255.255.255.255:80/tcp", "port 255.255.255.255:80/tcp: not an address"},
		{"[::ffff:1.2.3.4]:80/tcp", "not an address"},
		{"[fe80::1]:80/tcp", "port [fe80::1]:80/tcp: not an address"},
		{"169.254.1.1:80/tcp", ""},
	}
	for _, tt := range tests {
		if err := Check(ports(tt.ports)); (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("Check(%s) = %v, want %q", tt.ports, err, tt.err)
		}
	}
	if err := Check([]network.Port{{HostPort: 80, Protocol: network.TCP}}); err == nil {
		t.Error("port 0 of the sandbox")
	}
}

func TestInodes(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1B58 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1B58 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0000000000000000 100 0 0 10 0
   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000000000000000 100 0 0 10 0
`
	if got := inodesOf(strings.NewReader(table), 7000, true); len(got) != 1 || got[0] != "4711" {
		t.Errorf("listening on 7000: %v", got)
	}
	if got := inodesOf(strings.NewReader(table), 7000, false); len(got) != 2 {
		t.Errorf("all of 7000: %v", got)
	}
}

func FuzzInodes(f *testing.F) {
	f.Add("  0: 0100007F:1B58 00000000:0000 0A 0:0 00:0 0 0 0 4711 1\n", uint16(7000))
	f.Fuzz(func(_ *testing.T, s string, port uint16) { inodesOf(strings.NewReader(s), port, true) })
}
