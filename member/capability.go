package member

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// parseCapability returns the full name of the capability s, which may be in any
// case and lack "CAP_".
func parseCapability(s string) (string, error) {
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "CAP_") {
		name = "CAP_" + name
	}
	if !slices.Contains(capNames, name) {
		return "", fmt.Errorf("unknown capability %q (capabilities(7) lists them)", s)
	}
	return name, nil
}

// ownCapabilities returns the permitted capabilities of the calling thread as a
// bit set. Nobody can give what he does not have.
func ownCapabilities() (uint64, error) {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return 0, fmt.Errorf("capget: %w", err)
	}
	return uint64(data[1].Permitted)<<32 | uint64(data[0].Permitted), nil
}

// capabilityNames lists the capabilities of a bit set by number. Those that
// this program has no name for are left out.
func capabilityNames(set uint64) []string {
	var names []string
	for i, name := range capNames {
		if set&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// changeCapabilities returns base with add and drop applied, in the order of
// their numbers. As in Docker "ALL" in drop empties the base before add is
// applied, and in add stands for everything in own except what drop names.
func changeCapabilities(base, add, drop []string, own uint64) ([]string, error) {
	have := capabilityNames(own)
	set := map[string]bool{}
	for _, c := range base {
		set[c] = true
	}
	all := func(s string) bool { return strings.EqualFold(s, "ALL") }
	if slices.ContainsFunc(drop, all) {
		clear(set)
	}
	if slices.ContainsFunc(add, all) {
		for _, c := range have {
			set[c] = true
		}
	}
	added := map[string]bool{}
	for _, s := range add {
		if all(s) {
			continue
		}
		c, err := parseCapability(s)
		if err != nil {
			return nil, fmt.Errorf("cap-add: %w", err)
		}
		if !slices.Contains(have, c) {
			return nil, fmt.Errorf("cap-add: %s cannot be given: sandboxd does not have it itself", c)
		}
		set[c], added[c] = true, true
	}
	for _, s := range drop {
		if all(s) {
			continue
		}
		c, err := parseCapability(s)
		if err != nil {
			return nil, fmt.Errorf("cap-drop: %w", err)
		}
		if added[c] {
			return nil, fmt.Errorf("capability %s is both added and dropped", c)
		}
		delete(set, c)
	}
	var out []string
	for _, c := range capNames {
		if set[c] {
			out = append(out, c)
		}
	}
	return out, nil
}
