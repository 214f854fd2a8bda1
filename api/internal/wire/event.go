package wire

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/journal"
	"github.com/sandboxd/sandboxd/sandbox"
)

// FromEvent makes a message of an event.
func FromEvent(e sandbox.Event) *pb.Event {
	out := &pb.Event{
		Seq: e.Seq, Time: timestamppb.New(e.Time), Type: string(e.Type),
		Sandbox: e.Sandbox, SandboxName: e.SandboxName, Member: e.Member, MemberName: e.MemberName,
		Rev: e.Rev, From: e.From, To: e.To, Reason: e.Reason, Attrs: e.Attrs,
	}
	if e.Exit != nil {
		out.Exit = FromExit(*e.Exit)
	}
	return out
}

// ToEvent is the inverse of [FromEvent].
func ToEvent(m *pb.Event) sandbox.Event {
	e := sandbox.Event{
		Seq: m.GetSeq(), Time: m.GetTime().AsTime(), Type: sandbox.EventType(m.GetType()),
		Sandbox: m.GetSandbox(), SandboxName: m.GetSandboxName(), Member: m.GetMember(), MemberName: m.GetMemberName(),
		Rev: m.GetRev(), From: m.GetFrom(), To: m.GetTo(), Reason: m.GetReason(), Attrs: m.GetAttrs(),
	}
	if m.GetExit() != nil {
		x := ToExit(m.GetExit())
		e.Exit = &x
	}
	return e
}

// FromFindings makes messages of what a garbage collection has found.
func FromFindings(fs []garbage.Finding) []*pb.GarbageFinding {
	var out []*pb.GarbageFinding
	for _, f := range fs {
		m := &pb.GarbageFinding{Kind: string(f.Kind), Name: f.Name, Reason: f.Reason, Action: f.Action, Error: f.Err}
		if !f.Since.IsZero() {
			m.Since = timestamppb.New(f.Since)
		}
		out = append(out, m)
	}
	return out
}

// ToFindings is the inverse of [FromFindings].
func ToFindings(ms []*pb.GarbageFinding) []garbage.Finding {
	fs := []garbage.Finding{}
	for _, m := range ms {
		f := garbage.Finding{Kind: garbage.Kind(m.GetKind()), Name: m.GetName(), Reason: m.GetReason(), Action: m.GetAction(), Err: m.GetError()}
		if m.GetSince() != nil {
			f.Since = m.GetSince().AsTime()
		}
		fs = append(fs, f)
	}
	return fs
}

// FromEventQuery makes a message of what is asked of the journal.
func FromEventQuery(q sandbox.EventQuery) *pb.ReadEventsRequest {
	out := &pb.ReadEventsRequest{After: q.After, New: q.New, Follow: q.Follow}
	if !q.Since.IsZero() {
		out.Since = timestamppb.New(q.Since)
	}
	for k, vs := range q.Filter {
		for _, v := range vs {
			out.Filter = append(out.Filter, k+"="+v)
		}
	}
	return out
}

// ToEventQuery is the inverse of [FromEventQuery]. Its errors wrap [sandbox.ErrInvalid].
func ToEventQuery(m *pb.ReadEventsRequest) (sandbox.EventQuery, error) {
	f, err := journal.ParseFilter(m.GetFilter())
	var since time.Time
	if err == nil && m.GetSince() != nil {
		err = m.GetSince().CheckValid()
		since = m.GetSince().AsTime()
	}
	if err != nil {
		return sandbox.EventQuery{}, fmt.Errorf("%w: %w", sandbox.ErrInvalid, err)
	}
	q := sandbox.EventQuery{Since: since, New: m.GetNew(), Filter: f, Follow: m.GetFollow()}
	if m.After != nil {
		after := m.GetAfter()
		q.After = &after
	}
	return q, nil
}
