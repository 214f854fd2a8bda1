package wire

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/sandbox"
)

// ErrUnavailable means that no daemon answers on the socket, or that it went
// away during the call.
var ErrUnavailable = errors.New("no daemon answers")

// kinds pairs each error that callers test for with its code. A code stands
// for one error only, so that the way back is the way there.
var kinds = []struct {
	err  error
	code codes.Code
}{
	{sandbox.ErrNotFound, codes.NotFound},
	{sandbox.ErrExists, codes.AlreadyExists},
	{sandbox.ErrState, codes.FailedPrecondition},
	{sandbox.ErrInvalid, codes.InvalidArgument},
	{sandbox.ErrEventGap, codes.OutOfRange},
	{ErrUnavailable, codes.Unavailable},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// ToStatus makes a gRPC status error of err; nil stays nil. An error that
// callers do not test for is Unknown. A [*sandbox.StartError] anywhere in the
// chain travels as a detail.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			code = k.code
			break
		}
	}
	if code == codes.Unknown && errors.Is(err, procid.ErrGone) {
		code = codes.FailedPrecondition // it has ended in the meantime
	}
	st := status.New(code, err.Error())
	if start, ok := errors.AsType[*sandbox.StartError](err); ok {
		st = status.New(codes.FailedPrecondition, err.Error())
		if with, err := st.WithDetails(&pb.StartFailure{Text: start.Text, Errno: int32(start.Errno)}); err == nil {
			st = with
		}
	}
	if gap, ok := errors.AsType[*sandbox.EventGap](err); ok {
		if with, err := st.WithDetails(&pb.EventGap{After: gap.After, First: gap.First, Last: gap.Last}); err == nil {
			st = with
		}
	}
	return st.Err()
}

// FromStatus is the inverse of [ToStatus]: the result has the text of the
// original error and matches the same error with errors.Is or errors.As.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	out := &remoteError{text: st.Message()}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *pb.StartFailure:
			out.cause = &sandbox.StartError{Text: d.GetText(), Errno: unix.Errno(d.GetErrno())}
			return out
		case *pb.EventGap:
			out.cause = &sandbox.EventGap{After: d.GetAfter(), First: d.GetFirst(), Last: d.GetLast()}
			return out
		}
	}
	for _, k := range kinds {
		if st.Code() == k.code {
			out.cause = k.err
		}
	}
	return out
}

// remoteError is an error that the daemon returned. Its text names its cause
// already.
type remoteError struct {
	text  string
	cause error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }
