package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// versionInfo is what `sandboxd version` shows.
type versionInfo struct {
	Version  string `json:"version"`
	Commit   string `json:"commit"`
	Modified bool   `json:"modified"` // the commit's tree had been changed
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Kernel   string `json:"kernel"`
}

func readVersion() versionInfo {
	v := versionInfo{Version: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if b, ok := debug.ReadBuildInfo(); ok {
		if b.Main.Version != "" && b.Main.Version != "(devel)" {
			v.Version = b.Main.Version
		}
		for _, s := range b.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Commit = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		v.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return v
}

func (a *app) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version [-o json]",
		Short:   "Show the version of sandboxd, Go and the kernel",
		Long:    "Show the version of this program, the commit it was built from, the Go version and the running kernel.",
		Example: "  sandboxd version\n  sandboxd version -o json",
		Args:    argsBetween(0, 0),
	}
	isJSON := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		v := readVersion()
		if *isJSON {
			return writeJSON(a.out, v)
		}
		commit := v.Commit
		if v.Modified {
			commit += " (modified)"
		}
		return writeTable(a.out, [][]string{
			{"version", v.Version}, {"commit", commit}, {"go", v.Go}, {"platform", v.Platform}, {"kernel", v.Kernel},
		})
	}
	return cmd
}
