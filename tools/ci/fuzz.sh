#!/bin/bash
# Runs each fuzz target of the module on as many new inputs, and prints what
# `go test -json` says. The number is fixed, and not the time: a machine that is
# slow tests the same.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
inputs=${FUZZ_INPUTS:-10000}

status=0
while IFS=: read -r file target; do
	go test -json -run='^$' -fuzz="^$target\$" -fuzztime="${inputs}x" -parallel=2 -timeout=5m "./$(dirname "$file")" || status=1
done < <(git grep -o 'func Fuzz[A-Za-z0-9_]*' -- '*_test.go' | sed 's/func //')
exit "$status"
