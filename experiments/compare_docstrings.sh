#!/usr/bin/env bash
# The comparison on docstring topics with MiniLM of docs/results.md: five learning rates with one
# seed, then two more seeds at the best one.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # seeds, rates, methods, more options
  .venv/bin/python -m experiments.compare --task finetune --processes "${PROCESSES:-2}" --seeds $1 \
    --out docs/results/docstrings.jsonl --learning-rate $2 --method $3 \
    --vary rounds=100 eval_every=10 ${4:-}
}
upper="num_perturbations=10 upper_directions=10 upper_layers=2"
run 1 "0.00025 0.0005 0.001 0.002 0.004" "decomfl" "$upper"
run 1 "0.0001 0.0002 0.0004 0.0008 0.0016" "decomfl"
run 1 "0.0002 0.0004 0.0008 0.0016 0.0032" "hiso"
run 1 "0.00064 0.00128 0.00256 0.00512 0.01024" "rms"
run 1 "0.001 0.002 0.004 0.008 0.016" "rms" "$upper"
