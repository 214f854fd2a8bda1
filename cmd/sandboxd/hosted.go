package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/sandboxd/sandboxd/internal/etc"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/sandbox"
)

// hosted keeps the files of sandboxes that tell their members names: hosts,
// hostname and resolv.conf. There is one set for each sandbox, in a directory that
// no member sees, and members have the files mounted.
type hosted struct {
	root string // the root directory

	mu  sync.Mutex
	all map[string]*etcFiles // by sandbox; guarded by mu
}

// etcFiles are those of one sandbox. Members that are added at the same time
// change them one after the other.
type etcFiles struct {
	mu    sync.Mutex
	names []memberName // of those that share the network, by id; guarded by mu
}

type memberName struct{ id, name string }

// add adds a member, unless it is there. Preconditions: f.mu is held.
func (f *etcFiles) add(m *sandbox.MemberRecord) {
	if i, found := f.find(m.ID); !found {
		f.names = slices.Insert(f.names, i, memberName{m.ID, m.Config.Name})
	}
}

// find is for a member with that id. Preconditions: f.mu is held.
func (f *etcFiles) find(id string) (int, bool) {
	return slices.BinarySearchFunc(f.names, id, func(n memberName, id string) int { return strings.Compare(n.id, id) })
}

func newHosted(root string) *hosted { return &hosted{root: root, all: map[string]*etcFiles{}} }

func (h *hosted) dir(id string) string { return filepath.Join(h.root, "sandboxes", id, "etc") }

// forget drops a sandbox.
func (h *hosted) forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.all, id)
}

// drop drops a member, and its name from hosts. What cannot be changed is with the next
// member that joins.
func (h *hosted) drop(m *sandbox.MemberRecord) {
	f := h.of(m.Sandbox)
	f.mu.Lock()
	defer f.mu.Unlock()
	if i, found := f.find(m.ID); found {
		f.names = slices.Delete(f.names, i, i+1)
	}
	etc.Drop(h.dir(m.Sandbox), m.Config.Name)
}

// of returns what is known of a sandbox.
func (h *hosted) of(id string) *etcFiles {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.all[id]
	if f == nil {
		f = new(etcFiles)
		h.all[id] = f
	}
	return f
}

// update makes the files of r what they should be once m is a member, and returns
// their paths by what they are called in a member. They are only for members that
// have the sandbox's network, be it the host's.
func (h *hosted) update(r *sandbox.Record, m *sandbox.MemberRecord, siblings []*sandbox.MemberRecord) (map[string]string, error) {
	if !sharesNetwork(r, m.Namespaces) {
		return nil, nil
	}
	f := h.of(r.ID)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range siblings {
		if sharesNetwork(r, s.Namespaces) {
			f.add(s)
		}
	}
	f.add(m)
	dir := h.dir(r.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	paths := map[string]string{}
	for name, content := range etcContents(r, f.names) {
		if err := etc.Update(dir, name, content); err != nil {
			return nil, err
		}
		paths["/etc/"+name] = filepath.Join(dir, name)
	}
	return paths, nil
}

// sharesNetwork reports whether a member with the namespaces sel has the network
// of its sandbox r.
func sharesNetwork(r *sandbox.Record, sel namespace.Selection) bool {
	switch sel[namespace.Net].From {
	case namespace.Sandbox:
		return true
	case namespace.Host:
		return r.Config.Network == network.ModeHost
	}
	return false
}

// etcContents makes the contents of the files. names are those of members.
func etcContents(r *sandbox.Record, names []memberName) map[string][]byte {
	var addrs []netip.Addr
	var dns []network.DNS
	for _, a := range r.Networks {
		dns = append(dns, a.DNS)
		for _, p := range a.Addresses {
			addrs = append(addrs, p.Addr())
		}
	}
	hostname := r.Config.Hostname
	asked := r.Config.Net.Hosts
	if r.Config.Network == network.ModeHost {
		if hostname == "" {
			hostname, _ = os.Hostname() // a hosts file without it does as well
		}
	}
	members := make([]string, 0, len(names))
	for _, n := range names {
		if n.name != n.id {
			members = append(members, n.name)
		}
	}
	slices.Sort(members)
	files := map[string][]byte{"hosts": etc.Hosts(hostname, addrs, asked, members)}
	if hostname != "" {
		files["hostname"] = []byte(hostname + "\n")
	}
	d := etc.Merge(r.Config.Net.DNS, dns...)
	switch r.Config.Network {
	case network.ModeNone:
		if len(d.Servers)+len(d.Search)+len(d.Options) == 0 {
			return files // there is nobody to ask
		}
	case network.ModeHost:
		d = etc.Merge(d, hostDNS(true))
	default:
		d = etc.Merge(d, hostDNS(false))
	}
	files["resolv.conf"] = etc.Resolv(d)
	return files
}

// hostDNS is the host's configuration. Unless local is set, servers that only the
// host can ask are left out; where there are no others, a stub of systemd-resolved
// is, whose own servers are in another file.
func hostDNS(local bool) network.DNS {
	read := func(name string) network.DNS {
		f, err := os.Open(name)
		if err != nil {
			return network.DNS{} // as a resolver does, but for asking the host itself
		}
		defer f.Close()
		return etc.ParseResolv(f)
	}
	d := read("/etc/resolv.conf")
	if local {
		return d
	}
	asked := len(d.Servers)
	if d.Servers = etc.Reachable(d.Servers); len(d.Servers) == 0 && asked > 0 {
		d.Servers = etc.Reachable(read("/run/systemd/resolve/resolv.conf").Servers)
	}
	return d
}
