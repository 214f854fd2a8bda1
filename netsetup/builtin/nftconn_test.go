package builtin

import (
	"errors"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

// The kernel answers each message of a transaction that fails; the error says it once.
func TestErrorSaysItOnce(t *testing.T) {
	testenv.Root(t)
	p := newNftPool()
	defer p.end()
	table := &nftables.Table{Name: "sandboxd_test_none", Family: nftables.TableFamilyINet}
	err := p.use(func(c *nftables.Conn) error {
		for range 3 {
			c.DelTable(table)
		}
		return nil
	})
	if !errors.Is(err, unix.ENOENT) || err.Error() != "netlink receive: no such file or directory" {
		t.Errorf("error %q", err)
	}
	two := errors.Join(unix.ENOENT, errors.Join(unix.EBUSY, unix.ENOENT))
	if err := once(two); err.Error() != "no such file or directory; device or resource busy" || !errors.Is(err, unix.EBUSY) {
		t.Errorf("error %q", err)
	}
	if err := once(nil); err != nil {
		t.Error(err)
	}
}
