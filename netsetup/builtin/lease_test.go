package builtin

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/netsetup"
)

// newLeases returns a store of a subnet with five addresses for sandboxes.
func newLeases(t *testing.T, dir string) *leases {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, leaseDir), 0o700); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	s, err := openLeases(root, netip.MustParsePrefix("10.1.0.0/29"), netip.MustParsePrefix("fd01::/64"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustTake(t *testing.T, s *leases, id string, static ...netip.Addr) string {
	t.Helper()
	l, err := s.take(id, static)
	if err != nil {
		t.Fatalf("take(%s) = %v", id, err)
	}
	return l.String()
}

func giveBack(t *testing.T, s *leases, id string) {
	t.Helper()
	if err := errors.Join(s.release(id, time.Now()), s.free(id)); err != nil {
		t.Fatal(err)
	}
}

func TestLeases(t *testing.T) {
	dir := t.TempDir()
	s := newLeases(t, dir)
	for i := range 5 {
		want := fmt.Sprintf("10.1.0.%d,fd01::%d", i+2, i+2)
		for range 2 { // the second time it has one
			if got := mustTake(t, s, testID(i)); got != want {
				t.Errorf("lease %d is %s, want %s", i, got, want)
			}
		}
	}
	if _, err := s.take(testID(5), nil); err == nil || !strings.Contains(err.Error(), "10.1.0.0/29") {
		t.Errorf("all are taken: %v", err)
	}
	// Released is not free.
	if err := s.release(testID(1), time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.take(testID(5), nil); err == nil {
		t.Error("an address was handed out whose link may be there")
	}
	if _, err := s.take(testID(1), nil); err == nil {
		t.Error("a sandbox that is being detached got its address again")
	}
	if err := s.free(testID(1)); err != nil {
		t.Fatal(err)
	}
	if got := mustTake(t, s, testID(5)); got != "10.1.0.3,fd01::7" {
		t.Errorf("the one that is free again: %s", got)
	}

	// As the next daemon finds it.
	if err := s.release(testID(2), time.Now()); err != nil {
		t.Fatal(err)
	}
	again := newLeases(t, dir)
	if got := mustTake(t, again, testID(5)); got != "10.1.0.3,fd01::7" {
		t.Errorf("read again: %s", got)
	}
	if _, ok := again.get(testID(2)); ok || len(again.released()) != 1 {
		t.Errorf("released, read again: %v", again.released())
	}
	if _, err := again.take(testID(6), nil); err == nil {
		t.Error("an address of before was handed out")
	}
}

// TestLeasesInTurn: an address that was given back is the last to come again.
func TestLeasesInTurn(t *testing.T) {
	s := newLeases(t, t.TempDir())
	var got []string
	for i := range 6 {
		got = append(got, mustTake(t, s, testID(i)))
		giveBack(t, s, testID(i))
	}
	want := []string{"10.1.0.2,fd01::2", "10.1.0.3,fd01::3", "10.1.0.4,fd01::4", "10.1.0.5,fd01::5", "10.1.0.6,fd01::6", "10.1.0.2,fd01::7"}
	if !slices.Equal(got, want) {
		t.Errorf("in turn %v, want %v", got, want)
	}
}

func TestLeasesStatic(t *testing.T) {
	s := newLeases(t, t.TempDir())
	if got := mustTake(t, s, testID(0), netip.MustParseAddr("10.1.0.4")); got != "10.1.0.4,fd01::2" {
		t.Errorf("static: %s", got)
	}
	if _, err := s.take(testID(1), []netip.Addr{netip.MustParseAddr("10.1.0.4")}); err == nil || !strings.Contains(err.Error(), testID(0)) {
		t.Errorf("somebody's: %v, want whose", err)
	}
	for _, a := range []string{"10.1.0.0", "10.1.0.1", "10.1.0.7", "10.2.0.2", "fd01::", "fd01::1", "fd02::2"} {
		if _, err := s.take(testID(1), []netip.Addr{netip.MustParseAddr(a)}); !errors.Is(err, netsetup.ErrInvalid) {
			t.Errorf("static %s: %v", a, err)
		}
	}
	if got := mustTake(t, s, testID(1), netip.MustParseAddr("fd01::4"), netip.MustParseAddr("10.1.0.6")); got != "10.1.0.6,fd01::4" {
		t.Errorf("static IPv6: %s", got)
	}
}

// TestLeasesNotWritten: what cannot be recorded is not handed out, and not lost.
func TestLeasesNotWritten(t *testing.T) {
	dir := t.TempDir()
	s := newLeases(t, dir)
	if err := os.Remove(filepath.Join(dir, leaseDir)); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if _, err := s.take(testID(1), nil); err == nil {
			t.Fatal("a lease without a record")
		}
	}
	if err := os.Mkdir(filepath.Join(dir, leaseDir), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		mustTake(t, s, testID(i))
	}
}

func TestLeasesDamaged(t *testing.T) {
	dir := t.TempDir()
	s := newLeases(t, dir)
	mustTake(t, s, testID(1))
	at := func(name string) string { return filepath.Join(dir, leaseDir, name) }
	for _, err := range []error{
		os.Symlink("garbage", at(testID(2))),
		os.Symlink("10.1.0.9", at("no-id")),
		os.WriteFile(at(testID(3)), nil, 0o600),
		os.Mkdir(at(testID(4)), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s = newLeases(t, dir)
	if got := s.ids(); !slices.Equal(got, []string{testID(1)}) {
		t.Errorf("read %v", got)
	}
	if names, err := s.damaged(); err != nil || len(names) != 4 {
		t.Errorf("damaged: %v, %v", names, err)
	}
}

func FuzzParseLease(f *testing.F) {
	for _, s := range []string{"10.1.0.2", "10.1.0.2,fd01::2", ",", "fd01::2", "10.1.0.2,::ffff:10.0.0.1", "10.1.0.2,fe80::1%eth0", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := parseLease(s)
		if err != nil {
			return
		}
		again, err := parseLease(l.String())
		if err != nil || again != l {
			t.Errorf("parseLease(%q) = %v, which reads as %v, %v", s, l, again, err)
		}
	})
}
