package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

func (a *app) runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run [OPTION]… SANDBOX (--rootfs DIR | --bundle DIR) [-- CMD ARG…]",
		Short: "Create and start a member, and stay with it until it exits",
		Long: `Create and start a member. Without -d, show its output, pass on signals, and
exit with its exit code, or 128+N if signal N ended it. One that cannot be started
(its command cannot be executed, a prestart hook fails) is removed.

The output comes from the member's monitor and not through the daemon: it goes
on while the daemon is restarted. With -t (and only then), ctrl-p ctrl-q leaves
the member running.`,
		Example: `  sandboxd run web --rootfs /srv/redis --name redis -d -- redis-server
  sandboxd run web --rootfs /srv/alpine -i -t --rm -- sh
  sandboxd run web --bundle /srv/bundle --ns pid=member:redis -v /data:/data:ro`,
		Args:              nameAndCommand(1),
		ValidArgsFunction: a.completeRefs(1, true, false),
	}
	detach := cmd.Flags().BoolP("detach", "d", false, "do not stay; print the member's id")
	config := a.memberFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := config(args[1:])
		if err != nil {
			return err
		}
		d, err := a.client()
		if err != nil {
			return err
		}
		if *detach {
			m, err := d.Run(cmd.Context(), args[0], c)
			if err == nil {
				writeLine(a.out, m.ID)
			}
			return err
		}
		// From before there is a member: one that a signal kept from its start would be left.
		signals, stop := forward()
		defer stop()
		ref, err := a.addOrDiscard(cmd.Context(), d, args[0], c, signals, stop)
		if err != nil {
			return err
		}
		e, err := a.runAttached(cmd.Context(), ref, c, signals, stop)
		if errors.Is(err, errDetached) {
			return nil
		}
		if err != nil {
			return err
		}
		return exitOf(e)
	}
	return cmd
}

// addPatience is how long a signal waits for a member to be made, so that it can be
// removed by its id. What takes longer (a hook, say) is cut off, and the daemon
// undoes it.
const addPatience = time.Second

// addOrDiscard adds a member and returns the reference to it. If a signal comes
// first, there is no member, and the error is an [exitCode]. stop has another signal
// end this process at once.
func (a *app) addOrDiscard(ctx context.Context, d *api.Client, ref string, c sandbox.MemberConfig, signals <-chan unix.Signal, stop func()) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		ref string
		err error
	}
	added := make(chan result, 1)
	go func() {
		m, err := d.Add(ctx, ref, c)
		added <- result{m.Sandbox + "/" + m.ID, err}
	}()
	select {
	case r := <-added:
		return r.ref, r.err
	case sig := <-signals:
		stop()
		defer time.AfterFunc(addPatience, cancel).Stop()
		r := <-added
		if r.err == nil {
			return "", a.discard(ctx, r.ref, exitCode(exitSignal+int(sig)))
		}
		return "", exitCode(exitSignal + int(sig))
	}
}

// runAttached starts the member ref, which has been created, stays with it, passes
// signals on to it, and returns its exit record. If it cannot even be attached to, or
// a signal comes before it is started, it is removed: the caller has nothing of it.
func (a *app) runAttached(ctx context.Context, ref string, c sandbox.MemberConfig, signals <-chan unix.Signal, stop func()) (sandbox.Exit, error) {
	d, err := a.client()
	if err != nil {
		return sandbox.Exit{}, err
	}
	type result struct {
		exit sandbox.Exit
		err  error
	}
	exited := make(chan result, 1)
	started := false // its command has been executed, as far as is known
	err = func() error {
		defer stop()
		t, err := a.target(ref)
		if err != nil {
			return err
		}
		tty := t.member.Config.TTY // a bundle can ask for one too
		behind := a.catchUp(t)
		if behind != nil {
			defer behind.close()
		}
		return a.session(ctx, ref, t.dir, t.member.Init, t.member.Monitor, tty, c.Stdin, signals, behind, func() error {
			select {
			case sig := <-signals:
				return exitCode(exitSignal + int(sig))
			default:
			}
			started = true
			// Asked for before it starts: with --rm it may be gone by the time
			// that its end is known here.
			go func() {
				e, err := a.wait(ctx, ref)
				exited <- result{e, err}
			}()
			_, err := d.Start(ctx, ref)
			return err
		})
	}()
	if _, ok := errors.AsType[*sandbox.StartError](err); ok || !started || err != nil && a.neverRan(ref) {
		err = a.discard(ctx, ref, err)
	}
	if err != nil {
		return sandbox.Exit{}, err
	}
	r := <-exited
	if c.AutoRemove {
		// The daemon removes it by itself. This waits until it has, so that the
		// name is free for whoever comes next; without a daemon it will later. Not by
		// force, which would cut off what is being collected of it.
		if err := d.RemoveMember(context.WithoutCancel(ctx), ref, false); err != nil && !errors.Is(err, sandbox.ErrNotFound) && !errors.Is(err, api.ErrUnavailable) {
			return r.exit, errors.Join(r.err, err)
		}
	}
	return r.exit, r.err
}

// catchUp opens what goes on where the connection to t's output is cut; nil if
// nothing does.
func (a *app) catchUp(t *target) *catchUp {
	return openCatchUp(t.member.LogPath, t.dir, func(ctx context.Context) {
		if dir, err := a.dir(); err == nil {
			awaitExit(ctx, dir, sandbox.MemberInfo{Sandbox: t.member.Sandbox, ID: t.member.ID})
		}
	})
}

// neverRan reports whether the member ref is there and its command has not been
// executed: a hook has kept it from that.
func (a *app) neverRan(ref string) bool {
	d, err := a.dir()
	if err != nil {
		return false
	}
	m, err := d.Member(ref)
	return err == nil && m.State == sandbox.MemberCreated.String()
}

// discard removes a member whose command has not run, because of err, which it
// returns: whoever asked for it has nothing of it, and wants its name back.
func (a *app) discard(ctx context.Context, ref string, err error) error {
	rerr := a.conn.RemoveMember(context.WithoutCancel(ctx), ref, true)
	if rerr != nil && !errors.Is(rerr, sandbox.ErrNotFound) {
		return errors.Join(err, fmt.Errorf("remove %s: %w", ref, rerr))
	}
	return err
}

func (a *app) attachCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attach [--no-stdin | --sig-proxy=false] SANDBOX/MEMBER",
		Short: "Show a running member's output from now on, and write to its stdin",
		Long: `Show a running member's output from now on, and copy stdin to its own if it was
created with -i; the end of the input closes it.

Of a member with a terminal (-t), ctrl-p ctrl-q leaves it running. To one without,
signals are passed on: ctrl-c here, and closing the terminal, end most programs
there. They end only attach with --sig-proxy=false or --no-stdin.

It exits with the member's exit code. Works without the daemon, from the state
directory.`,
		Example:           "  sandboxd attach web/shell\n  sandboxd attach --no-stdin web/redis",
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeIn(sandbox.MemberRunning),
	}
	noStdin := cmd.Flags().Bool("no-stdin", false, "only show output: neither input nor signals are passed on")
	proxy := cmd.Flags().Bool("sig-proxy", true, "pass signals on to the member")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		t, err := a.target(args[0])
		if err != nil {
			return err
		}
		c := t.member.Config
		s, err := member.ReadStatus(t.dir)
		if err != nil {
			return err
		}
		if s.Phase != member.PhaseRunning && s.Phase != member.PhaseCreated {
			return wrongState(fmt.Errorf("attach %s: it is %s (logs shows what it has written)", args[0], s.Phase))
		}
		behind := a.catchUp(t)
		if behind != nil {
			defer behind.close()
		}
		stdin := c.Stdin && !*noStdin
		var signals <-chan unix.Signal
		if *proxy && !*noStdin || c.TTY && stdin { // else they end this process only
			var stop func()
			signals, stop = forward()
			defer stop()
		}
		err = a.session(cmd.Context(), args[0], t.dir, t.member.Init, t.member.Monitor, c.TTY, stdin, signals, behind, nil)
		if errors.Is(err, errDetached) {
			return nil
		}
		if err != nil {
			return err
		}
		e, err := a.wait(cmd.Context(), t.sandbox.ID+"/"+t.member.ID)
		if err != nil {
			return err
		}
		return exitOf(e)
	}
	return cmd
}
