#!/usr/bin/env bash
# The comparison on docstring topics with MiniLM of docs/results.md: five learning rates with one
# seed, then two more seeds at the best of them.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # seeds, rates, method, more options
  .venv/bin/python -m experiments.compare --task finetune --processes "${PROCESSES:-2}" --seeds $1 \
    --out docs/results/docstrings.jsonl --learning-rate $2 --method $3 \
    --vary rounds=100 eval_every=10 ${4:-}
}
upper="num_perturbations=10 upper_directions=10 upper_layers=2"
run 1 "0.00025 0.0005 0.001 0.002 0.004" "decomfl" "$upper"
run 1 "0.0001 0.0002 0.0004 0.0008 0.0016" "decomfl"
run 1 "0.0002 0.0004 0.0008 0.0016 0.0032" "hiso"
run 3 "0.001" "decomfl" "$upper"
run 3 "0.0004" "decomfl"
run 3 "0.0008" "hiso"
