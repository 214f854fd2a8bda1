package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/sandbox"
)

func (a *app) eventsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "events [-f] [--since SEQ|TIME] [--filter KEY=VALUE]… [-o json]",
		Short: "Show what has happened",
		Long: `Show what has happened to sandboxes and members, the oldest first: changes of state,
exits, hooks, collections, custody, garbage. Works without the daemon, from the
journal's files.

Each event has a number that only ever grows. --since takes the number of the last
event that was seen, a time such as 2026-07-01T12:00:00Z, or how long ago, such
as 10m. If events after a number are gone, the command fails and says so.

Filters are type, sandbox, member, from, to and attr.NAME. Of several with the same
key one has to fit, of different keys all.

With -o json it writes one object a line; docs/events.md describes it.`,
		Example: `  sandboxd events -f
  sandboxd events --since 1h --filter type=exit --filter type=oom
  sandboxd events -f --since 4711 --filter sandbox=web -o json`,
		Args: argsBetween(0, 0),
	}
	format := formatFlag(cmd, "text", "json")
	var q sandbox.EventQuery
	var filters []string
	f := cmd.Flags()
	follow := f.BoolP("follow", "f", false, "go on with what happens, from now or from what --since says")
	f.Var(&value[sandbox.EventQuery]{p: &q, typ: "SEQ|TIME", parse: func(s string) (sandbox.EventQuery, error) {
		return parseSince(s, time.Now())
	}}, "since", "only events after that number, or since that time")
	f.StringArrayVar(&filters, "filter", nil, "only events with `KEY=VALUE`; may be repeated")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var err error
		if q.Filter, err = journal.ParseFilter(filters); err != nil {
			return usageError(cmd, "%v", err)
		}
		q.Follow, q.New = *follow, *follow && !f.Changed("since")
		show := writeEvent
		if *format == "json" {
			show = writeEventJSON
		}
		ctx := cmd.Context()
		if q.Follow {
			ctx = a.whileRead(ctx)
		}
		return readerGone(ctx, a.events(ctx, q, func(e sandbox.Event) error { return show(a.out, &e) }))
	}
	return cmd
}

// parseSince reads the number of an event, a time, or a duration before now.
func parseSince(s string, now time.Time) (q sandbox.EventQuery, err error) {
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		q.After = &n
		return q, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		q.Since = now.Add(-d)
		return q, nil
	}
	if q.Since, err = time.Parse(time.RFC3339Nano, s); err != nil {
		return q, fmt.Errorf("%q is not the number of an event, a time such as 2026-07-01T12:00:00Z, or a duration such as 10m", s)
	}
	return q, nil
}

// events shows events: from the daemon, or if none answers, or it goes away,
// from the files.
func (a *app) events(ctx context.Context, q sandbox.EventQuery, show func(sandbox.Event) error) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if !a.answers(ctx, c) {
		a.sayNoAnswer()
		return a.eventsFromFiles(ctx, q, show, api.ErrUnavailable)
	}
	for e, err := range c.Events(ctx, q) {
		switch {
		case errors.Is(err, api.ErrUnavailable):
			return a.eventsFromFiles(ctx, q, show, err)
		case err != nil:
			return err
		}
		if err := show(e); err != nil {
			return err
		}
		last := e.Seq // to go on from
		q.After, q.New = &last, false
	}
	return nil
}

func (a *app) eventsFromFiles(ctx context.Context, q sandbox.EventQuery, show func(sandbox.Event) error, cause error) error {
	dir := filepath.Join(a.stateDir(), rootLink, eventsDir)
	w, err := journal.Watch(dir)
	if err != nil {
		return fmt.Errorf("%w; %w", cause, err)
	}
	defer w.Close()
	for e, err := range journal.Read(ctx, dir, q, w.Wait) {
		if err == nil {
			err = show(e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writeEventJSON(w io.Writer, e *sandbox.Event) error {
	return encodeJSON(w, e, "")
}

// writeEvent writes an event as a line for people.
func writeEvent(w io.Writer, e *sandbox.Event) error {
	what := e.SandboxName
	if what == "" {
		what = e.Sandbox
	}
	if e.Member != "" {
		name := e.MemberName
		if name == "" {
			name = e.Member
		}
		what += "/" + name
	}
	parts := []string{e.Time.Local().Format("2006-01-02 15:04:05.000"), fmt.Sprintf("%6d", e.Seq), fmt.Sprintf("%-10s", e.Type)}
	if what != "" {
		parts = append(parts, what)
	}
	if e.From != "" || e.To != "" {
		from, to := e.From, e.To
		if from == "" {
			from = "none"
		}
		if to == "" {
			to = "none"
		}
		parts = append(parts, from+" → "+to)
	}
	if e.Exit != nil {
		parts = append(parts, "code "+strconv.Itoa(e.Exit.Code))
	}
	for _, k := range slices.Sorted(maps.Keys(e.Attrs)) {
		parts = append(parts, k+"="+e.Attrs[k])
	}
	if e.Reason != "" {
		parts = append(parts, "("+e.Reason+")")
	}
	_, err := fmt.Fprintln(w, oneLine(strings.Join(parts, " ")))
	return err
}
