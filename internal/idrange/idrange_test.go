package idrange

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestFree(t *testing.T) {
	all := Range{0, 1<<32 - 1}
	for _, tt := range []struct {
		name   string
		used   []Range
		subids []string
		want   uint32
		err    error
	}{
		{name: "first", want: 524288},
		{name: "next", used: []Range{{524288, 65536}}, want: 589824},
		{name: "gap", used: []Range{{524288, 65536}, {655360, 65536}}, want: 589824},
		{name: "last id of a range", used: []Range{{589823, 1}}, want: 589824},
		{name: "just below", used: []Range{{524287, 1}}, want: 524288},
		{name: "just above", used: []Range{{589824, 1}}, want: 524288},
		{name: "not aligned", used: []Range{{524300, 65536}}, want: 655360},
		{name: "empty range", used: []Range{{524300, 0}}, want: 524288},
		{name: "subuid and subgid", subids: []string{"a:100000:65536\nb:524288:65536\n", "# comment\nc:589824:65536\nd:x:1\ne:655360:y\n\n f:655360:1 "}, want: 720896},
		{name: "overflow", used: []Range{{4294967295, 4294967295}}, want: 524288},
		{name: "to the end", used: []Range{{524288, 1878982656 - 524288}}, want: 1878982656},
		{name: "all but less than one", used: []Range{{524288, 1878982657 - 524288}}, err: ErrNone},
		{name: "none", used: []Range{all}, err: ErrNone},
	} {
		var rs []io.Reader
		for _, s := range tt.subids {
			rs = append(rs, strings.NewReader(s))
		}
		got, err := Free(tt.used, rs...)
		want := Range{tt.want, Size}
		if tt.err != nil {
			want = Range{}
		}
		if got != want || !errors.Is(err, tt.err) {
			t.Errorf("%s: Free = %v, %v, want %v, %v", tt.name, got, err, want, tt.err)
		}
	}
	boom := errors.New("boom")
	if _, err := Free(nil, iotest.ErrReader(boom)); !errors.Is(err, boom) {
		t.Errorf("Free = %v, want the reader's error", err)
	}
}
