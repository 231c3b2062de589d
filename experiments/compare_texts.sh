#!/usr/bin/env bash
# The comparisons on texts of docs/results.md: experiments/compare_texts.sh SST2_FOLDER. Docstring
# topics and SST-2 with MiniLM, docstring topics with the small OPT of experiments.pretrain, made twice:
# learning rates with one seed, then more seeds at the best of them.
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/.."
for model in pretrain pretrain_again; do # whose weights depend on how many threads there are
  test -d runs/$model || .venv/bin/python -m experiments.pretrain --out runs/$model
done
run() { # file, seeds, rates, method, more options
  local task=(finetune) own=(rounds=100 eval_every=10)
  case $1 in
    sst2) task=(sst2 --data "$data" --columns sentence label) own+=(batch_size=4) ;;
    opt) own+=(model=runs/pretrain) ;;
    opt_again) own+=(model=runs/pretrain_again) ;;
  esac
  .venv/bin/python -m experiments.compare --task "${task[@]}" --out "docs/results/$1.jsonl" \
    --processes "${PROCESSES:-2}" --seeds $2 --learning-rate $3 --method $4 \
    --vary "${own[@]}" ${5:-}
}
upper="num_perturbations=10 upper_directions=10 upper_layers"
run docstrings 1 "0.0001 0.0002 0.0004 0.0008 0.0016" decomfl
run docstrings 1 "0.0002 0.0004 0.0008 0.0016 0.0032" hiso
run docstrings 1 "0.00064 0.00128 0.00256 0.00512 0.01024" rms
run docstrings 1 "0.00025 0.0005 0.001 0.002 0.004" decomfl "$upper=1"
run docstrings 1 "0.00025 0.0005 0.001 0.002 0.004" decomfl "$upper=2"
run docstrings 1 "0.0016 0.0032 0.0064 0.0128 0.0256" "rms fzoo" "$upper=1"
run docstrings 3 "0.0004" decomfl
run docstrings 3 "0.0008" hiso
run docstrings 3 "0.00256" rms
run docstrings 3 "0.002" decomfl "$upper=1"
run docstrings 3 "0.001" decomfl "$upper=2"
run docstrings 3 "0.0064" "rms fzoo" "$upper=1"
run docstrings 2 "0.0032" rms "$upper=1"
run docstrings 3 "0.0064" rms "num_perturbations=12 upper_directions=10 upper_layers=1"
# The rest of the field.
run docstrings 1 "0.0001 0.0002 0.0004 0.0008 0.0016" "fedkseed hizoo"
run docstrings 1 "0.00064 0.00128 0.00256 0.00512 0.01024" fzoo
run docstrings 1 "0.00025 0.0005 0.001 0.002 0.004" "meazo adam"
run docstrings 1 "0.00001 0.00002 0.00004 0.00008 0.00016" momentum
run docstrings 1 "0.005 0.01 0.02 0.04 0.08" fedavg
run docstrings 1 "0.000125 0.00025 0.0005 0.001 0.002" fedadam
run docstrings 3 "0.0004" "fedkseed hizoo"
run docstrings 3 "0.00256" fzoo
run docstrings 3 "0.001" "meazo adam"
run docstrings 3 "0.00004" momentum
run docstrings 3 "0.04" fedavg
run docstrings 3 "0.0005" fedadam
run opt 1 "0.0002 0.0004 0.0008 0.0016 0.0032" decomfl
run opt 1 "0.0004 0.0008 0.0016 0.0032 0.0064" hiso
run opt 1 "0.002 0.004 0.008 0.016 0.032" rms
run opt 1 "0.0005 0.001 0.002 0.004 0.008 0.016 0.032 0.064" decomfl "$upper=1"
run opt 1 "0.0002 0.0004 0.0008 0.0016 0.0032" "fedkseed hizoo"
run opt 1 "0.002 0.004 0.008 0.016 0.032" fzoo
run opt 1 "0.001 0.002 0.004 0.008 0.016" meazo
run opt 1 "0.0005 0.001 0.002 0.004 0.008" adam
run opt 1 "0.00002 0.00004 0.00008 0.00016 0.00032" momentum
run opt 1 "0.0025 0.005 0.01 0.02 0.04" fedavg
run opt 1 "0.00025 0.0005 0.001 0.002 0.004 0.008 0.016" fedadam
run opt 3 "0.0004 0.0008" "decomfl fedkseed hizoo"
run opt 3 "0.0016" hiso
run opt 3 "0.008" "rms fzoo"
run opt 3 "0.004" meazo
run opt 3 "0.002" adam
run opt 3 "0.00008" momentum
run opt 3 "0.02" fedavg
run opt 3 "0.0005" fedadam
run opt 3 "0.008 0.016" decomfl "$upper=1"
run opt_again 1 "0.0002 0.0004 0.0008 0.0016 0.0032" "decomfl hiso mezo"
run opt_again 1 "0.002 0.004 0.008 0.016 0.032 0.064" decomfl "$upper=1"
run opt_again 1 "0.0128 0.0256 0.0512 0.1024 0.2048" rms "$upper=1"
run opt_again 1 "0.0064 0.0128 0.0256 0.0512 0.1024" fzoo "$upper=1"
run opt_again 3 "0.0008" "decomfl hiso"
run opt_again 3 "0.008 0.032" decomfl "$upper=1"
run opt_again 3 "0.0256" "rms fzoo" "$upper=1"
run sst2 1 "0.0002 0.0004 0.0008 0.0016 0.0032" "decomfl hiso fedkseed hizoo"
run sst2 1 "0.00064 0.00128 0.00256 0.00512 0.01024" "rms fzoo"
run sst2 1 "0.00025 0.0005 0.001 0.002 0.004" "meazo adam"
run sst2 1 "0.00002 0.00004 0.00008 0.00016 0.00032" momentum
run sst2 1 "0.01 0.02 0.04 0.08 0.16" fedavg
run sst2 1 "0.0000625 0.000125 0.00025 0.0005 0.001" fedadam
run sst2 1 "0.001 0.002 0.004 0.008 0.016" decomfl "$upper=1"
run sst2 1 "0.0016 0.0032 0.0064 0.0128 0.0256" fzoo "$upper=1"
run sst2 3 "0.0008" "decomfl hiso fedkseed hizoo"
run sst2 3 "0.00256" "rms fzoo"
run sst2 3 "0.001" "meazo adam"
run sst2 3 "0.00008" momentum
run sst2 3 "0.04" fedavg
run sst2 2 "0.000125" fedadam
run sst2 3 "0.00025" fedadam
run sst2 3 "0.004" decomfl "$upper=1"
run sst2 3 "0.0064" fzoo "$upper=1"
