package web

import (
	"time"

	"github.com/sandboxd/sandboxd/internal/markup"
)

// html returns the page.
func (v *view) html() []byte {
	p := new(markup.Page)
	p.Put(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>sandboxd`)
	if v.Recovered {
		p.Put(`: %d sandboxes`, v.Total)
	}
	p.Put(`</title>
<style>%s</style>
</head>
<body>
<header>
<h1>sandboxd</h1>
<p>`, markup.Trusted(style))
	if v.Version != "" {
		p.Put(`Version %s, `, v.Version)
	}
	p.Put(`as of %s. Load the page again to see what is new.</p>
<nav aria-label="Also here"><ul>
<li><a href="/metrics">Metrics</a></li><li><a href="/healthz">Health</a></li><li><a href="/readyz">Readiness</a></li>`, moment(v.At, "2006-01-02 15:04:05 UTC"))
	if v.Pprof {
		p.Put(`<li><a href="/debug/pprof/">Profiles</a></li>`)
	}
	p.Put(`
</ul></nav>
</header>
<main>
`)
	if v.Recovered {
		v.putSums(p)
		v.putSandboxes(p)
		v.putExits(p)
		if v.HaveGC {
			v.putGarbage(p)
		}
	} else {
		p.Put(`<p class="note bad">The daemon is taking up what an earlier one has left. Sandboxes are shown when that is done.</p>
`)
	}
	p.Put(`</main>
</body>
</html>
`)
	return p.Bytes()
}

// moment is a time as people read it and as programs do. t is in UTC.
func moment(t time.Time, layout string) markup.Trusted {
	return markup.Trusted(`<time datetime="` + t.Format("2006-01-02T15:04:05Z") + `">` + t.Format(layout) + `</time>`)
}

// badClass is the class of what somebody should look at.
func badClass(bad bool) markup.Trusted {
	if bad {
		return ` class="bad"`
	}
	return ""
}

func (v *view) putSums(p *markup.Page) {
	p.Put(`<dl class="sums">
<div><dt>Sandboxes</dt><dd>%d</dd></div>
<div><dt>Members</dt><dd>%d</dd></div>
<div><dt>Running</dt><dd>%d</dd></div>
<div><dt>In custody</dt><dd>%d</dd></div>
</dl>
`, v.Total, v.Members, v.Running, v.Held)
}

func (v *view) putSandboxes(p *markup.Page) {
	p.Put(`<section aria-labelledby="sandboxes">
<h2 id="sandboxes">Sandboxes</h2>
`)
	if len(v.Sandboxes) == 0 {
		p.Put("<p>There are none.</p>\n</section>\n")
		return
	}
	p.Put(`<p>Each table shows who is in which namespace. Equal letters in one column are one and the same namespace; <span class="ns host">H</span> is the host’s, <span class="ns gone">–</span> is gone.</p>
`)
	for _, s := range v.Sandboxes {
		s.put(p)
	}
	if v.Left > 0 {
		p.Put(`<p class="note">%d more are not shown here: <code>sandboxd ls</code> shows all.</p>
`, v.Left)
	}
	p.Put("</section>\n")
}

func (s *sandboxView) put(p *markup.Page) {
	state := "state"
	if s.Bad {
		state += " bad"
	}
	p.Put(`<article aria-labelledby="s-%s">
<h3 id="s-%s">%s <span class="%s">%s</span></h3>
<p class="facts">%s · %s old · network %s`, s.ID, s.ID, s.Name, state, s.State, s.ID, s.Age, s.Network.Mode)
	if s.Reason != "" {
		p.Put(` · %s`, s.Reason)
	}
	p.Put(`</p>
<div class="wide" role="group" aria-label="Namespaces of %s" tabindex="0"><table>
<caption class="unseen">Namespaces of %s</caption>
<thead><tr><th scope="col">Process</th><th scope="col">State</th>`, s.Name, s.Name)
	for _, k := range s.Grid.Kinds {
		p.Put(`<th scope="col">%s</th>`, k)
	}
	p.Put("</tr></thead>\n<tbody>\n")
	for _, r := range s.Grid.Rows {
		class := markup.Trusted("")
		if r.Pause {
			class = ` class="pause"`
		}
		p.Put(`<tr%s><th scope="row">%s</th><td%s>%s</td>`, class, r.Name, badClass(r.Bad), r.State)
		for _, c := range r.Cells {
			if c.Letter == "" {
				p.Put(`<td><small>not held</small></td>`)
				continue
			}
			p.Put(`<td><span class="ns %s">%s</span> <small>%s</small></td>`, c.Class, c.Letter, c.Source)
		}
		p.Put("</tr>\n")
	}
	p.Put("</tbody>\n</table></div>\n</article>\n")
}

func (v *view) putExits(p *markup.Page) {
	p.Put(`<section aria-labelledby="exits">
<h2 id="exits">Exits of the last hour</h2>
`)
	if v.ExitsErr != "" {
		p.Put("<p class=\"note bad\">%s</p>\n", v.ExitsErr)
	}
	if len(v.Exits) == 0 {
		p.Put("<p>There were none.</p>\n</section>\n")
		return
	}
	p.Put(`<div class="wide" role="group" aria-label="Exits of the last hour" tabindex="0"><table>
<caption>Members that have ended, newest first</caption>
<thead><tr><th scope="col">Member</th><th scope="col">How</th><th scope="col">Ago</th><th scope="col">At (UTC)</th></tr></thead>
<tbody>
`)
	for _, e := range v.Exits {
		p.Put("<tr><th scope=\"row\">%s/%s</th><td%s>%s</td><td>%s</td><td>%s</td></tr>\n", e.Sandbox, e.Member, badClass(e.Bad), e.How, e.When, moment(e.At, "15:04:05"))
	}
	p.Put("</tbody>\n</table></div>\n</section>\n")
}

func (v *view) putGarbage(p *markup.Page) {
	p.Put(`<section aria-labelledby="garbage">
<h2 id="garbage">Waiting for garbage collection</h2>
`)
	switch {
	case v.LastGC.IsZero():
		p.Put("<p>There has been no garbage collection yet.</p>\n")
	case len(v.Waiting) == 0:
		p.Put("<p>Nothing, as of %s.</p>\n", moment(v.LastGC, "15:04:05 UTC"))
	default:
		p.Put(`<div class="wide" role="group" aria-label="Waiting for garbage collection" tabindex="0"><table>
<caption>What the garbage collection of %s UTC could not remove</caption>
<thead><tr><th scope="col">Kind</th><th scope="col">Name</th><th scope="col">Why it is garbage</th><th scope="col">Action</th></tr></thead>
<tbody>
`, v.LastGC.Format("15:04:05"))
		for _, f := range v.Waiting {
			action := string(f.Action)
			if f.Err != "" {
				action += ": " + f.Err
			}
			p.Put("<tr><th scope=\"row\">%s</th><td>%s</td><td>%s</td><td%s>%s</td></tr>\n", f.Kind, f.Name, f.Reason, badClass(f.Err != ""), action)
		}
		p.Put("</tbody>\n</table></div>\n")
	}
	p.Put("</section>\n")
}
