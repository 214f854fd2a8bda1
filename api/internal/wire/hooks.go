package wire

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/sandbox"
)

func fromHooks(hs []request.Hook) []*pb.Hook {
	var out []*pb.Hook
	for _, h := range hs {
		m := &pb.Hook{Stage: string(h.Stage), Path: h.Path, Args: h.Args, Env: h.Env, Retries: int32(h.Retries)}
		if h.Timeout != 0 {
			m.Timeout = durationpb.New(h.Timeout)
		}
		out = append(out, m)
	}
	return out
}

func toHooks(ms []*pb.Hook) []request.Hook {
	var hs []request.Hook
	for _, m := range ms {
		hs = append(hs, request.Hook{
			Stage: request.Stage(m.GetStage()), Path: m.GetPath(), Args: m.GetArgs(), Env: m.GetEnv(),
			Timeout: m.GetTimeout().AsDuration(), Retries: int(m.GetRetries()),
		})
	}
	return hs
}

func fromHookRuns(runs []sandbox.HookRun) []*pb.HookRun {
	var out []*pb.HookRun
	for _, r := range runs {
		out = append(out, &pb.HookRun{
			Stage: string(r.Stage), Path: r.Path, State: string(r.State), Attempt: int32(r.Attempt), Failures: int32(r.Failures),
			StartedAt: fromTime(r.StartedAt), Duration: durationpb.New(r.Duration), Code: int32(r.Code),
			Output: r.Output, Truncated: r.Truncated, Error: r.Error,
		})
	}
	return out
}

func toHookRuns(ms []*pb.HookRun) []sandbox.HookRun {
	var runs []sandbox.HookRun
	for _, m := range ms {
		runs = append(runs, sandbox.HookRun{
			Stage: request.Stage(m.GetStage()), Path: m.GetPath(), State: sandbox.HookState(m.GetState()),
			Attempt: int(m.GetAttempt()), Failures: int(m.GetFailures()), StartedAt: toTime(m.GetStartedAt()),
			Duration: time.Duration(m.GetDuration().AsDuration()), Code: int(m.GetCode()),
			Output: m.GetOutput(), Truncated: m.GetTruncated(), Error: m.GetError(),
		})
	}
	return runs
}
