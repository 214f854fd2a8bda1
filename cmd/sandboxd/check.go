package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/probe"
)

func (a *app) checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check [--root DIR] [-o json]",
		Short: "Tell what this host can and cannot do",
		Long: `Try what sandboxd needs of the kernel, and say what is lost without it. It
changes nothing. It exits with 0 if everything that is required is there.`,
		Example: "  sandboxd check\n  sandboxd check -o json | jq '.[] | select(.ok | not)'",
		Args:    argsBetween(0, 0),
	}
	isJSON := outputFlag(cmd)
	root := cmd.Flags().String("root", "/var/lib/sandboxd", "the daemon's root `directory`")
	cmd.RunE = func(*cobra.Command, []string) error {
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
