#!/usr/bin/env bash
# Early exit against its competitors on the digits, over three training seeds, at equal seconds.
#   bash scripts/comparison.sh [FOLDER]
# excess: our model and everything that runs on it; paper: the published target; small: half the depth, plain training.
# What is finished is not done again. Reads: FOLDER/comparison.html, and its numbers in comparison.json.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

CONFIG=configs/digits_uvit_tiny.py
FOLDER=${1:-runs/comparison}
SEEDS="1234 1235 1236"
BUDGETS="0.33 0.4"          # of the calibrated schedules and thresholds, shares of full depth's MACs
RESIDUAL="--config.sample.residual=True --config.sample.refresh=4 --budget=0.45"
STEPS=dpm_solver_pp_2m-20
LAYERS="(2,3,4)"            # left at by all images
STEP_COUNTS="(10,14)"       # of full depth

evaluations=()
evaluate() { # MODEL RUN NAME ARGUMENTS...; the seconds that count are measured at the end, all together
    python eval.py --nnet_path="$2/last.ckpt" --output_path="$2/$3" "${@:4}" --config.eval.timing_runs=1
    evaluations+=("$1=$2/$3")
}

for seed in $SEEDS; do
    excess=$FOLDER/excess-$seed paper=$FOLDER/paper-$seed small=$FOLDER/small-$seed
    python train.py --config=$CONFIG --config.seed=$seed --workdir="$excess"
    python train.py --config=$CONFIG:paper --config.seed=$seed --workdir="$paper"
    python train.py --config=$CONFIG:small --config.seed=$seed --workdir="$small"

    sweep="'reuse.every=2','cache.every=2,cache.layers=1'"
    for budget in $BUDGETS; do
        file=$excess/calibrated/budget-$budget-$STEPS.json
        [ -f "$file" ] || python -m scripts.calibrate --config=$CONFIG --nnet_path="$excess/last.ckpt" \
            --output_path="$excess/calibrated" --nodes=keep --budget=$budget
        sweep+=",'schedule.path=$file','calibrated.path=$file'"
    done
    file=$excess/calibrated/budget-0.45-$STEPS-residual-4.json
    [ -f "$file" ] || python -m scripts.calibrate --config=$CONFIG --nnet_path="$excess/last.ckpt" \
        --output_path="$excess/calibrated" --nodes=keep $RESIDUAL
    sweep+=",'schedule.path=$file,residual=True,refresh=4','fixed.layer=2,residual=True,refresh=4'"
    sweep+=",'threshold.certainty=0.97,residual=True,refresh=4'"
    evaluate excess "$excess" eval --config=$CONFIG --exit_threshold=0.995,0.99,0.985,0.98,0.97 \
        --config.eval.fixed="$LAYERS" --config.eval.fewer_steps="$STEP_COUNTS" --config.eval.sweep="($sweep)"

    trace=$excess/eval/points/threshold-0.98/trace.npz
    evaluate excess "$excess" controls --config=$CONFIG --exit_threshold=0.98 --config.eval.fixed="()" \
        --config.eval.fewer_steps="()" --config.eval.sweep="('matched_static.path=$trace',\
'matched_random.path=$trace','matched_random.path=$trace,matched_random.match=all')"
    evaluate paper "$paper" eval --config=$CONFIG:paper --exit_threshold=0.97,0.95,0.93,0.9,0.85,0.8 \
        --config.eval.fixed="$LAYERS" --config.eval.fewer_steps="()"
    evaluate small "$small" eval --config=$CONFIG:small --config.eval.fewer_steps="$STEP_COUNTS"
done

python -m scripts.time_together --runs 3 "${evaluations[@]#*=}"
python -m scripts.compare "${evaluations[@]}" --output "$FOLDER/comparison.html"
