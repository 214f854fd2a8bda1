package main

import (
	"testing"

	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/sandbox"
)

// What was asked for is collected, and unasked what there is to say of a failure.
func TestCollects(t *testing.T) {
	rules := []request.Collect{{Path: "/out"}}
	for _, tt := range []struct {
		name string
		m    sandbox.MemberRecord
		want bool
	}{
		{"success", sandbox.MemberRecord{Exit: &sandbox.Exit{Known: true}}, false},
		{"failure", sandbox.MemberRecord{Exit: &sandbox.Exit{Known: true, Code: 1}}, true},
		{"unknown", sandbox.MemberRecord{Exit: &sandbox.Exit{Code: -1}}, true},
		{"not executed", sandbox.MemberRecord{Exit: &sandbox.Exit{Known: true, Code: 127}, StartError: "execute x: no such file"}, false},
		{"success, asked", sandbox.MemberRecord{Exit: &sandbox.Exit{Known: true}, Config: sandbox.MemberConfig{Collect: rules}}, true},
		{"not executed, asked", sandbox.MemberRecord{Exit: &sandbox.Exit{Known: true, Code: 127}, StartError: "execute x", Config: sandbox.MemberConfig{Collect: rules}}, true},
	} {
		if got := new(node).Collects(&tt.m); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
		}
	}
}
