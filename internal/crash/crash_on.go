//go:build crashpoints

package crash

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// set is what the environment asked for. Its methods are safe for concurrent
// use.
type set struct {
	at    string // "" if the process is not to be killed
	n     int    // at which hit
	log   string // "" if there is no log
	fatal func()

	mu   sync.Mutex
	hits int
}

var fromEnv = sync.OnceValue(func() *set {
	s, err := parse(os.Getenv("SANDBOXD_CRASH_AT"))
	if err != nil {
		// A test that spelt the point wrongly must not pass for one that
		// survived it.
		panic(err)
	}
	s.log = os.Getenv("SANDBOXD_CRASH_LOG")
	s.fatal = func() {
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // the signal may reach another thread first
	}
	return s
})

// Point marks a point where a test may want the process to die.
func Point(name string) { fromEnv().pass(name) }

// parse reads the value of SANDBOXD_CRASH_AT.
func parse(v string) (*set, error) {
	name, num, ok := strings.Cut(v, "#")
	s := &set{at: name, n: 1}
	if !ok {
		return s, nil
	}
	n, err := strconv.Atoi(num)
	if err != nil || n < 1 || name == "" {
		return nil, fmt.Errorf("crash point %q is not NAME or NAME#N", v)
	}
	s.n = n
	return s, nil
}

func (s *set) pass(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.log != "" {
		if err := appendLine(s.log, name); err != nil {
			panic(err)
		}
	}
	if s.at == "" || name != s.at {
		return
	}
	if s.hits++; s.hits == s.n {
		s.fatal()
	}
}

func appendLine(file, line string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(line + "\n"); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
