package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/member"
	"github.com/sandboxd/sandboxd/sandbox"
)

// completion of references. Errors are not shown: there is just nothing to
// complete then.
type completion func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// completeRefs completes names of sandboxes, of members, or both; for the first
// n arguments, n < 0 for all.
func (a *app) completeRefs(n int, sandboxes, members bool) completion {
	return a.complete(n, sandboxes, func(sandbox.MemberInfo) bool { return members })
}

// completeIn completes names of members in a state, for the first argument.
func (a *app) completeIn(state sandbox.MemberState) completion {
	return a.complete(1, false, func(m sandbox.MemberInfo) bool { return m.State == state.String() })
}

func (a *app) complete(n int, sandboxes bool, member func(sandbox.MemberInfo) bool) completion {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if n >= 0 && len(args) >= n {
			return nil, cobra.ShellCompDirectiveDefault
		}
		d, err := a.dir()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		infos, err := d.List()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []string
		for _, i := range infos {
			if sandboxes {
				out = append(out, cobra.CompletionWithDesc(i.Name, i.State))
			}
			for _, m := range i.Members {
				if member(m) {
					out = append(out, cobra.CompletionWithDesc(i.Name+"/"+m.Name, m.State))
				}
			}
		}
		slices.Sort(out)
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// oneOf completes words that are always the same.
func oneOf(words ...string) completion {
	return completion(cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

var signalNames = []string{"HUP", "INT", "KILL", "QUIT", "TERM", "USR1", "USR2"}

func capabilityNames() []string {
	names := []string{"ALL"}
	for _, c := range member.CapabilityNames() {
		names = append(names, strings.TrimPrefix(c, "CAP_"))
	}
	return names
}

// completeKinds completes the last element of the list of --share, or with
// sources of that of --ns.
func completeKinds(sources ...string) completion {
	return func(_ *cobra.Command, _ []string, s string) ([]string, cobra.ShellCompDirective) {
		before := s[:strings.LastIndexByte(s, ',')+1]
		var out []string
		for _, k := range namespace.Kinds() {
			name := string(k)
			if strings.Contains(","+before, ","+name+",") || strings.Contains(","+before, ","+name+"=") {
				continue // named already
			}
			if len(sources) == 0 && k != namespace.Mnt { // which no sandbox shares
				out = append(out, before+name)
			}
			for _, src := range sources {
				out = append(out, before+name+"="+src)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
}

// plainUsage takes the marks that help needs out of what flags say of themselves:
// completion shows it as it is.
func plainUsage(cmd *cobra.Command) {
	plain := func(f *pflag.Flag) { _, f.Usage = pflag.UnquoteUsage(f) }
	cmd.Flags().VisitAll(plain)
	cmd.PersistentFlags().VisitAll(plain)
	for _, c := range cmd.Commands() {
		plainUsage(c)
	}
}
