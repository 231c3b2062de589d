#!/usr/bin/env bash
# The comparison on MNIST of docs/results.md: experiments/compare_mnist.sh FOLDER_WITH_THE_IDX_FILES
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/.."
run() { # seeds, rates, methods, per-client directions, rounds, more options
  .venv/bin/python -m experiments.compare --task mnist --data "$data" --seeds $1 \
    --processes "${PROCESSES:-2}" --out docs/results/mnist.jsonl --learning-rate $2 --method $3 \
    --vary rounds=$5 eval_every=25 own_directions=$4 distribution=rademacher ${6:-}
}
run 3 "0.032 0.064 0.128 0.256 0.512" "rms" true 150,300
run 3 "0.00125 0.0025 0.005 0.01 0.02" "decomfl hiso" false 300
run 3 "0.016 0.032 0.064 0.128 0.256" "rms" false 300
# One pass a direction instead of two.
run 3 "0.032 0.064 0.128" "rms" true 150,300 estimator=forward
run 3 "0.005 0.01 0.02" "decomfl" false 300 estimator=forward
# Twenty directions of the dense layers only, beside four of everything.
upper="estimator=forward num_perturbations=24 upper_directions=20 upper_layers=2"
run 3 "0.032 0.064 0.128 0.256 0.512" "rms" true 300 "$upper"
run 3 "0.064 0.128 0.256" "fzoo" true 300 "$upper"
run 1 "0.032 0.512" "fzoo" true 300 "$upper"
# Shares of labels less and more alike, and four local steps a round: three rates, four at the edge.
four="local_steps=4 rounds=75 eval_every=5"
for other in "alpha=inf" "alpha=0.1" "$four"; do
  run 3 "0.064 0.128 0.256" "rms" true 300 "$upper $other"
  run 3 "0.005 0.01 0.02" "decomfl hiso" false 300 "estimator=forward $other"
done
run 3 "0.04" "decomfl hiso" false 300 "estimator=forward $four"
# The rest of the field: one seed, then two more at the best, and everywhere of MEAZO.
field() { run $1 "$2" "$3" false 300 "estimator=forward ${4:-}"; }
field 1 "0.0025 0.04" decomfl
field 1 "0.005 0.01 0.02" hiso
field 1 "0.016 0.032 0.064" rms
field 1 "0.008 0.016 0.032 0.064 0.128" fzoo
field 3 "0.002 0.004 0.008 0.016 0.032" meazo
field 1 "0.0025 0.005 0.01 0.02 0.04" "fedkseed hizoo"
field 1 "0.001 0.002 0.004 0.008 0.016" adam
field 1 "0.00025 0.0005 0.001 0.002 0.004" momentum
field 1 "0.064 0.128 0.256 0.512 1.024" fedavg
field 1 "0.001 0.002 0.004 0.008 0.016 0.032 0.064" fedadam
field 3 "0.01" "hiso fedkseed hizoo"
field 3 "0.032" "rms fzoo"
field 3 "0.008" adam
field 3 "0.002" momentum
field 3 "0.512" fedavg
field 3 "0.016" fedadam
field 1 "0.008 0.016 0.032 0.064 0.128" "fedyogi fedadagrad"
field 1 "0.001 0.002 0.004 0.008 0.016" mezo
field 1 "0.004 0.008 0.016 0.032 0.064 0.128 0.256" fedzo
field 3 "0.032" fedyogi
field 3 "0.064" fedadagrad
field 3 "0.004" mezo
field 3 "0.016" fedzo
# The same with the other shares of labels and with four local steps: three rates, one more at an edge.
for other in "alpha=inf" "alpha=0.1" "$four"; do
  field 1 "0.016 0.032 0.064" "rms fzoo" "$other"
  field 1 "0.004 0.008 0.016" "meazo adam" "$other"
  field 1 "0.005 0.01 0.02" "fedkseed hizoo" "$other"
  field 1 "0.0005 0.001 0.002 0.004" momentum "$other"
  field 1 "0.256 0.512 1.024" fedavg "$other"
  field 1 "0.008 0.016 0.032" fedadam "$other"
  field 3 "0.032" "rms fzoo" "$other"
  field 3 "0.008" "meazo adam" "$other"
  field 3 "0.01" hizoo "$other"
  field 3 "0.001" momentum "$other"
done
for other in "alpha=inf" "$four"; do
  field 1 "0.04" fedkseed "$other"
  field 1 "0.128" fedavg "$other"
  field 3 "0.02" fedkseed "$other"
  field 3 "0.256" fedavg "$other"
done
field 1 "0.064" fedadam "$four"
field 3 "0.01" fedkseed alpha=inf,0.1
field 3 "0.512" fedavg alpha=0.1
field 3 "0.016" fedadam alpha=inf,0.1
field 3 "0.032" fedadam "$four"
