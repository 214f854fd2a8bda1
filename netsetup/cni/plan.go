package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/netsetup"
)

// plan is what is kept of a request.
type plan struct {
	Networks []attachment `json:"networks"`
}

// attachment is one network with all that ADD, CHECK and DEL are told.
type attachment struct {
	Network      string          `json:"network"`
	Interface    string          `json:"interface"`
	Config       json.RawMessage `json:"config"` // the configuration list
	Args         [][2]string     `json:"args"`   // CNI_ARGS
	Capabilities map[string]any  `json:"capabilities,omitempty"`
	Ports        []network.Port  `json:"ports,omitempty"` // for the result
}

func readPlan(data json.RawMessage) (*plan, error) {
	var p plan
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("plan of a CNI network: %w", err)
	}
	return &p, nil
}

// ports are those that all networks publish.
func (p *plan) ports() (ps []network.Port) {
	for _, a := range p.Networks {
		ps = append(ps, a.Ports...)
	}
	return ps
}

func (a *attachment) list() (*libcni.NetworkConfigList, error) { return parseList(a.Config) }

func (a *attachment) runtimeConf(id, ns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: ns, IfName: a.Interface, Args: a.Args, CapabilityArgs: a.Capabilities}
}

// has reports whether a plugin of the list takes a capability argument.
func has(l *libcni.NetworkConfigList, capability string) bool {
	return slices.ContainsFunc(l.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[capability] })
}

// Names of capabilities and the form of their arguments are those of CONVENTIONS.md
// of the CNI specification.
const (
	capPorts     = "portMappings"
	capBandwidth = "bandwidth"
	capDNS       = "dns"
	capIPs       = "ips"
	capMAC       = "mac"
)

type portMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"` // bits a second
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"` // bits
}

type dns struct {
	Servers  []netip.Addr `json:"servers,omitempty"`
	Searches []string     `json:"searches,omitempty"`
	Options  []string     `json:"options,omitempty"`
}

func invalid(format string, args ...any) error {
	return netsetup.Invalid(fmt.Errorf(format, args...))
}

// newPlan turns a request into a plan: a pure function of it and the
// configuration. The network's name servers need no plugin, since the caller writes
// resolv.conf; all else that is asked for must be what some plugin declares.
func newPlan(c *config, req *network.Request) (*plan, error) {
	if req.Isolated {
		return nil, invalid("a CNI network cannot be isolated from other sandboxes: that is up to its plugins")
	}
	args, err := cniArgs(req.CNIArgs)
	if err != nil {
		return nil, err
	}
	asked := slices.Clone(req.Attach)
	if len(asked) == 0 {
		asked = []network.Attach{{}}
	}
	p := &plan{}
	var lists []*libcni.NetworkConfigList
	for i, a := range asked {
		n, err := c.find(a.Network)
		if err != nil {
			return nil, invalid("%w", err)
		}
		l, err := parseList(n.raw)
		if err != nil {
			return nil, invalid("network %s: %w", n.Name, err)
		}
		switch loopback := l.Plugins[0].Network.Type == "loopback"; {
		case loopback && a.Interface == "":
			asked[i].Interface = "lo" // the only one that it sets up
		case !loopback && a.Interface == "lo":
			return nil, invalid("interface \"lo\": the sandbox has one of that name already")
		}
		lists = append(lists, l)
		p.Networks = append(p.Networks, attachment{Network: n.Name, Config: n.raw, Args: args, Capabilities: map[string]any{}})
	}
	names, err := interfaces(asked)
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		p.Networks[i].Interface = name
	}
	return p, p.addCapabilities(lists, req)
}

// interfaces names the interfaces in the sandbox: as asked for, and eth0, eth1, … for the others.
func interfaces(asked []network.Attach) ([]string, error) {
	names := make([]string, len(asked))
	for i, a := range asked {
		if a.Interface == "" {
			continue
		}
		if err := utils.ValidateInterfaceName(a.Interface); err != nil {
			return nil, invalid("interface %q: %w", a.Interface, err)
		}
		if slices.Contains(names, a.Interface) {
			return nil, invalid("interface %q: the sandbox has one of that name already", a.Interface)
		}
		names[i] = a.Interface
	}
	next := 0
	for i := range names {
		for names[i] == "" {
			if name := fmt.Sprintf("eth%d", next); !slices.Contains(names, name) {
				names[i] = name
			}
			next++
		}
	}
	return names, nil
}

// cniArgs returns CNI_ARGS. IgnoreUnknown is what runtimes begin it with, since
// each plugin is given all arguments and refuses those that it does not know.
func cniArgs(asked [][2]string) ([][2]string, error) {
	args := [][2]string{{"IgnoreUnknown", "1"}}
	for _, kv := range asked {
		if kv[0] == "" || strings.ContainsAny(kv[0], "=;\x00") || strings.ContainsAny(kv[1], ";\x00") {
			return nil, invalid("CNI argument %q: keys have no =, and neither keys nor values a semicolon", kv[0]+"="+kv[1])
		}
		args = append(args, kv)
	}
	return args, nil
}

// addCapabilities gives each argument to the networks that take it: ports and MAC, which
// there can be only once, to the first one, the n-th address of a family to the n-th
// one, the others to all.
func (p *plan) addCapabilities(lists []*libcni.NetworkConfigList, req *network.Request) error {
	takers := func(capability, what string) ([]int, error) {
		var is []int
		var names []string
		for i, l := range lists {
			if has(l, capability) {
				is = append(is, i)
			}
			names = append(names, l.Name)
		}
		if len(is) == 0 {
			return nil, invalid("%s: no plugin of CNI network %s declares the capability %s", what, strings.Join(names, ", "), capability)
		}
		return is, nil
	}
	var errs []error
	give := func(capability, what string, do func(takers []int) error) {
		is, err := takers(capability, what)
		if err == nil {
			err = do(is)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	if len(req.Ports) > 0 {
		give(capPorts, "published ports", func(is []int) error {
			p.Networks[is[0]].Capabilities[capPorts] = portMappings(req.Ports)
			p.Networks[is[0]].Ports = req.Ports
			return nil
		})
	}
	if len(req.Addresses) > 0 {
		give(capIPs, "static address", func(is []int) error { return p.addIPs(is, req.Addresses) })
	}
	if req.MAC != "" {
		give(capMAC, "static MAC address", func(is []int) error {
			mac, err := net.ParseMAC(req.MAC)
			if err != nil || len(mac) != 6 {
				return invalid("%q is not a MAC address", req.MAC)
			}
			p.Networks[is[0]].Capabilities[capMAC] = mac.String()
			return nil
		})
	}
	if req.Bandwidth != (network.Bandwidth{}) {
		give(capBandwidth, "bandwidth", func(is []int) error {
			for _, i := range is {
				p.Networks[i].Capabilities[capBandwidth] = bandwidth{
					IngressRate: req.Bandwidth.Ingress, IngressBurst: burst(req.Bandwidth.Ingress),
					EgressRate: req.Bandwidth.Egress, EgressBurst: burst(req.Bandwidth.Egress),
				}
			}
			return nil
		})
	}
	for i, l := range lists {
		if d := req.DNS; has(l, capDNS) && len(d.Servers)+len(d.Search)+len(d.Options) > 0 {
			p.Networks[i].Capabilities[capDNS] = dns{d.Servers, d.Search, d.Options}
		}
	}
	return errors.Join(errs...)
}

func (p *plan) addIPs(is []int, addrs []netip.Addr) error {
	given := map[bool]int{} // by whether it is IPv6: how many
	for _, a := range addrs {
		n := given[a.Is6()]
		given[a.Is6()]++
		if n >= len(is) {
			return invalid("address %s is one more of its family than there are networks that take one", a)
		}
		caps := p.Networks[is[n]].Capabilities
		ips, _ := caps[capIPs].([]string)
		caps[capIPs] = append(ips, a.String())
	}
	return nil
}

func portMappings(ports []network.Port) []portMapping {
	var ms []portMapping
	for _, p := range ports {
		m := portMapping{HostPort: p.HostPort, ContainerPort: p.Port, Protocol: string(p.Protocol)}
		if p.HostIP.IsValid() {
			m.HostIP = p.HostIP.String()
		}
		ms = append(ms, m)
	}
	return ms
}

// burst is how many bits may come at once at a rate: a tenth of a second's, but
// a large packet at least, and no more than the plugin takes.
func burst(rate uint64) uint64 {
	if rate == 0 {
		return 0
	}
	return min(max(rate/10, 64<<10*8), math.MaxUint32)
}
