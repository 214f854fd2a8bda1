package builtin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/sandboxd/sandboxd/internal/hostport"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/netsetup"
)

// plan is what Attach and Detach need to know.
type plan struct {
	Ports     []network.Port    `json:"ports,omitempty"`     // every one with a host port
	Addresses []netip.Addr      `json:"addresses,omitempty"` // asked for; others come from the leases
	MAC       string            `json:"mac,omitempty"`
	Bandwidth network.Bandwidth `json:"bandwidth,omitzero"`
	Isolated  bool              `json:"isolated,omitempty"`
}

func decodePlan(raw json.RawMessage) (*plan, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	var p plan
	if err := dec.Decode(&p); err != nil {
		return nil, fmt.Errorf("decode network plan: %w", err)
	}
	return &p, nil
}

// mac is the hardware address of eth0.
func (p *plan) mac(l lease) net.HardwareAddr {
	if mac, err := net.ParseMAC(p.MAC); err == nil {
		return mac
	}
	return macOf(l.v4)
}

// Plan checks a request, and chooses host ports for those that are 0. What
// depends on other sandboxes, as a free address, is decided by Attach.
func (d *Driver) Plan(_ context.Context, id string, req *network.Request) (json.RawMessage, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	p := plan{Ports: req.Ports, Addresses: req.Addresses, MAC: req.MAC, Bandwidth: req.Bandwidth, Isolated: req.Isolated}
	if err := d.check(req); err != nil {
		return nil, netsetup.Invalid(err)
	}
	only6 := func(p network.Port) bool { return p.HostIP == netip.IPv6Loopback() }
	if i := slices.IndexFunc(p.Ports, only6); i >= 0 && !loopback6Works() {
		return nil, fmt.Errorf("port %s: nothing can be published on ::1 while net.bridge.bridge-nf-call-ip6tables is set", hostport.Name(p.Ports[i]))
	}
	p.Ports = slices.Clone(p.Ports)
	if err := d.ports.Choose(id, p.Ports); err != nil {
		return nil, err
	}
	return json.Marshal(p)
}

// check reports what can never work.
func (d *Driver) check(req *network.Request) error {
	if len(req.Attach) > 0 {
		return fmt.Errorf("network %s: the builtin network has no networks to choose from", req.Attach[0].Network)
	}
	if len(req.CNIArgs) > 0 {
		return fmt.Errorf("CNI argument %s: the builtin network takes none", req.CNIArgs[0][0])
	}
	var seen [2]bool
	for _, a := range req.Addresses {
		subnet, family := d.opts.Subnet, 0
		if a.Is6() {
			subnet, family = d.opts.Subnet6, 1
		}
		if !subnet.IsValid() {
			return fmt.Errorf("address %s: the network has no IPv6 subnet", a)
		}
		if seen[family] {
			return fmt.Errorf("address %s: a second one of its family", a)
		}
		seen[family] = true
		if err := usable(subnet, a); err != nil {
			return err
		}
	}
	if req.MAC != "" {
		mac, err := net.ParseMAC(req.MAC)
		if err != nil {
			return fmt.Errorf("MAC address %q is not of the form aa:bb:cc:dd:ee:ff", req.MAC)
		}
		if len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
			return fmt.Errorf("MAC address %s is not a unicast one of 6 bytes", req.MAC)
		}
		if bytes.Equal(mac, d.bridgeMAC()) {
			return fmt.Errorf("MAC address %s is that of the bridge %s: choose another one", req.MAC, d.opts.Bridge)
		}
	}
	for _, rate := range []uint64{req.Bandwidth.Ingress, req.Bandwidth.Egress} {
		if rate != 0 && (rate < minRate || rate > maxRate) {
			return fmt.Errorf("bandwidth of %d bits per second: the builtin network can keep limits from %d to %d", rate, uint64(minRate), uint64(maxRate))
		}
	}
	for _, p := range req.Ports {
		if p.HostIP.Is6() && !d.opts.Subnet6.IsValid() {
			return fmt.Errorf("port %s: the network has no IPv6 subnet", hostport.Name(p))
		}
	}
	return hostport.Check(req.Ports)
}
