package netsetup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/network"
)

// retryWait is how long GC waits for the attempts that it has made be made.
const retryWait = 2 * time.Second

// GC finds what belongs to no attachment and, unless dryRun is set, removes it,
// and makes every tombstone be tried now. What is found before something fails
// is returned with the error.
func (s *Store) GC(ctx context.Context, dryRun bool) ([]garbage.Finding, error) {
	var found []garbage.Finding
	var errs []error
	for _, mode := range slices.Sorted(maps.Keys(s.drivers)) {
		live := func() map[string]json.RawMessage { return s.plans(mode) }
		fs, err := s.drivers[mode].GC(ctx, live, dryRun)
		found = append(found, fs...)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s network: %w", mode, err))
		}
	}
	tombs := s.Tombstones()
	attempts := map[string]*attempt{}
	if !dryRun {
		for _, t := range tombs {
			attempts[t.ID] = s.tryNow(t.ID)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, retryWait)
	defer cancel()
	for _, t := range tombs {
		f := garbage.Finding{
			Kind: garbage.Tombstone, Name: t.ID, Since: t.Since,
			Reason: fmt.Sprintf("the sandbox %s is gone and its %s network could not be taken down yet", t.Name, t.Mode),
			Action: garbage.WouldRetry, Err: t.LastError,
		}
		if !dryRun {
			a := attempts[t.ID]
			if a == nil {
				continue // it has gone meanwhile
			}
			// What the one before failed with says nothing of this one.
			f.Action, f.Err = garbage.Retried, ""
			select {
			case <-a.done:
				if a.err != nil {
					f.Err = a.err.Error()
				} else {
					f.Action = garbage.Removed
				}
			case <-ctx.Done():
				f.Reason += "; it is being tried"
			}
		}
		found = append(found, f)
	}
	return found, errors.Join(errs...)
}

// plans returns the plans of all attachments of a mode, those of tombstones too.
func (s *Store) plans(mode network.Mode) map[string]json.RawMessage {
	s.mu.Lock()
	defer s.mu.Unlock()
	plans := map[string]json.RawMessage{}
	for id, e := range s.entries {
		if e.rec.Mode == mode {
			plans[id] = e.rec.Plan
		}
	}
	return plans
}
