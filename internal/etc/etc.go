// Package etc makes the files that tell a container its name and those of others:
// /etc/resolv.conf, /etc/hosts and /etc/hostname.
package etc

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/network"
)

// maxResolv is how much of a resolv.conf is read: more than any resolver reads.
const maxResolv = 64 << 10

// ParseResolv reads a resolv.conf(5). What it does not understand it passes over,
// as resolvers do. The last search or domain line counts; options add up.
func ParseResolv(r io.Reader) network.DNS {
	var d network.DNS
	lines := bufio.NewScanner(io.LimitReader(r, maxResolv))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0][0] == '#' || f[0][0] == ';' {
			continue
		}
		for i, s := range f {
			if s[0] == '#' || s[0] == ';' {
				f = f[:i]
				break
			}
		}
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil {
				d.Servers = append(d.Servers, a)
			}
		case "domain", "search":
			d.Search = slices.DeleteFunc(f[1:], func(s string) bool { return s == "." })
		case "options":
			d.Options = append(d.Options, f[1:]...)
		}
	}
	return d
}

// Reachable leaves out the servers that only the host itself can ask: those of
// its loopback, and addresses that mean nothing without an interface of the host.
func Reachable(servers []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(servers), func(a netip.Addr) bool { return a.IsLoopback() || a.Zone() != "" })
}

// Resolv makes a resolv.conf(5).
func Resolv(d network.DNS) []byte {
	var b bytes.Buffer
	for _, s := range d.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(d.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(d.Search, " "))
	}
	if len(d.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(d.Options, " "))
	}
	return b.Bytes()
}

// Merge is over, with what it leaves open taken from the others in turn.
func Merge(over network.DNS, others ...network.DNS) network.DNS {
	for _, d := range others {
		if len(over.Servers) == 0 {
			over.Servers = d.Servers
		}
		if len(over.Search) == 0 {
			over.Search = d.Search
		}
		if len(over.Options) == 0 {
			over.Options = d.Options
		}
	}
	return over
}

// Hosts makes a hosts(5): localhost, what was asked for, and under each of the
// sandbox's addresses its name. local are names of what is reached by localhost.
// A name that was asked for means nothing else.
func Hosts(hostname string, addrs []netip.Addr, asked []network.Host, local []string) []byte {
	var b bytes.Buffer
	taken := map[string]bool{"localhost": true, "ip6-localhost": true, "ip6-loopback": true}
	for _, h := range asked {
		taken[h.Name] = true
	}
	free := func(names ...string) (out []string) {
		for _, n := range names {
			if n != "" && !taken[n] && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
		return out
	}
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, h := range asked {
		fmt.Fprintf(&b, "%s\t%s\n", h.IP, h.Name)
	}
	short, _, _ := strings.Cut(hostname, ".")
	if own := free(hostname, short); len(own) > 0 {
		if len(addrs) == 0 {
			addrs = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 1, 1})}
		}
		for _, a := range addrs {
			fmt.Fprintf(&b, "%s\t%s\n", a, strings.Join(own, " "))
		}
		for _, n := range own {
			taken[n] = true
		}
	}
	if names := free(local...); len(names) > 0 {
		fmt.Fprintf(&b, "%s%s\n", localPrefix, strings.Join(names, " "))
	}
	return b.Bytes()
}

// Drop removes a name from the last line of the file hosts below dir, if that is the line
// of local names that [Hosts] ends with and has it. Like [Update] it changes the file in place.
func Drop(dir, name string) error {
	f, err := os.OpenFile(filepath.Join(dir, "hosts"), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	old, err := io.ReadAll(io.LimitReader(f, 1<<20)) // members may have written to it
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	rest := strings.TrimSuffix(string(old), "\n")
	i := strings.LastIndexByte(rest, '\n') + 1
	list, ok := strings.CutPrefix(rest[i:], localPrefix)
	names := strings.Fields(list)
	n := slices.Index(names, name)
	if !ok || n < 0 || i == 0 { // the first line is that of localhost
		return nil
	}
	rest = rest[:i]
	if names = slices.Delete(names, n, n+1); len(names) > 0 {
		rest += localPrefix + strings.Join(names, " ") + "\n"
	}
	return Update(dir, "hosts", []byte(rest))
}

const localPrefix = "127.0.0.1\t"

// Update makes content the contents of a file below dir. A file that is there
// with other contents is changed in place: who has it mounted sees it. It follows
// no link, and does not touch a file that is as it should be.
func Update(dir, name string, content []byte) error {
	// Not by os.Root, which follows a link as long as it stays below.
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return err
	} else if !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", name)
	}
	old, err := io.ReadAll(io.LimitReader(f, int64(len(content))+1))
	if err != nil || bytes.Equal(old, content) {
		return err
	}
	// A reader may see a part of it, as with every editor that keeps the inode.
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return err
}
