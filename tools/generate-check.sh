#!/bin/bash
# Generates everything again in a copy of the tree and compares: what is
# committed must be what its source makes, byte for byte.
set -euo pipefail
cd "$(dirname "$0")/.."

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard |
	while IFS= read -r -d '' f; do if [[ -e $f ]]; then printf '%s\0' "$f"; fi; done |
	tar --null -T - -cf - | tar -C "$copy" -xf -
cp -a "$copy" "$copy.before"
trap 'rm -rf "$copy" "$copy.before"' EXIT
(cd "$copy" && go generate ./...)
if ! diff -rq "$copy.before" "$copy"; then
	echo "generate-check: run 'go generate ./...' and commit what it changes" >&2
	exit 1
fi
echo "generate-check: generated files are up to date"
