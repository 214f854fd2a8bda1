// Package network holds the words that describe a sandbox's network: what is
// asked for, and what came of it. It is plain data, shared by the packages that
// take a request, carry it out, keep it on record and show it.
package network

import (
	"net/netip"
)

// Mode says how a sandbox gets its network.
type Mode string

// The modes.
const (
	ModeNone    Mode = "none"    // a network namespace of its own with only lo, which is up
	ModeHost    Mode = "host"    // the host's network namespace; the sandbox must not hold net
	ModeBuiltin Mode = "builtin" // bridge, veth pair and nftables, made by this process
	ModeCNI     Mode = "cni"     // plugins, as the CNI configuration directory says
)

// Request is what a caller asks of a sandbox's network beside its mode. The
// zero value is what somebody gets who asks for nothing.
type Request struct {
	// Attach names the CNI networks, in order; empty means the default one.
	Attach    []Attach     `json:"attach,omitempty"`
	Ports     []Port       `json:"ports,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"` // static ones, at most one of each family and network
	MAC       string       `json:"mac,omitempty"`       // in the form aa:bb:cc:dd:ee:ff
	DNS       DNS          `json:"dns,omitzero"`
	Hosts     []Host       `json:"hosts,omitempty"` // added to /etc/hosts
	Bandwidth Bandwidth    `json:"bandwidth,omitzero"`
	CNIArgs   [][2]string  `json:"cniArgs,omitempty"`  // CNI_ARGS, in order
	Isolated  bool         `json:"isolated,omitempty"` // builtin: no traffic to and from other sandboxes
}

// Attach names one CNI network and the interface that it is to get.
type Attach struct {
	Network   string `json:"network"`
	Interface string `json:"interface,omitempty"` // default: eth0, eth1, …
}

// Protocol is a transport protocol, in lower case.
type Protocol string

// The protocols whose ports can be published.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// Port publishes a port of the sandbox on the host.
type Port struct {
	HostIP   netip.Addr `json:"hostIP,omitzero"` // the zero value is every address of both families
	HostPort uint16     `json:"hostPort"`
	Port     uint16     `json:"port"` // in the sandbox
	Protocol Protocol   `json:"protocol"`
}

// DNS is what goes into a resolv.conf(5).
type DNS struct {
	Servers []netip.Addr `json:"servers,omitempty"`
	Search  []string     `json:"search,omitempty"`
	Options []string     `json:"options,omitempty"`
}

// Host is a line of hosts(5).
type Host struct {
	Name string     `json:"name"`
	IP   netip.Addr `json:"ip"`
}

// Bandwidth limits traffic, in bits per second as seen from the sandbox; 0 is
// no limit.
type Bandwidth struct {
	Ingress uint64 `json:"ingress,omitempty"`
	Egress  uint64 `json:"egress,omitempty"`
}

// Result is what came of a request.
type Result struct {
	Networks []Attachment `json:"networks"`
}

// Attachment is one network that a sandbox is in. Its JSON form is stable.
type Attachment struct {
	Name      string         `json:"name"`      // of the network
	Interface string         `json:"interface"` // in the sandbox
	Addresses []netip.Prefix `json:"addresses"`
	MAC       string         `json:"mac"`
	MTU       int            `json:"mtu"`
	Routes    []Route        `json:"routes"`
	Gateway   []netip.Addr   `json:"gateway"`
	DNS       DNS            `json:"dns"`
	Ports     []Port         `json:"ports"`
}

// Route is a route in the sandbox.
type Route struct {
	Dst netip.Prefix `json:"dst"`
	GW  netip.Addr   `json:"gw,omitzero"`
}
