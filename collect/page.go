package collect

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
)

// pageLines is how many lines of a log a page shows; the manifest has more.
const pageLines = 20

// pageFiles is how many files a page names.
const pageFiles = 12

// WriteText writes the report for people, in lines of plain text. Nothing in it
// does anything to a terminal, whatever a member has written.
func (r *Report) WriteText(w io.Writer) error {
	m := r.Manifest
	var b bytes.Buffer
	line := func(format string, a ...any) {
		b.WriteString(strings.TrimRight(Plain(fmt.Sprintf(format, a...)), " ") + "\n")
	}
	line("%s: %s", r.Ref, r.Verdict)
	line("")
	line("  command    %s", strings.Join(m.Command, " "))
	if e := m.Exit; e != nil {
		ran := ""
		if l := lifetime(m); l != "" {
			ran = ", after " + l
		}
		line("  ended      %s%s", when(e.FinishedAt, r.At), ran)
		line("  exit       code %d, %s", e.Code, e.Reason)
	} else {
		line("  state      %s", m.State)
	}
	line("  started    %s", when(m.StartedAt, r.At))
	line("  ids        sandbox %s, member %s", m.SandboxID, m.MemberID)
	if rows := counterRows(m); len(rows) > 0 {
		line("")
		var t bytes.Buffer
		tw := tabwriter.NewWriter(&t, 0, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "  COUNTERS\tUSED\tPEAK\tLIMIT\t")
		for _, x := range rows {
			fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%s\n", Plain(x.What), x.Used, dash(x.Peak), dash(x.Limit), x.Note)
		}
		tw.Flush()
		for l := range strings.Lines(t.String()) {
			line("%s", strings.TrimSuffix(l, "\n"))
		}
	}
	line("")
	if n := len(m.Log.Lines); n == 0 && m.Log.Dropped > 0 {
		line("  LAST WORDS  none")
	} else if n == 0 {
		line("  LAST WORDS  none: it has written nothing")
	} else {
		last := m.Log.Lines[max(0, n-pageLines):]
		if len(last) < n || m.Log.Cut {
			line("  LAST WORDS  the last %d lines of %s", len(last), m.Log.Path)
		} else {
			line("  LAST WORDS  all that is in %s", m.Log.Path)
		}
		for _, l := range last {
			line("    %s %s  %s", l.Time.Format("15:04:05.000"), l.Stream, l.Text)
		}
	}
	if text := m.Log.Missing(); text != "" {
		line("    %s", text)
	}
	line("")
	line("  COLLECTED   %s", collected(m))
	for _, f := range pick(m.Files) {
		text := f.Path
		if note := fileNote(f); note != "" {
			text += ": " + note
		}
		line("    %-9s  %s", fileSize(f), text)
	}
	if more := len(m.Files) + m.FilesMore - len(pick(m.Files)); more > 0 {
		line("    and %d more", more)
	}
	for _, c := range m.Collectors {
		if why := collectorNote(c); why != "" {
			line("    --collect %s: %s", c.Path, why)
		}
	}
	line("")
	if len(r.Hooks) > 0 {
		line("  HOOKS")
		for _, h := range r.Hooks {
			line("    %-9s  %-15s %s", h.State, h.Stage, h.note())
		}
		line("")
	}
	heading := "STILL HELD"
	if r.running() {
		heading = "MOUNTS    "
	}
	line("  %s  %s", heading, r.held())
	if r.Custody.Held {
		for _, mt := range shown(r.Custody.Mounts) {
			line("    %-9s  %-24s %s", mt.Type, mt.Target, usage(mt))
		}
		line("    copy it out with: sandboxd cp %s:PATH .", r.Ref)
	}
	for i, u := range m.Unknown {
		if i == 0 {
			line("")
			line("  NOT KNOWN")
		}
		line("    %s", u)
	}
	_, err := w.Write(b.Bytes())
	return err
}

func collectorNote(c Collector) string {
	if !c.Applied {
		return fmt.Sprintf("only on %s", c.On)
	}
	return c.Why
}

// pick chooses the files that a page names: what was left out or changed first,
// since the others can be seen in the archive.
func pick(fs []File) []File {
	var odd, fine []File
	for _, f := range fs {
		if f.Why != "" || !f.Taken {
			odd = append(odd, f)
		} else if f.Type != "directory" {
			fine = append(fine, f)
		}
	}
	odd = append(odd, fine...)
	return odd[:min(len(odd), pageFiles)]
}

func fileSize(f File) string {
	switch {
	case !f.Taken:
		return "left out"
	case f.LinkOf != "":
		return "hard link"
	case f.Type == "file":
		return size(f.Bytes)
	}
	return f.Type
}

func fileNote(f File) string {
	if f.Why == "" && f.LinkOf != "" {
		return "another name of " + f.LinkOf
	}
	return f.Why
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// Plain keeps what somebody else has chosen from doing anything to a terminal, or to
// the order of what is around it: what is not printed is shown as in Go, such as \n.
func Plain(s string) string {
	odd := func(r rune) bool { return !unicode.IsPrint(r) }
	if !strings.ContainsFunc(s, odd) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\t':
			b.WriteByte(' ')
		case odd(r):
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
