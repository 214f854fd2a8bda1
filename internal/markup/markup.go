// Package markup writes pages of HTML in which nothing that is shown can be taken
// for markup.
//
// It does the little that two pages need. Package html/template does more, but
// calls methods by their names, and in a program that may do so the linker keeps
// the exported methods of all types: 3 MB of the daemon.
package markup

import (
	"bytes"
	"fmt"
	"strings"
)

// Page is a page of HTML in the making. Its zero value is empty.
type Page struct{ b bytes.Buffer }

// Trusted is markup, or a style, and is written as it is: nothing that anybody
// else has chosen may be in it.
type Trusted string

// Put writes a format of package fmt. What args hold is escaped, unless it is
// [Trusted], so that it is good as text and in the quoted value of an attribute
// that is neither a URL, a style nor a script.
func (p *Page) Put(format string, args ...any) {
	safe := make([]any, len(args))
	for i, a := range args {
		switch a := a.(type) {
		case int, float64, Trusted:
			safe[i] = a
		default:
			safe[i] = escape.Replace(fmt.Sprint(a))
		}
	}
	fmt.Fprintf(&p.b, format, safe...)
}

// Bytes returns what has been written.
func (p *Page) Bytes() []byte { return p.b.Bytes() }

var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&#34;", "'", "&#39;", "\x00", "\uFFFD")
