#!/usr/bin/env bash
# The comparison on MNIST of docs/results.md: experiments/compare_mnist.sh FOLDER_WITH_THE_IDX_FILES
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/.."
run() { # rates, methods, own directions
  .venv/bin/python -m experiments.compare --task mnist --data "$data" --seeds 3 \
    --processes "${PROCESSES:-2}" --out docs/results/mnist.jsonl --learning-rate $1 --method $2 \
    --vary rounds=300 eval_every=25 own_directions=$3 distribution=rademacher
}
run "0.016 0.032 0.064 0.128" "rms" true
run "0.008 0.016 0.032 0.064" "rms" false
run "0.0025 0.005 0.01 0.02" "decomfl hiso" false
