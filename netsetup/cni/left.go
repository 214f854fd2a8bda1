package cni

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// gone is how long killed processes are waited for.
const gone = 5 * time.Second

// killLeft kills the plugins that a killed daemon of this installation has left,
// each with its process group, and waits until they are gone. What a plugin has
// started to stay, such as a name server, has made itself a session and is left alone.
func killLeft(mark string) error {
	return killAll(func() (n int) {
		for _, p := range marked(mark + ".") {
			if p.pid == p.group && p.pid != p.session {
				unix.Kill(-p.group, unix.SIGKILL)
				n++
			}
		}
		return n
	})
}

// killCall kills all that is left of one call of a plugin.
func killCall(call string) {
	// What cannot be killed, because it hangs in the kernel, cannot be helped.
	_ = killAll(func() (n int) {
		for _, p := range marked(call + "\x00") {
			unix.Kill(p.pid, unix.SIGKILL)
			n++
		}
		return n
	})
}

func killAll(kill func() int) error {
	for end := time.Now().Add(gone); ; time.Sleep(2 * time.Millisecond) {
		n := kill()
		if n == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d CNI plugins that an earlier daemon has started cannot be killed", n)
		}
	}
}

type process struct{ pid, group, session int }

// marked lists the processes, zombies apart, whose mark begins with prefix.
func marked(prefix string) []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	want := []byte(markEnv + "=" + prefix)
	var ps []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// It is empty for kernel threads and zombies, and unreadable once the process is gone.
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err != nil || !bytes.HasPrefix(env, want) && !bytes.Contains(env, append([]byte{0}, want...)) {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		if p, err := parseStat(stat); err == nil {
			p.pid = pid
			ps = append(ps, p)
		}
	}
	return ps
}

// parseStat reads process group and session, fields 5 and 6 of proc_pid_stat(5).
func parseStat(stat []byte) (p process, err error) {
	_, rest, ok := bytes.Cut(stat[max(bytes.LastIndexByte(stat, ')'), 0):], []byte(") "))
	f := bytes.Fields(rest)
	if !ok || len(f) < 4 {
		return p, errors.New("not a line of /proc/PID/stat")
	}
	p.group, err = strconv.Atoi(string(f[2]))
	if err != nil {
		return p, err
	}
	p.session, err = strconv.Atoi(string(f[3]))
	return p, err
}
