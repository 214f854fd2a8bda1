package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/collect"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/sandbox"
)

// outputFlag adds -o to cmd and returns whether JSON is asked for.
func outputFlag(cmd *cobra.Command) *bool {
	isJSON := new(bool)
	cmd.Flags().VarP(&value[bool]{p: isJSON, typ: "table|json", parse: func(s string) (bool, error) {
		switch s {
		case "json", "table":
			return s == "json", nil
		}
		return false, fmt.Errorf("unknown output format %q (one of table, json)", s)
	}}, "output", "o", "output format (default table)")
	cmd.RegisterFlagCompletionFunc("output", oneOf("json", "table"))
	return isJSON
}

// writeJSON writes v, indented, with a line feed at the end.
func writeJSON(w io.Writer, v any) error { return encodeJSON(w, v, "  ") }

// encodeJSON writes v with a line feed at the end. What a terminal would not show
// but obey is escaped: encoding/json does that only below U+0020.
func encodeJSON(w io.Writer, v any, indent string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := w.Write(escapeJSON(b.Bytes()))
	return err
}

// escapeJSON escapes characters that are neither printed nor the format of b, which
// is JSON and so has them in strings only.
func escapeJSON(b []byte) []byte {
	obeyed := func(r rune) bool { return r >= 0x7f && r != utf8.RuneError && !unicode.IsPrint(r) }
	if !bytes.ContainsFunc(b, obeyed) {
		return b
	}
	out := make([]byte, 0, len(b)+64)
	for _, r := range string(b) {
		if !obeyed(r) {
			out = utf8.AppendRune(out, r)
			continue
		}
		for _, u := range utf16.AppendRune(nil, r) {
			out = fmt.Appendf(out, `\u%04x`, u)
		}
	}
	return out
}

// writeTable writes rows in aligned columns; the first row is the head.
func writeTable(w io.Writer, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		for i := range r {
			r[i] = oneLine(strings.ReplaceAll(r[i], "\t", " "))
			if r[i] == "" {
				r[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	return tw.Flush()
}

// age shows how long ago t was, to two digits of precision or so.
func age(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := max(now.Sub(t), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 10*time.Minute:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 10*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// byteSize shows a number of bytes as other flags take it.
func byteSize(n int64) string {
	const units = "kMGTPE"
	if n < 1<<10 {
		return strconv.FormatInt(n, 10)
	}
	v, i := float64(n)/1024, 0
	for ; v >= 999.5 && i < len(units)-1; i++ {
		v /= 1024
	}
	if v < 9.95 {
		return fmt.Sprintf("%.1f%c", v, units[i])
	}
	return fmt.Sprintf("%.0f%c", v, units[i])
}

// memberStatus shows a member's state and how it ended.
func memberStatus(m sandbox.MemberInfo) string {
	switch e := m.Exit; {
	case e == nil:
		return m.State
	case !e.Known:
		return m.State + " (?)"
	case e.OOMKilled:
		return fmt.Sprintf("%s (%d, OOM)", m.State, e.Code)
	default:
		return fmt.Sprintf("%s (%d)", m.State, e.Code)
	}
}

// holds lists the kinds that a sandbox holds, in the usual order.
func holds(i sandbox.Info) string {
	var out []string
	for _, k := range namespace.Kinds() {
		if _, ok := i.Namespaces[k]; ok {
			out = append(out, string(k))
		}
	}
	return strings.Join(out, ",")
}

// command shows a member's command, cut to n characters.
func command(args []string, n int) string {
	s := collect.Plain(strings.Join(args, " "))
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
