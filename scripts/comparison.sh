#!/usr/bin/env bash
# Early exit against its rivals over several training seeds, at equal quality and in seconds of one interleaved run.
#   bash scripts/comparison.sh [digits|fashion|cifar10] [FOLDER]
# One call makes everything: trains, calibrates, evaluates, times, writes. What is finished is not done again.
# Reads: FOLDER/comparison.html, and its numbers in benchmarks/results/frontier-<data>-cpu.json.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

DATA=${1:-digits} FOLDER=${2:-runs/comparison-${1:-digits}}
# Per data set: config, training seeds, steps of the small network (equal training time).
case $DATA in
    digits) CONFIG=configs/digits_uvit_tiny.py SEEDS="1 2 3" SMALL_STEPS=4400 ;;
    fashion) CONFIG=configs/fashion_uvit_small.py SEEDS="1" SMALL_STEPS=4800 ;;
    cifar10) CONFIG=configs/cifar10_uvit_tiny.py SEEDS="1" SMALL_STEPS=4800 ;;
    *) echo "the data are $DATA; they must be digits, fashion or cifar10" >&2 && exit 2 ;;
esac
REFERENCE="--config.sample.sample_steps=20 --config.sample.grid= --config.sample.mini_batch_size=128"  # 20 even calls
BUDGETS="0.1 0.15 0.2 0.3 0.5"                     # shares of the reference's GMACs
PLACED="0.2 0.25 0.35 0.5"                         # the same for full depth: 4, 5, 7, 10 calls
FEW=power:2,lower_order_final=False                # where few calls do well
FEW_CONFIG="--config.sample.grid=power:2 --config.sample.dpm_solver_pp_2m.lower_order_final=False"

SWEEP=(                                            # eval.sweep: every rival with its own settings, on good grids
    steps=10 steps=7,grid=power:2.5 steps={3,4,5,6,8},grid=$FEW                         # fewer calls, at full depth
    threshold.certainty=0.98 threshold.certainty={0.98,0.985},steps={5,6},grid=$FEW     # exits
    fixed.layer={3,4,5},steps=5,grid=$FEW fixed.layer=4,steps=6,grid=$FEW
    {full,threshold.certainty=0.98},steps=8,grid=$FEW,forecast.every=2                  # and forecasts
    steps=8,grid=$FEW,forecast.every=2,forecast.order={2,3}
    {reuse,cache}.every=2,steps=8,grid=$FEW                                             # caches
    first_block.threshold=0.3,first_block.per_image={True,False},steps=8,grid=$FEW
    teacache.threshold=0.2,steps=8,grid=$FEW
)
SMALL=(steps={4,5,6,8},grid=$FEW)                  # of the small network

missing() { # FOLDER SUFFIX BUDGETS...: those without a plan, with commas
    for budget in "${@:3}"; do [ -f "$1/plan-budget-$budget$2.json" ] || echo "$budget"; done | paste -sd,
}
tuple() { printf "("; printf "'%s'," "$@"; printf ")"; }
evaluate() { # MODEL RUN CONFIG ENTRIES...; the seconds that count are measured at the end, all together
    python eval.py --config="$3" $REFERENCE --nnet_path="$2/last.ckpt" --output_path="$2/eval" \
        --config.exit.name=full --config.eval.thresholds="()" --config.eval.fixed="()" --config.eval.fewer_steps="()" \
        --config.eval.sweep="$(tuple "${@:4}")" --config.eval.tolerance=0 \
        --config.eval.timing_runs=1 --config.eval.timing_batch=128
    evaluations+=("$1=$2/eval")
}

evaluations=() plans=()
for seed in $SEEDS; do
    run=$FOLDER/$DATA$seed small=$FOLDER/$DATA$seed/small
    python train.py --config=$CONFIG --config.seed=$seed --workdir="$run"
    python train.py --config=$CONFIG:small --config.seed=$seed --config.train.n_steps=$SMALL_STEPS --workdir="$small"
    if [ ${#plans[@]} = 0 ]; then # the first network's plans serve all: what they are worth where nobody searched
        for depth in search full; do
            if [ $depth = full ]; then suffix=-full budgets=$PLACED; else suffix="" budgets=$BUDGETS; fi
            todo=$(missing "$run/last.ckpt" "$suffix" $budgets)
            [ -z "$todo" ] || python -m scripts.calibrate --config=$CONFIG $REFERENCE --nnet_path="$run/last.ckpt" \
                --depth=$depth --budget="$todo"
            for budget in $budgets; do plans+=("plan=$run/last.ckpt/plan-budget-$budget$suffix.json"); done
        done
    fi
    fitted=(duo.path=$small/last.ckpt,duo.first=3,steps=6,grid=$FEW)  # the small network first
    for kind in learned_cache lazy_gate; do
        file=$run/last.ckpt/$kind-0.6-6.json
        [ -f "$file" ] || python -m scripts.fit_rivals --config=$CONFIG $REFERENCE $FEW_CONFIG \
            --config.sample.sample_steps=6 --nnet_path="$run/last.ckpt" --kind=$kind --budget=0.6
        fitted+=($kind.path=$file,steps=6,grid=$FEW)
    done
    evaluate adaptive "$run" $CONFIG "${SWEEP[@]}" "${fitted[@]}" "${plans[@]}"
    evaluate small "$small" $CONFIG:small "${SMALL[@]}"
done

python -m scripts.time_together --runs 3 "${evaluations[@]#*=}"
python -m scripts.compare "${evaluations[@]}" --output "$FOLDER/comparison.html" \
    --json "benchmarks/results/frontier-$DATA-cpu.json"
