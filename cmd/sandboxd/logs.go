package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/internal/crilog"
	"github.com/sandboxd/sandboxd/sandbox"
)

func (a *app) logsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logs [-f] [--tail N] [--timestamps] [--reopen] SANDBOX/MEMBER",
		Short: "Show what a member has written",
		Long: `Show what a member has written: its stdout on stdout, its stderr on stderr.
Works without the daemon, from the state directory. If lines are missing, because
the disk was full or --log-max-size was reached, it says so at the end.

With --reopen nothing is shown: the member's monitor, told by the daemon, opens
the log by its name anew, after somebody has renamed the file to rotate it.`,
		Example:           "  sandboxd logs web/redis\n  sandboxd logs -f --tail 20 --timestamps web/redis\n  mv redis.log redis.log.1 && sandboxd logs --reopen web/redis",
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeRefs(1, false, true),
	}
	follow := cmd.Flags().BoolP("follow", "f", false, "go on until the member has exited, across rotations of the file")
	tail := cmd.Flags().IntP("tail", "n", -1, "begin with the last `N` lines")
	cmd.Flags().Lookup("tail").DefValue = "all"
	stamps := cmd.Flags().BoolP("timestamps", "t", false, "show when each line was written")
	reopen := cmd.Flags().Bool("reopen", false, "open the file anew, after it was renamed")
	cmd.MarkFlagsMutuallyExclusive("reopen", "follow")
	cmd.MarkFlagsMutuallyExclusive("reopen", "tail")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		if cmd.Flags().Changed("tail") && *tail < 0 {
			return usageError(cmd, "--tail %d is negative", *tail)
		}
		if *reopen {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.ReopenLog(cmd.Context(), args[0])
		}
		d, err := a.dir()
		if err != nil {
			return err
		}
		m, err := d.Member(args[0])
		if err != nil {
			return err
		}
		o := crilog.Options{Tail: *tail, Follow: *follow, Bad: func(e *crilog.LineError) { a.report(e) }}
		ctx, cancel := context.WithCancel(cmd.Context())
		defer cancel()
		if *follow {
			ctx = a.whileRead(ctx)
			done := make(chan struct{})
			o.Done = done
			go func() {
				defer close(done)
				awaitExit(ctx, d, m)
			}()
		}
		var j crilog.Joiner
		err = crilog.Read(ctx, m.LogPath, o, func(l crilog.Line) error {
			whole, ok := j.Add(l)
			if !ok {
				return nil
			}
			return a.writeLog(whole, *stamps)
		})
		for _, l := range j.Rest() {
			if err == nil {
				err = a.writeLog(l, *stamps)
			}
		}
		if err == nil && ctx.Err() == nil {
			a.sayMissing(d, args[0], m)
		}
		return readerGone(ctx, err)
	}
	return cmd
}

// sayMissing says on stderr how much of m's output is not in its log.
func (a *app) sayMissing(d *sandbox.Dir, ref string, m sandbox.MemberInfo) {
	now, err := d.Member(m.Sandbox + "/" + m.ID)
	if err != nil {
		return // it has just been removed
	}
	l := collect.Log{Dropped: int64(now.LogLinesDropped)}
	if text := l.Missing(); text != "" {
		fmt.Fprintf(a.err, "sandboxd: %s: %s\n", ref, text)
	}
}

// writeLog writes one line of a log to the stream that it was written to.
func (a *app) writeLog(l crilog.Line, stamp bool) error {
	w := a.out
	if l.Stream == "stderr" {
		w = a.err
	}
	var b []byte
	if stamp {
		b = append(l.Time.AppendFormat(b, stampLayout), ' ')
	}
	b = append(b, l.Content...)
	if !l.Partial {
		b = append(b, '\n')
	}
	_, err := w.Write(b)
	return err
}

// awaitExit returns when m has exited or been removed, or ctx ends. It looks at
// the state directory, so that it works without the daemon.
func awaitExit(ctx context.Context, d *sandbox.Dir, m sandbox.MemberInfo) {
	ref := m.Sandbox + "/" + m.ID
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for m.Exit == nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var err error
		if m, err = d.Member(ref); err != nil {
			return
		}
	}
}

// stampLayout is [time.RFC3339Nano] with all nine digits, as they are in the log:
// lines stay aligned.
const stampLayout = "2006-01-02T15:04:05.000000000Z07:00"
