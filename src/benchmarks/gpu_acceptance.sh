#!/usr/bin/env bash
# What only a GPU can show, within 15 minutes: the tests marked gpu that one GPU answers, then the benchmark.
# usage: bash src/benchmarks/gpu_acceptance.sh [RESULTS] [WHEELS]
# WHEELS is a folder with wheels of what a machine without a package registry lacks, such as omegaconf, zstandard and
# zlib-ng. Results go to RESULTS (default: results): gpu-tests.txt, gpu.json and gpu.txt. PYTHON chooses the interpreter.
set -uo pipefail
results=$(realpath -m "${1:-results}")
wheels=${2:+$(realpath "$2")}
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
mkdir -p "$results" || exit 1
if [ -n "$wheels" ]; then
    packages=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$packages" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 WANDB_MODE=disabled
timeout 400 "$python" -m pytest -n 0 -m gpu -rs --durations=5 tests/gpu 2>&1 | tee "$results/gpu-tests.txt"
tests=$?
timeout 400 "$python" -m src.benchmarks.gpu --minutes 5 --output "$results/gpu.json" 2>&1 | tee "$results/gpu.txt"
benchmark=$?
exit $((tests ? tests : benchmark))
