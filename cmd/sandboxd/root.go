package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/sandbox"
)

const defaultState = "/run/sandboxd"

// app is what the subcommands share.
type app struct {
	args      []string // of the command line
	in        io.Reader
	out, err  io.Writer
	lookupEnv func(string) (string, bool)

	address string // flag; empty means the environment, then the default
	state   string

	conn *api.Client // made by client
}

func (a *app) close() {
	if a.conn != nil {
		a.conn.Close()
	}
}

// Groups of subcommands in the help.
const (
	groupSandbox = "sandbox"
	groupMember  = "member"
	groupInside  = "inside"
	groupShow    = "show"
	groupHost    = "host"
)

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "sandboxd",
		Short: "Pod sandboxes that outlive their members",
		Long: `sandboxd manages pod sandboxes on one Linux host.

A sandbox holds namespaces. Members are containers that join any subset of them.
What a member leaves behind (its root with every mount in it, its namespaces)
stays reachable after it has exited, until you remove it.

Refer to a sandbox by its name, its id, or a unique prefix of its id of at least
three characters, and to a member, in the same way, as SANDBOX/MEMBER.

exec, join, cp, logs, attach, wait and all that looks (ls, ps, inspect, events,
postmortem, collected) also work while no daemon runs.

Exit codes: that of the process for run, exec, join, attach and wait, 128+N if
signal N ended it; 125 if sandboxd itself failed; 126 if the command cannot be
executed, 127 if it is not found.`,
		Example: `  sandboxd serve &
  sandboxd create web
  sandboxd run web --rootfs /srv/alpine --name shell -i -t -- sh
  sandboxd cp web/shell:/tmp/core .
  sandboxd rm -f web`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              cobra.ArbitraryArgs,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: false},
	}
	root.SuggestionsMinimumDistance = 1
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetUsageFunc(usageWith(root.UsageFunc()))
	version := root.Flags().BoolP("version", "v", false, "version for sandboxd")
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if *version {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "sandboxd", readVersion().Version)
			return err
		}
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		return cmd.Help()
	}
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(helpCommand())
	f := root.PersistentFlags()
	f.StringVar(&a.address, "address", "", "the daemon's socket, unix:///`PATH` (default $SANDBOXD_ADDRESS, or STATE/sandboxd.sock)")
	f.StringVar(&a.state, "state", "", "state `directory` (default $SANDBOXD_STATE, or "+defaultState+")")
	root.AddGroup(
		&cobra.Group{ID: groupSandbox, Title: "Sandboxes:"},
		&cobra.Group{ID: groupMember, Title: "Members:"},
		&cobra.Group{ID: groupInside, Title: "Inside members, running or exited:"},
		&cobra.Group{ID: groupShow, Title: "Look:"},
		&cobra.Group{ID: groupHost, Title: "Host:"},
	)
	root.SetHelpCommandGroupID(groupHost)
	root.SetCompletionCommandGroupID(groupHost)
	for _, g := range []struct {
		id   string
		cmds []*cobra.Command
	}{
		{groupSandbox, []*cobra.Command{a.createCommand(), a.stopCommand(), a.rmCommand()}},
		{groupMember, []*cobra.Command{a.runCommand(), a.addCommand(), a.startCommand(), a.attachCommand(), a.waitCommand(), a.killCommand()}},
		{groupInside, []*cobra.Command{a.execCommand(), a.joinCommand(), a.cpCommand(), a.logsCommand()}},
		{groupShow, []*cobra.Command{a.lsCommand(), a.psCommand(), a.inspectCommand(), a.eventsCommand(), a.postmortemCommand(), a.collectedCommand()}},
		{groupHost, []*cobra.Command{a.serveCommand(), a.checkCommand(), a.gcCommand(), a.versionCommand()}},
	} {
		for _, c := range g.cmds {
			c.GroupID = g.id
			c.DisableFlagsInUseLine = true
			c.Flags().SortFlags = false
			root.AddCommand(c)
		}
	}
	root.InitDefaultCompletionCmd()
	if c, _, err := root.Find([]string{"completion"}); err == nil {
		onlyCommands(c)
	}
	return root
}

// usageWith returns what prints the usage of a command as standard does, with
// flags as [flagUsages] shows them. Cobra's templates could do it too. With them
// the linker would keep the exported methods of all types, which is a fifth of
// the program.
func usageWith(standard func(*cobra.Command) error) func(*cobra.Command) error {
	return func(cmd *cobra.Command) error {
		out := cmd.OutOrStderr()
		var b strings.Builder
		cmd.SetOut(&b)
		err := standard(cmd)
		cmd.SetOut(out)
		text := b.String()
		for _, fs := range []*pflag.FlagSet{cmd.LocalFlags(), cmd.InheritedFlags()} {
			if old := strings.TrimSpace(fs.FlagUsages()); old != "" {
				text = strings.Replace(text, old, strings.TrimSpace(flagUsages(fs)), 1)
			}
		}
		_, werr := io.WriteString(out, text)
		return errors.Join(err, werr)
	}
}

// flagUsages is [pflag.FlagSet.FlagUsages] without the values of flags that need
// none, and aligned by characters instead of bytes.
func flagUsages(fs *pflag.FlagSet) string {
	const mark = "\x01" // before the text of a flag
	fs.VisitAll(func(f *pflag.Flag) { f.Usage = mark + f.Usage })
	text := fs.FlagUsages()
	fs.VisitAll(func(f *pflag.Flag) { f.Usage = strings.TrimPrefix(f.Usage, mark) })
	type row struct{ flag, usage string }
	var rows []row
	width := 0
	for line := range strings.Lines(text) {
		flag, usage, _ := strings.Cut(line, mark)
		flag = strings.TrimSuffix(strings.TrimRight(flag, " "), "[=true|false]")
		rows = append(rows, row{flag, usage})
		width = max(width, utf8.RuneCountInString(flag))
	}
	var b strings.Builder
	for _, r := range rows {
		b.WriteString(r.flag + strings.Repeat(" ", width-utf8.RuneCountInString(r.flag)+3) + r.usage)
	}
	return b.String()
}

// helpCommand is cobra's, but fails if there is no such command.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:                   "help [COMMAND]",
		Short:                 "Show the help of a command",
		GroupID:               groupHost,
		DisableFlagsInUseLine: true,
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			of, _, _ := cmd.Root().Find(args)
			var names []string
			for _, c := range of.Commands() {
				if c.IsAvailableCommand() {
					names = append(names, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			of, rest, err := cmd.Root().Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return unknownCommand(of, rest[0])
			}
			of.InitDefaultHelpFlag()
			return of.Help()
		},
	}
}

// onlyCommands makes cmd one that only has subcommands.
func onlyCommands(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		return cmd.Help()
	}
}

// unknownCommand says that cmd has no subcommand of that name.
func unknownCommand(cmd *cobra.Command, name string) error {
	msg := fmt.Sprintf("unknown command %q", name)
	if s := cmd.SuggestionsFor(name); len(s) > 0 {
		msg += ", did you mean " + strings.Join(s, " or ") + "?"
	}
	return usageError(cmd, "%s", msg)
}

// instead says what there is in place of flags that other container tools have:
// of one command, or of all.
var instead = map[string]string{
	"create name":    "the name is an argument: sandboxd create NAME",
	"kill s":         "the signal is an argument: sandboxd kill SANDBOX/MEMBER SIGNAL",
	"kill signal":    "the signal is an argument: sandboxd kill SANDBOX/MEMBER SIGNAL",
	"create network": "it is called --net",
	"run network":    "the network is the sandbox's: sandboxd create --net; a member's own is --ns net=private",
	"run net":        "the network is the sandbox's: sandboxd create --net; a member's own is --ns net=private",
	"run pid":        "it is called --ns pid=SOURCE",
	"run ipc":        "it is called --ns ipc=SOURCE",
	"run uts":        "it is called --ns uts=SOURCE",
	"run mount":      "use --volume or --tmpfs",
	"run m":          "it is called --memory",
	"run entrypoint": "the command follows after --",
	"run restart":    "members are not restarted",
}

// flagError makes one line of a flag that cannot be had or understood.
func flagError(cmd *cobra.Command, err error) error {
	if bad, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		flag, cause := "--"+bad.GetFlag().Name, bad.Unwrap().Error()
		if !strings.Contains(cause, bad.GetValue()) {
			flag += fmt.Sprintf(" %q", bad.GetValue())
		}
		return usageError(cmd, "%s: %s", flag, cause)
	}
	unknown, ok := errors.AsType[*pflag.NotExistError](err)
	if !ok {
		return usageError(cmd, "%s", err)
	}
	// As other container tools take it: run web sh -c 'exit 3'.
	if cmd.Flags().NArg() > 1 && strings.HasSuffix(strings.TrimSuffix(cmd.Use, "]"), "CMD ARG…") {
		return usageError(cmd, "%s; flags of the command need -- before it", err)
	}
	name := unknown.GetSpecifiedName()
	of, other := cmd.Name(), "create"
	switch of {
	case "add":
		of = "run"
	case "create":
		other = "run"
	}
	if s := instead[of+" "+name]; s != "" {
		return usageError(cmd, "%s; %s", err, s)
	}
	if of == "run" || of == "create" {
		c, _, _ := cmd.Root().Find([]string{other})
		if c.Flags().Lookup(name) != nil || len(name) == 1 && c.Flags().ShorthandLookup(name) != nil {
			return usageError(cmd, "%s; sandboxd %s has it", err, other)
		}
	}
	return usageError(cmd, "%s", err)
}

// usageError is a mistake of the caller: one line, with a hint.
func usageError(cmd *cobra.Command, format string, args ...any) error {
	return fmt.Errorf("%s (try: %s --help)", fmt.Sprintf(format, args...), cmd.CommandPath())
}

// argsBetween refuses calls with fewer than least or more than most arguments;
// most < 0 is no limit.
func argsBetween(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		_, want, _ := strings.Cut(cmd.Use, " ")
		switch {
		case len(args) < least:
			return usageError(cmd, "%s needs arguments: %s", cmd.Name(), want)
		case most == 0 && len(args) > 0:
			return usageError(cmd, "%s takes no arguments, but got %q", cmd.Name(), args[0])
		case most >= 0 && len(args) > most:
			return usageError(cmd, "%s does not take the argument %q", cmd.Name(), args[most])
		}
		return nil
	}
}

// nameAndCommand refuses calls with fewer than least arguments. Before a -- there must
// be the name and nothing else: a word too much would silently become the command.
func nameAndCommand(least int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch dash := cmd.ArgsLenAtDash(); {
		case dash == 0:
			what := "sandbox"
			if cmd.Name() == "exec" {
				what = "member"
			} else if cmd.Name() == "join" {
				what = "sandbox or member"
			}
			return usageError(cmd, "the name of the %s is missing before --", what)
		case dash > 1:
			return usageError(cmd, "%q is too much between %q and --", args[1:dash], args[0])
		}
		return argsBetween(least, -1)(cmd, args)
	}
}

// stateDir returns the state directory that flags and environment name, by the
// one path that all its processes bear the mark of.
func (a *app) stateDir() string {
	if a.state != "" {
		return realPath(a.state)
	}
	env, _ := a.lookupEnv("SANDBOXD_STATE")
	return realPath(cmp.Or(env, defaultState))
}

// realPath returns path without links, as far as it exists: /var/run/x and /run/x
// are one directory.
func realPath(path string) string {
	path, err := filepath.Abs(path)
	if err != nil || path == "/" {
		return path
	}
	real, err := filepath.EvalSymlinks(path)
	switch {
	case err == nil:
		return real
	case errors.Is(err, fs.ErrNotExist):
		return filepath.Join(realPath(filepath.Dir(path)), filepath.Base(path))
	}
	return path
}

// socketAddress returns the address that flags and environment name.
func (a *app) socketAddress() string {
	if a.address != "" {
		return a.address
	}
	if s, ok := a.lookupEnv("SANDBOXD_ADDRESS"); ok && s != "" {
		return s
	}
	return "unix://" + a.stateDir() + "/sandboxd.sock"
}

// client returns the connection to the daemon. [app.close] closes it.
func (a *app) client() (*api.Client, error) {
	if a.conn == nil {
		// Nor would it be kept in records as it is: they are JSON.
		for _, s := range a.args {
			if !utf8.ValidString(s) {
				return nil, fmt.Errorf("argument %.100q is not UTF-8 text, which is all that the daemon takes", s)
			}
		}
		c, err := api.Dial(a.socketAddress())
		if err != nil {
			return nil, err
		}
		a.conn = c
	}
	return a.conn, nil
}

// dir opens the state directory for reading.
func (a *app) dir() (*sandbox.Dir, error) { return sandbox.OpenDir(a.stateDir(), statusReader{}) }

// answerTime is how long what only looks waits for the daemon, which may be stopped
// or hung. What changes something waits for as long as it takes.
const answerTime = 2 * time.Second

// sayNoAnswer says that it was not the daemon that was asked.
func (a *app) sayNoAnswer() {
	fmt.Fprintf(a.err, "sandboxd: the daemon has not answered for %s: read from %s instead\n", answerTime, a.stateDir())
}

// answers reports whether a daemon takes the connection, or whether that is for the next
// call to find out.
func (a *app) answers(ctx context.Context, c *api.Client) bool {
	ask, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	return c.Connect(ask) == nil || ctx.Err() != nil
}

// list returns all sandboxes: from the daemon, or if none answers from the
// state directory. With all, and a daemon, those too of which only a network is left.
func (a *app) list(ctx context.Context, all bool) ([]sandbox.Info, error) {
	return fallBack(ctx, a,
		func(ctx context.Context, c *api.Client) ([]sandbox.Info, error) {
			if all {
				return c.ListAll(ctx)
			}
			return c.List(ctx)
		},
		func(d *sandbox.Dir) ([]sandbox.Info, error) { return d.List() })
}

func (a *app) inspectSandbox(ctx context.Context, ref string) (sandbox.Info, error) {
	return fallBack(ctx, a,
		func(ctx context.Context, c *api.Client) (sandbox.Info, error) { return c.Inspect(ctx, ref) },
		func(d *sandbox.Dir) (sandbox.Info, error) { return d.Sandbox(ref) })
}

func (a *app) inspectMember(ctx context.Context, ref string) (sandbox.MemberInfo, error) {
	return fallBack(ctx, a,
		func(ctx context.Context, c *api.Client) (sandbox.MemberInfo, error) { return c.InspectMember(ctx, ref) },
		func(d *sandbox.Dir) (sandbox.MemberInfo, error) { return d.Member(ref) })
}

// fallBack asks the daemon, or if none answers the state directory.
func fallBack[T any](ctx context.Context, a *app, daemon func(context.Context, *api.Client) (T, error), local func(*sandbox.Dir) (T, error)) (T, error) {
	var none T
	c, err := a.client()
	if err != nil {
		return none, err
	}
	ask, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	v, err := daemon(ask, c)
	switch {
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		a.sayNoAnswer()
	case !errors.Is(err, api.ErrUnavailable):
		return v, err
	}
	d, derr := a.dir()
	if derr != nil {
		return none, fmt.Errorf("%w; %w", err, derr)
	}
	return local(d)
}

// isMember reports whether ref names a member rather than a sandbox.
func isMember(ref string) bool { return strings.Contains(ref, "/") }

// wantMember refuses a reference that names no member.
func wantMember(cmd *cobra.Command, ref string) error {
	if !isMember(ref) {
		return usageError(cmd, "%q is not SANDBOX/MEMBER", ref)
	}
	return nil
}
