package builtin

import (
	"context"
	"encoding/json"
	"os"

	"github.com/sandboxd/sandboxd/internal/garbage"
)

// Verify reports what is no longer as Attach made it.
func (d *Driver) Verify(context.Context, string, json.RawMessage, *os.File) error { return nil }

// Restore repairs what can have been lost.
func (d *Driver) Restore(_ context.Context, id string, raw json.RawMessage, ns *os.File) error {
	_, err := d.prepared()
	return err
}

// GC finds what belongs to nobody.
func (d *Driver) GC(context.Context, func() map[string]json.RawMessage, bool) ([]garbage.Finding, error) {
	return nil, nil
}
