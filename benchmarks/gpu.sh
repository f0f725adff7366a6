#!/usr/bin/env bash
# The benchmarks on one GPU, part by part, each under 9 minutes; a part that fails is named and the next one starts.
#   bash benchmarks/gpu.sh                     all parts
#   bash benchmarks/gpu.sh mfu exits-bf16      these parts
#   bash benchmarks/gpu.sh smoke --device cpu  the whole control flow with the smallest cases, 3 minutes on a CPU
# Results: $OUT where it is set, otherwise benchmarks/results. PEAK: dense TFLOP/s of a card that benchmarks.mfu does not know.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$(command -v python3 || command -v python)} || { echo "gpu.sh: no python3 and no python on PATH" >&2; exit 2; }
PARTS="tests mfu exits-bf16 exits-fp32 compiled sampler-bf16 train attention"
DEVICE=cuda SMOKE="" CHOSEN=""
while [ $# -gt 0 ]; do
    case "$1" in
        smoke) SMOKE=yes ;;
        --device) DEVICE=${2:-}; shift ;;
        *) case " $PARTS " in *" $1 "*) CHOSEN+=" $1" ;; *) echo "gpu.sh: no part $1; there are: $PARTS" >&2; exit 2 ;; esac ;;
    esac
    shift
done
case "$DEVICE" in
    cuda) "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: torch sees no CUDA device; --device cpu smoke tries the flow" >&2; exit 2; } ;;
    cpu) PEAK=${PEAK:-1} ;;
    *) echo "gpu.sh: --device is '$DEVICE'; it must be cuda or cpu" >&2; exit 2 ;;
esac
PEAK=(${PEAK:+--peak "$PEAK"})
"$PYTHON" -m benchmarks.mfu --check --device "$DEVICE" --dtype bf16 "${PEAK[@]}" || exit 2  # before anything is measured
"$PYTHON" - <<'CHECK'
import importlib.util as find
missing = [name for name in ("ml_collections", "diffusers", "wandb", "pytorch_fid") if find.find_spec(name) is None]
if missing:
    print(f"not installed: {', '.join(missing)}; the benchmarks do without, tests that need them are skipped")
CHECK

bench() { # MODULE ARGUMENTS...
    local module=$1; shift
    if [ -n "$SMOKE" ]; then
        set -- "$@" --sizes tiny --batches 8 --rounds 2 --least 1 --budget 1
        [ "$module" = compiled ] && set -- "$@" --ways fp32 bf16 # compiling takes minutes
        [ "$module" = sampler ] && set -- "$@" --steps 2 --factor 2
    fi
    "$PYTHON" -m "benchmarks.$module" --device "$DEVICE" "$@"
}
part() {
    case "$1" in
        tests) "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py; local rc=$?; [ $rc = 5 ] && [ "$DEVICE" = cpu ] && rc=0; return $rc ;;
        mfu) bench mfu --dtype bf16 "${PEAK[@]}" --budget 5 ;;
        exits-bf16) bench exits --dtype bf16 --sizes tiny S/2 L/2 --batches 1 8 64 256 --budget 8 ;;
        exits-fp32) bench exits --dtype fp32 --sizes tiny S/2 --batches 1 8 64 256 --budget 8 ;;
        compiled) bench compiled --sizes tiny S/2 --batches 64 --budget 30 ;;
        sampler-bf16) bench sampler --dtype bf16 --sizes tiny S/2 --batches 16 64 256 --budget 10 ;;
        train) bench train_step --dtype bf16 --sizes S/2 --batches 8 128 --budget 20 ;;
        attention) bench attention --sizes S/2 L/2 --batches 1 8 64 --budget 8 ;;
    esac
}
failed=""
for name in ${CHOSEN:-$PARTS}; do
    echo "== $name"
    start=$SECONDS
    part "$name" || { failed+=" $name"; echo "== $name failed; going on" >&2; }
    echo "== $name: $((SECONDS - start)) s"
done
[ -z "$failed" ] || { echo "gpu.sh: failed:$failed" >&2; exit 1; }
echo "gpu.sh: all parts ran"
