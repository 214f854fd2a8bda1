// Command leakcheck says what a command, a demonstration or a test suite has
// left behind on the host.
//
//	leakcheck --before --dir STATE --dir ROOT --cgroup-parent PATH FILE   writes down what there is
//	leakcheck FILE                                                        says what is there beside it
//
// The second form takes the options of the first from the file. It exits with 1
// if something was left behind, and with 2 if it could not look.
package main

import (
	"encoding/json"
	"fmt"
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
	take := flags.Bool("before", false, "write down what there is")
	flags.StringSliceVar(&o.Dirs, "dir", nil, "`directory` below which everything is ours; repeatable")
	flags.StringVar(&o.CgroupParent, "cgroup-parent", "", "`path` of the cgroup that is ours")
	flags.StringSliceVar(&o.Marks, "mark", nil, "installation's `mark`; repeatable")
	flags.IntVar(&o.PID, "pid", 0, "`process` whose descriptors are counted")
	flags.BoolVar(&o.Links, "links", false, "count all new network links")
	flags.BoolVar(&o.Global, "global", false, "everything new is ours")
	wait := flags.Duration("wait", 5*time.Second, "how long the kernel is given to free things")
	if err := flags.Parse(args); err != nil {
		return 2, err
	}
	if flags.NArg() != 1 {
		return 2, fmt.Errorf("want one file, got %d arguments", flags.NArg())
	}
	file := flags.Arg(0)
	if *take {
		o.Ancestor = -1
		if err := before(o, file); err != nil {
			return 2, err
		}
		return 0, nil
	}
	return after(file, *wait)
}

func before(o leak.Options, file string) error {
	s, err := leak.Take(o)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o644)
}

func after(file string, wait time.Duration) (int, error) {
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
