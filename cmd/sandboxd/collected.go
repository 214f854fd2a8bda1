package main

import (
	"errors"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sandboxd/sandboxd/collect"
)

func (a *app) collectedCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "collected COMMAND",
		Short: "What was taken of members at their exit",
		Long: `What was taken of members at their exit: of each failure at least a manifest, and
files where --collect has named some. A collection is called SANDBOX/MEMBER-N, and
is that directory below the daemon's --collect-dir: manifest.json, and
files.tar.zst, which tar --zstd reads.

Works without the daemon, on the directory itself.`,
		Example: `  sandboxd collected ls
  sandboxd collected export web/redis-1 redis.tar`,
	}
	onlyCommands(cmd)
	for _, c := range []*cobra.Command{a.collectedLs(), a.collectedShow(), a.collectedExport(), a.collectedRm()} {
		c.DisableFlagsInUseLine = true
		c.Flags().SortFlags = false
		cmd.AddCommand(c)
	}
	return cmd
}

// withStore runs fn with the collection directory.
func (a *app) withStore(dir string, fn func(s *collect.Store) error) error {
	s, err := a.collected(dir)
	if err != nil {
		return err
	}
	defer s.Close()
	return fn(s)
}

func (a *app) collectedLs() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls [-o json]",
		Aliases: []string{"list"},
		Short:   "List collections, the oldest first",
		Long: `List collections, the oldest first.

With -o json it writes an array of the manifests, each with the size of its
collection on disk.`,
		Example: "  sandboxd collected ls",
		Args:    argsBetween(0, 0),
	}
	isJSON := outputFlag(cmd)
	quiet := cmd.Flags().BoolP("quiet", "q", false, "only names")
	dir := dirFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, _ []string) error {
		entries := []collect.Entry{}
		err := a.withStore(*dir, func(s *collect.Store) (err error) {
			entries, err = s.List()
			return err
		})
		if err != nil && (*dir != "" || !errors.Is(err, collect.ErrNotFound)) {
			return err
		}
		if *isJSON {
			return writeJSON(a.out, entries)
		}
		now := time.Now()
		rows := [][]string{{"NAME", "AGE", "EXIT", "FILES", "SIZE"}}
		for _, e := range entries {
			if *quiet {
				writeLine(a.out, e.Name)
				continue
			}
			row := []string{e.Name, "", "manifest cannot be read", "", byteSize(e.Size)}
			if m := e.Manifest; m != nil {
				row[1], row[2] = age(now, m.CollectedAt), m.Outcome()
				if m.Archive != nil {
					row[3] = strconv.Itoa(m.Archive.Entries)
					if m.Archive.Err != "" {
						row[3] = "lost"
					}
				}
			}
			rows = append(rows, row)
		}
		if *quiet {
			return nil
		}
		return writeTable(a.out, rows)
	}
	return cmd
}

func (a *app) collectedShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show [-o text|json|html] SANDBOX/MEMBER-N",
		Short:             "Show a collection's manifest",
		Long:              "Show a collection's manifest: as a page for people, or as it is.",
		Example:           "  sandboxd collected show web/redis-1",
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeCollected(1),
	}
	format := formatFlag(cmd, "text", "json", "html")
	dir := dirFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		m, err := a.manifest(args[0], *dir)
		if err != nil {
			return err
		}
		r := collect.NewReport(m, collect.Custody{Why: "this is what was known at the exit"}, time.Now())
		switch *format {
		case "json":
			return writeJSON(a.out, m)
		case "html":
			return r.WriteHTML(a.out)
		}
		return r.WriteText(a.out)
	}
	return cmd
}

func (a *app) collectedExport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export SANDBOX/MEMBER-N [FILE|-]",
		Short: "Write a collection as a tar archive",
		Long: `Write a collection, manifest and files, as a tar archive: to FILE, which must not
exist, or to stdout.`,
		Example:           "  sandboxd collected export web/redis-1 redis.tar\n  sandboxd collected export web/redis-1 | ssh desk tar x",
		Args:              argsBetween(1, 2),
		ValidArgsFunction: a.completeCollected(1),
	}
	dir := dirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withStore(*dir, func(s *collect.Store) error {
			if len(args) == 1 || args[1] == "-" {
				if err := a.refuseTerminal(cmd); err != nil {
					return err
				}
				return s.Export(args[0], a.out)
			}
			return writeNew(args[1], func(w io.Writer) error { return s.Export(args[0], w) })
		})
	}
	return cmd
}

// refuseTerminal fails if stdout, which is to get a tar archive, is a terminal.
func (a *app) refuseTerminal(cmd *cobra.Command) error {
	if f := asFile(a.out); f != nil && term.IsTerminal(int(f.Fd())) {
		return usageError(cmd, "a tar archive is nothing for a terminal: name a file, or a command after |")
	}
	return nil
}

// writeNew makes the file name with what write writes to it; if that fails there is
// no such file.
func writeNew(name string, write func(io.Writer) error) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	return nil
}

func (a *app) collectedRm() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "rm SANDBOX/MEMBER-N…",
		Aliases:           []string{"remove"},
		Short:             "Remove collections",
		Long:              "Remove collections.",
		Example:           "  sandboxd collected rm web/redis-1",
		Args:              argsBetween(1, -1),
		ValidArgsFunction: a.completeCollected(-1),
	}
	dir := dirFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		return a.withStore(*dir, func(s *collect.Store) error {
			var last error
			for _, name := range args {
				if err := s.Remove(name); err != nil {
					if last != nil {
						a.report(last)
					}
					last = err
				}
			}
			return last
		})
	}
	return cmd
}

// completeCollected completes names of collections for the first n arguments,
// n < 0 for all.
func (a *app) completeCollected(n int) completion {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if n >= 0 && len(args) >= n {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var names []string
		a.withStore("", func(s *collect.Store) error { // without it, there is nothing to complete
			entries, err := s.List()
			for _, e := range entries {
				if e.Manifest != nil {
					names = append(names, cobra.CompletionWithDesc(e.Name, e.Outcome()))
				}
			}
			return err
		})
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
