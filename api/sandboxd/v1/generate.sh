#!/bin/sh
# Generates the Go code of sandboxd.proto. It needs protoc and the well-known
# types (Debian: protobuf-compiler, libprotobuf-dev). protoc-gen-go has the
# version of the protobuf module in go.mod; protoc-gen-go-grpc is a module of
# its own, named here.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go
GOBIN=$bin go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.0
PATH=$bin:$PATH protoc --go_out=. --go_opt=paths=source_relative \
	--go-grpc_out=. --go-grpc_opt=paths=source_relative sandboxd.proto
