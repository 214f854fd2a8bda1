package main

import (
	"cmp"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/sandbox"
)

func (a *app) lsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls [-a] [-o json]",
		Aliases: []string{"list"},
		Short:   "List sandboxes",
		Long: `List sandboxes. Works without the daemon, from the state directory.

With -o json it writes an array of the objects that inspect shows, without what
members were made with (limits, mounts, env) and what hooks have printed.`,
		Example: "  sandboxd ls\n  sandboxd ls -o json | jq -r '.[].name'",
		Args:    argsBetween(0, 0),
	}
	isJSON := outputFlag(cmd)
	quiet := cmd.Flags().BoolP("quiet", "q", false, "only ids")
	all := cmd.Flags().BoolP("all", "a", false, "also sandboxes that are gone and whose network is still to be taken down (asks the daemon)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		infos, err := a.list(cmd.Context(), *all)
		if err != nil {
			return err
		}
		if *isJSON {
			return writeJSON(a.out, append([]sandbox.Info{}, infos...))
		}
		if *quiet {
			for _, i := range infos {
				writeLine(a.out, i.ID)
			}
			return nil
		}
		now := time.Now()
		rows := [][]string{{"ID", "NAME", "STATE", "AGE", "MEMBERS", "HOLDS", "NETWORK"}}
		if *all {
			rows[0] = append(rows[0], "REASON")
		}
		for _, i := range infos {
			row := []string{i.ID, i.Name, i.State, age(now, i.CreatedAt), strconv.Itoa(len(i.Members)), holds(i), string(i.Network.Mode)}
			if *all {
				row = append(row, cmp.Or(i.Reason, "-"))
			}
			rows = append(rows, row)
		}
		return writeTable(a.out, rows)
	}
	return cmd
}

func (a *app) psCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ps [-o json] [SANDBOX]",
		Short: "List members, of one sandbox or of all",
		Long: `List members, running or exited. Works without the daemon, from the state
directory.

CUSTODY says that the root of one that has exited is held, and for how long
still if that has an end; TMPFS is what its file systems in memory hold.

With -o json it writes an array of the objects that inspect shows of members,
without what they were made with (limits, mounts, env) and what hooks have printed.`,
		Example:           "  sandboxd ps\n  sandboxd ps web",
		Args:              argsBetween(0, 1),
		ValidArgsFunction: a.completeRefs(1, true, false),
	}
	isJSON := outputFlag(cmd)
	quiet := cmd.Flags().BoolP("quiet", "q", false, "only references, SANDBOX/MEMBER, by id")
	cmd.Flags().BoolP("all", "a", false, "those that have exited too, which are always shown")
	cmd.Flags().MarkHidden("all") // a habit from other container tools
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var infos []sandbox.Info
		if len(args) == 0 {
			var err error
			if infos, err = a.list(cmd.Context(), false); err != nil {
				return err
			}
		} else {
			i, err := a.inspectSandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			infos = []sandbox.Info{i}
		}
		now := time.Now()
		members := []sandbox.MemberInfo{}
		rows := [][]string{{"ID", "SANDBOX", "NAME", "STATE", "PID", "AGE", "CUSTODY", "TMPFS", "COMMAND"}}
		for _, i := range infos {
			for _, m := range i.Members {
				m.Limits, m.Mounts, m.Env = nil, nil, nil // lists leave them out
				if *quiet {
					writeLine(a.out, i.ID+"/"+m.ID)
				}
				members = append(members, m)
				held, pid, tmpfs := "", "", ""
				if m.Custody.Held {
					held, tmpfs = "held", byteSize(m.Custody.TmpfsBytes)
					if until := m.Custody.Until; !until.IsZero() {
						held += " " + age(until, now)
					}
				}
				if m.PID != 0 {
					pid = strconv.Itoa(m.PID)
				}
				rows = append(rows, []string{m.ID, i.Name, m.Name, memberStatus(m), pid, age(now, m.CreatedAt), held, tmpfs, command(m.Command, 40)})
			}
		}
		switch {
		case *quiet:
			return nil
		case *isJSON:
			return writeJSON(a.out, members)
		}
		return writeTable(a.out, rows)
	}
	return cmd
}

func (a *app) inspectCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect SANDBOX[/MEMBER]",
		Short: "Show everything about a sandbox or a member, as JSON",
		Long: `Show everything about a sandbox or a member, as one JSON object. Works without
the daemon, from the state directory. The form is stable: fields are added,
never renamed or removed.`,
		Example:           "  sandboxd inspect web\n  sandboxd inspect web/redis | jq .exit",
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeRefs(1, true, true),
	}
	outputFlag(cmd) // JSON either way; accepted as everywhere else
	cmd.Flag("output").Usage = "output format, json either way"
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if isMember(args[0]) {
			m, err := a.inspectMember(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return writeJSON(a.out, m)
		}
		i, err := a.inspectSandbox(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return writeJSON(a.out, i)
	}
	return cmd
}
