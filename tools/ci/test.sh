#!/bin/bash
# Everything that `make test` does: each target of make in turn, also after one
# that failed, and at the end what took how long and the number of tests, which
# stays in build/results/summary too.
#
#   test.sh TARGET…
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
results=build/results
rm -rf "$results"
mkdir -p "$results"

broken=()
times=()
for target; do
	echo "=== make $target"
	start=$SECONDS
	${MAKE:-make} --no-print-directory "$target" </dev/null || broken+=("$target")
	times+=("$((SECONDS - start))")
	echo "=== make $target: ${times[-1]} s"
done

i=0
for target; do
	printf '%6d s  %s\n' "${times[i]}" "$target"
	i=$((i + 1))
done
passed=0 failed=0 skipped=0
for counts in "$results"/*.counts; do
	[[ -e $counts ]] || continue
	read -r p f s <"$counts"
	passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
# A target that failed without a failed test, such as lint, is a failure too.
for target in "${broken[@]}"; do
	echo "make $target failed"
	f=0
	[[ ! -e $results/$target.counts ]] || read -r _ f _ <"$results/$target.counts"
	((f > 0)) || failed=$((failed + 1))
done
((passed > 0)) || failed=$((failed + 1))
echo "$passed passed, $failed failed, $skipped skipped" | tee "$results/summary"
((failed == 0))
