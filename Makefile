# Everything that CI does and a developer needs. docs/testing.md tells what the
# layers of tests are for. `make test` needs root, and Debian for what it installs
# by tools/deps.sh.

SHELL := /bin/bash -o pipefail
export CGO_ENABLED := 0

RESULTS := build/results
# What this machine may lack; everything else is required by `make test`.
MISSING := tools/ci/missing
REQUIRE := all$(shell sed -n 's/^\([a-z0-9_:-]\+\).*/,-\1/p' $(MISSING) | tr -d '\n')
SUM = go run ./internal/testsum --skips $(MISSING) --counts $(RESULTS)/$@.counts
# One package at a time: root tests look at the whole host for what they left.
TEST = SANDBOXD_TEST_REQUIRE=$(REQUIRE) go test -json -p=1 -count=1

# What user-mode emulation can run: packages that ask little of the kernel. It
# has no openat2, refuses new namespaces at clone, and programs in memory are the host's. Tests of
# packages launch, member and pause run their arm64 programs themselves.
ARM64_PACKAGES := ./api/... ./cmd/... ./internal/idrange ./internal/signum ./internal/statefile ./internal/undo ./sandbox
# Tests of such packages that use openat2 after all, or execute themselves.
ARM64_SKIP := ^(TestRemoveAllIsDeep|TestRemoveDataTouchesNoMount|TestListenAfterADeadDaemon)$$

.PHONY: build
build: ## the binary, static, in build/sandboxd
	go build -trimpath -tags=grpcnotrace -ldflags="-s -w" -o build/sandboxd ./cmd/sandboxd

.PHONY: test
test: ## everything that CI does
	tools/ci/test.sh lint generate-check test-root test-race test-fuzz test-arm64 test-e2e test-vm

.PHONY: test-unit
test-unit: | $(RESULTS) ## what needs no root; what does is skipped without it
	go test -json ./... | go run ./internal/testsum --counts $(RESULTS)/$@.counts

.PHONY: test-root
test-root: | $(RESULTS) ## all tests of all packages; nothing that this machine has is skipped
	$(TEST) -timeout=10m ./... | $(SUM)
	$(TEST) -timeout=10m -tags=crashpoints ./internal/crash | \
		go run ./internal/testsum --skips $(MISSING) --counts $(RESULTS)/$@-crash.counts

.PHONY: test-race
test-race: | $(RESULTS) ## packages with goroutines under the race detector, which needs cgo
	CGO_ENABLED=1 $(TEST) -race -timeout=15m ./api/... ./cmd/... ./collect ./internal/crilog ./internal/journal ./internal/nsthread ./member ./metrics ./pause ./sandbox ./web | $(SUM)

.PHONY: test-fuzz
test-fuzz: | $(RESULTS) ## each fuzz target for a moment: as many inputs everywhere
	tools/ci/fuzz.sh | $(SUM)

.PHONY: test-e2e
test-e2e: | $(RESULTS) ## the binary as a user drives it, the demonstration and the documents too
	$(TEST) -tags=e2e -timeout=20m ./e2e | $(SUM)

.PHONY: test-vm
test-vm: | $(RESULTS) ## root and e2e tests on Linux 6.1 with cgroup v2 only, in an emulator
	tools/vm/run.sh --counts $(RESULTS)/$@.counts

.PHONY: test-arm64
test-arm64: | $(RESULTS) ## builds everything for arm64, and runs what user-mode emulation can
	GOARCH=arm64 go build ./...
	GOARCH=arm64 go vet -tags=e2e,crashpoints ./...
	GOARCH=arm64 $(TEST) -exec=qemu-aarch64-static -skip='$(ARM64_SKIP)' $(ARM64_PACKAGES) | $(SUM)

.PHONY: lint
lint: build/bin/staticcheck ## what can be checked without running anything
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); if [[ -n $$unformatted ]]; then echo "gofmt: $$unformatted"; exit 1; fi
	go vet ./...
	go vet -tags=e2e,crashpoints ./...
	build/bin/staticcheck ./...
	build/bin/staticcheck -tags=e2e,crashpoints ./...
	shellcheck $$(git ls-files '*.sh' .ci/run docs/hooks/audit docs/hooks/flush-conntrack docs/hooks/heap-dump docs/hooks/upload-core)
	shellcheck --shell=dash tools/vm/init

.PHONY: lint-all
lint-all: lint build/bin/golangci-lint ## lint, and golangci-lint with .golangci.yml
	build/bin/golangci-lint run

.PHONY: generate-check
generate-check: ## generated files are what their sources make, byte for byte
	tools/generate-check.sh

.PHONY: bench
bench: build build/cni/bin ## medians and ratios against runc, crun and a bare clone
	go build -o build/bench ./e2e/bench
	tools/bench.sh $(BENCH)

.PHONY: soak
soak: ## what users do, at random, while everything is killed; SOAK=2h for longer
	SANDBOXD_SOAK=$(or $(SOAK),3m) go test -tags=e2e -count=1 -v -timeout=0 -run='^TestSoak$$' ./e2e

.PHONY: demo
demo: build build/leakcheck ## the story of the README, with the leak oracle's verdict
	tools/demo.sh

.PHONY: build/leakcheck
build/leakcheck:
	go build -o $@ ./internal/leak/cmd/leakcheck

.PHONY: tools
tools: ## installs what the other targets need, and builds the linters
	tools/deps.sh
	$(MAKE) build/bin/staticcheck build/bin/golangci-lint

.PHONY: clean
clean: ## removes what was built, the kernel of test-vm too
	rm -rf build

$(RESULTS):
	mkdir -p $@

# CNI plugins for tests and the benchmark. go build leaves alone what is up to date.
.PHONY: build/cni/bin
build/cni/bin:
	mkdir -p $@
	cd tools/cni && go build -trimpath -ldflags="-s -w" -o ../../$@/ tool

# The linters are in modules of their own, which keeps what they need out of ours.
build/bin/staticcheck: tools/go.mod tools/go.sum
	cd tools && go build -o ../$@ honnef.co/go/tools/cmd/staticcheck

build/bin/golangci-lint: tools/golangci/go.mod tools/golangci/go.sum
	cd tools/golangci && go build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: help
help: ## this
	@sed -n 's/^\([a-z0-9-]\+\):.*## /\1\t/p' Makefile | expand -t 18
