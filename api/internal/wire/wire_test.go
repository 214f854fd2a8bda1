package wire

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/sandbox"
)

// fill sets every field of the struct at v, however deep, to something that is
// not its default. A field that a conversion forgets is then seen.
func fill(t *testing.T, v reflect.Value, n *int64) {
	t.Helper()
	*n++
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		*x = time.Unix(*n, 5).UTC()
		return
	case *namespace.Kind:
		*x = namespace.UTS
		return
	case *namespace.Source:
		*x = namespace.Source{From: namespace.Member, Member: fmt.Sprint("m", *n)}
		return
	case *netip.Addr:
		*x = netip.AddrFrom4([4]byte{10, 0, byte(*n >> 8), byte(*n)})
		return
	case *netip.Prefix:
		*x = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(*n >> 8), byte(*n)}), 24)
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprint("s", *n))
	case reflect.Int, reflect.Int64:
		v.SetInt(*n)
	case reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(t, v.Index(i), n)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(t, k, n)
		fill(t, e, n)
		v.SetMapIndex(k, e)
	default:
		t.Fatalf("%s: no way to fill it", v.Type())
	}
}

func filled[T any](t *testing.T) T {
	t.Helper()
	var v T
	var n int64
	fill(t, reflect.ValueOf(&v).Elem(), &n)
	return v
}

var (
	sameAddr   = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	samePrefix = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
)

func TestEveryFieldSurvives(t *testing.T) {
	cfg := filled[sandbox.Config](t)
	if got, err := ToConfig(FromConfig(cfg)); err != nil {
		t.Error(err)
	} else if d := cmp.Diff(cfg, got, sameAddr, samePrefix); d != "" {
		t.Errorf("sandbox configuration (-want +got):\n%s", d)
	}
	mcfg := filled[sandbox.MemberConfig](t)
	if got, err := ToMemberConfig(FromMemberConfig(mcfg)); err != nil {
		t.Error(err)
	} else if d := cmp.Diff(mcfg, got); d != "" {
		t.Errorf("member configuration (-want +got):\n%s", d)
	}
	info := filled[sandbox.Info](t)
	if d := cmp.Diff(info, ToInfo(FromInfo(info)), sameAddr, samePrefix); d != "" {
		t.Errorf("sandbox info (-want +got):\n%s", d)
	}
	e := filled[sandbox.Exit](t)
	if d := cmp.Diff(e, ToExit(FromExit(e))); d != "" {
		t.Errorf("exit record (-want +got):\n%s", d)
	}
}

func TestEventsAndFindingsSurvive(t *testing.T) {
	e := filled[sandbox.Event](t)
	if d := cmp.Diff(e, ToEvent(FromEvent(e))); d != "" {
		t.Errorf("event (-want +got):\n%s", d)
	}
	if e := (sandbox.Event{Time: e.Time}); ToEvent(FromEvent(e)).Exit != nil {
		t.Error("an exit record is made up")
	}
	f := filled[[]garbage.Finding](t)
	if d := cmp.Diff(f, ToFindings(FromFindings(f))); d != "" {
		t.Errorf("findings (-want +got):\n%s", d)
	}
	if f := ToFindings(FromFindings([]garbage.Finding{{Kind: garbage.Link}})); !f[0].Since.IsZero() {
		t.Errorf("a time is made up: %+v", f)
	}
	after := uint64(7)
	for _, q := range []sandbox.EventQuery{
		{}, {After: &after}, {Since: e.Time}, {New: true, Follow: true}, {Filter: sandbox.EventFilter{"type": {"exit", "oom"}, "attr.a": {"b=c"}}},
	} {
		got, err := ToEventQuery(FromEventQuery(q))
		if q.Filter == nil {
			q.Filter = sandbox.EventFilter{}
		}
		if d := cmp.Diff(q, got); err != nil || d != "" {
			t.Errorf("query %v (-want +got):\n%s", err, d)
		}
	}
	if _, err := ToEventQuery(&pb.ReadEventsRequest{Filter: []string{"colour=red"}}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("an unknown filter: %v", err)
	}
	gap := &sandbox.EventGap{After: 1, First: 5, Last: 9}
	var got *sandbox.EventGap
	if err := FromStatus(ToStatus(fmt.Errorf("read: %w", gap))); !errors.As(err, &got) || *got != *gap || !errors.Is(err, sandbox.ErrEventGap) {
		t.Errorf("a gap became %v", err)
	}
}

// Whether a list is given at all matters: no list means the default.
func TestShareMayBeEmpty(t *testing.T) {
	for _, want := range [][]namespace.Kind{nil, {}} {
		got, err := ToConfig(FromConfig(sandbox.Config{Share: want}))
		if err != nil || (got.Share == nil) != (want == nil) || len(got.Share) != 0 {
			t.Errorf("share %#v became %#v, %v", want, got.Share, err)
		}
	}
}

func TestBadWords(t *testing.T) {
	if _, err := ToConfig(&pb.SandboxConfig{Share: &pb.NamespaceKinds{Kinds: []string{"nett"}}}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("kind nett: %v", err)
	}
	for k, v := range map[string]string{"nett": "host", "net": "hots"} {
		if _, err := ToMemberConfig(&pb.MemberConfig{Namespaces: map[string]string{k: v}}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s=%s: %v", k, v, err)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		err  error
		is   error // what the error matches after the way there and back
		code codes.Code
	}{
		{fmt.Errorf("sandbox web: %w", sandbox.ErrNotFound), sandbox.ErrNotFound, codes.NotFound},
		{fmt.Errorf("sandbox web: %w", sandbox.ErrExists), sandbox.ErrExists, codes.AlreadyExists},
		{&sandbox.OpError{Op: "start", Ref: "a/b", Err: sandbox.ErrState}, sandbox.ErrState, codes.FailedPrecondition},
		{fmt.Errorf("%w: nonsense", sandbox.ErrInvalid), sandbox.ErrInvalid, codes.InvalidArgument},
		{fmt.Errorf("%w: quitting", ErrUnavailable), ErrUnavailable, codes.Unavailable},
		{context.Canceled, context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, context.DeadlineExceeded, codes.DeadlineExceeded},
		{errors.New("disk is full"), nil, codes.Unknown},
		{fmt.Errorf("exec a/b: %w", procid.ErrGone), sandbox.ErrState, codes.FailedPrecondition},
		{&sandbox.OpError{Op: "start", Err: &sandbox.StartError{Text: "execute nope", Errno: unix.ENOENT}}, os.ErrNotExist, codes.FailedPrecondition},
	} {
		st := ToStatus(tt.err)
		if c := status.Code(st); c != tt.code {
			t.Errorf("ToStatus(%v) has code %v, want %v", tt.err, c, tt.code)
		}
		back := FromStatus(st)
		if back.Error() != tt.err.Error() {
			t.Errorf("text %q became %q", tt.err, back)
		}
		if tt.is != nil && !errors.Is(back, tt.is) {
			t.Errorf("%v came back as something that does not match %v", tt.err, tt.is)
		}
		for _, k := range kinds {
			if k.err != tt.is && errors.Is(back, k.err) {
				t.Errorf("%v came back matching %v", tt.err, k.err)
			}
		}
	}
	back := FromStatus(ToStatus(fmt.Errorf("run: %w", &sandbox.StartError{Text: "execute x", Errno: unix.EACCES})))
	if se, ok := errors.AsType[*sandbox.StartError](back); !ok || se.Errno != unix.EACCES || se.Text != "execute x" {
		t.Errorf("start error came back as %#v", back)
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil {
		t.Error("nil is not nil")
	}
}
