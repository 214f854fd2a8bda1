package sandbox

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/crash"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/internal/network"
)

// restoreTimeout bounds what the start of the daemon waits for one network.
const restoreTimeout = 10 * time.Second

// made reports whether a network of that mode is made by the node, and has to be
// taken down.
func made(mode NetworkMode) bool { return mode == network.ModeBuiltin || mode == network.ModeCNI }

// mayHaveNetwork reports whether there may be something to take down. A record
// that could not be read does not say.
func mayHaveNetwork(r *Record) bool { return made(r.Config.Network) || r.Config.Network == "" }

// planNetwork asks the node what it will do. Nothing has been done yet, so what is
// wrong with a request is found here. Preconditions: b.op is held.
func (m *Manager) planNetwork(ctx context.Context, b *box) (plan json.RawMessage, err error) {
	if !made(b.rec.Load().Config.Network) {
		return nil, nil
	}
	err = m.run("create", "network plan", func() (err error) {
		plan, err = m.node.PlanNetwork(ctx, b.rec.Load())
		return err
	})
	return plan, err
}

// attachNetwork makes the network. Preconditions: b.op is held.
func (m *Manager) attachNetwork(ctx context.Context, b *box, plan json.RawMessage) (as []network.Attachment, err error) {
	if !made(b.rec.Load().Config.Network) {
		return nil, nil
	}
	err = m.run("create", "network", func() (err error) {
		as, err = m.node.AttachNetwork(ctx, b.rec.Load(), plan)
		return err
	})
	return as, err
}

// restoreNetwork repairs what has happened to b's network while no daemon ran. What
// does not succeed is logged: the sandbox is there all the same, and check tells.
// Preconditions: b.op is held.
func (m *Manager) restoreNetwork(ctx context.Context, b *box) {
	r := b.rec.Load()
	if !made(r.Config.Network) || !m.o.alive(r.Pause) {
		return
	}
	crash.Point("recover network before")
	done := m.o.Observer.Step("recover", "network")
	ctx, cancel := context.WithTimeout(ctx, restoreTimeout)
	defer cancel()
	err := m.node.RestoreNetwork(ctx, r)
	done(err)
	if err != nil {
		m.o.Log.Warn("Network not restored", "sandbox", r.ID, "err", err)
	}
	crash.Point("recover network after")
}

// VerifyNetwork reports what is no longer as it was when the sandbox was created;
// nil if everything is. It waits for operations on the sandbox.
func (m *Manager) VerifyNetwork(ctx context.Context, ref string) (err error) {
	defer m.operation("verify_network", &err)()
	b, err := m.lockBox(ctx, ref)
	if err != nil {
		return opError("check", ref, err, nil)
	}
	defer b.op.release()
	r := b.rec.Load()
	switch {
	case !made(r.Config.Network):
		return &OpError{Op: "check", Ref: ref, Err: statef("the network is %s: there is nothing to check", r.Config.Network)}
	case r.State != Ready && r.State != Stopped:
		return &OpError{Op: "check", Ref: ref, Err: statef("the sandbox is %s", r.State)}
	}
	return opError("check", ref, m.run("check", "network", func() error { return m.node.VerifyNetwork(ctx, r) }), nil)
}

// networkTried tells of an attempt to take down the network of a sandbox that is
// gone, or is just going.
func (m *Manager) networkTried(t Tombstone, err error) {
	e := Event{
		Type: journal.Network, Sandbox: t.ID, SandboxName: t.Name,
		Attrs: map[string]string{"action": "detach", "mode": string(t.Mode), "attempts": strconv.Itoa(t.Attempts), "outcome": "done"},
	}
	if err != nil {
		e.Reason, e.Attrs["outcome"] = err.Error(), "failed"
	}
	m.Emit(e)
}

// removed is the state of a sandbox that is gone and whose network is not.
const removed = "Removed"

// Tombstones returns the sandboxes that are gone and whose network could not be
// taken down yet, the oldest first.
func (m *Manager) Tombstones() []Info {
	infos := []Info{}
	for _, t := range m.node.Tombstones() {
		i := m.view().sandbox(&Record{ID: t.ID, CreatedAt: t.CreatedAt, Config: Config{Name: t.Name, Network: t.Mode}}, nil)
		i.State, i.Reason = removed, "its network could not be taken down yet"
		if t.LastError != "" {
			i.Reason += ": " + t.LastError
		}
		i.Network.Tombstone = &t.TombstoneInfo
		infos = append(infos, i)
	}
	return infos
}

// ForgetNetwork gives up the network of a sandbox that is gone, of those that
// [Manager.Tombstones] returns: it is not tried to be taken down again, and what is left of it on
// the host stays there. id is the whole id, so that nobody means another one.
func (m *Manager) ForgetNetwork(ctx context.Context, id string) (err error) {
	defer m.operation("forget_network", &err)()
	if err := ctx.Err(); err != nil {
		return &OpError{Op: "gc", Ref: id, Err: err}
	}
	t, err := m.node.ForgetNetwork(id)
	if err != nil {
		return &OpError{Op: "gc", Ref: id, Err: err}
	}
	m.Emit(Event{
		Type: journal.Network, Sandbox: t.ID, SandboxName: t.Name, Reason: t.LastError,
		Attrs: map[string]string{"action": "forget", "mode": string(t.Mode), "attempts": strconv.Itoa(t.Attempts), "outcome": "done"},
	})
	return nil
}

// Bounds of a network request. They keep a record, and a resolv.conf(5) or hosts(5)
// that is made of it, of a size that everybody can read.
const (
	maxPorts = 4096
	maxNames = 1024
)

// completeNetwork checks what can be checked without a driver, and returns a copy
// with every default filled in.
func completeNetwork(mode NetworkMode, q network.Request) (network.Request, error) {
	var err error
	for _, f := range []struct {
		set   bool
		what  string
		modes []NetworkMode
	}{
		{len(q.Attach) > 0, "names of networks", []NetworkMode{network.ModeCNI}},
		{len(q.CNIArgs) > 0, "cni arguments", []NetworkMode{network.ModeCNI}},
		{q.Isolated, "isolation", []NetworkMode{network.ModeBuiltin}},
		{len(q.Ports) > 0, "published ports", []NetworkMode{network.ModeBuiltin, network.ModeCNI}},
		{len(q.Addresses) > 0, "addresses", []NetworkMode{network.ModeBuiltin, network.ModeCNI}},
		{q.MAC != "", "a mac address", []NetworkMode{network.ModeBuiltin, network.ModeCNI}},
		{q.Bandwidth != network.Bandwidth{}, "a bandwidth", []NetworkMode{network.ModeBuiltin, network.ModeCNI}},
	} {
		if f.set && !slices.Contains(f.modes, mode) {
			return q, invalidf("network %s: %s can be given for %s only", mode, f.what, join(f.modes))
		}
	}
	q.Attach = slices.Clone(q.Attach)
	q.CNIArgs = slices.Clone(q.CNIArgs)
	q.Addresses = slices.Clone(q.Addresses)
	for i, a := range q.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a.Zone() != "" {
			return q, invalidf("address %s: not one that a sandbox can have", a)
		}
		if slices.Contains(q.Addresses[:i], a) {
			return q, invalidf("address %s is named twice", a)
		}
	}
	if q.MAC != "" {
		if q.MAC, err = completeMAC(q.MAC); err != nil {
			return q, err
		}
	}
	if q.Ports, err = completePorts(q.Ports); err != nil {
		return q, err
	}
	if q.DNS, err = completeDNS(q.DNS); err != nil {
		return q, err
	}
	q.Hosts, err = completeHosts(q.Hosts)
	return q, err
}

func join(modes []NetworkMode) string {
	s := make([]string, len(modes))
	for i, m := range modes {
		s[i] = string(m)
	}
	return strings.Join(s, " and ")
}

func completeMAC(s string) (string, error) {
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		return "", invalidf("mac address %s: want six bytes such as 02:42:ac:11:00:02", quote(s))
	case mac[0]&1 != 0:
		return "", invalidf("mac address %s is a multicast address", mac)
	case slices.Equal(mac, make([]byte, 6)):
		return "", invalidf("mac address %s cannot be given to an interface", mac)
	}
	return mac.String(), nil
}

// broadcast is the address of everybody on a link (RFC 919), and of no host.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func completePorts(in []network.Port) ([]network.Port, error) {
	if len(in) > maxPorts {
		return nil, invalidf("%d published ports are more than %d", len(in), maxPorts)
	}
	out := slices.Clone(in)
	seen := make(map[network.Port]bool, len(in))
	for i := range out {
		p := &out[i]
		if p.Protocol == "" {
			p.Protocol = network.TCP
		}
		switch {
		case p.Protocol != network.TCP && p.Protocol != network.UDP && p.Protocol != network.SCTP:
			return nil, invalidf("published port %d: protocol %s: want tcp, udp or sctp", p.HostPort, quote(string(p.Protocol)))
		case p.Port == 0:
			return nil, invalidf("published port %d: the sandbox's port is 0", p.HostPort)
		case p.HostIP.IsMulticast() || p.HostIP == broadcast || p.HostIP.Is4In6() || p.HostIP.Zone() != "":
			return nil, invalidf("published port %d: %s is not an address that the host can have", p.HostPort, p.HostIP)
		}
		key := network.Port{HostIP: p.HostIP, HostPort: p.HostPort, Protocol: p.Protocol}
		if seen[key] && p.HostPort != 0 {
			return nil, invalidf("host port %d/%s is published twice", p.HostPort, p.Protocol)
		}
		seen[key] = true
	}
	return out, nil
}

func completeDNS(d network.DNS) (network.DNS, error) {
	if len(d.Servers)+len(d.Search)+len(d.Options) > maxNames {
		return d, invalidf("dns: more than %d servers, domains and options", maxNames)
	}
	for _, s := range d.Servers {
		if !s.IsValid() || s.IsUnspecified() || s.IsMulticast() {
			return d, invalidf("dns server %s: not the address of a host", s)
		}
	}
	for _, s := range d.Search {
		if s == "" || len(s) > maxDomain || strings.ContainsFunc(s, noNameRune) {
			return d, invalidf("dns search domain %s: want letters, digits, '-', '_' and '.', at most %d", quote(s), maxDomain)
		}
	}
	for _, s := range d.Options {
		if s == "" || len(s) > maxDomain || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' }) {
			return d, invalidf("dns option %s: want one word of at most %d bytes, such as ndots:2 (resolv.conf(5))", quote(s), maxDomain)
		}
	}
	return network.DNS{Servers: slices.Clone(d.Servers), Search: slices.Clone(d.Search), Options: slices.Clone(d.Options)}, nil
}

func completeHosts(in []network.Host) ([]network.Host, error) {
	if len(in) > maxNames {
		return nil, invalidf("%d additional hosts are more than %d", len(in), maxNames)
	}
	for _, h := range in {
		if err := checkHostsName(h.Name); err != nil {
			return nil, err
		}
		if !h.IP.IsValid() || h.IP == (netip.Addr{}) {
			return nil, invalidf("additional host %s has no address", h.Name)
		}
	}
	return slices.Clone(in), nil
}

// maxDomain is the length of the longest name (RFC 1035, section 2.3.4).
const maxDomain = 255

// noNameRune reports whether r is in no name of a host or domain. Some in use have
// an underscore.
func noNameRune(r rune) bool {
	return r > '~' || !isAlnum(byte(r)) && r != '-' && r != '.' && r != '_'
}

// checkHostsName accepts what hosts(5) can have as a name.
func checkHostsName(s string) error {
	if s == "" || len(s) > 253 || strings.ContainsFunc(s, noNameRune) {
		return invalidf("additional host %s: want letters, digits, '-', '_' and '.'", quote(s))
	}
	return nil
}
