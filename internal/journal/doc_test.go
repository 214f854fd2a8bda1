package journal

import (
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestDocumentation compares docs/events.md with what is written.
func TestDocumentation(t *testing.T) {
	b, err := os.ReadFile("../../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	before, after, ok := strings.Cut(doc, "| type | when |")
	if !ok {
		t.Fatal("no table of types")
	}
	var fields, kinds []string
	for f := range reflect.TypeFor[Event]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields = append(fields, name)
	}
	for _, typ := range types {
		kinds = append(kinds, string(typ))
	}
	for _, table := range []struct {
		text string
		want []string
	}{{before, fields}, {after, kinds}} {
		got := firstColumn(table.text)
		slices.Sort(got)
		slices.Sort(table.want)
		if diff := cmp.Diff(table.want, got); diff != "" {
			t.Errorf("documented (-what is written +what the page says):\n%s", diff)
		}
	}
	for key := range filterKeys {
		if !strings.Contains(doc[strings.Index(doc, "## Filters"):], "`"+key+"`") {
			t.Errorf("filter key %s is not documented", key)
		}
	}
	// The example is an event, with every field that it has known.
	example := regexp.MustCompile("(?s)```json\n(.*?)```").FindStringSubmatch(doc)
	d := json.NewDecoder(strings.NewReader(example[1]))
	d.DisallowUnknownFields()
	var e Event
	if err := d.Decode(&e); err != nil || e.Type != Exit || e.Exit == nil {
		t.Errorf("the example: %+v, %v", e, err)
	}
}

// firstColumn returns the names in the first column of tables.
func firstColumn(text string) []string {
	var names []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*`) \\|").FindAllStringSubmatch(text, -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			names = append(names, name[1])
		}
	}
	return names
}
