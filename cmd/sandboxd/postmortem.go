package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/sandbox"
)

// formatFlag adds -o with the given formats, the first of which is the default.
func formatFlag(cmd *cobra.Command, formats ...string) *string {
	format := new(string)
	*format = formats[0]
	cmd.Flags().VarP(&value[string]{p: format, typ: strings.Join(formats, "|"), parse: func(s string) (string, error) {
		for _, f := range formats {
			if s == f {
				return s, nil
			}
		}
		return "", fmt.Errorf("unknown output format %q (one of %s)", s, strings.Join(formats, ", "))
	}}, "output", "o", "output format (default "+formats[0]+")")
	cmd.RegisterFlagCompletionFunc("output", oneOf(formats...))
	return format
}

// dirFlag adds --collect-dir.
func dirFlag(cmd *cobra.Command) *string {
	dir := cmd.Flags().String("collect-dir", "", "collection `directory` (default that of the daemon)")
	cmd.MarkFlagDirname("collect-dir")
	return dir
}

func (a *app) postmortemCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "postmortem [-o text|json|html] SANDBOX/MEMBER",
		Short: "Tell what a member died of",
		Long: `Tell what a member died of: how it ended and when, its counters against its
limits, its last words, what was collected of it, what became of its hooks, and
what can still be copied out and until when.

Of one that has been removed, it tells what was collected at its exit; so it does
of an earlier one, by the name of its collection, SANDBOX/MEMBER-N. Of one that
is running it tells what is known now. Works without the daemon.`,
		Example: `  sandboxd postmortem web/redis
  sandboxd postmortem -o html web/redis > redis.html`,
		Args:              argsBetween(1, 1),
		ValidArgsFunction: a.completeRefs(1, false, true),
	}
	format := formatFlag(cmd, "text", "json", "html")
	dir := dirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wantMember(cmd, args[0]); err != nil {
			return err
		}
		r, err := a.postmortem(args[0], *dir)
		if err != nil {
			return err
		}
		switch *format {
		case "json":
			return writeJSON(a.out, r)
		case "html":
			return r.WriteHTML(a.out)
		}
		return r.WriteText(a.out)
	}
	return cmd
}

// postmortem finds out what is known of a member, from the state directory and
// from the collection directory.
func (a *app) postmortem(ref, dir string) (*collect.Report, error) {
	now := time.Now()
	t, info, err := a.memberNow(ref)
	if errors.Is(err, sandbox.ErrNotFound) {
		m, cerr := a.collectedOf(ref, dir)
		if errors.Is(cerr, collect.ErrNotFound) {
			return nil, fmt.Errorf("%w, and nothing was collected of it", err)
		}
		if cerr != nil {
			return nil, cerr
		}
		return collect.NewReport(m, collect.Custody{Why: "the member has been removed"}, now), nil
	}
	if err != nil {
		return nil, err
	}
	s := newSubject(t.sandbox, t.member, t.dir, dataDir(filepath.Join(a.stateDir(), rootLink), t.member))
	s.State, s.Exit = info.State, info.Exit
	if info.Collection != "" {
		m, err := a.manifest(info.Collection, dir)
		if err == nil && m.MemberID == info.ID {
			mounts, _ := collect.Mounts(s) // without them, less is shown
			return withHooks(collect.NewReport(m, custodyOf(t.member, info, mounts), now), info.Hooks), nil
		}
		// It has been removed, or made room for others: much is still there.
	}
	host, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	m := collect.Gather(host, s, now.Round(0).UTC())
	return withHooks(collect.NewReport(m, custodyOf(t.member, info, m.Mounts), now), info.Hooks), nil
}

// withHooks adds to a report what became of the member's hooks, which run after its
// manifest has been made.
func withHooks(r *collect.Report, runs []sandbox.HookRun) *collect.Report {
	for _, h := range runs {
		lines := strings.Split(strings.TrimSpace(h.Output), "\n")
		r.Hooks = append(r.Hooks, collect.Hook{
			Stage: string(h.Stage), Path: h.Path, State: string(h.State), Attempts: h.Attempt, Error: h.Error, Output: oneLine(lines[len(lines)-1]),
		})
	}
	return r
}

// memberNow returns the records of a member and what they show.
func (a *app) memberNow(ref string) (*target, sandbox.MemberInfo, error) {
	t, err := a.target(ref)
	if err != nil {
		return nil, sandbox.MemberInfo{}, err
	}
	d, err := a.dir()
	if err != nil {
		return nil, sandbox.MemberInfo{}, err
	}
	i, err := d.Member(t.sandbox.ID + "/" + t.member.ID)
	return t, i, err
}

// manifest reads the manifest of a collection.
func (a *app) manifest(name, dir string) (*collect.Manifest, error) {
	s, err := a.collected(dir)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Manifest(name)
}

// collectedOf finds a collection by its own name, or the latest by its member's.
func (a *app) collectedOf(ref, dir string) (*collect.Manifest, error) {
	s, err := a.collected(dir)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	box, member, _ := strings.Cut(ref, "/")
	m, err := s.Latest(box, member)
	if errors.Is(err, collect.ErrNotFound) {
		if exact, eerr := s.Manifest(ref); eerr == nil {
			return exact, nil
		}
	}
	return m, err
}
