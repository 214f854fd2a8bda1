package main

import (
	"context"
	"errors"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/sandbox"
)

// SandboxHooks implements [sandbox.HookNode].
func (n *node) SandboxHooks(c *sandbox.Config) ([]request.Hook, error) { return c.Hooks, nil }

// MemberHooks implements [sandbox.HookNode].
func (n *node) MemberHooks(_ *sandbox.Record, m *sandbox.MemberRecord, _ *specs.Spec) ([]request.Hook, error) {
	return m.Config.Hooks, nil
}

// RunHook implements [sandbox.HookNode].
func (n *node) RunHook(context.Context, *sandbox.HookCall) sandbox.HookOutcome {
	return sandbox.HookOutcome{Code: -1, Err: errors.New("no hooks in this version")}
}
