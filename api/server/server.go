// Package server is the daemon's side of the native API: translation between
// messages and a [Manager], and the socket.
package server

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sandboxd/sandboxd/api/internal/wire"
	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/internal/rest"
	"github.com/sandboxd/sandboxd/sandbox"
)

// Manager is what the server needs of a [sandbox.Manager].
type Manager interface {
	Create(ctx context.Context, c sandbox.Config) (sandbox.Info, error)
	Stop(ctx context.Context, ref string, timeout time.Duration) error
	Remove(ctx context.Context, ref string, force bool) error
	List() []sandbox.Info
	Tombstones() []sandbox.Info
	VerifyNetwork(ctx context.Context, ref string) error
	Inspect(ref string) (sandbox.Info, error)

	Add(ctx context.Context, sandboxRef string, c sandbox.MemberConfig) (sandbox.MemberInfo, error)
	Run(ctx context.Context, sandboxRef string, c sandbox.MemberConfig) (sandbox.MemberInfo, error)
	Start(ctx context.Context, ref string) (sandbox.MemberInfo, error)
	StopMember(ctx context.Context, ref string, timeout time.Duration) error
	Kill(ctx context.Context, ref string, sig unix.Signal) error
	RemoveMember(ctx context.Context, ref string, force bool) error
	Wait(ctx context.Context, ref string) (sandbox.Exit, error)
	ReopenLog(ctx context.Context, ref string) error
	InspectMember(ref string) (sandbox.MemberInfo, error)

	Events(ctx context.Context, q sandbox.EventQuery) iter.Seq2[sandbox.Event, error]
	GC(ctx context.Context, dryRun bool) ([]garbage.Finding, error)
	ForgetNetwork(ctx context.Context, id string) error
}

// Execer runs commands in members. Package cmd/sandboxd has the real one.
type Execer interface {
	Exec(ctx context.Context, ref string, r sandbox.ExecRequest) (sandbox.ExecResult, error)
}

var _ Manager = (*sandbox.Manager)(nil)

// Server answers calls with a Manager that it does not own.
type Server struct {
	grpc *grpc.Server
	quit context.CancelFunc
	rest *rest.Timer
}

// New returns a server. Failed calls are logged to log, which must not be nil.
func New(m Manager, x Execer, log *slog.Logger) *Server {
	quit, cancel := context.WithCancel(context.Background())
	s := &Server{quit: cancel, rest: rest.NewTimer()}
	// Windows of a fixed size, or each call would bring a PING and its answer both
	// ways, to measure what a socket of this host carries. The workers keep the
	// stack that a call needs, which takes as long to grow as a few system calls;
	// what comes while they work gets a goroutine of its own.
	s.grpc = grpc.NewServer(grpc.NumStreamWorkers(2), grpc.StaticStreamWindowSize(wire.Window), grpc.StaticConnWindowSize(wire.Window), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			begin := time.Now()
			resp, err := h(ctx, req)
			s.rest.Called()
			switch status.Code(err) {
			case codes.OK, codes.Canceled:
			case codes.NotFound:
				// How clients find out that something is gone.
				log.Debug("Call refused", "method", info.FullMethod, "err", status.Convert(err).Message(), "took", time.Since(begin))
			default:
				log.Info("Call refused", "method", info.FullMethod, "err", status.Convert(err).Message(), "took", time.Since(begin))
			}
			return resp, err
		}))
	pb.RegisterSandboxdServer(s.grpc, &service{m: m, x: x, quit: quit})
	return s
}

// Serve answers calls on l until [Server.Shutdown]. It closes l.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(l) }

// Shutdown stops accepting, ends the calls that only wait for a member, and
// lets the others finish until ctx ends; then it cuts them off.
func (s *Server) Shutdown(ctx context.Context) {
	s.quit()
	defer s.rest.Stop()
	defer context.AfterFunc(ctx, s.grpc.Stop)()
	s.grpc.GracefulStop()
}

// service implements the generated interface.
type service struct {
	pb.UnimplementedSandboxdServer
	m    Manager
	x    Execer
	quit context.Context // ends when the server shuts down
}

func (s *service) CreateSandbox(ctx context.Context, r *pb.CreateSandboxRequest) (*pb.CreateSandboxResponse, error) {
	c, err := wire.ToConfig(r.GetConfig())
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	i, err := s.m.Create(ctx, c)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &pb.CreateSandboxResponse{Sandbox: wire.FromInfo(i)}, nil
}

func (s *service) StopSandbox(ctx context.Context, r *pb.StopSandboxRequest) (*pb.StopSandboxResponse, error) {
	d, err := timeout(r.GetTimeout())
	if err == nil {
		err = s.m.Stop(ctx, r.GetSandbox(), d)
	}
	return &pb.StopSandboxResponse{}, wire.ToStatus(err)
}

func (s *service) RemoveSandbox(ctx context.Context, r *pb.RemoveSandboxRequest) (*pb.RemoveSandboxResponse, error) {
	begin := time.Now()
	if err := s.m.Remove(ctx, r.GetSandbox(), r.GetForce()); err != nil {
		return nil, wire.ToStatus(err)
	}
	out := &pb.RemoveSandboxResponse{}
	for _, i := range s.m.Tombstones() {
		// An older one may be of another sandbox that had the name.
		if (i.Name == r.GetSandbox() || strings.HasPrefix(i.ID, r.GetSandbox())) && !i.Network.Tombstone.Since.Before(begin) {
			out.NetworkLeft = i.Reason
		}
	}
	return out, nil
}

func (s *service) ListSandboxes(_ context.Context, r *pb.ListSandboxesRequest) (*pb.ListSandboxesResponse, error) {
	infos := s.m.List()
	if r.GetAll() {
		infos = append(infos, s.m.Tombstones()...)
	}
	out := &pb.ListSandboxesResponse{}
	for _, i := range infos {
		out.Sandboxes = append(out.Sandboxes, wire.FromInfo(i))
	}
	return out, nil
}

func (s *service) GetSandbox(_ context.Context, r *pb.GetSandboxRequest) (*pb.GetSandboxResponse, error) {
	i, err := s.m.Inspect(r.GetSandbox())
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &pb.GetSandboxResponse{Sandbox: wire.FromInfo(i)}, nil
}

func (s *service) CheckNetwork(ctx context.Context, r *pb.CheckNetworkRequest) (*pb.CheckNetworkResponse, error) {
	return &pb.CheckNetworkResponse{}, wire.ToStatus(s.m.VerifyNetwork(ctx, r.GetSandbox()))
}

func (s *service) AddMember(ctx context.Context, r *pb.AddMemberRequest) (*pb.AddMemberResponse, error) {
	c, err := wire.ToMemberConfig(r.GetConfig())
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	add := s.m.Add
	if r.GetStart() {
		add = s.m.Run
	}
	i, err := add(ctx, r.GetSandbox(), c)
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &pb.AddMemberResponse{Member: wire.FromMemberInfo(i)}, nil
}

func (s *service) StartMember(ctx context.Context, r *pb.StartMemberRequest) (*pb.StartMemberResponse, error) {
	i, err := s.m.Start(ctx, r.GetMember())
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &pb.StartMemberResponse{Member: wire.FromMemberInfo(i)}, nil
}

func (s *service) StopMember(ctx context.Context, r *pb.StopMemberRequest) (*pb.StopMemberResponse, error) {
	d, err := timeout(r.GetTimeout())
	if err == nil {
		err = s.m.StopMember(ctx, r.GetMember(), d)
	}
	return &pb.StopMemberResponse{}, wire.ToStatus(err)
}

func (s *service) KillMember(ctx context.Context, r *pb.KillMemberRequest) (*pb.KillMemberResponse, error) {
	return &pb.KillMemberResponse{}, wire.ToStatus(s.m.Kill(ctx, r.GetMember(), unix.Signal(r.GetSignal())))
}

func (s *service) RemoveMember(ctx context.Context, r *pb.RemoveMemberRequest) (*pb.RemoveMemberResponse, error) {
	return &pb.RemoveMemberResponse{}, wire.ToStatus(s.m.RemoveMember(ctx, r.GetMember(), r.GetForce()))
}

// errQuit tells a waiting client that it is not the member that has ended.
var errQuit = fmt.Errorf("%w: the daemon is shutting down", wire.ErrUnavailable)

func (s *service) WaitMember(ctx context.Context, r *pb.WaitMemberRequest) (*pb.WaitMemberResponse, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.quit, func() { cancel(errQuit) })()
	e, err := s.m.Wait(ctx, r.GetMember())
	if err != nil {
		if errors.Is(context.Cause(ctx), errQuit) {
			err = errQuit
		}
		return nil, wire.ToStatus(err)
	}
	return &pb.WaitMemberResponse{Exit: wire.FromExit(e)}, nil
}

func (s *service) ReopenMemberLog(ctx context.Context, r *pb.ReopenMemberLogRequest) (*pb.ReopenMemberLogResponse, error) {
	return &pb.ReopenMemberLogResponse{}, wire.ToStatus(s.m.ReopenLog(ctx, r.GetMember()))
}

func (s *service) GetMember(_ context.Context, r *pb.GetMemberRequest) (*pb.GetMemberResponse, error) {
	i, err := s.m.InspectMember(r.GetMember())
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &pb.GetMemberResponse{Member: wire.FromMemberInfo(i)}, nil
}

func (s *service) ReadEvents(r *pb.ReadEventsRequest, stream grpc.ServerStreamingServer[pb.ReadEventsResponse]) error {
	q, err := wire.ToEventQuery(r)
	if err != nil {
		return wire.ToStatus(err)
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.quit, func() { cancel(errQuit) })()
	for e, err := range s.m.Events(ctx, q) {
		if err == nil {
			err = stream.Send(&pb.ReadEventsResponse{Event: wire.FromEvent(e)})
		}
		if err != nil {
			if errors.Is(context.Cause(ctx), errQuit) {
				err = errQuit
			}
			return wire.ToStatus(err)
		}
	}
	return nil
}

func (s *service) CollectGarbage(ctx context.Context, r *pb.CollectGarbageRequest) (*pb.CollectGarbageResponse, error) {
	found, err := s.m.GC(ctx, r.GetDryRun())
	if err != nil && found == nil {
		return nil, wire.ToStatus(err)
	}
	out := &pb.CollectGarbageResponse{Findings: wire.FromFindings(found)}
	if err != nil {
		out.Error = err.Error()
	}
	return out, nil
}

func (s *service) ForgetNetwork(ctx context.Context, r *pb.ForgetNetworkRequest) (*pb.ForgetNetworkResponse, error) {
	return &pb.ForgetNetworkResponse{}, wire.ToStatus(s.m.ForgetNetwork(ctx, r.GetSandbox()))
}

// timeout returns what d says, or the default if it is absent.
func timeout(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return sandbox.DefaultStopTimeout, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, fmt.Errorf("%w: timeout: %w", sandbox.ErrInvalid, err)
	}
	if d.AsDuration() < 0 {
		return 0, fmt.Errorf("%w: timeout %s is negative", sandbox.ErrInvalid, d.AsDuration())
	}
	return d.AsDuration(), nil
}

func (s *service) ExecMember(ctx context.Context, r *pb.ExecMemberRequest) (*pb.ExecMemberResponse, error) {
	res, err := s.x.Exec(ctx, r.GetMember(), sandbox.ExecRequest{
		Args: r.GetArgs(), Env: r.GetEnv(), Cwd: r.GetCwd(), User: r.GetUser(), Stdin: r.GetStdin(),
	})
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return &pb.ExecMemberResponse{
		ExitCode: int32(res.Code), Stdout: res.Stdout, Stderr: res.Stderr, Truncated: res.Truncated,
	}, nil
}
