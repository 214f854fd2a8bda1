package builtin

import (
	"math"
	"net/netip"
)

// Count is how many addresses of one family sandboxes have, and how many there are
// for them at all. An IPv6 subnet has more than an integer can count.
type Count struct {
	Family       string // ipv4, ipv6
	InUse, Total float64
}

// Counts returns the addresses of each family that the bridge has.
func (d *Driver) Counts() []Count {
	s := d.leases
	s.mu.Lock()
	defer s.mu.Unlock()
	cs := []Count{{"ipv4", float64(len(s.v4.taken)), size(s.v4.subnet)}}
	if s.v6.subnet.IsValid() {
		cs = append(cs, Count{"ipv6", float64(len(s.v6.taken)), size(s.v6.subnet)})
	}
	return cs
}

// size is the number of addresses of a subnet that [usable] allows.
func size(subnet netip.Prefix) float64 {
	n := math.Exp2(float64(subnet.Addr().BitLen()-subnet.Bits())) - 2 // the subnet's and the bridge's
	if subnet.Addr().Is4() {
		n-- // broadcast
	}
	return n
}
