#!/usr/bin/env bash
# Compare what `make demo` installs with a bare `pip install torch transformers trl`.
#
#     benchmarks/install.sh [ROUNDS]
#
# Each round installs both into new environments, in turn, with the same versions. The first round
# fills pip's cache and is not counted. Prints the seconds and the ratio of the medians.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds="${1:-3}"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

bare() {
  "$python" -m venv "$work/bare"
  "$work/bare/bin/pip" install --quiet -c constraints/newest.txt torch
  "$work/bare/bin/pip" install --quiet -c constraints/newest.txt transformers trl
}

ours() { make --silent PYTHON="$python" VENV="$work/ours" "$work/ours/.demo-ready"; }

median() { sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }

for round in $(seq 0 "$rounds"); do
  for which in bare ours; do
    rm -rf "${work:?}/$which"
    begin=$(date +%s.%N)
    $which
    taken=$(awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    [ "$round" = 0 ] || echo "$taken" >>"$work/$which.times"
    echo "round $round, $which: $taken s"
  done
done
awk -v bare="$(median <"$work/bare.times")" -v ours="$(median <"$work/ours.times")" \
  'BEGIN { printf "make demo installs in %.1f s, a bare torch, transformers and trl in %.1f s: %.2f x\n", ours, bare, ours / bare }'
