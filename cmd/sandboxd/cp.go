package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/tarstream"
	"github.com/sandboxd/sandboxd/member"
)

func (a *app) cpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cp [-q] (SANDBOX/MEMBER:PATH DEST|- | SRC|- SANDBOX/MEMBER:PATH)",
		Short: "Copy files out of or into a member, running or exited",
		Long: `Copy files out of or into a member, running or exited, through every mount that
it has or had. "-" is a tar stream on stdin or stdout; a stream that goes in is
unpacked into the directory PATH.

Modes, owners, times, extended attributes, links, holes and devices are kept.
Links in the member lead nowhere outside of it. Works without the daemon.`,
		Example: `  sandboxd cp web/crashed:/tmp/core .
  sandboxd cp web/redis:/data - | tar t
  sandboxd cp ./conf web/redis:/etc/redis`,
		Args:              argsBetween(2, 2),
		ValidArgsFunction: a.completeCopy,
	}
	quiet := cmd.Flags().BoolP("quiet", "q", false, "do not say what could not be kept")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var note func(path, what string)
		if !*quiet {
			note = func(path, what string) { fmt.Fprintf(a.err, "sandboxd: %s\n", oneLine(path+": "+what)) }
		}
		fromRef, from, out := splitCopy(args[0])
		toRef, to, in := splitCopy(args[1])
		if in && out {
			return usageError(cmd, "%q and %q are both in members: copy by way of the host, or sandboxd cp %s - | sandboxd cp - %s", args[0], args[1], args[0], args[1])
		}
		if !in && !out {
			return usageError(cmd, "one of %q and %q must be SANDBOX/MEMBER:PATH", args[0], args[1])
		}
		if out {
			if args[1] == "-" {
				if err := a.refuseTerminal(cmd); err != nil {
					return err
				}
			}
			return a.copyOut(cmd.Context(), fromRef, from, args[1], note)
		}
		return a.copyIn(cmd.Context(), args[0], toRef, to, note)
	}
	return cmd
}

// splitCopy splits SANDBOX/MEMBER:PATH. ok is false for a path of the host:
// what has no colon, or no name before it, or begins like a path.
func splitCopy(s string) (ref, path string, ok bool) {
	ref, path, ok = strings.Cut(s, ":")
	if !ok || !isMember(ref) || strings.HasPrefix(ref, "/") || strings.HasPrefix(ref, ".") {
		return "", "", false
	}
	return ref, path, true
}

// memberRoot opens the root of a member, and returns the options that say which
// ids its user namespace has. The caller closes it.
func (a *app) memberRoot(ref, path string) (*os.File, member.CopyOptions, error) {
	if path == "" {
		return nil, member.CopyOptions{}, fmt.Errorf("%s: the path after the colon is empty", ref)
	}
	t, err := a.target(ref)
	if err != nil {
		return nil, member.CopyOptions{}, err
	}
	root, err := openRoot(t.member)
	if err != nil {
		return nil, member.CopyOptions{}, fmt.Errorf("%s: %w", ref, err)
	}
	var o member.CopyOptions
	if ids := t.sandbox.IDs; ids != nil && t.member.Namespaces[namespace.User].From != namespace.Host {
		o.IDs = &tarstream.IDs{Start: ids.Start, Size: ids.Size}
	}
	return root, o, nil
}

func (a *app) copyOut(ctx context.Context, ref, path, dest string, note func(path, what string)) error {
	root, o, err := a.memberRoot(ref, path)
	if err != nil {
		return err
	}
	defer root.Close()
	o.Note = note
	if dest == "-" {
		return inMember(ref, member.CopyOut(ctx, root, path, a.out, o))
	}
	return pipe(ctx,
		func(ctx context.Context, w io.Writer) error {
			return inMember(ref, member.CopyOut(ctx, root, path, w, o))
		},
		func(ctx context.Context, r io.Reader) error { return member.ExtractTo(ctx, dest, r, note) })
}

func (a *app) copyIn(ctx context.Context, src, ref, path string, note func(path, what string)) error {
	root, o, err := a.memberRoot(ref, path)
	if err != nil {
		return err
	}
	defer root.Close()
	o.Note = note
	if src == "-" {
		return inMember(ref, member.CopyIn(ctx, root, path, a.in, o))
	}
	return pipe(ctx,
		func(ctx context.Context, w io.Writer) error { return member.TarFrom(ctx, src, w, note) },
		func(ctx context.Context, r io.Reader) error {
			return inMember(ref, member.CopyInAs(ctx, root, path, r, o))
		})
}

// inMember says that the paths in err are the member's, not the host's.
func inMember(ref string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", ref, err)
}

// pipe runs both ends of a stream and returns the error of the one that failed
// first: the other then fails because of it.
func pipe(ctx context.Context, write func(context.Context, io.Writer) error, read func(context.Context, io.Reader) error) error {
	r, w := io.Pipe()
	written := make(chan error)
	go func() {
		err := write(ctx, w)
		w.CloseWithError(err) // nil is io.EOF
		written <- err
	}()
	err := read(ctx, r)
	r.CloseWithError(io.ErrClosedPipe)
	if werr := <-written; werr != nil && !errors.Is(werr, io.ErrClosedPipe) {
		return werr
	}
	return err
}

func (a *app) completeCopy(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	if len(args) >= 2 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	refs, _ := a.completeRefs(-1, false, true)(cmd, nil, s)
	for i, r := range refs {
		name, _, _ := strings.Cut(r, "\t")
		refs[i] = name + ":"
	}
	return refs, cobra.ShellCompDirectiveNoSpace
}
