package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/sandbox"
)

func writeLine(w io.Writer, s string) { fmt.Fprintln(w, s) }

func (a *app) createCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create [OPTION]… [NAME]",
		Short: "Create a sandbox and print its id",
		Long: `Create a sandbox: a pause process that holds namespaces for members to join, a
cgroup, and a /dev/shm. It lives until rm, whether or not anything runs in it.`,
		Example: `  sandboxd create web
  sandboxd create --share net,ipc,uts,pid --hostname db --label app=shop db
  sandboxd create --net builtin --publish 8080:80 --publish 127.0.0.1:5353:53/udp web
  sandboxd create --net cni:lan,storage:store0 --cni-arg IgnoreUnknown=1 db
  sandboxd create --net host --share ipc,uts tools`,
		Args:              argsBetween(0, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	var (
		c           sandbox.Config
		sysctls     []string
		labels      []string
		annotations []string
	)
	f := cmd.Flags()
	q := networkRequestFlags(cmd)
	f.Var(&value[[]namespace.Kind]{p: &c.Share, typ: "kinds", parse: parseShare}, "share", "namespaces to hold: any of net,ipc,uts,pid,user,cgroup,time (default net,ipc,uts)")
	f.StringVar(&c.Hostname, "hostname", "", "host `name` (default the sandbox's name)")
	f.StringArrayVar(&sysctls, "sysctl", nil, "set a sysctl of the sandbox's namespaces, `KEY=VALUE`")
	f.StringArrayVar(&labels, "label", nil, "label, `KEY=VALUE`")
	f.StringArrayVar(&annotations, "annotation", nil, "annotation, `KEY=VALUE`")
	f.Var(&value[int64]{p: &c.ShmSize, typ: "size", parse: parseSize}, "shm-size", "size of /dev/shm, such as 128m (default 64m)")
	hookFlag(cmd, &c.Hooks)
	cmd.RegisterFlagCompletionFunc("share", completeKinds())
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if len(args) > 0 {
			if args[0] == "" {
				return usageError(cmd, "the name is empty")
			}
			c.Name = args[0]
		}
		c.Network, c.Net = q.mode, q.Request
		if c.Sysctls, err = parsePairs("sysctl", sysctls); err != nil {
			return usageError(cmd, "%s", err)
		}
		if c.Labels, err = parsePairs("label", labels); err != nil {
			return usageError(cmd, "%s", err)
		}
		if c.Annotations, err = parsePairs("annotation", annotations); err != nil {
			return usageError(cmd, "%s", err)
		}
		d, err := a.client()
		if err != nil {
			return err
		}
		i, err := d.Create(cmd.Context(), c)
		if err != nil {
			return err
		}
		writeLine(a.out, i.ID)
		return nil
	}
	return cmd
}

func (a *app) stopCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "stop [--time 10s] SANDBOX[/MEMBER]…",
		Short: "Stop a member, or a sandbox with all its members",
		Long: `Stop a member: send its stop signal and, if it has not exited in time, SIGKILL.
Of a sandbox, stop every member, for good: none can be added or started then.
If one of several names is of nothing that there is, none is stopped.

What members left behind stays reachable until rm. It is no error if they have
stopped already.`,
		Example:           "  sandboxd stop web/redis\n  sandboxd stop --time 1m web",
		Args:              argsBetween(1, -1),
		ValidArgsFunction: a.completeRefs(-1, true, true),
	}
	timeout := sandbox.DefaultStopTimeout
	cmd.Flags().VarP(&value[time.Duration]{p: &timeout, typ: "duration", parse: parseTimeout}, "time", "t", "how long to wait before SIGKILL, such as 500ms; a bare number is of seconds (default 10s)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.eachRef(cmd.Context(), args, false, func(ref string) error {
			if isMember(ref) {
				return a.conn.StopMember(cmd.Context(), ref, timeout)
			}
			return a.conn.Stop(cmd.Context(), ref, timeout)
		})
	}
	return cmd
}

func (a *app) rmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "rm [-f] SANDBOX[/MEMBER]…",
		Aliases: []string{"remove", "delete"},
		Short:   "Remove members, or sandboxes with all their members",
		Long: `Remove members, or sandboxes with all their members: end custody, and delete
their writable layers, logs and records. What is collected of a member that has
exited is waited for; with -f for ten seconds, then its files are given up. If one
of several names is of nothing that there is, without -f none is removed.`,
		Example:           "  sandboxd rm web/redis\n  sandboxd rm -f web",
		Args:              argsBetween(1, -1),
		ValidArgsFunction: a.completeRefs(-1, true, true),
	}
	force := cmd.Flags().BoolP("force", "f", false, "kill what still runs; no error if there is nothing of that name")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.eachRef(cmd.Context(), args, *force, func(ref string) error {
			var err error
			if isMember(ref) {
				err = a.conn.RemoveMember(cmd.Context(), ref, *force)
			} else {
				var left string
				if left, err = a.conn.Remove(cmd.Context(), ref, *force); left != "" {
					a.report(fmt.Errorf("%s is removed; %s; it is tried again (see ls -a)", ref, left))
				}
			}
			if *force && errors.Is(err, sandbox.ErrNotFound) {
				return nil
			}
			return err
		})
	}
	return cmd
}

// eachRef connects, then calls fn for each reference. If one of several is of nothing
// that there is, which missing allows, it is called for none: "site nginx" was to be
// "site/nginx". Those after one for which fn fails are still handled.
func (a *app) eachRef(ctx context.Context, refs []string, missing bool, fn func(ref string) error) error {
	if _, err := a.client(); err != nil {
		return err
	}
	if len(refs) > 1 && !missing {
		err := a.each(refs, func(ref string) (err error) {
			if isMember(ref) {
				_, err = a.conn.InspectMember(ctx, ref)
			} else {
				_, err = a.conn.Inspect(ctx, ref)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("nothing was done: %w", err)
		}
	}
	return a.each(refs, fn)
}

// each calls fn for all references, and reports all errors but the last.
func (a *app) each(refs []string, fn func(ref string) error) error {
	var last error
	for _, ref := range refs {
		if err := fn(ref); err != nil {
			if last != nil {
				a.report(last)
			}
			last = err
		}
	}
	return last
}

// pollInterval is how often something that cannot be watched is looked at.
const pollInterval = 200 * time.Millisecond
