#!/usr/bin/env bash
# Several machines under SLURM: sbatch scripts/slurm_example.sh scripts/train_imagenet256.sh [FLAGS]
# One task per machine starts that machine's processes. Three minutes before the time is up all processes are told to
# stop: they save the step in flight, and the job is queued again and goes on from there.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
set -euo pipefail
GPUS=${GPUS:-8} # per machine
export MACHINES=$SLURM_NNODES PROCESSES=$((SLURM_NNODES * GPUS))
MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_IP MAIN_PORT=${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

cd "$SLURM_SUBMIT_DIR"
again=
trap 'again=1; kill -TERM "$job"' USR1 # srun passes it on to the tasks
# --num_machines and --machine_rank of accelerate come from these in scripts/launch.sh; the rank is known on the machine
srun --kill-on-bad-exit=1 bash -c 'MACHINE_RANK=$SLURM_NODEID exec bash "$@"' _ "$@" &
job=$! code=0
wait "$job" || code=$?
if [ -n "$again" ]; then # the first wait ended with the signal
    wait "$job" || true
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
