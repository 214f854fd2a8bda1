package collect

import (
	"fmt"
	"html/template"
	"io"
	"strings"
	"sync"
	"time"
)

// WriteHTML writes the report as a page that needs nothing else: no script, and
// nothing from anywhere.
func (r *Report) WriteHTML(w io.Writer) error {
	m := r.Manifest
	return page().Execute(w, map[string]any{
		"R": r, "M": m, "Command": strings.Join(m.Command, " "), "Rows": counterRows(m), "Held": r.held(),
		"Mounts": shown(r.Custody.Mounts), "Collected": collected(m), "Lifetime": lifetime(m), "Curves": curves(m.Samples, limitOf(m)),
		"Bad": failed(m.Exit) && m.Exit != nil,
	})
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

// page is parsed when it is needed, which is not at the start of each command.
var page = sync.OnceValue(func() *template.Template {
	return template.Must(template.New("page").Funcs(template.FuncMap{
		"when": when, "size": size, "usage": usage, "dash": dash, "fileSize": fileSize,
	}).Parse(pageText))
})

const pageText = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Postmortem of {{.R.Ref}}</title>
<style>
:root { color-scheme: light dark; --fg: #1b1f24; --dim: #57606a; --bg: #fff; --box: #f4f6f8; --line: #d0d7de; --bad: #b3261e; --ink: #0b5cad }
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
</style>
</head>
<body>
<header>
<h1>{{.R.Ref}}</h1>
<p class="verdict{{if .Bad}} bad{{end}}">{{.R.Verdict}}</p>
</header>
<main>
<dl>
<dt>Command</dt><dd><code>{{.Command}}</code></dd>
{{with .M.Exit}}<dt>Ended</dt><dd>{{when .FinishedAt $.R.At}}{{with $.Lifetime}}, after {{.}}{{end}}</dd>
<dt>Exit</dt><dd>code {{.Code}}, {{.Reason}}</dd>{{else}}<dt>State</dt><dd>{{.M.State}}</dd>{{end}}
<dt>Started</dt><dd>{{when .M.StartedAt .R.At}}</dd>
<dt>Sandbox</dt><dd>{{.M.Sandbox}} <span class="dim mono">{{.M.SandboxID}}</span></dd>
<dt>Member</dt><dd>{{.M.Member}} <span class="dim mono">{{.M.MemberID}}</span></dd>
</dl>
{{with .Curves}}<section aria-labelledby="curves"><h2 id="curves">The last minutes</h2>
{{range .}}<figure>
<svg viewBox="0 0 600 120" preserveAspectRatio="none" role="img" aria-label="{{.Title}}: at most {{.Top}}, {{.From}} to the {{.To}}"><polyline points="{{.Points}}"/>{{if .Limit}}<line class="limit" x1="0" x2="600" y1="{{.Limit}}" y2="{{.Limit}}"/>{{end}}</svg>
<figcaption><span>{{.From}}</span><span>{{.Title}}, top of the picture {{.Top}}{{if .Limit}}; dashed: the limit{{end}}</span><span>{{.To}}</span></figcaption>
</figure>{{end}}</section>{{end}}
{{with .Rows}}<section aria-labelledby="counters"><h2 id="counters">Counters against limits</h2>
<div class="wide"><table><thead><tr><th scope="col">What</th><th scope="col">Used</th><th scope="col">Peak</th><th scope="col">Limit</th><th scope="col">Note</th></tr></thead>
<tbody>{{range .}}<tr><th scope="row">{{.What}}</th><td>{{.Used}}</td><td>{{dash .Peak}}</td><td>{{dash .Limit}}</td><td>{{.Note}}</td></tr>
{{end}}</tbody></table></div></section>{{end}}
<section aria-labelledby="words"><h2 id="words">Last words</h2>
{{with .M.Log.Lines}}<pre>{{range .}}<span class="dim">{{.Time.Format "15:04:05.000"}}</span> <span class="{{.Stream}}">{{.Text}}</span>
{{end}}</pre>{{else}}<p class="dim">It has written nothing.</p>{{end}}
<p class="dim mono">{{.M.Log.Path}}{{if .M.Log.Cut}} (there is more in it){{end}}</p></section>
<section aria-labelledby="collected"><h2 id="collected">Collected</h2>
<p>{{.Collected}}</p>
{{with .M.Collectors}}<div class="wide"><table><caption>Collectors</caption><thead><tr><th scope="col">Path</th><th scope="col">On</th><th scope="col">Taken</th><th scope="col">Content</th><th scope="col">Note</th></tr></thead>
<tbody>{{range .}}<tr><th scope="row"><code>{{.Path}}</code></th><td>{{.On}}</td><td>{{if .Applied}}{{.Taken}}{{else}}does not apply{{end}}</td><td>{{size .Bytes}}</td><td>{{.Why}}</td></tr>
{{end}}</tbody></table></div>{{end}}
{{with .M.Files}}<details><summary>{{len .}} {{if eq (len .) 1}}entry{{else}}entries{{end}}{{if $.M.FilesMore}}, and {{$.M.FilesMore}} more that are not listed{{end}}</summary><div class="wide"><table><thead><tr><th scope="col">Path</th><th scope="col">Taken</th><th scope="col">Note</th></tr></thead>
<tbody>{{range .}}<tr><th scope="row"><code>{{.Path}}</code></th><td>{{fileSize .}}</td><td>{{.Why}}</td></tr>
{{end}}</tbody></table></div></details>{{end}}</section>
<section aria-labelledby="held"><h2 id="held">Still held</h2>
<p>{{.Held}}</p>
{{if .R.Custody.Held}}<div class="wide"><table><thead><tr><th scope="col">Mounted on</th><th scope="col">Type</th><th scope="col">Used</th></tr></thead>
<tbody>{{range .Mounts}}<tr><th scope="row"><code>{{.Target}}</code></th><td>{{.Type}}</td><td>{{usage .}}</td></tr>
{{end}}</tbody></table></div><p>Copy it out with <code>sandboxd cp {{.R.Ref}}:PATH .</code></p>{{end}}</section>
{{with .M.Unknown}}<section aria-labelledby="unknown"><h2 id="unknown">Not known</h2><ul>{{range .}}<li>{{.}}</li>{{end}}</ul></section>{{end}}
</main>
<footer class="dim"><p>Made {{.R.At.Format "2006-01-02 15:04:05 UTC"}} from what was known {{.M.CollectedAt.Format "2006-01-02 15:04:05 UTC"}}</p></footer>
</body>
</html>
`
