# Everything that CI does and a developer needs. docs/testing.md tells what the
# layers of tests are for. `make test` needs root, and Debian for what it installs
# by tools/deps.sh.

SHELL := /bin/bash -o pipefail
export CGO_ENABLED := 0
export GOFLAGS := -buildvcs=false

VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
RESULTS := build/results
# What this machine may lack; everything else is required by `make test`.
MISSING := tools/ci/missing
REQUIRE := all$(shell sed -n 's/^\([a-z0-9_:-]\+\).*/,-\1/p' $(MISSING) | tr -d '\n')
SUM = go run ./internal/testsum --skips $(MISSING) --counts $(RESULTS)/$@

# What can run under user-mode emulation: packages that ask little of the kernel.
ARM64_PACKAGES := ./internal/exit/... ./internal/namespace/... ./internal/procid/... ./internal/request/...

.PHONY: build
build: ## the binary, static, in build/sandboxd
	go build -trimpath -ldflags="-s -w -X main.version=$(VERSION)" -o build/sandboxd ./cmd/sandboxd

.PHONY: test
test: lint generate-check test-root test-arm64 test-e2e test-vm ## everything

.PHONY: test-unit
test-unit: | $(RESULTS) ## what needs no root; what does is skipped without it
	go test -json ./... | go run ./internal/testsum --counts $(RESULTS)/$@

.PHONY: test-root
test-root: | $(RESULTS) ## all tests of all packages; nothing that this machine has is skipped
	SANDBOXD_TEST_REQUIRE=$(REQUIRE) go test -json -count=1 -timeout=10m ./... | $(SUM)

.PHONY: test-race
test-race: | $(RESULTS) ## the same under the race detector, which needs cgo
	CGO_ENABLED=1 SANDBOXD_TEST_REQUIRE=$(REQUIRE) go test -race -json -count=1 -timeout=15m ./... | $(SUM)

.PHONY: test-e2e
test-e2e: | $(RESULTS) ## the binary as a user drives it
	SANDBOXD_TEST_REQUIRE=$(REQUIRE) go test -tags=e2e -json -count=1 -timeout=15m ./e2e | $(SUM)

.PHONY: test-vm
test-vm: | $(RESULTS) ## root and e2e tests on Linux 6.1 with cgroup v2 only, in an emulator
	tools/vm/run.sh --counts $(RESULTS)/$@

.PHONY: test-arm64
test-arm64: | $(RESULTS) ## builds everything for arm64, and runs what user-mode emulation can
	GOARCH=arm64 go build ./...
	GOARCH=arm64 go vet ./...
	GOARCH=arm64 go test -exec=qemu-aarch64-static -json -count=1 $(ARM64_PACKAGES) | $(SUM)

.PHONY: lint
lint: build/bin/staticcheck ## what CI checks without running anything
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); if [[ -n $$unformatted ]]; then echo "gofmt: $$unformatted"; exit 1; fi
	go vet ./...
	go vet -tags=e2e ./e2e/...
	build/bin/staticcheck -tags=e2e ./...
	shellcheck $$(git ls-files '*.sh' .ci/run)
	shellcheck --shell=busybox tools/vm/init 2>/dev/null || shellcheck --shell=dash tools/vm/init

.PHONY: lint-all
lint-all: build/bin/golangci-lint ## lint, and golangci-lint with .golangci.yml
	build/bin/golangci-lint run

.PHONY: generate-check
generate-check: ## generated files are what their sources make, byte for byte
	tools/generate-check.sh

.PHONY: bench
bench: build ## medians against runc, crun and bare unshare
	go run ./e2e/bench

.PHONY: demo
demo: build ## what it is for, on real input, with the leak oracle's verdict
	go build -o build/leakcheck ./internal/leak/cmd/leakcheck
	tools/demo.sh

.PHONY: tools
tools: build/bin/staticcheck build/bin/golangci-lint ## builds the linters
	tools/deps.sh

.PHONY: clean
clean: ## removes what was built, the kernel of test-vm too
	rm -rf build

$(RESULTS):
	mkdir -p $@

# The linters are in modules of their own, which keeps what they need out of ours.
build/bin/staticcheck: tools/go.mod tools/go.sum
	cd tools && go build -o ../$@ honnef.co/go/tools/cmd/staticcheck

build/bin/golangci-lint: tools/golangci/go.mod tools/golangci/go.sum
	cd tools/golangci && go build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: help
help: ## this
	@sed -n 's/^\([a-z0-9-]\+\):.*## /\1\t/p' Makefile | expand -t 18
