package member

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxUserFile bounds what is read of a root's /etc/passwd and /etc/group.
const maxUserFile = 4 << 20

// maxID is the highest user or group id; 2^32-1 means "no change" to chown(2)
// and its like.
const maxID = 1<<32 - 2

// account is a user as a process is started with it.
type account struct {
	uid, gid uint32
	groups   []uint32 // supplementary
	home     string
}

func (a account) specUser() specs.User {
	return specs.User{UID: a.uid, GID: a.gid, AdditionalGids: a.groups}
}

// lookupUser returns the account that s, "USER[:GROUP]" in names or numbers,
// means in the root at the host's path root. The empty string is user 0. A number
// need not be in /etc/passwd; its group is then 0. Supplementary groups are those
// of /etc/group that list the user, unless s names a group.
func lookupUser(root, s string) (account, error) {
	user, group, hasGroup := strings.Cut(s, ":")
	if hasGroup && group == "" {
		return account{}, fmt.Errorf("user %q lacks the group after the colon", s)
	}
	if user == "" {
		if hasGroup {
			return account{}, fmt.Errorf("user %q lacks the user before the colon", s)
		}
		user = "0"
	}
	passwd, err := readInRoot(root, "/etc/passwd")
	if err != nil {
		return account{}, fmt.Errorf("user %q: %w", s, err)
	}
	groups, err := readInRoot(root, "/etc/group")
	if err != nil {
		return account{}, fmt.Errorf("user %q: %w", s, err)
	}

	a := account{home: "/"}
	uid, isID, err := parseID(user)
	if err != nil {
		return account{}, fmt.Errorf("user %q: %w", s, err)
	}
	a.uid = uid
	name := "" // of the user, if it is known
	for f := range records(passwd, 7) {
		id, ok, err := parseID(f[2])
		gid, gok, gerr := parseID(f[3])
		if !ok || !gok || err != nil || gerr != nil || (f[0] != user && (!isID || id != uid)) {
			continue
		}
		name, a.uid, a.gid = f[0], id, gid
		if strings.HasPrefix(f[5], "/") {
			a.home = f[5]
		}
		break
	}
	if name == "" && !isID {
		return account{}, fmt.Errorf("user %q is not in the root's /etc/passwd (a number needs no entry)", user)
	}
	if !hasGroup {
		for f := range records(groups, 4) {
			gid, ok, err := parseID(f[2])
			if name != "" && ok && err == nil && slices.Contains(strings.Split(f[3], ","), name) && !slices.Contains(a.groups, gid) {
				a.groups = append(a.groups, gid)
			}
		}
		return a, nil
	}
	gid, isID, err := parseID(group)
	if err != nil {
		return account{}, fmt.Errorf("user %q: group: %w", s, err)
	}
	if isID {
		a.gid = gid
		return a, nil
	}
	for f := range records(groups, 4) {
		if gid, ok, err := parseID(f[2]); f[0] == group && ok && err == nil {
			a.gid = gid
			return a, nil
		}
	}
	return account{}, fmt.Errorf("group %q is not in the root's /etc/group (a number needs no entry)", group)
}

// parseID reads a number; ok is false if s is not one but a name.
func parseID(s string) (id uint32, ok bool, err error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > maxID {
		return 0, false, fmt.Errorf("id %s is above %d", s, uint32(maxID))
	}
	return uint32(n), true, nil
}

// records yields the colon-separated fields of the lines of b that have at least
// n of them, as passwd(5) and group(5) say; other lines are passed over, as the
// C library does.
func records(b []byte, n int) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		sc := bufio.NewScanner(bytes.NewReader(b))
		sc.Buffer(nil, maxUserFile+1)
		for sc.Scan() {
			f := strings.Split(strings.TrimSpace(sc.Text()), ":")
			if len(f) >= n && f[0] != "" && !yield(f) {
				return
			}
		}
	}
}

// statInRoot tells what is at a path of a root, like lstat(2); links above it lead
// nowhere outside of the root.
func statInRoot(root, path string) (st unix.Stat_t, err error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return st, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return st, &os.PathError{Op: "open", Path: root + path, Err: err}
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &st); err != nil {
		return st, &os.PathError{Op: "stat", Path: root + path, Err: err}
	}
	return st, nil
}

// readInRoot returns the contents of a file of a root that its owner may have
// planted anything in: links lead nowhere outside of it, and only a regular file
// of a bounded size is read. A file that does not exist is empty.
func readInRoot(root, path string) (_ []byte, err error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	// To open a device can have effects, so look at it first.
	peek := how
	peek.Flags = unix.O_PATH | unix.O_CLOEXEC
	fd, err := unix.Openat2(dir, path, &peek)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root + path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: root + path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s%s is not a regular file", root, path)
	}
	// The path leads to the file that was looked at, whatever is at its place now.
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), int(how.Flags), 0)
	if err != nil {
		return nil, fmt.Errorf("open %s%s: %w", root, path, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxUserFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s%s: %w", root, path, err)
	}
	if len(b) > maxUserFile {
		return nil, fmt.Errorf("%s%s is larger than %d bytes", root, path, maxUserFile)
	}
	return b, nil
}
