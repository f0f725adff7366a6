#!/usr/bin/env bash
# Early exit against its rivals over several training seeds, at equal quality and in seconds of one interleaved run.
#   bash scripts/comparison.sh [digits|digits-deep|fashion|cifar10] [FOLDER] [--config.…=… of all commands]
#   JOBS=2 OMP_NUM_THREADS=1 bash scripts/comparison.sh      two trainings at a time, then evaluations of two processes
# One call makes everything: trains, calibrates, evaluates, times, writes. What is finished is not done again.
# Reads: FOLDER/comparison.html, and its numbers in benchmarks/results/frontier-<data>-cpu.json.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

JOBS=${JOBS:-1} DATA=${1:-digits} FOLDER=${2:-runs/comparison-${1:-digits}} MORE=("${@:3}")
# Per data set: config, training seeds; the other networks of equal training time (presets of the config) and the steps of
# the small one; images per noise seed; budgets as shares of the reference's GMACs, those between them, which begin with
# the plans on both sides, those of no layers or all (exit 0), and those of full depth; the grid on which few calls do well, how many calls full depth tries
# on it, and on how many calls exits and fixed layers are compared; the settings of exits, forecasts and caches. Of the
# digits they are the best that cost no more than five calls of full depth, found on other noise (Q41). Where there is
# an exit 0, the other networks have it too (Q47).
OTHERS="small plain" SMALL_STEPS=6000 IMAGES=1024 BUDGETS="0.1 0.15 0.2" BETWEEN="" ENDS="" PLACED="0.2 0.25 0.3 0.35 0.4"
GRID=karras:7 PLAIN=(steps={4,5,6,8,10}) CALLS=6 LAYERS="1 2" CERTAINTIES="0.98 0.99" FORECASTS=10
RIVALS=(
    {reuse,cache}.every=2,steps={6,8} teacache.threshold={0.1,0.2,0.4},steps=8
    first_block.threshold={0.15,0.3},first_block.per_image={True,False},steps=8
)
case $DATA in
    digits) CONFIG=configs/digits_uvit_tiny.py SEEDS="1 2 3" IMAGES=2048
        BUDGETS="0.05 0.08 0.1 0.12 0.15 0.2 0.3 0.5" ENDS="0.05 0.1 0.15" PLACED="0.2 0.25 0.3 0.4"
        GRID=power:2 PLAIN=(steps={4,5,6,8}) CALLS=5 CERTAINTIES="0.96 0.98" FORECASTS=8
        RIVALS=(
            reuse.every=2,steps=8 cache.every=2,steps=6 teacache.threshold=0.2,steps={5,6}
            first_block.threshold=0.3,first_block.per_image={True,False},steps=5
        ) ;;
    digits-deep) CONFIG=configs/digits_uvit_deep.py SEEDS="1 2 3" OTHERS=small SMALL_STEPS=4400 IMAGES=2048
        BUDGETS="0.08 0.1 0.15 0.2 0.3 0.5" BETWEEN="0.12 0.11 0.09" PLACED="0.2 0.25 0.3 0.4"
        GRID=power:2 PLAIN=(steps={3,4,5,8}) CALLS=5 LAYERS="3 4" FORECASTS=8
        RIVALS=(
            reuse.every=2,steps=6 cache.every=2,steps=7 teacache.threshold=0.2,steps=6
            first_block.threshold=0.3,first_block.per_image={True,False},steps=6
        ) ;;
    fashion) CONFIG=configs/fashion_uvit_small.py SEEDS="1 2" BETWEEN="0.185 0.175 0.18" ;;
    cifar10) CONFIG=configs/cifar10_uvit_tiny.py SEEDS="1" SMALL_STEPS=5500 IMAGES=512 ;;
    *) echo "the data are $DATA; they must be digits, digits-deep, fashion or cifar10" >&2 && exit 2 ;;
esac
REFERENCE="--config.sample.sample_steps=20 --config.sample.grid= --config.sample.mini_batch_size=128"  # 20 even calls
FEW=$GRID,lower_order_final=False
FEW_CONFIG="--config.sample.grid=$GRID --config.sample.dpm_solver_pp_2m.lower_order_final=False"

SWEEP=(                                            # eval.sweep: on good grids, every rival with its own settings
    threshold.certainty=0.98                                                            # exits
    steps=$FORECASTS,grid=$FEW,forecast.every=2,forecast.tail=2,forecast.order={1,2,3}  # calls extrapolated
    "${RIVALS[@]/%/,grid=$FEW}"                                                         # caches
)
PLAIN=("${PLAIN[@]/%/,grid=$FEW}")                 # fewer calls, full depth: of all networks
for c in $CERTAINTIES; do SWEEP+=("threshold.certainty=$c,steps=$CALLS,grid=$FEW"); done
for k in $LAYERS; do SWEEP+=("fixed.layer=$k,steps=$CALLS,grid=$FEW"); done

PROCESSES=(python)                                 # of an evaluation: as many as JOBS
if [ "$JOBS" -gt 1 ]; then
    PROCESSES=(torchrun --nproc_per_node "$JOBS")
    export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-$(python -c "import torch; print(not torch.cuda.is_available())")}
fi
running=0
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
start() { # COMMAND...: in the background, as soon as fewer than JOBS run
    [ "$running" -lt "$JOBS" ] || finish $((JOBS - 1))
    "$@" &
    running=$((running + 1))
}
finish() { # [N]: until at most N (default: none) of what was started runs; stop at the first failure
    while [ "$running" -gt "${1:-0}" ]; do # wait -n: a wait for ids fails when an id is given to another process
        wait -n
        running=$((running - 1))
    done
}
place() { # CONFIG CHECKPOINT DEPTH BUDGETS...
    suffix=$([ "$3" = search ] || echo "-$3")
    todo=$(for budget in "${@:4}"; do [ -f "$2/plan-budget-$budget$suffix.json" ] || echo "$budget"; done | paste -sd,)
    [ -z "$todo" ] || python -m scripts.calibrate --config="$1" $REFERENCE --config.sample.n_samples=$IMAGES \
        "${MORE[@]}" --nnet_path="$2" --depth="$3" --budget="$todo"
}
prepare() { # RUN SEED: everything that an evaluation reads, but the other networks
    checkpoint=$1/last.ckpt
    python train.py --config=$CONFIG "${MORE[@]}" --config.seed="$2" --workdir="$1"
    if [ "$checkpoint" = "$FIRST" ]; then # its plans serve all networks: what they are worth where nobody searched
        place $CONFIG "$FIRST" ends $ENDS  # a search begins with them
        place $CONFIG "$FIRST" search $BUDGETS
        for budget in $BETWEEN; do place $CONFIG "$FIRST" search "$budget"; done # in this order
        place $CONFIG "$FIRST" full $PLACED
    fi
    few=("${MORE[@]}" --nnet_path="$checkpoint" $FEW_CONFIG --config.sample.sample_steps=6 --budget=0.6)
    [ -f "$checkpoint/$KEPT" ] || python -m scripts.calibrate --config=$CONFIG $REFERENCE "${few[@]}" --nodes=keep
    for kind in learned_cache lazy_gate; do
        [ -f "$checkpoint/$kind-0.6-6-${GRID/:/-}.json" ] ||
            python -m scripts.fit_rivals --config=$CONFIG $REFERENCE "${few[@]}" --kind=$kind
    done
}
ZERO=${ENDS:+,exit0}
prepare_other() { # RUN SEED PRESET; a network of the same size takes as many steps
    steps=$([ "$3" != small ] || echo --config.train.n_steps=$SMALL_STEPS)
    python train.py --config="$CONFIG:$3$ZERO" --config.seed="$2" $steps "${MORE[@]}" --workdir="$1/$3"
    [ "$1/last.ckpt" = "$FIRST" ] || return 0
    place "$CONFIG:$3$ZERO" "$1/$3/last.ckpt" ends $ENDS
    place "$CONFIG:$3$ZERO" "$1/$3/last.ckpt" full $PLACED
}
tuple() { printf "("; printf "'%s'," "$@"; printf ")"; }
evaluate() { # RUN CONFIG ENTRIES...; the seconds that count are measured at the end, all together
    "${PROCESSES[@]}" eval.py --config="$2" $REFERENCE --nnet_path="$1/last.ckpt" --output_path="$1/eval" \
        --config.sample.n_samples=$IMAGES --config.exit.name=full --config.eval.thresholds="()" \
        --config.eval.fixed="()" --config.eval.fewer_steps="()" --config.eval.sweep="$(tuple "${@:3}")" \
        --config.eval.tolerance=0 --config.eval.timing_runs=1 --config.eval.timing_batch=128 "${MORE[@]}"
}

SETTINGS="$CONFIG $REFERENCE $IMAGES ${MORE[*]}"   # plans made with others would be kept
[[ $SETTINGS != *train.n_steps=* ]] || { echo "train.n_steps is that of $CONFIG: rivals train as long" >&2 && exit 2; }
if [ -f "$FOLDER/settings" ] && [ "$(cat "$FOLDER/settings")" != "$SETTINGS" ]; then
    echo "$FOLDER holds a comparison with other settings, $(cat "$FOLDER/settings"); name another folder" >&2 && exit 2
fi
mkdir -p "$FOLDER"
echo "$SETTINGS" > "$FOLDER/settings"

FIRST=$FOLDER/$DATA${SEEDS%% *}/last.ckpt KEPT=budget-0.6-dpm_solver_pp_2m-6-${GRID/:/-}.json
for seed in $SEEDS; do start prepare "$FOLDER/$DATA$seed" "$seed"; done
for other in $OTHERS; do
    for seed in $SEEDS; do start prepare_other "$FOLDER/$DATA$seed" "$seed" "$other"; done
done
finish

evaluations=() plans=()
for budget in $BUDGETS $BETWEEN; do plans+=("plan=$FIRST/plan-budget-$budget.json"); done
for budget in $ENDS; do plans+=("plan=$FIRST/plan-budget-$budget-ends.json"); done
for budget in $PLACED; do plans+=("plan=$FIRST/plan-budget-$budget-full.json"); done
for seed in $SEEDS; do
    run=$FOLDER/$DATA$seed on=steps=6,grid=$FEW
    fitted=({schedule,calibrated}.path="$run/last.ckpt/$KEPT,$on")
    for kind in learned_cache lazy_gate; do fitted+=("$kind.path=$run/last.ckpt/$kind-0.6-6-${GRID/:/-}.json,$on"); done
    fitted+=("duo.path=$run/small/last.ckpt,duo.first=3,$on") # the small network first
    evaluate "$run" $CONFIG "${SWEEP[@]}" "${PLAIN[@]}" "${fitted[@]}" "${plans[@]}"
    evaluations+=("adaptive=$run/eval")
    for other in $OTHERS; do
        placed=() of=${FIRST%/*}/$other/last.ckpt
        for budget in $PLACED; do placed+=("plan=$of/plan-budget-$budget-full.json"); done
        for budget in $ENDS; do placed+=("plan=$of/plan-budget-$budget-ends.json"); done
        evaluate "$run/$other" "$CONFIG:$other$ZERO" "${PLAIN[@]}" "${placed[@]}"
        evaluations+=("$other=$run/$other/eval")
    done
done

python -m scripts.time_together --runs 7 "${evaluations[@]#*=}"
python -m scripts.compare "${evaluations[@]}" --output "$FOLDER/comparison.html" \
    --json "benchmarks/results/frontier-$DATA-cpu.json"
