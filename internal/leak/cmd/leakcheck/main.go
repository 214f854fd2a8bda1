// Command leakcheck says what a command, a demonstration or a test suite has
// left behind on the host.
//
//	leakcheck snapshot --dir STATE --dir ROOT --cgroup-parent PATH >FILE   writes down what there is
//	leakcheck verdict FILE                                                 says what is there beside it
//
// A verdict takes the options from the file. It exits with 1 if something was
// left behind, and with 2 if it could not look.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/internal/leak"
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "leakcheck:", err)
	}
	os.Exit(code)
}

func run(args []string) (int, error) {
	flags := pflag.NewFlagSet("leakcheck", pflag.ContinueOnError)
	var o leak.Options
	flags.StringSliceVar(&o.Dirs, "dir", nil, "`directory` below which everything is ours; repeatable")
	flags.StringSliceVar(&o.Keep, "keep", nil, "`path` that is not looked at, nor what is below it; repeatable")
	flags.StringVar(&o.CgroupParent, "cgroup-parent", "", "`path` of the cgroup that is ours")
	flags.StringSliceVar(&o.Marks, "mark", nil, "installation's `mark`; repeatable")
	flags.IntVar(&o.PID, "pid", 0, "`process` whose descriptors are counted")
	flags.BoolVar(&o.Links, "links", false, "count all new network links")
	flags.StringVar(&o.NetNS, "netns", "", "`file` of a network namespace in which everything new is ours, such as /proc/self/ns/net")
	flags.BoolVar(&o.Global, "global", false, "everything new is ours")
	wait := flags.Duration("wait", 5*time.Second, "how long the kernel is given to free things")
	switch err := flags.Parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		return 0, nil
	case err != nil:
		return 2, err
	}
	args = flags.Args()
	switch {
	case len(args) == 1 && args[0] == "snapshot":
		if !o.Global && len(o.Dirs) == 0 && o.CgroupParent == "" && len(o.Marks) == 0 && o.PID == 0 && !o.Links && o.NetNS == "" {
			return 2, errors.New("nothing is ours without --dir, --cgroup-parent, --mark, --pid, --links, --netns or --global")
		}
		o.Ancestor = -1
		if err := snapshot(o, os.Stdout); err != nil {
			return 2, err
		}
		return 0, nil
	case len(args) == 2 && args[0] == "verdict":
		return verdict(args[1], *wait)
	}
	return 2, fmt.Errorf("want snapshot, or verdict and a file, not %q", args)
}

func snapshot(o leak.Options, w io.Writer) error {
	s, err := leak.Take(o)
	if err != nil {
		return err
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "\t")
	return e.Encode(s)
}

func verdict(file string, wait time.Duration) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 2, err
	}
	var s leak.Snapshot
	if err := json.Unmarshal(b, &s); err != nil {
		return 2, fmt.Errorf("%s: %w", file, err)
	}
	fs, err := s.Wait(wait)
	if err != nil {
		return 2, err
	}
	fmt.Println(leak.Report(fs))
	if len(fs) > 0 {
		return 1, nil
	}
	return 0, nil
}
