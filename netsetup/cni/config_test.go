package cni

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	tests := []struct {
		name, in string
		want     string // NAME VERSION PLUGIN…
		err      string
	}{
		{"list", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x"},{"type":"y"}]}`, "a 1.0.0 [x y]", ""},
		{"one plugin", `{"cniVersion":"0.3.1","name":"a","type":"x","ipam":{"type":"host-local"}}`, "a 0.3.1 [x]", ""},
		{"versions", `{"cniVersions":["0.4.0","1.1.0","1.0.0"],"name":"a","plugins":[{"type":"x"}]}`, "a 1.1.0 [x]", ""},
		{"versions of the future", `{"cniVersion":"1.0.0","cniVersions":["7.0.0"],"name":"a","plugins":[{"type":"x"}]}`, "a 1.0.0 [x]", ""},
		{"only a version of the future", `{"cniVersion":"7.0.0","name":"a","plugins":[{"type":"x"}]}`, "", `cniVersion "7.0.0" is not one of 0.3.1, 0.4.0, 1.0.0, 1.1.0`},
		{"old version", `{"cniVersion":"0.2.0","name":"a","type":"x"}`, "", `cniVersion "0.2.0" is not one of`},
		{"no version", `{"name":"a","type":"x"}`, "", `cniVersion "" is not one of`},
		{"no name", `{"cniVersion":"1.0.0","plugins":[{"type":"x"}]}`, "", "no name"},
		{"no name, one plugin", `{"cniVersion":"1.0.0","type":"x"}`, "", "no name"},
		{"path as a name", `{"cniVersion":"1.0.0","name":"../a","plugins":[{"type":"x"}]}`, "", "invalid characters found in network name"},
		{"name of another type", `{"cniVersion":"1.0.0","name":3,"plugins":[{"type":"x"}]}`, "", "invalid name type"},
		{"longest name", `{"cniVersion":"1.0.0","name":"` + strings.Repeat("a", 200) + `","type":"x"}`, strings.Repeat("a", 200) + " 1.0.0 [x]", ""},
		{"long name", `{"cniVersion":"1.0.0","name":"` + strings.Repeat("a", 201) + `","type":"x"}`, "", "has 201 bytes, more than 200"},
		{"no plugins", `{"cniVersion":"1.0.0","name":"a","plugins":[]}`, "", "no plugins"},
		{"no list of plugins", `{"cniVersion":"1.0.0","name":"a"}`, "", "no plugins"},
		{"plugins of another type", `{"cniVersion":"1.0.0","name":"a","plugins":{}}`, "", "invalid 'plugins' type"},
		{"plugin without type", `{"cniVersion":"1.0.0","name":"a","plugins":[{}]}`, "", "missing 'type'"},
		{"path as a type", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../../bin/sh"}]}`, "", "not the name of a program"},
		{"no JSON", `cniVersion: 1.0.0`, "", "invalid character"},
		{"nothing", ``, "", "unexpected end of JSON input"},
		{"null", `null`, "", "not a JSON object"},
		{"no object", `[]`, "", "cannot unmarshal array"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n, err := parse([]byte(tt.in), nothingMore)
			got := ""
			if err == nil {
				got = fmt.Sprint(n.Name, " ", n.Version, " ", n.Plugins)
			}
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("parse = %q, %v; want %q, %q", got, err, tt.want, tt.err)
			}
		})
	}
}

func nothingMore(string) ([]json.RawMessage, error) { return nil, nil }

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x","capabilities":{"ips":true}}],"disableGC":"true"}`))
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"a","type":"x"}`))
	f.Add([]byte(`{"cniVersions":["1.1.0"],"name":"a","loadOnlyInlinedPlugins":true,"plugins":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := parse(data, func(string) ([]json.RawMessage, error) { return []json.RawMessage{[]byte(`{"type":"more"}`)}, nil })
		if err != nil {
			return
		}
		// What a plan keeps must be understood when it is read again.
		l, err := parseList(n.raw)
		if err != nil || l.Name != n.Name || l.CNIVersion != n.Version || len(l.Plugins) != len(n.Plugins) {
			t.Errorf("%q became %s: %v", data, n.raw, err)
		}
	})
}

func TestLoad(t *testing.T) {
	r := newRig(t)
	list := func(name string) string {
		return `{"cniVersion":"1.0.0","name":"` + name + `","plugins":[{"type":"x"}]}`
	}
	r.config("30-c.json", `{"cniVersion":"1.0.0","name":"c","type":"x"}`)
	r.config("20-b.conf", `{"cniVersion":"1.0.0","name":"b","type":"x"}`)
	r.config("10-broken.conflist", `{`)
	r.config("40-again.conflist", list("b"))
	r.config("00-readme.txt", "not for us")
	r.config("50-d.conflist", list("d"))
	conf := filepath.Join(r.dir, "conf")
	for _, dir := range []string{"05-dir.conf", "d", "b"} {
		if err := os.Mkdir(filepath.Join(conf, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.config("d/2.conf", `{"type":"z"}`)
	r.config("d/1.conf", `{"type":"y"}`)
	r.config("d/0.txt", `not for us`)
	if err := unix.Mkfifo(filepath.Join(conf, "60-fifo.conf"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(conf, "70-dangling.conf")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(func() string { r.config("80-big.conf", ""); return filepath.Join(conf, "80-big.conf") }(), maxConfig+1); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range r.Networks() {
		got = append(got, fmt.Sprint(n.Name, n.File, n.Plugins))
	}
	if want := []string{"b20-b.conf[x]", "c30-c.json[x]", "d50-d.conflist[x y z]"}; !slices.Equal(got, want) {
		t.Errorf("networks %q, want %q", got, want)
	}
	got = nil
	for _, p := range r.Problems() {
		got = append(got, p.Error())
	}
	want := []string{"10-broken.conflist: unexpected end of JSON input", `40-again.conflist: network "b" is in 20-b.conf already`,
		"60-fifo.conf: not a regular file", "70-dangling.conf: open " + conf + "/70-dangling.conf: no such file or directory",
		"80-big.conf: larger than 1048576 bytes"}
	if !slices.Equal(got, want) {
		t.Errorf("problems %q, want %q", got, want)
	}
	for _, w := range want {
		file, _, _ := strings.Cut(w, ":")
		eventually(t, func() bool { return strings.Count(r.log.String(), "file="+conf+"/"+file+" ") == 1 }, func() string { return "not logged once: " + w + "\n" + r.log.String() })
	}
}

// A change is seen by the next request, however the file was changed.
func TestWatch(t *testing.T) {
	r := newRig(t)
	conf := filepath.Join(r.dir, "conf")
	text := func(name string) string {
		return `{"cniVersion":"1.0.0","name":"` + name + `","plugins":[{"type":"x"}]}`
	}
	want := func(names string) {
		t.Helper()
		var got []string
		for _, n := range r.Networks() {
			got = append(got, n.Name+strings.Join(n.Plugins, ""))
		}
		if strings.Join(got, " ") != names {
			t.Errorf("networks %q, want %q", got, names)
		}
	}
	do := func(errs ...error) {
		t.Helper()
		for _, err := range errs {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	want("")
	for range 20 { // the goroutine that watches may be first, or second
		r.config("a.conflist", text("a"))
		want("ax")
		r.config("a.conflist", text("b"))
		want("bx")
		do(os.Remove(filepath.Join(conf, "a.conflist")))
		want("")
	}
	do(os.WriteFile(filepath.Join(r.dir, "new"), []byte(text("c")), 0o644), os.Rename(filepath.Join(r.dir, "new"), filepath.Join(conf, "c.conflist")))
	want("cx")
	do(os.Rename(filepath.Join(conf, "c.conflist"), filepath.Join(r.dir, "old")))
	want("")
	do(os.Link(filepath.Join(r.dir, "old"), filepath.Join(conf, "c.conflist")))
	want("cx")
	do(os.Mkdir(filepath.Join(conf, "c"), 0o755), os.WriteFile(filepath.Join(conf, "c", "1.conf"), []byte(`{"type":"y"}`), 0o644))
	want("cxy")
	do(os.Remove(filepath.Join(conf, "c", "1.conf")))
	want("cx")
	do(os.Rename(conf, conf+".away"))
	want("")
	do(os.Mkdir(conf, 0o755))
	want("")
	r.config("d.conflist", text("d"))
	want("dx")
	do(os.RemoveAll(conf))
	want("")
	do(os.Rename(conf+".away", conf))
	want("cx")
	do(os.RemoveAll(conf), os.WriteFile(conf, nil, 0o644))
	want("")
	if p := r.Problems(); len(p) != 1 || !strings.Contains(p[0].Error(), "not a directory") {
		t.Errorf("problems %v", p)
	}
	do(os.Remove(conf), os.Mkdir(conf, 0o755))
	r.config("e.conflist", text("e"))
	want("ex")
	r.config("f.conflist", "{")
	eventually(t, func() bool { return strings.Contains(r.log.String(), "f.conflist") }, func() string { return "a broken file is not logged: " + r.log.String() })
	want("ex")
}
