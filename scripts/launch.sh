#!/usr/bin/env bash
# What scripts/train_*.sh and scripts/eval_*.sh run: launch.sh train|eval EXPERIMENT [FLAGS for the Python command].
# Set in front of the command: CONFIG, WORKDIR, PRETRAINED (train; empty = from scratch with the config's settings),
# NNET, OUTPUT, THRESHOLDS (eval; empty = the config's), PROCESSES, PRECISION. Several machines: MACHINES,
# MACHINE_RANK, MAIN_IP, and PROCESSES counts all of them together (scripts/slurm_example.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 2; }

case ${1:-} in
train | eval) job=$1 experiment=${2:-} ;;
*) fail "launch.sh takes train or eval, then an experiment, not ${1:-nothing}; U-ViT's *_ldm_discrete.py are train_ldm.py and eval_ldm.py here" ;;
esac
shift $(($# < 2 ? $# : 2))
# experiment: config, suffix of the script, processes, thresholds; fine-tuning where it differs: lr, images per step, steps
case $experiment in
celeba64)    row=(configs/celeba64_uvit_small.py   ""             4 0.92,0.95,0.98 8e-4 1024 200000) ;;
cifar10)     row=(configs/cifar10_uvit_small.py    ""             4 0.92,0.95,0.98 4e-4 512 200000) ;;
imagenet64)  row=(configs/imagenet64_uvit_mid.py   ""             8 0.92,0.95,0.98 3e-4 1024 300000) ;;
imagenet256) row=(configs/imagenet256_uvit_large.py _ldm          8 0.90,0.92,0.95) ;;
imagenet512) row=(configs/imagenet512_uvit_large.py _ldm          8 0.90,0.92,0.95) ;;
mscoco)      row=(configs/mscoco_uvit_small.py     _t2i_discrete  4 0.85,0.87,0.92) ;;
*) fail "there is no experiment ${experiment:-without a name}; it is one of celeba64, cifar10, imagenet64, imagenet256, imagenet512, mscoco: scripts/${job}_EXPERIMENT.sh" ;;
esac
config=${row[0]} script=$job${row[1]}.py
name=$(basename "$config" .py)

if [ -z "${PROCESSES:-}${PRECISION:-}" ] && ! nvidia-smi -L > /dev/null 2>&1; then
    fail "no GPU is visible, and $script would start ${row[2]} processes in fp16: on a CPU set PRECISION=no PROCESSES=1 in front of the command"
fi
PROCESSES=${PROCESSES:-${row[2]}} PRECISION=${PRECISION:-fp16} MACHINES=${MACHINES:-1}

weights() { # FILE REMEDY: looked at once, before any process starts
    [ -n "$1" ] && [ ! -e "$1" ] || return 0
    case $1 in assets/uvit/*) fail "there are no weights at $1; python -m scripts.download $(basename "$1" .pth) fetches them" ;; esac
    fail "there are no weights at $1; $2"
}

if [ "$job" = train ]; then
    PRETRAINED=${PRETRAINED-assets/uvit/$name.pth}
    weights "$PRETRAINED" "PRETRAINED names a file, and PRETRAINED= trains from scratch"
    from=$([ -n "$PRETRAINED" ] || echo -scratch) # a folder of its own: a workdir is one experiment
    flags=(--config="${CONFIG:-$config}" --workdir="${WORKDIR:-workdir/$name$from}")
    if [ -n "$PRETRAINED" ]; then
        flags+=(--pretrained_weight="$PRETRAINED")
        [ ${#row[@]} = 4 ] || flags+=(--config.optimizer.lr="${row[4]}" --config.train.batch_size="${row[5]}" --config.train.n_steps="${row[6]}")
    fi
else
    NNET=${NNET:-workdir/$name/last.ckpt} THRESHOLDS=${THRESHOLDS-${row[3]}}
    OUTPUT=${OUTPUT:-$NNET-eval}
    weights "$NNET" "train first (scripts/train_$experiment.sh), or name a file in NNET"
    flags=(--config="${CONFIG:-$config}" --nnet_path="$NNET" --output="$OUTPUT")
    [ -z "$THRESHOLDS" ] || flags+=(--exit_threshold="$THRESHOLDS")
fi

source scripts/environment.sh
if [ "$PROCESSES" = 1 ]; then # without a launcher in between, signals reach the command itself
    command=(env ACCELERATE_MIXED_PRECISION="$PRECISION" python)
else
    layout=configs/accelerate/$PROCESSES-gpus.yaml
    [ -f "$layout" ] || layout=configs/accelerate/8-gpus.yaml
    [ "$MACHINES" = 1 ] || layout=configs/accelerate/2-nodes.yaml
    command=(accelerate launch --config_file "$layout" --num_processes "$PROCESSES" --num_machines "$MACHINES" --mixed_precision "$PRECISION")
    [ "$MACHINES" = 1 ] || command+=(--machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_IP" --main_process_port "${MAIN_PORT:-29500}")
fi
[ "$job" = eval ] || exec "${command[@]}" "$script" "${flags[@]}" "$@"
trap : TERM USR1 # the command ends by itself; then so does this script
"${command[@]}" "$script" "${flags[@]}" "$@"
python -m scripts.report "$OUTPUT"
