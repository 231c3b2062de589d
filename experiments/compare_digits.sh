#!/usr/bin/env bash
# The comparison on the handwritten digits of docs/results.md: five learning rates a method, each
# twice the last, around the best of a first look at every fourth power of two; three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # rates, methods, more options
  .venv/bin/python -m experiments.compare --task digits --seeds 3 --processes "${PROCESSES:-2}" \
    --out docs/results/digits.jsonl --learning-rate $1 --method $2 ${3:-}
}
run "0.005 0.01 0.02 0.04 0.08" "hiso decomfl"
run "0.016 0.032 0.064 0.128 0.256" "rms fzoo"
run "0.02 0.04 0.08 0.16 0.32" "decomfl" "--vary own_directions=true"
run "0.005 0.01 0.02 0.04 0.08" "hiso" "--vary own_directions=true"
run "0.016 0.032 0.064 0.128 0.256" "rms" "--vary own_directions=true"
run "0.004 0.008 0.016 0.032 0.064" "meazo adam mezo"
run "0.001 0.002 0.004 0.008 0.016" "momentum"
run "0.005 0.01 0.02 0.04 0.08" "hizoo fedkseed"
run "0.016 0.032 0.064 0.128 0.256" "fedzo fedyogi fedadagrad"
run "0.064 0.128 0.256 0.512 1.024" "fedavg"
run "0.001 0.002 0.004 0.008 0.016" "fedadam"
# A method with half of the rounds, and so another schedule, against the others with all of them.
run "0.032 0.064 0.128 0.256 0.512" "rms" "--vary own_directions=true rounds=300"
run "0.01 0.02 0.04 0.08 0.16" "decomfl hiso" "--vary rounds=300"
run "0.016 0.032 0.064 0.128 0.256" "rms" "--vary rounds=300"
# Ten more directions of the dense layer only, beside two or four of everything.
upper="upper_directions=10 num_perturbations"
run "0.064 0.128 0.256 0.512 1.024" "rms" "--vary own_directions=true $upper=12,14"
run "0.064 0.128 0.256 0.512 1.024" "fzoo" "--vary own_directions=true $upper=14"
run "0.032 0.064 0.128 0.256 0.512" "rms" "--vary $upper=12"
run "0.01 0.02 0.04 0.08 0.16" "decomfl hiso" "--vary $upper=12"
run "0.128 0.256 0.512 1.024 2.048" "rms" "--vary own_directions=true $upper=12 rounds=300"
