#!/usr/bin/env bash
# One option at a time, on the handwritten digits; five learning rates, three seeds: docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # rates, methods, options
  .venv/bin/python -m experiments.compare --task digits --seeds 3 --processes "${PROCESSES:-2}" \
    --out docs/results/ablations.jsonl --learning-rate $1 --method $2 --vary $3
}
own="own_directions=true"
run "0.005 0.01 0.02 0.04 0.08" "hiso" "decay=0.9,0.99"
run "0.005 0.01 0.02 0.04 0.08" "hiso decomfl" "distribution=normal"
run "0.005 0.01 0.02 0.04 0.08" "hiso decomfl" "estimator=central"
run "0.005 0.01 0.02 0.04 0.08" "hiso decomfl" "num_perturbations=5,20"
run "0.001 0.002 0.004 0.008 0.016" "decomfl" "num_perturbations=1"
run "0.005 0.01 0.02 0.04 0.08" "hiso" "num_perturbations=1"
run "0.005 0.01 0.02 0.04 0.08" "hiso decomfl" "clients_per_round=2,32"
run "0.005 0.01 0.02 0.04 0.08" "hiso decomfl" "alpha=0.1,inf"
# As many local steps in all.
run "0.005 0.01 0.02 0.04 0.08" "hiso experiments.methods:hiso_all decomfl" "local_steps=5 rounds=120 eval_every=10"
for more in alpha=0.1,inf clients_per_round=2,32 num_perturbations=1,5,20; do
  run "0.032 0.064 0.128 0.256 0.512" "rms" "$own $more"
done
# The control: one number in the place of H.
for more in distribution=normal num_perturbations=1,5,20 clients_per_round=2,32 alpha=0.1,inf \
  "local_steps=5 rounds=120 eval_every=10"; do
  run "0.016 0.032 0.064 0.128 0.256" "rms" "$more"
done
# Clients in all.
run "0.01 0.02 0.04" "hiso decomfl" "clients=10,160"
run "0.032 0.064 0.128" "rms" "clients=10,160"
