// Package undo takes back what a sequence of steps has made.
package undo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// StepTimeout bounds one step, so that one that hangs cannot hold a sandbox's
// lock for ever.
const StepTimeout = 30 * time.Second

// Stack holds named steps that take something down. The zero value is empty and
// ready to use. A Stack is not safe for concurrent use.
type Stack struct {
	steps []step
}

type step struct {
	name string
	fn   func(context.Context) error
}

// Push adds a step. fn must succeed if there is nothing to take down, and may
// be called again after it failed.
func (s *Stack) Push(name string, fn func(context.Context) error) {
	s.steps = append(s.steps, step{name, fn})
}

// Unwind runs the steps, the newest first. A step that fails does not keep the
// older ones from running; it stays on the stack, so that the next Unwind
// retries what is left and nothing else. The steps see the values of ctx but not
// its cancellation: a client that hung up is the usual reason for an undo.
//
// The error joins one error for each step that failed, and names it.
func (s *Stack) Unwind(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var left []step
	var errs []error
	for _, st := range slices.Backward(s.steps) {
		if err := st.run(ctx); err != nil {
			left = append(left, st)
			errs = append(errs, fmt.Errorf("%s: %w", st.name, err))
		}
	}
	slices.Reverse(left)
	s.steps = left
	return errors.Join(errs...)
}

func (st step) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, StepTimeout)
	defer cancel()
	return st.fn(ctx)
}
