package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/signum"
	"github.com/sandboxd/sandboxd/sandbox"
)

// memberFlags declares the flags that add and run share. The returned function
// is called after they have been parsed.
func (a *app) memberFlags(cmd *cobra.Command) func(command []string) (sandbox.MemberConfig, error) {
	var (
		c       sandbox.MemberConfig
		env     []string
		labels  []string
		custody string
		log     string
	)
	f := cmd.Flags()
	f.Var(&value[string]{p: &c.Rootfs, typ: "dir", parse: parsePath}, "rootfs", "root file system; it is never written to")
	f.Var(&value[string]{p: &c.Bundle, typ: "dir", parse: parsePath}, "bundle", "OCI bundle: a config.json and a root file system")
	f.StringVar(&c.Name, "name", "", "the member's `name` (default derived from its id)")
	f.BoolVarP(&c.Stdin, "interactive", "i", false, "keep stdin open")
	f.BoolVarP(&c.TTY, "tty", "t", false, "give it a terminal")
	f.BoolVar(&c.AutoRemove, "rm", false, "remove it once it has exited")
	nsFlag(cmd, &c.Namespaces, "default: what the sandbox holds; private mnt, cgroup, and pid if it is not held")
	f.StringArrayVarP(&env, "env", "e", nil, "environment variable, `K=V`; K alone takes this program's")
	f.VarP(&list[request.Volume]{p: &c.Volumes, typ: "src:dst[:ro]", parse: parseVolume}, "volume", "v", "bind mount from the host")
	f.Var(&list[request.Tmpfs]{p: &c.Tmpfs, typ: "dst[:size=16m]", parse: parseTmpfs}, "tmpfs", "empty file system in memory")
	f.StringVarP(&c.Cwd, "workdir", "w", "", "working `directory`")
	f.StringVarP(&c.User, "user", "u", "", "user, `UID[:GID]` or names of its root")
	f.BoolVar(&c.ReadOnly, "read-only", false, "read-only root file system, without a writable layer")
	f.Var(&value[int64]{p: &c.Memory, typ: "size", parse: parseSize}, "memory", "memory limit, such as 64m")
	f.Var(&value[int64]{p: &c.NanoCPUs, typ: "number", parse: parseCPUs}, "cpus", "CPU limit, such as 0.5")
	f.Int64Var(&c.PidsLimit, "pids-limit", 0, "`number` of processes and threads at most")
	f.StringArrayVar(&c.CapAdd, "cap-add", nil, "add a `capability`; ALL for all of them")
	f.StringArrayVar(&c.CapDrop, "cap-drop", nil, "drop a `capability`; ALL for all of them")
	f.BoolVar(&c.Privileged, "privileged", false, "all capabilities and devices, nothing masked, no seccomp filter")
	f.StringVar(&c.StopSignal, "stop-signal", "", "`signal` that stop sends (default TERM)")
	f.StringVar(&custody, "custody", "", "when root and namespaces stay held after exit: `always|failure|never` (default always)")
	f.Var(&value[time.Duration]{p: &c.CustodyTTL, typ: "duration", parse: parseTTL}, "custody-ttl", "end custody this long after the exit, such as 1h (default 0: when it is removed)")
	f.Var(&list[request.Collect]{p: &c.Collect, typ: "path[,on=always|failure|oom|signal][,max=64m]", parse: parseCollect}, "collect", "file, directory or glob of its root that is put into the collection directory once it has exited (default on=always, max=64m)")
	f.StringArrayVar(&labels, "label", nil, "label, `KEY=VALUE`")
	f.Var(&value[string]{p: &log, typ: "file", parse: parsePath}, "log", "log file (default under the daemon's root directory)")
	f.Var(&value[int64]{p: &c.LogMax, typ: "size", parse: parseSize}, "log-max-size", "drop what would make the log longer, until it is reopened, such as 64m (default 0: no limit)")
	hookFlag(cmd, &c.Hooks)
	cmd.RegisterFlagCompletionFunc("custody", oneOf("always", "failure", "never"))
	cmd.RegisterFlagCompletionFunc("stop-signal", oneOf(signalNames...))
	cmd.RegisterFlagCompletionFunc("cap-add", oneOf(capabilityNames()...))
	cmd.RegisterFlagCompletionFunc("cap-drop", oneOf(capabilityNames()...))
	cmd.MarkFlagDirname("rootfs")
	cmd.MarkFlagDirname("bundle")
	return func(command []string) (sandbox.MemberConfig, error) {
		var err error
		c.Args = command
		c.Custody = sandbox.Custody(custody)
		c.LogPath = log
		if c.Env, err = a.environment(env); err != nil {
			return c, usageError(cmd, "%s", err)
		}
		for _, kv := range c.Env {
			if name, _, _ := strings.Cut(kv, "="); !utf8.ValidString(kv) {
				return c, usageError(cmd, "the value of environment variable %.100q is not UTF-8 text", name)
			}
		}
		if c.Labels, err = parsePairs("label", labels); err != nil {
			return c, usageError(cmd, "%s", err)
		}
		if f.Changed("pids-limit") && c.PidsLimit <= 0 {
			return c, usageError(cmd, "--pids-limit %d is not positive", c.PidsLimit)
		}
		return c, nil
	}
}

// nsFlag declares --ns.
func nsFlag(cmd *cobra.Command, p *namespace.Selection, def string) {
	cmd.Flags().Var(&value[namespace.Selection]{p: p, typ: "type=source,…", parse: namespace.ParseSelection}, "ns",
		"where namespaces come from: TYPE is net, ipc, uts, pid, mnt, user, cgroup, time or all; SOURCE is sandbox, private, host or member:NAME ("+def+")")
	cmd.RegisterFlagCompletionFunc("ns", completeKinds("sandbox", "private", "host", "member:"))
}

// environment resolves the arguments of -e.
func (a *app) environment(list []string) ([]string, error) {
	var env []string
	for _, s := range list {
		kv, ok, err := parseEnv(s, a.lookupEnv)
		if err != nil {
			return nil, err
		}
		if ok {
			env = append(env, kv)
		}
	}
	return env, nil
}

func (a *app) addCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "add [OPTION]… SANDBOX (--rootfs DIR | --bundle DIR) [-- CMD ARG…]",
		Short: "Create a member without starting it, and print its id",
		Long: `Create a member and leave it blocked just before its command is executed:
namespaces, mounts and cgroup are complete. start lets it go on.`,
		Example: `  sandboxd add web --rootfs /srv/alpine --name job -- /bin/job
  sandboxd start web/job`,
		Args:              nameAndCommand(1),
		ValidArgsFunction: a.completeRefs(1, true, false),
	}
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
		m, err := d.Add(cmd.Context(), args[0], c)
		if err != nil {
			return err
		}
		writeLine(a.out, m.ID)
		return nil
	}
	return cmd
}

func (a *app) startCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "start SANDBOX/MEMBER",
		Short:             "Start a member that add has created",
		Long:              "Start a member that add has created. It returns when its command has been executed.",
		Example:           "  sandboxd start web/job",
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeIn(sandbox.MemberCreated),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		d, err := a.client()
		if err != nil {
			return err
		}
		_, err = d.Start(cmd.Context(), args[0])
		return err
	}
	return cmd
}

func (a *app) waitCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "wait [-o json] SANDBOX/MEMBER",
		Short: "Wait until a member has exited, and exit as it did",
		Long: `Wait until a member has exited; exit with its exit code, or 128+N if signal N
ended it. With -o json, write its exit record first.

It goes on waiting while the daemon is restarted.`,
		Example:           "  sandboxd wait web/job; echo $?",
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeRefs(1, false, true),
	}
	isJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		e, err := a.wait(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *isJSON {
			if err := writeJSON(a.out, e); err != nil {
				return err
			}
		}
		return exitOf(e)
	}
	return cmd
}

// exitOf returns what the CLI exits with for e.
func exitOf(e sandbox.Exit) error {
	if !e.Known {
		return errors.New("the exit status is not known: " + e.Reason)
	}
	return asExit(e.Code)
}

// wait waits for a member's exit. While no daemon answers it looks into the
// state directory, where the monitor leaves the exit record.
func (a *app) wait(ctx context.Context, ref string) (sandbox.Exit, error) {
	c, err := a.client()
	if err != nil {
		return sandbox.Exit{}, err
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for said := false; ; {
		if a.answers(ctx, c) {
			e, err := c.Wait(ctx, ref)
			if !errors.Is(err, api.ErrUnavailable) {
				return e, err
			}
		} else if !said {
			a.sayNoAnswer()
			said = true
		}
		d, err := a.dir()
		if err != nil {
			return sandbox.Exit{}, err
		}
		m, err := d.Member(ref)
		if err != nil {
			return sandbox.Exit{}, err
		}
		if m.Exit != nil {
			return *m.Exit, nil
		}
		select {
		case <-ctx.Done():
			return sandbox.Exit{}, ctx.Err()
		case <-tick.C:
		}
	}
}

func (a *app) killCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kill SANDBOX/MEMBER [SIGNAL]",
		Short: "Send a signal to a member's first process",
		Long: `Send a signal to a member's first process: a name, with or without SIG, or a
number. The default is KILL.

The first process of a pid namespace, which a member's is if it has one of its
own, ignores signals that it has no handler for, except KILL and STOP (pid_namespaces(7)).`,
		Example: "  sandboxd kill web/redis\n  sandboxd kill web/nginx HUP",
		Args:    argsBetween(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return signalNames, cobra.ShellCompDirectiveNoFileComp
			}
			return a.completeRefs(1, false, true)(cmd, args, s)
		},
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		sig := unix.SIGKILL
		if len(args) == 2 {
			var err error
			if sig, err = signum.Parse(args[1]); err != nil {
				return usageError(cmd, "%s", err)
			}
		}
		d, err := a.client()
		if err != nil {
			return err
		}
		return d.Kill(cmd.Context(), args[0], sig)
	}
	return cmd
}

// asFile returns the file that a stream is, if it is one.
func asFile(stream any) *os.File {
	f, _ := stream.(*os.File)
	return f
}
