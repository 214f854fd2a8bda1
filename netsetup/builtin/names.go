package builtin

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/sandboxd/sandboxd/netsetup"
)

// idDigits of a sandbox's id are in the names of its links: with the prefix that
// makes 14 bytes, and a link's name has at most 15.
const idDigits = 12

// Prefixes of the names of a sandbox's links on the host.
const (
	hostPrefix = "sb" // the end of the veth pair that is a port of the bridge
	ifbPrefix  = "si" // what the sandbox sends goes through this one, if it is limited
)

func checkID(id string) error {
	if len(id) < idDigits || strings.Trim(id, "0123456789abcdef") != "" {
		return netsetup.Invalid(fmt.Errorf("id %q is not %d hex digits or more", id, idDigits))
	}
	return nil
}

func hostName(id string) string { return hostPrefix + id[:idDigits] }
func ifbName(id string) string  { return ifbPrefix + id[:idDigits] }

// alias marks what belongs to an installation, and to one of its sandboxes
// unless id is empty.
func alias(mark, id string) string {
	if id == "" {
		return "sandboxd " + mark
	}
	return "sandboxd " + mark + " " + id
}

// gateway is the bridge's address in a subnet: the first one.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Addr().Next() }

// Links of sandboxes are in one of two groups (IFLA_GROUP), whose numbers are derived
// from the mark. They are nobody else's; but see [Driver.removeLinks].
func portGroup(mark string) uint32  { return 0x5c000000 | groupDigits(mark) }
func goingGroup(mark string) uint32 { return 0x5b000000 | groupDigits(mark) } // are to go

func groupDigits(mark string) uint32 {
	sum := sha256.Sum256([]byte(mark))
	return binary.BigEndian.Uint32(sum[:]) >> 8
}

// linkLocal is the address that the kernel derives from a hardware address (RFC 4291, A).
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
}

// macOf derives a hardware address from an IPv4 one. An address that comes back
// to another sandbox has the same hardware address then, so that nobody's
// neighbour table has a wrong one.
func macOf(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x5b, b[0], b[1], b[2], b[3]}
}
