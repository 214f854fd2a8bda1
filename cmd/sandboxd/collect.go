package main

import (
	"context"

	"github.com/sandboxd/sandboxd/sandbox"
)

// Collects implements [sandbox.CollectNode].
func (n *node) Collects(*sandbox.MemberRecord) bool { return false }

// Collect implements [sandbox.CollectNode].
func (n *node) Collect(context.Context, *sandbox.Record, *sandbox.MemberRecord, string) error {
	return nil
}
