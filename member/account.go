package member

import "github.com/opencontainers/runtime-spec/specs-go"

// LookupUser returns the user that s, "USER[:GROUP]" in names or numbers, means
// in the root at the host's path root. The root's /etc/passwd and /etc/group are
// read as files that somebody may have planted.
func LookupUser(root, s string) (specs.User, error) {
	a, err := lookupUser(root, s)
	return a.specUser(), err
}

// OwnCapabilities returns the names of the capabilities that this process has:
// the most that it can give.
func OwnCapabilities() ([]string, error) {
	set, err := ownCapabilities()
	return capabilityNames(set), err
}
