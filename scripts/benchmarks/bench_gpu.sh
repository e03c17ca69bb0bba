#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command: correctness of every CUDA path, then the tables of speed.
# Usage: bash scripts/benchmarks/bench_gpu.sh [DIRECTORY]     results go to DIRECTORY (docs/results/cuda-DATE)
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" ".[dev,cuda]"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA device, or torch was installed without CUDA: nothing was run" >&2
    exit 2
fi
export NASQ_CUDA_KERNELS=1 # off by default in training and evaluation, until this script has passed
out="${1:-docs/results/cuda-$(date -u +%F)}"
mkdir -p "$out"
failed=0
run() { # $1: name of the log; the rest: the command. A failure is kept and told, and what comes next runs.
    echo "== $1" >&2
    "${@:2}" 2>&1 | tee "$out/$1.log" || failed=1
}
run tests python -m pytest -q tests/cuda tests/quant/test_fake_quantize.py tests/quant/test_integer.py
run gpu-tests python -m pytest -q -m gpu tests
run correctness python -m scripts.benchmarks.gpu_correctness --out "$out/correctness.json"
if [ "$failed" -ne 0 ]; then
    echo "something above is wrong: times of wrong results mean nothing, so none are taken. Logs: $out" >&2
    exit 1
fi
run tables python -m scripts.benchmarks.gpu_tables --out "$out/tables.json"
echo "results: $out" >&2
exit "$failed"
