package main

import (
	"errors"
	"log/slog"

	"github.com/sandboxd/sandboxd/sandbox"
)

type nodeOptions struct {
	State        string
	Root         string
	CgroupParent string
	Log          *slog.Logger
}

func newNode(nodeOptions) (sandbox.Node, error) { return nil, errors.ErrUnsupported }
