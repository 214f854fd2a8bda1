package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/garbage"
)

func (a *app) gcCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "gc [--dry-run | --forget ID] [-o json]",
		Short: "Remove what belongs to nobody any more",
		Long: `Remove what a crash, a boot or somebody's hand has left: processes, cgroups and
directories of sandboxes that are not on record, records whose removal failed,
networks, unfinished collections, temporary files. The daemon does the same when it starts and
every --gc-interval.

Nothing is touched that this installation has not made, nothing that is in use or
in the making. What is kept is for somebody to look at.

A network that can never be taken down, since a plugin is gone for good, is tried
again for ever, and its address waits. With --forget it is given up: the plugins
are called a last time, those too that have waited for others to succeed, and what
is left of it on the host then stays.`,
		Example: "  sandboxd gc --dry-run\n  sandboxd gc -o json | jq -r '.[].name'",
		Args:    argsBetween(0, 0),
	}
	isJSON := outputFlag(cmd)
	dryRun := cmd.Flags().BoolP("dry-run", "n", false, "only show what would be removed")
	forget := cmd.Flags().String("forget", "", "collect nothing, but give up the network of the removed sandbox of this `ID`, as ls -a shows it")
	cmd.MarkFlagsMutuallyExclusive("forget", "dry-run")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("forget") {
			return c.ForgetNetwork(cmd.Context(), *forget)
		}
		found, err := c.GC(cmd.Context(), *dryRun)
		if err != nil && found == nil {
			return err
		}
		if *isJSON {
			return errors.Join(err, writeJSON(a.out, found))
		}
		now := time.Now()
		rows := [][]string{{"KIND", "AGE", "ACTION", "NAME", "REASON"}}
		for _, f := range found {
			reason := f.Reason
			if f.Err != "" {
				reason += ": " + f.Err
			}
			rows = append(rows, []string{string(f.Kind), age(now, f.Since), f.Action, f.Name, reason})
		}
		return errors.Join(err, writeTable(a.out, rows))
	}
	return cmd
}

const (
	// gcInterval is the default of --gc-interval.
	gcInterval = 5 * time.Minute
	// minGCInterval keeps the daemon from doing nothing else.
	minGCInterval = time.Second
)

// garbageCollector is the part of a [sandbox.Manager] that keepClean needs.
type garbageCollector interface {
	GC(ctx context.Context, dryRun bool) ([]garbage.Finding, error)
}

// keepClean collects garbage now and, unless interval is 0, again and again,
// until ctx ends.
func keepClean(ctx context.Context, m garbageCollector, interval time.Duration, log *slog.Logger) {
	for {
		if _, err := m.GC(ctx, false); err != nil && ctx.Err() == nil {
			log.Warn("Garbage collection is incomplete", "err", err)
		}
		if interval <= 0 {
			return
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return
		}
	}
}
