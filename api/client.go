// Package api is the client of the native API. The daemon's side is package
// server below it, the messages are in sandboxd/v1.
//
// Errors match those of package sandbox with [errors.Is] and [errors.As], as
// if the daemon's [sandbox.Manager] had been called here.
package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sandboxd/sandboxd/api/internal/wire"
	pb "github.com/sandboxd/sandboxd/api/sandboxd/v1"
	"github.com/sandboxd/sandboxd/internal/garbage"
	"github.com/sandboxd/sandboxd/sandbox"
)

// ErrUnavailable means that no daemon answers on the socket, or that it went
// away during the call.
var ErrUnavailable = wire.ErrUnavailable

// maxMessage bounds what a client accepts: a list of thousands of sandboxes.
const maxMessage = 256 << 20

// SocketPath returns the path in address, which is unix://PATH or an absolute
// PATH, of a length that a socket can have.
func SocketPath(address string) (string, error) {
	path := strings.TrimPrefix(address, "unix://")
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("address %q is not unix:///PATH", address)
	}
	// The length of sun_path, less the NUL (unix(7)).
	if most := len(unix.RawSockaddrUnix{}.Path) - 1; len(path) > most {
		return "", fmt.Errorf("address %.100q…: the path has %d bytes, that of a socket has at most %d", address, len(path), most)
	}
	return path, nil
}

// Client is a connection to a daemon. It is safe for concurrent use.
type Client struct {
	path    string
	conn    *grpc.ClientConn
	rpc     pb.SandboxdClient
	dialErr atomic.Pointer[error] // of the last attempt to connect; gRPC keeps only its text
}

// Dial returns a client for the daemon at address ([SocketPath]). It does not
// connect yet: if nobody listens, the first call fails with [ErrUnavailable].
// The caller closes the client.
func Dial(address string) (*Client, error) {
	path, err := SocketPath(address)
	if err != nil {
		return nil, err
	}
	c := &Client{path: path}
	c.conn, err = grpc.NewClient("passthrough:///sandboxd",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the socket's mode says who may connect
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
			c.dialErr.Store(&err)
			return conn, err
		}),
		grpc.WithStaticStreamWindowSize(wire.Window), // as in package server
		grpc.WithStaticConnWindowSize(wire.Window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, err
	}
	c.rpc = pb.NewSandboxdClient(c.conn)
	return c, nil
}

// Connect connects, which the first call would do too, and returns when a daemon has
// taken the connection, or nobody has: the first call says so. If the daemon does
// neither, since it is stopped or hung, it returns ctx's error.
func (c *Client) Connect(ctx context.Context) error {
	c.conn.Connect()
	for {
		s := c.conn.GetState()
		if s == connectivity.Ready || s == connectivity.TransientFailure || s == connectivity.Shutdown {
			return nil
		}
		if !c.conn.WaitForStateChange(ctx, s) {
			return ctx.Err()
		}
	}
}

// Close drops the connection. Calls in flight fail.
func (c *Client) Close() error { return c.conn.Close() }

// err translates what a call returned.
func (c *Client) err(err error) error {
	err = wire.FromStatus(err)
	if !errors.Is(err, ErrUnavailable) {
		return err
	}
	if d := c.dialErr.Load(); d != nil && *d != nil {
		if errors.Is(*d, fs.ErrPermission) {
			return *d // there may be one
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, *d)
	}
	if !strings.HasPrefix(err.Error(), ErrUnavailable.Error()) { // it is gRPC's, of the connection
		return fmt.Errorf("the daemon ended before it answered, and may have done what it was asked: %w", err)
	}
	return err
}

// Create is [sandbox.Manager.Create].
func (c *Client) Create(ctx context.Context, cfg sandbox.Config) (sandbox.Info, error) {
	r, err := c.rpc.CreateSandbox(ctx, &pb.CreateSandboxRequest{Config: wire.FromConfig(cfg)})
	return wire.ToInfo(r.GetSandbox()), c.err(err)
}

// Stop is [sandbox.Manager.Stop].
func (c *Client) Stop(ctx context.Context, ref string, timeout time.Duration) error {
	_, err := c.rpc.StopSandbox(ctx, &pb.StopSandboxRequest{Sandbox: ref, Timeout: durationpb.New(timeout)})
	return c.err(err)
}

// Remove is [sandbox.Manager.Remove]. If the sandbox is gone and its network could not be
// taken down yet, left says why.
func (c *Client) Remove(ctx context.Context, ref string, force bool) (left string, err error) {
	r, err := c.rpc.RemoveSandbox(ctx, &pb.RemoveSandboxRequest{Sandbox: ref, Force: force})
	return r.GetNetworkLeft(), c.err(err)
}

// List is [sandbox.Manager.List].
func (c *Client) List(ctx context.Context) ([]sandbox.Info, error) { return c.list(ctx, false) }

// ListAll is List, and [sandbox.Manager.Tombstones] after it.
func (c *Client) ListAll(ctx context.Context) ([]sandbox.Info, error) { return c.list(ctx, true) }

// VerifyNetwork is [sandbox.Manager.VerifyNetwork].
func (c *Client) VerifyNetwork(ctx context.Context, ref string) error {
	_, err := c.rpc.CheckNetwork(ctx, &pb.CheckNetworkRequest{Sandbox: ref})
	return c.err(err)
}

func (c *Client) list(ctx context.Context, all bool) ([]sandbox.Info, error) {
	r, err := c.rpc.ListSandboxes(ctx, &pb.ListSandboxesRequest{All: all})
	if err != nil {
		return nil, c.err(err)
	}
	infos := make([]sandbox.Info, 0, len(r.GetSandboxes()))
	for _, s := range r.GetSandboxes() {
		infos = append(infos, wire.ToInfo(s))
	}
	return infos, nil
}

// Inspect is [sandbox.Manager.Inspect].
func (c *Client) Inspect(ctx context.Context, ref string) (sandbox.Info, error) {
	r, err := c.rpc.GetSandbox(ctx, &pb.GetSandboxRequest{Sandbox: ref})
	return wire.ToInfo(r.GetSandbox()), c.err(err)
}

// InspectMember is [sandbox.Manager.InspectMember].
func (c *Client) InspectMember(ctx context.Context, ref string) (sandbox.MemberInfo, error) {
	r, err := c.rpc.GetMember(ctx, &pb.GetMemberRequest{Member: ref})
	return wire.ToMemberInfo(r.GetMember()), c.err(err)
}

// Add is [sandbox.Manager.Add].
func (c *Client) Add(ctx context.Context, sandboxRef string, cfg sandbox.MemberConfig) (sandbox.MemberInfo, error) {
	r, err := c.rpc.AddMember(ctx, &pb.AddMemberRequest{Sandbox: sandboxRef, Config: wire.FromMemberConfig(cfg)})
	return wire.ToMemberInfo(r.GetMember()), c.err(err)
}

// Run is [sandbox.Manager.Run].
func (c *Client) Run(ctx context.Context, sandboxRef string, cfg sandbox.MemberConfig) (sandbox.MemberInfo, error) {
	r, err := c.rpc.AddMember(ctx, &pb.AddMemberRequest{Sandbox: sandboxRef, Config: wire.FromMemberConfig(cfg), Start: true})
	return wire.ToMemberInfo(r.GetMember()), c.err(err)
}

// Start is [sandbox.Manager.Start].
func (c *Client) Start(ctx context.Context, ref string) (sandbox.MemberInfo, error) {
	r, err := c.rpc.StartMember(ctx, &pb.StartMemberRequest{Member: ref})
	return wire.ToMemberInfo(r.GetMember()), c.err(err)
}

// StopMember is [sandbox.Manager.StopMember].
func (c *Client) StopMember(ctx context.Context, ref string, timeout time.Duration) error {
	_, err := c.rpc.StopMember(ctx, &pb.StopMemberRequest{Member: ref, Timeout: durationpb.New(timeout)})
	return c.err(err)
}

// Kill is [sandbox.Manager.Kill].
func (c *Client) Kill(ctx context.Context, ref string, sig unix.Signal) error {
	_, err := c.rpc.KillMember(ctx, &pb.KillMemberRequest{Member: ref, Signal: int32(sig)})
	return c.err(err)
}

// RemoveMember is [sandbox.Manager.RemoveMember].
func (c *Client) RemoveMember(ctx context.Context, ref string, force bool) error {
	_, err := c.rpc.RemoveMember(ctx, &pb.RemoveMemberRequest{Member: ref, Force: force})
	return c.err(err)
}

// Wait is [sandbox.Manager.Wait].
func (c *Client) Wait(ctx context.Context, ref string) (sandbox.Exit, error) {
	r, err := c.rpc.WaitMember(ctx, &pb.WaitMemberRequest{Member: ref})
	return wire.ToExit(r.GetExit()), c.err(err)
}

// Events is [sandbox.Manager.Events].
func (c *Client) Events(ctx context.Context, q sandbox.EventQuery) iter.Seq2[sandbox.Event, error] {
	return func(yield func(sandbox.Event, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.rpc.ReadEvents(ctx, wire.FromEventQuery(q))
		for err == nil {
			var r *pb.ReadEventsResponse
			if r, err = stream.Recv(); err == nil && !yield(wire.ToEvent(r.GetEvent()), nil) {
				return
			}
		}
		if err != io.EOF {
			yield(sandbox.Event{}, c.err(err))
		}
	}
}

// GC is [sandbox.Manager.GC].
func (c *Client) GC(ctx context.Context, dryRun bool) ([]garbage.Finding, error) {
	r, err := c.rpc.CollectGarbage(ctx, &pb.CollectGarbageRequest{DryRun: dryRun})
	if err != nil {
		return nil, c.err(err)
	}
	if text := r.GetError(); text != "" {
		err = errors.New(text)
	}
	return wire.ToFindings(r.GetFindings()), err
}

// ForgetNetwork is [sandbox.Manager.ForgetNetwork].
func (c *Client) ForgetNetwork(ctx context.Context, id string) error {
	_, err := c.rpc.ForgetNetwork(ctx, &pb.ForgetNetworkRequest{Sandbox: id})
	return c.err(err)
}

// ReopenLog is [sandbox.Manager.ReopenLog].
func (c *Client) ReopenLog(ctx context.Context, ref string) error {
	_, err := c.rpc.ReopenMemberLog(ctx, &pb.ReopenMemberLogRequest{Member: ref})
	return c.err(err)
}

// Exec runs a command in a running member and returns when it has ended. A
// command that cannot be executed is a [*sandbox.StartError]. When ctx ends the
// command is killed.
func (c *Client) Exec(ctx context.Context, ref string, r sandbox.ExecRequest) (sandbox.ExecResult, error) {
	res, err := c.rpc.ExecMember(ctx, &pb.ExecMemberRequest{
		Member: ref, Args: r.Args, Env: r.Env, Cwd: r.Cwd, User: r.User, Stdin: r.Stdin,
	})
	if err != nil {
		return sandbox.ExecResult{}, c.err(err)
	}
	return sandbox.ExecResult{
		Code: int(res.GetExitCode()), Stdout: res.GetStdout(), Stderr: res.GetStderr(), Truncated: res.GetTruncated(),
	}, nil
}
