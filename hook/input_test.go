package hook

import (
	"encoding/json"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The schema in docs has the fields that there are, and no others.
func TestSchemaIsComplete(t *testing.T) {
	b, err := os.ReadFile("../docs/hooks/input.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	compare(t, "input", reflect.TypeFor[Input](), schema)
}

// compare compares the fields of a struct with the properties of an object.
func compare(t *testing.T, path string, typ reflect.Type, schema map[string]any) {
	t.Helper()
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	if typ.Kind() != reflect.Struct || typ.PkgPath() == "time" {
		return
	}
	props, _ := schema["properties"].(map[string]any)
	required, _ := schema["required"].([]any)
	var names []string
	for _, f := range reflect.VisibleFields(typ) {
		tag, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous || tag == "" || tag == "-" {
			continue
		}
		names = append(names, tag)
		prop, ok := props[tag].(map[string]any)
		if !ok {
			t.Errorf("%s.%s is not in the schema", path, tag)
			continue
		}
		if must := !strings.Contains(opts, "omit"); must != slices.Contains(required, any(tag)) {
			t.Errorf("%s.%s: the schema requires it: %t", path, tag, !must)
		}
		compare(t, path+"."+tag, f.Type, prop)
	}
	for name := range props {
		if !slices.Contains(names, name) {
			t.Errorf("%s.%s is in the schema only", path, name)
		}
	}
	if schema["additionalProperties"] != false {
		t.Errorf("%s lets other fields pass", path)
	}
}
