package builtin

import (
	"net/netip"
	"testing"
)

// The size is what usable says of each address.
func TestSize(t *testing.T) {
	for _, s := range []string{"10.88.0.0/29", "10.88.0.0/24", "fd00::/125", "fd00::/120"} {
		subnet := netip.MustParsePrefix(s)
		n := 0.0
		for a := subnet.Addr(); subnet.Contains(a); a = a.Next() {
			if usable(subnet, a) == nil {
				n++
			}
		}
		if got := size(subnet); got != n {
			t.Errorf("size(%s) = %v, want %v", s, got, n)
		}
	}
}
