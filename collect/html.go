package collect

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/markup"
)

// WriteHTML writes the report as a page that needs nothing else: no script, and
// nothing from anywhere.
func (r *Report) WriteHTML(w io.Writer) error {
	m := r.Manifest
	p := new(markup.Page)
	p.Put(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Postmortem of %s</title>
<style>
%s</style>
</head>
<body>
<header>
<h1>%s</h1>
`, r.Ref, pageStyle, r.Ref)
	class := "verdict"
	if m.Exit != nil && failed(m.Exit) {
		class += " bad"
	}
	p.Put("<p class=\"%s\">%s</p>\n</header>\n<main>\n", class, r.Verdict)
	r.putFacts(p)
	putCurves(p, curves(m.Samples, limitOf(m)))
	putCounters(p, counterRows(m))
	putWords(p, &m.Log)
	putCollected(p, m)
	putHooks(p, r.Hooks)
	r.putHeld(p)
	if len(m.Unknown) > 0 {
		p.Put(`<section aria-labelledby="unknown"><h2 id="unknown">Not known</h2><ul>`)
		for _, u := range m.Unknown {
			p.Put(`<li>%s</li>`, u)
		}
		p.Put("</ul></section>\n")
	}
	const layout = "2006-01-02 15:04:05 UTC"
	p.Put(`</main>
<footer class="dim"><p>Made %s from what was known %s</p></footer>
</body>
</html>
`, r.At.Format(layout), m.CollectedAt.Format(layout))
	_, err := w.Write(p.Bytes())
	return err
}

func (r *Report) putFacts(p *markup.Page) {
	m := r.Manifest
	p.Put("<dl>\n<dt>Command</dt><dd><code>%s</code></dd>\n", Plain(strings.Join(m.Command, " ")))
	if e := m.Exit; e != nil {
		ended := when(e.FinishedAt, r.At)
		if l := lifetime(m); l != "" {
			ended += ", after " + l
		}
		p.Put("<dt>Ended</dt><dd>%s</dd>\n<dt>Exit</dt><dd>code %d, %s</dd>\n", ended, e.Code, e.Reason)
	} else {
		p.Put("<dt>State</dt><dd>%s</dd>\n", m.State)
	}
	p.Put(`<dt>Started</dt><dd>%s</dd>
<dt>Sandbox</dt><dd>%s <span class="dim mono">%s</span></dd>
<dt>Member</dt><dd>%s <span class="dim mono">%s</span></dd>
</dl>
`, when(m.StartedAt, r.At), m.Sandbox, m.SandboxID, m.Member, m.MemberID)
}

func putCurves(p *markup.Page, cs []curve) {
	if len(cs) == 0 {
		return
	}
	p.Put("<section aria-labelledby=\"curves\"><h2 id=\"curves\">The last minutes</h2>\n")
	for _, c := range cs {
		p.Put(`<figure>
<svg viewBox="0 0 600 120" preserveAspectRatio="none" role="img" aria-label="%s: at most %s, %s to the %s"><polyline points="%s"/>`, c.Title, c.Top, c.From, c.To, c.Points)
		note := ""
		if c.Limit != 0 {
			p.Put(`<line class="limit" x1="0" x2="600" y1="%v" y2="%v"/>`, c.Limit, c.Limit)
			note = "; dashed: the limit"
		}
		p.Put(`</svg>
<figcaption><span>%s</span><span>%s, top of the picture %s%s</span><span>%s</span></figcaption>
</figure>`, c.From, c.Title, c.Top, note, c.To)
	}
	p.Put("</section>\n")
}

func putCounters(p *markup.Page, rows []row) {
	if len(rows) == 0 {
		return
	}
	p.Put(`<section aria-labelledby="counters"><h2 id="counters">Counters against limits</h2>
<div class="wide"><table><thead><tr><th scope="col">What</th><th scope="col">Used</th><th scope="col">Peak</th><th scope="col">Limit</th><th scope="col">Note</th></tr></thead>
<tbody>`)
	for _, x := range rows {
		p.Put("<tr><th scope=\"row\">%s</th><td>%s</td><td>%s</td><td>%s</td><td>%s</td></tr>\n", x.What, x.Used, dash(x.Peak), dash(x.Limit), x.Note)
	}
	p.Put("</tbody></table></div></section>\n")
}

func putWords(p *markup.Page, l *Log) {
	p.Put("<section aria-labelledby=\"words\"><h2 id=\"words\">Last words</h2>\n")
	if len(l.Lines) == 0 && l.Dropped == 0 {
		p.Put(`<p class="dim">It has written nothing.</p>`)
	}
	if len(l.Lines) > 0 {
		p.Put(`<pre>`)
		for _, x := range l.Lines {
			p.Put("<span class=\"dim\">%s %s</span> <span class=\"%s\">%s</span>\n", x.Time.Format("15:04:05.000"), x.Stream, x.Stream, Plain(x.Text))
		}
		p.Put(`</pre>`)
	}
	if text := l.Missing(); text != "" {
		p.Put("<p>%s.</p>", text)
	}
	more := ""
	if l.Cut {
		more = " (there is more in it)"
	}
	p.Put("\n<p class=\"dim mono\">%s%s</p></section>\n", l.Path, more)
}

func putCollected(p *markup.Page, m *Manifest) {
	p.Put("<section aria-labelledby=\"collected\"><h2 id=\"collected\">Collected</h2>\n<p>%s</p>\n", collected(m))
	if len(m.Collectors) > 0 {
		p.Put(`<div class="wide"><table><caption>Collectors</caption><thead><tr><th scope="col">Path</th><th scope="col">On</th><th scope="col">Taken</th><th scope="col">Content</th><th scope="col">Note</th></tr></thead>
<tbody>`)
		for _, c := range m.Collectors {
			taken := "-"
			if c.Applied {
				taken = strconv.Itoa(c.Taken)
			}
			p.Put("<tr><th scope=\"row\"><code>%s</code></th><td>%s</td><td>%s</td><td>%s</td><td>%s</td></tr>\n", Plain(c.Path), c.On, taken, size(c.Bytes), Plain(collectorNote(c)))
		}
		p.Put("</tbody></table></div>\n")
	}
	if len(m.Files) > 0 {
		what, more := "entries", ""
		if len(m.Files) == 1 {
			what = "entry"
		}
		if m.FilesMore > 0 {
			more = fmt.Sprintf(", and %d more that are not listed", m.FilesMore)
		}
		p.Put(`<details><summary>%d %s%s</summary><div class="wide"><table><thead><tr><th scope="col">Path</th><th scope="col">Taken</th><th scope="col">Note</th></tr></thead>
<tbody>`, len(m.Files), what, more)
		for _, f := range m.Files {
			p.Put("<tr><th scope=\"row\"><code>%s</code></th><td>%s</td><td>%s</td></tr>\n", Plain(f.Path), fileSize(f), Plain(fileNote(f)))
		}
		p.Put(`</tbody></table></div></details>`)
	}
	p.Put("</section>\n")
}

func putHooks(p *markup.Page, hooks []Hook) {
	if len(hooks) == 0 {
		return
	}
	p.Put(`<section aria-labelledby="hooks"><h2 id="hooks">Hooks</h2>
<div class="wide"><table><thead><tr><th scope="col">Stage</th><th scope="col">Outcome</th><th scope="col">Note</th></tr></thead>
<tbody>`)
	for _, h := range hooks {
		p.Put("<tr><th scope=\"row\">%s</th><td>%s</td><td>%s</td></tr>\n", h.Stage, h.State, Plain(h.note()))
	}
	p.Put("</tbody></table></div></section>\n")
}

func (r *Report) putHeld(p *markup.Page) {
	heading := "Still held"
	if r.running() {
		heading = "Mounts"
	}
	p.Put("<section aria-labelledby=\"held\"><h2 id=\"held\">%s</h2>\n<p>%s</p>\n", heading, r.held())
	if r.Custody.Held {
		p.Put(`<div class="wide"><table><thead><tr><th scope="col">Mounted on</th><th scope="col">Type</th><th scope="col">Used</th></tr></thead>
<tbody>`)
		for _, mt := range shown(r.Custody.Mounts) {
			p.Put("<tr><th scope=\"row\"><code>%s</code></th><td>%s</td><td>%s</td></tr>\n", mt.Target, mt.Type, usage(mt))
		}
		p.Put(`</tbody></table></div><p>Copy it out with <code>sandboxd cp %s:PATH .</code></p>`, r.Ref)
	}
	p.Put("</section>\n")
}

func limitOf(m *Manifest) int64 {
	if u := m.Counters.Memory; u != nil {
		return u.Limit
	}
	return 0
}

// curve is a line in a diagram of 600 by 120.
type curve struct {
	Title, Points, Top, From, To string
	Limit                        float64 // where the limit is; 0: it is not in the picture
}

const (
	curveWidth  = 600.0
	curveHeight = 120.0
)

// curves draws what was measured, if that is enough for a line.
func curves(s *Samples, limit int64) []curve {
	if s == nil || len(s.UnixMs) < 3 || len(s.CPU) != len(s.UnixMs) || len(s.Memory) != len(s.UnixMs) {
		return nil
	}
	n := len(s.UnixMs)
	memory, cpu := make([]float64, n), make([]float64, n)
	for i := range n {
		memory[i] = float64(s.Memory[i])
		if i > 0 {
			if ms := s.UnixMs[i] - s.UnixMs[i-1]; ms > 0 {
				cpu[i] = float64(s.CPU[i]-s.CPU[i-1]) / 10 / float64(ms) // percent of a CPU
			}
		}
	}
	cpu[0] = cpu[1]
	span := duration(time.Duration(s.UnixMs[n-1]-s.UnixMs[0]) * time.Millisecond)
	mem := draw("Memory", s.UnixMs, memory, func(v float64) string { return size(int64(v)) }, float64(limit))
	use := draw("CPU", s.UnixMs, cpu, func(v float64) string { return fmt.Sprintf("%.0f %%", v) }, 0)
	mem.From, use.From = span+" before", span+" before"
	mem.To, use.To = "last sample", "last sample"
	return []curve{mem, use}
}

func draw(title string, at []int64, values []float64, unit func(float64) string, limit float64) curve {
	top := 0.0
	for _, v := range values {
		top = max(top, v)
	}
	// A limit that is far away would press the line to the ground.
	c := curve{Title: title}
	if limit > 0 && limit <= 4*top {
		top = max(top, limit)
		c.Limit = curveHeight * (1 - limit/top)
		c.Limit = max(c.Limit, 0.5)
	}
	c.Top = unit(top)
	if top <= 0 {
		top = 1
	}
	span := float64(max(1, at[len(at)-1]-at[0]))
	var b strings.Builder
	for i, v := range values {
		fmt.Fprintf(&b, "%.1f,%.1f ", float64(at[i]-at[0])/span*curveWidth, curveHeight*(1-max(0, v)/top))
	}
	c.Points = strings.TrimSpace(b.String())
	return c
}

const pageStyle markup.Trusted = `:root { color-scheme: light dark; --fg: #1b1f24; --dim: #57606a; --bg: #fff; --box: #f4f6f8; --line: #d0d7de; --bad: #b3261e; --ink: #0b5cad }
@media (prefers-color-scheme: dark) {
 :root { --fg: #e6e8eb; --dim: #9da7b3; --bg: #14171a; --box: #1e2328; --line: #39424c; --bad: #ff8a80; --ink: #7ab8ff }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
.verdict { font-size: 1.15rem; margin: .5rem 0 1rem }
.bad { color: var(--bad) }
.dim { color: var(--dim) }
code, pre, td, .mono { font-family: ui-monospace, monospace; font-size: .875rem; overflow-wrap: anywhere }
td { overflow-wrap: break-word }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 }
dt { color: var(--dim) }
dd { margin: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
caption { text-align: left; color: var(--dim); padding-bottom: .25rem }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; vertical-align: top }
thead th { border-bottom: 1px solid var(--line); font-weight: 600 }
tbody th { font-weight: 400 }
pre { background: var(--box); padding: .75rem; margin: 0; white-space: pre-wrap; border-radius: 4px }
.stderr { color: var(--bad) }
figure { margin: 0 0 1rem }
svg { width: 100%; height: 8rem; background: var(--box); border-radius: 4px; display: block }
polyline { fill: none; stroke: var(--ink); stroke-width: 2; vector-effect: non-scaling-stroke }
.limit { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 6 4; vector-effect: non-scaling-stroke }
figcaption { display: flex; justify-content: space-between; gap: 1rem; color: var(--dim); font-size: .875rem }
`
