#!/bin/bash
# Everything that `make test` does: each target of make in turn, also after one
# that failed, and at the end what took how long and the number of tests, which
# stays in build/results/summary too.
#
# Tests that start processes, kill them and look at a whole host can fail for a
# reason outside. A target with tests that fails is run once more; if it passes
# then, it is reported as flaky, which is a bug to look into but stops nobody.
#
#   test.sh TARGET…
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
results=build/results
rm -rf "$results"
mkdir -p "$results"

run() { ${MAKE:-make} --no-print-directory "$1" </dev/null; }

broken=() flaky=()
times=()
for target; do
	echo "=== make $target"
	start=$SECONDS
	if ! run "$target"; then
		if [[ $target != test-* ]]; then
			broken+=("$target")
		elif echo "=== make $target failed; once more" && rm -f "$results/$target"*.counts && run "$target"; then
			flaky+=("$target")
		else
			broken+=("$target")
		fi
	fi
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
for target in "${flaky[@]}"; do
	echo "make $target is FLAKY: it failed, and passed when it was run again; see above"
done
((passed > 0)) || failed=$((failed + 1))
echo "$passed passed, $failed failed, $skipped skipped" | tee "$results/summary"
((failed == 0))
