// Package netsetup makes the networks of sandboxes, and takes them down.
//
// A [Driver] does the work; packages builtin and cni below this one are two.
// This package keeps what is durable about an attachment, under the root
// directory, before anything is done to the host, and undoes it from that
// record: at once or, if that fails, again and again from a tombstone.
package netsetup

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/network"
)

// ErrInvalid means that a request can never succeed as it is.
var ErrInvalid = errors.New("invalid network request")

// Invalid makes err match [ErrInvalid] without changing its text.
func Invalid(err error) error { return invalid{err} }

type invalid struct{ error }

func (e invalid) Unwrap() error        { return e.error }
func (e invalid) Is(target error) bool { return target == ErrInvalid }

// ErrNoTombstone means that there is no network that waits to be taken down.
var ErrNoTombstone = errors.New("no network of that sandbox waits to be taken down")

// Driver makes networks of one kind. Its methods may be called from several
// goroutines, but not at the same time for one id.
//
// ns is a network namespace's file; it stays the caller's. A plugin that is
// executed reaches it as /proc/PID/fd/N.
type Driver interface {
	// Plan checks a request and returns all that Attach and Detach need to
	// know, beside the id, to do the same thing again after a crash or a change of
	// configuration. It changes nothing on the host. What is wrong with the
	// request is reported here: errors wrap [ErrInvalid].
	Plan(ctx context.Context, id string, req *network.Request) (json.RawMessage, error)
	// Attach gives the namespace its network. The plan is on disk. If it fails,
	// the caller calls Detach.
	Attach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) (*network.Result, error)
	// Detach takes back what Attach did, all or a part of it. It succeeds if
	// nothing is there, may be called again, and works without the namespace:
	// ns may be nil. One part that fails does not keep others from being taken back.
	Detach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error
	// Forget lets go of what the driver itself keeps of an attachment that
	// Detach will not be called for again, and takes back what it can of what Detach has
	// left because something else failed. It may be called again. Its error says what is left.
	Forget(ctx context.Context, id string, plan json.RawMessage) error
	// Verify reports what is no longer as Attach made it.
	Verify(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error
	// Restore repairs what can have been lost on the host while no daemon ran,
	// or because somebody removed it: bridges, links, rules. It is called once
	// for every attachment at the start of a daemon, and when one is seen to be broken.
	Restore(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error
	// Status reports why the driver cannot make networks now; nil if it can.
	Status(ctx context.Context) error
	// GC finds what belongs to no attachment, and unless dryRun is set removes
	// it. It touches nothing that this installation has not made.
	//
	// live returns the plans of all attachments on record, by id, those that
	// are still to be detached among them. The driver looks at the host first
	// and calls live then: since an attachment is on record before anything is made for
	// it, what was seen and is not live belongs to nobody.
	GC(ctx context.Context, live func() map[string]json.RawMessage, dryRun bool) ([]garbage.Finding, error)
	// Close lets go of what the driver holds; networks stay.
	Close() error
}
