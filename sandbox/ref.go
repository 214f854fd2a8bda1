package sandbox

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

const (
	idLen        = 16 // hex digits
	minPrefixLen = 3  // shorter beginnings of an id are taken for mistyped names
	maxNameLen   = 63
)

// newID returns a random id. It is long enough never to be drawn twice on a host.
func newID() string {
	var b [idLen / 2]byte
	rand.Read(b[:]) // never fails, see its documentation
	return hex.EncodeToString(b[:])
}

func isID(s string) bool { return len(s) == idLen && isHex(s) }

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// checkName accepts [a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}. What looks like an id is
// refused, so that no name can hide another sandbox's id.
func checkName(what, name string) error {
	ok := name != "" && len(name) <= maxNameLen && isAlnum(name[0])
	for i := range len(name) {
		c := name[i]
		ok = ok && (isAlnum(c) || c == '_' || c == '.' || c == '-')
	}
	if !ok {
		return invalidf("%s name %s: want a letter or digit, then at most %d of letters, digits, '_', '.', '-'", what, quote(name), maxNameLen-1)
	}
	if isID(name) {
		return invalidf("%s name %q looks like an id", what, name)
	}
	return nil
}

func isAlnum(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// checkHostname accepts what RFC 1123, section 2.1, calls a host name.
func checkHostname(s string) error {
	bad := len(s) > maxNameLen
	for label := range strings.SplitSeq(s, ".") {
		bad = bad || label == "" || label[0] == '-' || label[len(label)-1] == '-'
		for i := range len(label) {
			bad = bad || !isAlnum(label[i]) && label[i] != '-'
		}
	}
	if bad {
		return invalidf("hostname %s: want letters, digits, '-' and '.', at most %d (RFC 1123)", quote(s), maxNameLen)
	}
	return nil
}

// quote keeps an error about a nonsensical value to one line of readable length.
func quote(s string) string {
	const limit = 80
	if len(s) > limit {
		return fmt.Sprintf("%q... (%d bytes)", s[:limit], len(s))
	}
	return fmt.Sprintf("%q", s)
}

func invalidf(format string, a ...any) error {
	return &kindError{fmt.Sprintf(format, a...), ErrInvalid}
}

func statef(format string, a ...any) error {
	return &kindError{fmt.Sprintf(format, a...), ErrState}
}

// findMember returns the one of a sandbox's members that ref names.
func findMember[E entry](ref string, members []E, sandbox string) (E, error) {
	return find("member", ref, members, " in sandbox "+sandbox)
}

// splitRef takes "SANDBOX/MEMBER" apart.
func splitRef(ref string) (sandbox, member string, err error) {
	sandbox, member, ok := strings.Cut(ref, "/")
	if !ok {
		return "", "", invalidf("%s is not SANDBOX/MEMBER", quote(ref))
	}
	if sandbox == "" || member == "" || strings.Contains(member, "/") {
		return "", "", invalidf("%s is not SANDBOX/MEMBER", quote(ref))
	}
	return sandbox, member, nil
}

// entry is something that has an id and a name.
type entry interface {
	id() string
	name() string
}

// find returns the one of all that ref names: by its name, its id, or an
// unambiguous beginning of its id. where is what the error says if there is none.
func find[E entry](what, ref string, all []E, where string) (E, error) {
	var none E
	for _, e := range all {
		if e.name() == ref {
			return e, nil
		}
	}
	var hits []E
	if len(ref) >= minPrefixLen && isHex(ref) {
		for _, e := range all {
			if strings.HasPrefix(e.id(), ref) {
				hits = append(hits, e)
			}
		}
	}
	switch {
	case len(hits) == 1:
		return hits[0], nil
	case len(hits) > 1:
		var names []string
		for _, e := range hits {
			names = append(names, fmt.Sprintf("%s (%s)", e.id(), e.name()))
		}
		return none, invalidf("%s %q is ambiguous: %s", what, ref, strings.Join(names, ", "))
	case what == "sandbox" && strings.Contains(ref, "/"):
		return none, invalidf("%s names a member; a sandbox is needed", quote(ref))
	}
	short := ""
	if n := len(ref); n > 0 && n < minPrefixLen && slices.ContainsFunc(all, func(e E) bool { return strings.HasPrefix(e.id(), ref) }) {
		short = fmt.Sprintf(" (of an id, at least %d characters are needed)", minPrefixLen)
	}
	return none, &kindError{fmt.Sprintf("no %s %s%s%s", what, quote(ref), where, short), ErrNotFound}
}
