// Command sandboxd manages pod sandboxes on one Linux host. `sandboxd serve` is
// the daemon; the other subcommands are its clients, or work from the state
// directory without it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/api"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Exit codes beside those of the processes that are run (docker-run(1) has the
// same).
const (
	exitFailed     = 125 // sandboxd itself failed
	exitCannotExec = 126 // the command cannot be executed
	exitNotFound   = 127 // the command is not found
	exitSignal     = 128 // plus the signal that ended the process
)

func main() {
	runtime.MemProfileRate = 0
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the program without its process: it returns the exit code. Only if
// the streams are files can terminals be used.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{args: args, in: stdin, out: stdout, err: stderr, lookupEnv: os.LookupEnv}
	defer a.close()
	root := a.rootCommand()
	if len(args) > 0 && strings.HasPrefix(args[0], cobra.ShellCompRequestCmd) {
		plainUsage(root)
	}
	root.SetArgs(args)
	return a.report(root.ExecuteContext(ctx))
}

// report writes err as one line, unless it is only a process's exit code, and
// returns the exit code that it stands for.
func (a *app) report(err error) int {
	if err == nil {
		return 0
	}
	if code, ok := errors.AsType[exitCode](err); ok {
		return int(code)
	}
	hint := ""
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		hint = " (sandboxd is for root)"
	} else if errors.Is(err, api.ErrUnavailable) && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)) {
		hint = " (sandboxd serve starts one)"
	}
	fmt.Fprintf(a.err, "sandboxd: %s%s\n", oneLine(err.Error()), hint)
	if f, ok := errors.AsType[*failure](err); ok {
		return f.code
	}
	if se, ok := errors.AsType[*sandbox.StartError](err); ok {
		return startErrorCode(se.Errno)
	}
	return exitFailed
}

// startErrorCode is what shells exit with if execve failed with errno.
func startErrorCode(errno unix.Errno) int {
	if errno == unix.ENOENT || errno == unix.ENOTDIR {
		return exitNotFound
	}
	return exitCannotExec
}

// exitCode is the exit code of a process that was run, as an error.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// failure is an error with an exit code of its own.
type failure struct {
	code int
	err  error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// asExit returns the exit code as an error; 0 is nil.
func asExit(code int) error {
	if code == 0 {
		return nil
	}
	return exitCode(code)
}

// oneLine keeps messages to one line of readable length, whatever a path or a
// foreign program's output holds: nor do they do anything to a terminal. What
// failed is at the beginning and why at the end, so it is the middle that goes.
func oneLine(s string) string {
	const head, tail = 600, 300
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.TrimSpace(s))
	if len(s) <= head+tail {
		return s
	}
	return strings.ToValidUTF8(s[:head], "") + "…" + strings.ToValidUTF8(s[len(s)-tail:], "")
}
