package markup

import (
	"errors"
	"testing"
)

type named string

func TestPut(t *testing.T) {
	var p Page
	p.Put(`<p class="%v">%v %v %v</p>`, `"><b onclick='x()'>`, named("</p><script>"), errors.New("a & b\x00"), Trusted("<br>"))
	p.Put("%d of %.1f%%, %v\n", 3, 99.95, "100%d")
	const want = `<p class="&#34;&gt;&lt;b onclick=&#39;x()&#39;&gt;">&lt;/p&gt;&lt;script&gt; a &amp; b` + "\uFFFD" + ` <br></p>3 of 100.0%, 100%d` + "\n"
	if got := string(p.Bytes()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
