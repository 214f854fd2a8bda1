package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/network"
)

// networkRequest is what the flags of create say of a network.
type networkRequest struct {
	mode network.Mode
	network.Request
}

// networkRequestFlags declares them. The result is good once they have been parsed.
func networkRequestFlags(cmd *cobra.Command) *networkRequest {
	q := new(networkRequest)
	f := cmd.Flags()
	f.Var(&value[networkRequest]{p: q, typ: "mode", parse: func(s string) (networkRequest, error) {
		r := *q
		err := parseNet(s, &r)
		return r, err
	}}, "net", "network: builtin|cni[:NAME[:INTERFACE],…]|host|none (default as the daemon has been told; none if net is not shared)")
	f.VarP(&list[network.Port]{p: &q.Ports, typ: "[ip:]hostport:port[/tcp|udp|sctp]", parse: parsePublish}, "publish", "p", "publish a port on the host")
	f.Var(&list[netip.Addr]{p: &q.Addresses, typ: "address", parse: parseAddr}, "ip", "address of its own choice")
	f.StringVar(&q.MAC, "mac", "", "MAC `address` of its own choice")
	f.BoolVar(&q.Isolated, "isolated", false, "no traffic to and from other sandboxes (builtin)")
	f.Var(&value[network.Bandwidth]{p: &q.Bandwidth, typ: "ingress=RATE,egress=RATE", parse: parseBandwidth}, "bandwidth", "limit its traffic, in bits per second such as 10M")
	f.Var(&list[netip.Addr]{p: &q.DNS.Servers, typ: "address", parse: parseAddr}, "dns", "DNS server (default the network's, or the host's)")
	f.StringArrayVar(&q.DNS.Search, "dns-search", nil, "`domain` to search for short names")
	f.StringArrayVar(&q.DNS.Options, "dns-option", nil, "resolver `option`, such as ndots:2")
	f.Var(&list[network.Host]{p: &q.Hosts, typ: "name:address", parse: parseHost}, "add-host", "line for its /etc/hosts")
	f.Var(&list[[2]string]{p: &q.CNIArgs, typ: "KEY=VALUE", parse: parseCNIArg}, "cni-arg", "argument for CNI plugins, in CNI_ARGS")
	cmd.RegisterFlagCompletionFunc("net", oneOf("builtin", "cni", "host", "none"))
	return q
}

// parseNet reads a mode, or cni with names of networks and of the interfaces that
// they are to get.
func parseNet(s string, q *networkRequest) error {
	mode, names, named := strings.Cut(s, ":")
	q.mode, q.Attach = network.Mode(mode), nil
	if _, err := parseMode(mode); err != nil {
		return err
	}
	if !named {
		return nil
	}
	if q.mode != network.ModeCNI {
		return fmt.Errorf("network %q: only cni has networks to choose from", s)
	}
	for n := range strings.SplitSeq(names, ",") {
		name, ifname, given := strings.Cut(n, ":")
		if name == "" || given && ifname == "" {
			return fmt.Errorf("network %q is not cni:NAME[:INTERFACE][,NAME[:INTERFACE]]…", s)
		}
		q.Attach = append(q.Attach, network.Attach{Network: name, Interface: ifname})
	}
	return nil
}

// parsePublish reads [HOSTIP:]HOSTPORT:PORT[/PROTOCOL]. An IPv6 address is in
// brackets.
func parsePublish(s string) (network.Port, error) {
	bad := func() (network.Port, error) {
		return network.Port{}, fmt.Errorf("port %q is not [IP:]HOSTPORT:PORT[/tcp|udp|sctp]", s)
	}
	rest, proto, given := strings.Cut(s, "/")
	p := network.Port{Protocol: network.TCP}
	if given {
		p.Protocol = network.Protocol(strings.ToLower(proto))
		switch p.Protocol {
		case network.TCP, network.UDP, network.SCTP:
		default:
			return network.Port{}, fmt.Errorf("port %q: unknown protocol %q (one of tcp, udp, sctp)", s, proto)
		}
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return bad()
	}
	inside := rest[i+1:]
	host := rest[:i]
	if i = strings.LastIndexByte(host, ':'); i >= 0 {
		ip := host[:i]
		host = host[i+1:]
		bare := strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
		var err error
		if p.HostIP, err = netip.ParseAddr(bare); err != nil || p.HostIP.Is6() != strings.HasPrefix(ip, "[") || p.HostIP.Is6() != strings.HasSuffix(ip, "]") {
			return bad()
		}
	}
	for _, f := range []struct {
		text string
		to   *uint16
	}{{host, &p.HostPort}, {inside, &p.Port}} {
		n, err := strconv.ParseUint(f.text, 10, 16)
		if errors.Is(err, strconv.ErrRange) {
			return network.Port{}, fmt.Errorf("port %q: %s is not between 0 and 65535", s, f.text)
		}
		if err != nil {
			return bad()
		}
		*f.to = uint16(n)
	}
	if p.Port == 0 {
		return network.Port{}, fmt.Errorf("port %q: the sandbox's port is 0", s)
	}
	return p, nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, fmt.Errorf("%q is not an IP address", s)
	}
	return a, nil
}

// parseHost reads NAME:IP, where the address may be IPv6, in brackets or not.
func parseHost(s string) (network.Host, error) {
	name, ip, ok := strings.Cut(s, ":")
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]"))
	if !ok || name == "" || err != nil {
		return network.Host{}, fmt.Errorf("host %q is not NAME:ADDRESS", s)
	}
	return network.Host{Name: name, IP: a}, nil
}

// parseBandwidth reads ingress=RATE,egress=RATE, or one of them.
func parseBandwidth(s string) (network.Bandwidth, error) {
	var b network.Bandwidth
	for part := range strings.SplitSeq(s, ",") {
		key, text, ok := strings.Cut(part, "=")
		if !ok {
			return b, fmt.Errorf("bandwidth %q is not ingress=RATE,egress=RATE", s)
		}
		rate, err := parseRate(text)
		if err != nil {
			return b, fmt.Errorf("bandwidth %q: %w", s, err)
		}
		switch {
		case key == "ingress" && b.Ingress == 0:
			b.Ingress = rate
		case key == "egress" && b.Egress == 0:
			b.Egress = rate
		default:
			return b, fmt.Errorf("bandwidth %q: %q is unknown or given twice (ingress, egress)", s, key)
		}
	}
	return b, nil
}

// parseRate reads bits per second: digits, and one of k, m, g, in either case, for
// powers of 1000, as rates of networks have it.
func parseRate(s string) (uint64, error) {
	digits, unit := s, uint64(1)
	if n := len(s); n > 0 {
		if i := strings.IndexByte("kmg", s[n-1]|0x20); i >= 0 {
			digits, unit = s[:n-1], [...]uint64{1e3, 1e6, 1e9}[i]
		}
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || n == 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("rate %q is not a number of bits per second such as 500k or 10M", s)
	}
	return n * unit, nil
}

func parseCNIArg(s string) ([2]string, error) {
	k, v, ok := strings.Cut(s, "=")
	if !ok || k == "" || strings.Contains(s, ";") {
		return [2]string{}, fmt.Errorf("cni argument %q is not KEY=VALUE without a semicolon", s)
	}
	return [2]string{k, v}, nil
}
