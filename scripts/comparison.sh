#!/usr/bin/env bash
# Early exit against its rivals over several training seeds, at equal quality and in seconds of one interleaved run.
#   bash scripts/comparison.sh [digits|fashion|cifar10] [FOLDER]      (SEEDS="1" for some of the training seeds)
# One call makes everything: trains, calibrates, evaluates, times, writes. What is finished is not done again.
# Reads: FOLDER/comparison.html, and its numbers in benchmarks/results/frontier-<data>-cpu.json.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

DATA=${1:-digits} SEEDS_ASKED=${SEEDS:-}
FOLDER=${2:-runs/comparison-$DATA}
# config; training seeds; steps of the small network: equal training time
case $DATA in
    digits) CONFIG=configs/digits_uvit_tiny.py SEEDS="1 2 3" SMALL_STEPS=4400 ;;
    fashion) CONFIG=configs/fashion_uvit_small.py SEEDS="1" SMALL_STEPS=4800 ;;
    cifar10) CONFIG=configs/cifar10_uvit_tiny.py SEEDS="1" SMALL_STEPS=4800 ;;
    *) echo "the data are $DATA; they must be digits, fashion or cifar10" >&2 && exit 2 ;;
esac
SEEDS=${SEEDS_ASKED:-$SEEDS}
REFERENCE="--config.sample.sample_steps=20 --config.sample.grid="          # today's full depth: 20 evenly spaced calls
BUDGETS="0.1 0.15 0.2 0.3 0.5"                                             # shares of the reference's GMACs
PLACED="0.2 0.25 0.35 0.5"                                                 # the same for full depth: 4, 5, 7, 10 calls
GRID=power:2,lower_order_final=False                                       # on which few calls do well

SWEEP=(                                                                    # settings of eval.sweep
    steps=10 steps=7,grid=power:2.5                                        # fewer calls, at full depth
    steps={3,4,5,6,8},grid=$GRID
    threshold.certainty=0.98 threshold.certainty={0.98,0.985},steps={5,6,8},grid=$GRID
    fixed.layer={3,4,5},steps=5,grid=$GRID fixed.layer=4,steps=6,grid=$GRID
    reuse.every=2,steps=8,grid=$GRID cache.every=2,steps=8,grid=$GRID
)
SMALL=(steps={4,5,6,8},grid=$GRID)

missing() { # FOLDER SUFFIX BUDGETS...; those without a plan, with commas
    for budget in "${@:3}"; do [ -f "$1/plan-budget-$budget$2.json" ] || echo "$budget"; done | paste -sd,
}
tuple() { printf "("; printf "'%s'," "$@"; printf ")"; }
evaluate() { # MODEL RUN CONFIG ENTRIES...; the seconds that count are measured at the end, all together
    python eval.py --config="$3" $REFERENCE --nnet_path="$2/last.ckpt" --output_path="$2/eval" \
        --config.eval.thresholds="()" --config.exit.name=full --config.eval.fixed="()" --config.eval.fewer_steps="()" --config.eval.tolerance=0 \
        --config.eval.sweep="$(tuple "${@:4}")" --config.eval.timing_runs=1 --config.eval.timing_batch=128
    evaluations+=("$1=$2/eval")
}

evaluations=()
for seed in $SEEDS; do
    run=$FOLDER/$DATA$seed small=$FOLDER/small$seed
    python train.py --config=$CONFIG --config.seed=$seed --workdir="$run"
    python train.py --config=$CONFIG:small --config.seed=$seed --config.train.n_steps=$SMALL_STEPS --workdir="$small"
    for depth in search full; do
        [ $depth = full ] && suffix=-full budgets=$PLACED || suffix="" budgets=$BUDGETS
        todo=$(missing "$run/last.ckpt" "$suffix" $budgets)
        [ -z "$todo" ] || python -m scripts.calibrate --config=$CONFIG $REFERENCE --nnet_path="$run/last.ckpt" \
            --depth=$depth --budget="$todo"
    done
    plans=()
    for budget in $BUDGETS; do plans+=("plan=$run/last.ckpt/plan-budget-$budget.json"); done
    for budget in $PLACED; do plans+=("plan=$run/last.ckpt/plan-budget-$budget-full.json"); done
    evaluate adaptive "$run" $CONFIG "${SWEEP[@]}" "${plans[@]}"
    evaluate small "$small" $CONFIG:small "${SMALL[@]}"
done

python -m scripts.time_together --runs 3 "${evaluations[@]#*=}"
python -m scripts.compare "${evaluations[@]}" --output "$FOLDER/comparison.html" \
    --json "benchmarks/results/frontier-$DATA-cpu.json"
