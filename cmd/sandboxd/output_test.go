package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/sandbox"
)

// What a member has chosen does nothing to a terminal in JSON either, and is what it was.
func TestJSONOnATerminal(t *testing.T) {
	const text = "CSI \u009b31m, escape \x1b[31m, delete \x7f, backwards \u202e, a tag \U000e0041; ä €\n<b> \U0001f642"
	for _, write := range []func(*bytes.Buffer) error{
		func(b *bytes.Buffer) error { return writeJSON(b, sandbox.Event{Reason: text}) },
		func(b *bytes.Buffer) error { return writeEventJSON(b, &sandbox.Event{Reason: text}) },
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Fatal(err)
		}
		if strings.ContainsAny(b.String(), "\u009b\x1b\x7f\u202e\U000e0041") {
			t.Errorf("a terminal gets %q", &b)
		}
		for _, plain := range []string{"ä €", "<b> \U0001f642"} {
			if !strings.Contains(b.String(), plain) {
				t.Errorf("%q is not in %q", plain, &b)
			}
		}
		var got sandbox.Event
		if err := json.Unmarshal(b.Bytes(), &got); err != nil || got.Reason != text {
			t.Errorf("decoded %q, %v", got.Reason, err)
		}
	}
}

// A command with a script in it stays one line, and says where the lines of the script end.
func TestCommandOfSeveralLines(t *testing.T) {
	if got, want := command([]string{"sh", "-c", "a\n\tb \x1b[2J \u202e"}, 40), `sh -c a\n b \x1b[2J \u202e`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := command([]string{"a\nb"}, 3), `a\…`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
