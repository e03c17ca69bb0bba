#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command: correctness of every CUDA path, then the tables of speed.
# Usage: bash scripts/benchmarks/bench_gpu.sh [DIRECTORY]     results go to DIRECTORY (docs/results/cuda-DATE)
# NASQ_SECONDS=540 stops in time and returns 3: the same command goes on with what is missing in DIRECTORY. Every result is
# written as soon as it is there. Where python3 has all packages, nothing is downloaded; NASQ_OFFLINE=1 never downloads, and
# stops with the list of what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
needed="torch torchvision triton timm numpy scipy sklearn onnx safetensors pydantic pytest pytest_timeout hypothesis"
missing="$(python3 -c 'import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])' $needed)"
if [ -n "$missing" ]; then
    echo "python3 ($(command -v python3)) lacks: $missing" >&2
    [ -z "${NASQ_OFFLINE:-}" ] || exit 2
    echo "installing into a virtual environment" >&2
    source scripts/environment.sh ".[dev,cuda]"
elif ! python3 -c 'import nasq, nasq.search_spaces, importlib.metadata as m; assert m.entry_points(group="nasq.proxies")' 2>/dev/null; then
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . >&2
fi
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no CUDA device, or torch was installed without CUDA: nothing was run" >&2
    exit 2
fi
export NASQ_CUDA_KERNELS=1 # off by default in training and evaluation, until this script has passed
export PYTHONUNBUFFERED=1
out="${1:-docs/results/cuda-$(date -u +%F)}"
mkdir -p "$out"
left() { echo $((${NASQ_SECONDS:-86400} - SECONDS)); }
stop() { # $1: the exit code, $2: what is to be said
    echo "$2 Results so far: $out" >&2
    exit "$1"
}
run() { # $1: name of the log; the rest: the command, which is ended when the time is up. Returns what it returns.
    echo "== $1" >&2
    [ "$(left)" -gt 10 ] || stop 3 "The time is up; run the same command again."
    local code=0
    timeout --signal=INT --kill-after=10 "$(left)" "${@:2}" 2>&1 | tee -a "$out/$1.log" || code=$?
    [ "$code" -ne 124 ] && [ "$code" -ne 137 ] && [ "$code" -ne 3 ] || stop 3 "The time is up; run the same command again."
    return "$code"
}
code="$(python3 -m scripts.benchmarks.gpu_correctness --code)"
failed=0
if [ "$(cat "$out/tests.passed" 2>/dev/null)" != "$code" ]; then
    # The interpreter's tests say nothing of a device, and need a CPU that is quick.
    run tests python3 -m pytest -q -m "not long" -p no:cacheprovider tests/cuda tests/quant/test_fake_quantize.py \
        tests/quant/test_integer.py --ignore=tests/cuda/test_interpreted.py || failed=1
    [ "$failed" -ne 0 ] || echo "$code" >"$out/tests.passed"
fi
run correctness python3 -m scripts.benchmarks.gpu_correctness --out "$out/correctness.json" --seconds "$(($(left) - 20))" || failed=1
[ "$failed" -eq 0 ] || stop 1 "Something above is wrong: times of wrong results mean nothing, so none are taken."
# A line in work may take minutes: none is begun in the last three.
run tables python3 -m scripts.benchmarks.gpu_tables --out "$out/tables.json" --seconds "$(($(left) - 180))" || failed=1
stop "$failed" "Done."
