#!/usr/bin/env bash
# All benchmarks on one CUDA device, about 15 minutes. PEAK: its dense bf16 TFLOP/s (H100 and H200: 989, A100: 312).
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "benchmarks/gpu.sh needs a CUDA device")'
for dtype in fp32 bf16; do
    python -m benchmarks.exits --device cuda --dtype "$dtype" --sizes tiny S/2 L/2 --batches 1 8 64 256 --budget 8
    python -m benchmarks.sampler --device cuda --dtype "$dtype" --sizes tiny S/2 --batches 16 64 256 --budget 10
    python -m benchmarks.train_step --device cuda --dtype "$dtype" --sizes S/2 --batches 8 128 --budget 20
done
python -m benchmarks.attention --device cuda --sizes S/2 L/2 --batches 1 8 64 --budget 8
python -m benchmarks.mfu --device cuda --dtype bf16 --peak "${PEAK:?set PEAK to the dense bf16 TFLOP/s of the device}" --budget 5
