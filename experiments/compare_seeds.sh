#!/usr/bin/env bash
# Eight seeds at each method's best rate on the handwritten digits, and other noise: docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # rate, methods, options
  .venv/bin/python -m experiments.compare --task digits --seeds 8 --processes "${PROCESSES:-2}" \
    --out docs/results/seeds.jsonl --learning-rate $1 --method $2 --vary $3
}
laws="distribution=rademacher,near_normal,normal"
run 0.04 "decomfl" $laws
run 0.02 "hiso" $laws
run 0.064 "rms fzoo" "distribution=rademacher"
run 0.128 "rms" "own_directions=true"
run 0.08 "decomfl" "own_directions=true"
