package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/probe"
)

func (a *app) checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check [--root DIR] [-o json] | check --sandbox SANDBOX",
		Short: "Tell what this host can and cannot do, or whether a sandbox's network is as it was made",
		Long: `Try what sandboxd needs of the kernel, and say what is lost without it. It
changes nothing. It exits with 0 if everything that is required is there.

With --sandbox, ask the daemon whether a sandbox's network still is what it was
when it was made (of CNI networks, by the plugins' CHECK). It exits with 0 if so.`,
		Example: "  sandboxd check\n  sandboxd check -o json | jq '.[] | select(.ok | not)'\n  sandboxd check --sandbox web",
		Args:    argsBetween(0, 0),
	}
	isJSON := outputFlag(cmd)
	root := cmd.Flags().String("root", "/var/lib/sandboxd", "the daemon's root `directory`")
	box := cmd.Flags().String("sandbox", "", "check the network of this `sandbox`, and nothing else")
	cmd.RegisterFlagCompletionFunc("sandbox", a.completeRefs(-1, true, false))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if cmd.Flags().Changed("sandbox") {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.VerifyNetwork(cmd.Context(), *box)
		}
		if os.Geteuid() != 0 {
			return errors.New("check must be run as root")
		}
		rs := probe.Host(*root)
		var missing error
		rows := [][]string{{"FEATURE", "STATUS", "DETAIL"}}
		for _, r := range rs {
			row := []string{r.Name, "ok", r.Detail}
			if !r.OK {
				row[1], row[2] = "missing", r.Detail+"; lost: "+r.Lost
				if r.Required {
					row[1] = "MISSING"
					missing = errors.New("this host lacks " + r.Name)
				}
			}
			rows = append(rows, row)
		}
		var err error
		if *isJSON {
			err = writeJSON(a.out, rs)
		} else {
			err = writeTable(a.out, rows)
		}
		return errors.Join(err, missing)
	}
	return cmd
}
