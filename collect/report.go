package collect

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
)

// Report is what `sandboxd postmortem` tells of a member. Its JSON form is
// stable, like that of [Manifest].
type Report struct {
	Ref      string    `json:"ref"` // SANDBOX/MEMBER
	At       time.Time `json:"at"`
	Verdict  string    `json:"verdict"` // one sentence: how it ended
	Manifest *Manifest `json:"manifest"`
	Custody  Custody   `json:"custody"`
	Hooks    []Hook    `json:"hooks,omitempty"` // that have been run; not known once it has been removed
}

// Hook is what became of a hook of the member's: its latest attempt.
type Hook struct {
	Stage    string `json:"stage"`
	Path     string `json:"path"`
	State    string `json:"state"` // running, succeeded, retrying, failed
	Attempts int    `json:"attempts"`
	Error    string `json:"error,omitempty"`
	Output   string `json:"output,omitempty"` // the last line of what it has printed
}

// note says in a line how it went.
func (h Hook) note() string {
	s := h.Path
	if h.Attempts > 1 {
		s += fmt.Sprintf(", %d attempts", h.Attempts)
	}
	if h.Error != "" {
		s += ": " + h.Error
	}
	if h.Output != "" && !strings.Contains(h.Error, h.Output) {
		s += ": " + h.Output
	}
	return s
}

// Custody says what can still be copied out of a member.
type Custody struct {
	Held     bool      `json:"held"`
	Until    time.Time `json:"until,omitzero"` // absent: until it is removed
	Released time.Time `json:"released,omitzero"`
	Why      string    `json:"why,omitempty"` // why nothing is held
	Mounts   []Mount   `json:"mounts"`
}

// NewReport returns a report of m, whose verdict it finds.
func NewReport(m *Manifest, c Custody, at time.Time) *Report {
	if c.Mounts == nil {
		c.Mounts = []Mount{}
	}
	return &Report{Ref: m.Sandbox + "/" + m.Member, At: at.Round(0).UTC(), Verdict: verdict(m), Manifest: m, Custody: c}
}

// verdict says in one sentence how a member has ended, and of what.
func verdict(m *Manifest) string {
	e := m.Exit
	switch {
	case e == nil && m.StartedAt.IsZero():
		return "It has not been started."
	case e == nil:
		return "It is running."
	case m.StartError != "" || strings.HasPrefix(e.Reason, "StartError"):
		why := cmp.Or(m.StartError, strings.TrimPrefix(e.Reason, "StartError: "))
		return fmt.Sprintf("Its command could not be executed: %s.", strings.TrimSuffix(why, "."))
	case !e.Known:
		return fmt.Sprintf("It has ended, and how is not known: %s.", strings.TrimPrefix(e.Reason, "Unknown: "))
	case e.OOMKilled && e.Signal == int(unix.SIGKILL):
		return "The kernel killed it because it needed more memory than " + memoryLimit(m) + "."
	case e.OOMKilled:
		return fmt.Sprintf("It %s, after the kernel had killed a process of it that needed more memory than %s.", ended(e), memoryLimit(m))
	case m.StartedAt.IsZero() && e.Signal != 0:
		return fmt.Sprintf("It was killed by %s before it was started.", signalName(e.Signal))
	}
	return "It " + ended(e) + "."
}

func ended(e *exit.Record) string {
	if e.Signal != 0 {
		return "was killed by " + signalName(e.Signal) + meaning(unix.Signal(e.Signal))
	}
	if e.Code == 0 {
		return "ended well, with code 0"
	}
	return fmt.Sprintf("ended by itself, with code %d", e.Code)
}

func memoryLimit(m *Manifest) string {
	if u := m.Counters.Memory; u != nil && u.Limit > 0 {
		return "its limit of " + size(u.Limit)
	}
	return "there was"
}

func signalName(n int) string {
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return fmt.Sprintf("signal %d (%s)", n, name)
	}
	return fmt.Sprintf("signal %d", n)
}

// meaning says what a signal most often means, to those who do not know them by
// heart.
func meaning(s unix.Signal) string {
	switch s {
	case unix.SIGSEGV, unix.SIGBUS:
		return ", because of a bad access to memory"
	case unix.SIGILL, unix.SIGTRAP:
		return ", because of a bad instruction"
	case unix.SIGFPE:
		return ", because of a bad calculation"
	case unix.SIGABRT:
		return ", which programs send themselves when they find something wrong"
	case unix.SIGSYS:
		return ", because it used a system call that it may not"
	case unix.SIGXCPU, unix.SIGXFSZ:
		return ", because it has passed a limit"
	}
	return ""
}

// row is a line of the table of counters.
type row struct{ What, Used, Peak, Limit, Note string }

// counterRows shows the counters against their limits.
func counterRows(m *Manifest) []row {
	var rows []row
	or := func(n int64, none string) string {
		if n == 0 {
			return none
		}
		return size(n)
	}
	if u := m.Counters.Memory; u != nil {
		r := row{"memory", size(u.Current), or(u.Peak, "?"), or(u.Limit, "none"), ""}
		var notes []string
		if u.AtLimit > 0 {
			notes = append(notes, fmt.Sprintf("at the limit %s", times(u.AtLimit)))
		}
		if u.OOMKills > 0 {
			notes = append(notes, plural(u.OOMKills, "process", "processes")+" killed for it")
		}
		r.Note = strings.Join(notes, ", ")
		rows = append(rows, r)
	}
	if u := m.Counters.CPU; u != nil {
		r := row{"cpu", micros(u.UsageMicros), "", "none", fmt.Sprintf("user %s, system %s", micros(u.UserMicros), micros(u.SystemMicros))}
		if u.Limit > 0 {
			r.Limit = fmt.Sprintf("%.4g CPUs", u.Limit)
		}
		if u.Throttled > 0 {
			r.Note += fmt.Sprintf("; had to wait %s, %s in all", times(u.Throttled), micros(u.ThrottledMicros))
		}
		rows = append(rows, r)
	}
	if u := m.Counters.Pids; u != nil {
		r := row{"processes", fmt.Sprint(u.Current), "?", "none", ""}
		if u.Peak > 0 {
			r.Peak = fmt.Sprint(u.Peak)
		}
		if u.Limit > 0 {
			r.Limit = fmt.Sprint(u.Limit)
		}
		if u.AtLimit > 0 {
			r.Note = "a fork failed " + times(u.AtLimit)
		}
		rows = append(rows, r)
	}
	for _, d := range m.Counters.IO {
		rows = append(rows, row{"disk " + d.Device, size(d.ReadBytes + d.WriteBytes), "", "",
			fmt.Sprintf("read %s, wrote %s", size(d.ReadBytes), size(d.WriteBytes))})
	}
	for _, i := range m.Network {
		note := fmt.Sprintf("received %s in %s, sent %s in %s", size(i.RxBytes), plural(i.RxPackets, "packet", "packets"),
			size(i.TxBytes), plural(i.TxPackets, "packet", "packets"))
		if bad := i.RxErrors + i.TxErrors + i.RxDropped + i.TxDropped; bad > 0 {
			note += fmt.Sprintf("; %d lost", bad)
		}
		rows = append(rows, row{i.Name, size(i.RxBytes + i.TxBytes), "", "", note + " (the sandbox)"})
	}
	return rows
}

func times(n int64) string {
	switch n {
	case 1:
		return "once"
	case 2:
		return "twice"
	}
	return fmt.Sprintf("%d times", n)
}

func plural(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func micros(n int64) string { return duration(time.Duration(n) * time.Microsecond) }

// duration shows a time to three digits or so.
func duration(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(10 * time.Millisecond).String()
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// when shows a time and how long before at it was.
func when(t, at time.Time) string {
	if t.IsZero() {
		return "never"
	}
	s := t.UTC().Format("2006-01-02 15:04:05.000 UTC")
	if d := at.Sub(t); d >= 0 {
		return s + ", " + duration(d) + " ago"
	}
	return s + ", in " + duration(t.Sub(at))
}

// lifetime says how long the member ran.
func lifetime(m *Manifest) string {
	if m.StartedAt.IsZero() || m.Exit == nil || m.Exit.FinishedAt.IsZero() {
		return ""
	}
	return duration(m.Exit.FinishedAt.Sub(m.StartedAt))
}

// running reports whether the member is held because it has not ended yet.
func (r *Report) running() bool { return r.Custody.Held && r.Manifest.Exit == nil }

// held says until when something can be copied out.
func (r *Report) held() string {
	switch {
	case !r.Custody.Held:
		return "nothing: " + cmp.Or(r.Custody.Why, "it is not held")
	case r.running():
		return "it has not ended"
	case r.Custody.Until.IsZero():
		return "until it is removed"
	}
	return "until " + when(r.Custody.Until, r.At)
}

// shown are the mounts that are worth a look.
func shown(ms []Mount) []Mount {
	var out []Mount
	for _, m := range ms {
		// The first is where cgroups are mounted, the second has nodes and links.
		if m.Memory && m.Used == 0 && (m.Target == "/sys/fs/cgroup" || m.Target == "/dev") {
			continue
		}
		out = append(out, m)
	}
	return out
}

// usage says how much a mount holds, or whose it is.
func usage(m Mount) string {
	switch {
	case m.From == "" && !m.Memory: // in a manifest of before: that of the whole disk
		return "on disk"
	case m.Memory && m.From == "sandbox":
		return size(m.Used) + " of " + size(m.Size) + ", the sandbox's"
	case m.Memory:
		return size(m.Used) + " of " + size(m.Size)
	case m.Type == "overlay":
		return size(m.Used) + " on disk"
	case m.From == "host":
		return "the host's"
	case strings.HasPrefix(m.From, "member:"):
		return "that of " + strings.TrimPrefix(m.From, "member:")
	}
	return ""
}

// Missing says in words what is not in the log although it was written; "" is nothing.
func (l *Log) Missing() string {
	switch l.Dropped {
	case 0:
		return ""
	case 1:
		return "1 line is missing: the disk was full, or the log has reached its maximum"
	}
	return fmt.Sprintf("%d lines are missing: the disk was full, or the log has reached its maximum", l.Dropped)
}

// collected says in a line what was taken.
func collected(m *Manifest) string {
	switch a := m.Archive; {
	case m.Name == "":
		return "nothing has been collected"
	case a == nil:
		return m.Name + ": this manifest, no files"
	case a.Err != "":
		return m.Name + ": this manifest, no files: " + a.Err
	default:
		return fmt.Sprintf("%s: %s, %s packed", m.Name, plural(int64(a.Entries), "entry", "entries"), size(a.Bytes))
	}
}

// Outcome says in a few words how the member ended.
func (m *Manifest) Outcome() string {
	e := m.Exit
	switch {
	case e == nil:
		return "running"
	case !e.Known:
		return "unknown"
	case e.OOMKilled:
		return fmt.Sprintf("%d, out of memory", e.Code)
	case e.Signal != 0:
		return fmt.Sprintf("%d, %s", e.Code, cmp.Or(unix.SignalName(unix.Signal(e.Signal)), "signal"))
	}
	return fmt.Sprint(e.Code)
}
