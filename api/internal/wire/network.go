package wire

import (
	"fmt"
	"net/netip"
	"strings"

	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/sandbox"
)

func fromNetworkRequest(q network.Request) *pb.NetworkConfig {
	out := &pb.NetworkConfig{
		Ports: fromPorts(q.Ports), Addresses: texts(q.Addresses), Mac: q.MAC, Dns: fromDNS(q.DNS),
		Ingress: q.Bandwidth.Ingress, Egress: q.Bandwidth.Egress, Isolated: q.Isolated,
	}
	for _, a := range q.Attach {
		out.Attach = append(out.Attach, &pb.NetworkName{Network: a.Network, Interface: a.Interface})
	}
	for _, h := range q.Hosts {
		out.Hosts = append(out.Hosts, &pb.Host{Name: h.Name, Ip: h.IP.String()})
	}
	for _, kv := range q.CNIArgs {
		out.CniArgs = append(out.CniArgs, kv[0]+"="+kv[1])
	}
	return out
}

func toNetworkRequest(m *pb.NetworkConfig) (q network.Request, err error) {
	q.MAC, q.Isolated = m.GetMac(), m.GetIsolated()
	q.Bandwidth = network.Bandwidth{Ingress: m.GetIngress(), Egress: m.GetEgress()}
	for _, a := range m.GetAttach() {
		q.Attach = append(q.Attach, network.Attach{Network: a.GetNetwork(), Interface: a.GetInterface()})
	}
	if q.Ports, err = toPorts(m.GetPorts()); err != nil {
		return q, err
	}
	if q.Addresses, err = addrs("address", m.GetAddresses()); err != nil {
		return q, err
	}
	if q.DNS, err = toDNS(m.GetDns()); err != nil {
		return q, err
	}
	for _, h := range m.GetHosts() {
		ip, err := netip.ParseAddr(h.GetIp())
		if err != nil {
			return q, fmt.Errorf("additional host %.80q: %w", h.GetName(), err)
		}
		q.Hosts = append(q.Hosts, network.Host{Name: h.GetName(), IP: ip})
	}
	for _, s := range m.GetCniArgs() {
		k, v, ok := strings.Cut(s, "=")
		if !ok {
			return q, fmt.Errorf("cni argument %.80q is not KEY=VALUE", s)
		}
		q.CNIArgs = append(q.CNIArgs, [2]string{k, v})
	}
	return q, nil
}

func fromNetworks(as []network.Attachment) []*pb.NetworkInfo {
	var out []*pb.NetworkInfo
	for _, a := range as {
		n := &pb.NetworkInfo{
			Name: a.Name, Interface: a.Interface, Addresses: texts(a.Addresses), Mac: a.MAC, Mtu: int32(a.MTU),
			Gateway: texts(a.Gateway), Dns: fromDNS(a.DNS), Ports: fromPorts(a.Ports),
		}
		for _, r := range a.Routes {
			n.Routes = append(n.Routes, &pb.Route{Dst: r.Dst.String(), Gw: text(r.GW)})
		}
		out = append(out, n)
	}
	return out
}

// toNetworks is the inverse of fromNetworks. Lists are never nil, so that the JSON
// of the result has [] where a Manager's has. What is not an address is left out.
func toNetworks(ms []*pb.NetworkInfo) []network.Attachment {
	out := []network.Attachment{}
	for _, m := range ms {
		a := network.Attachment{
			Name: m.GetName(), Interface: m.GetInterface(), Addresses: []netip.Prefix{}, MAC: m.GetMac(), MTU: int(m.GetMtu()),
			Routes: []network.Route{}, Gateway: []netip.Addr{}, Ports: []network.Port{},
		}
		for _, s := range m.GetAddresses() {
			if p, err := netip.ParsePrefix(s); err == nil {
				a.Addresses = append(a.Addresses, p)
			}
		}
		for _, r := range m.GetRoutes() {
			if dst, err := netip.ParsePrefix(r.GetDst()); err == nil {
				gw, _ := netip.ParseAddr(r.GetGw()) // there may be none
				a.Routes = append(a.Routes, network.Route{Dst: dst, GW: gw})
			}
		}
		for _, s := range m.GetGateway() {
			if gw, err := netip.ParseAddr(s); err == nil {
				a.Gateway = append(a.Gateway, gw)
			}
		}
		a.DNS, _ = toDNS(m.GetDns())
		if ports, err := toPorts(m.GetPorts()); err == nil {
			a.Ports = append(a.Ports, ports...)
		}
		out = append(out, a)
	}
	return out
}

func fromTombstone(t *sandbox.TombstoneInfo) *pb.Tombstone {
	if t == nil {
		return nil
	}
	return &pb.Tombstone{Since: fromTime(t.Since), Attempts: int32(t.Attempts), LastError: t.LastError, NextTry: fromTime(t.NextTry)}
}

func toTombstone(m *pb.Tombstone) *sandbox.TombstoneInfo {
	if m == nil {
		return nil
	}
	return &sandbox.TombstoneInfo{
		Since: toTime(m.GetSince()), Attempts: int(m.GetAttempts()), LastError: m.GetLastError(), NextTry: toTime(m.GetNextTry()),
	}
}

func fromPorts(ps []network.Port) []*pb.Port {
	var out []*pb.Port
	for _, p := range ps {
		out = append(out, &pb.Port{HostIp: text(p.HostIP), HostPort: uint32(p.HostPort), Port: uint32(p.Port), Protocol: string(p.Protocol)})
	}
	return out
}

func toPorts(ms []*pb.Port) ([]network.Port, error) {
	var out []network.Port
	for _, m := range ms {
		p := network.Port{HostPort: uint16(m.GetHostPort()), Port: uint16(m.GetPort()), Protocol: network.Protocol(m.GetProtocol())}
		if uint32(p.HostPort) != m.GetHostPort() || uint32(p.Port) != m.GetPort() {
			return nil, fmt.Errorf("published port %d:%d: want numbers up to 65535", m.GetHostPort(), m.GetPort())
		}
		if s := m.GetHostIp(); s != "" {
			var err error
			if p.HostIP, err = netip.ParseAddr(s); err != nil {
				return nil, fmt.Errorf("published port %d: %w", p.HostPort, err)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

func fromDNS(d network.DNS) *pb.DNS {
	return &pb.DNS{Servers: texts(d.Servers), Search: d.Search, Options: d.Options}
}

func toDNS(m *pb.DNS) (network.DNS, error) {
	servers, err := addrs("dns server", m.GetServers())
	return network.DNS{Servers: servers, Search: m.GetSearch(), Options: m.GetOptions()}, err
}

func addrs(what string, list []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range list {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		out = append(out, a)
	}
	return out, nil
}

// text is the address, or nothing for none.
func text(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func texts[T fmt.Stringer](list []T) []string {
	var out []string
	for _, v := range list {
		out = append(out, v.String())
	}
	return out
}
