#!/usr/bin/env bash
# Everything there is to do on a machine with a GPU, in one command: build, GPU tests, benchmarks.
#
#   OUT=folder PYTHON=python3 bench/gpu.sh [PART...]
#
# Parts, all of them unless some are named: machine info verify gpu-tests conformance sample bench-ops bench-brownian
# bench-train-ops bench-train bench-loop bench-norm bench-unet bench-stream.
# Works offline with the Python that has torch; makes no virtual environment. A part that fails does not stop the next
# one. Leaves $OUT/results.txt (all output, ending in a summary of the parts) and $OUT/results.csv. The status is the
# number of parts that failed. A part that takes longer than $LIMIT seconds is ended and counted as failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/gpu}
LIMIT=${LIMIT:-300}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
RESULTS=$OUT/results.txt
: > "$RESULTS"
wanted=$*
summary=()
failed=0
export PYTHONUNBUFFERED=1

part() { # part NAME COMMAND...: run it, record what it prints and how it ended
    local name=$1 started=$SECONDS status
    shift
    if [ "$name" != build ] && [ "$name" != by-hand ] && [[ -n "$wanted" && " $wanted " != *" $name "* ]]; then
        return 0
    fi
    printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$RESULTS"
    timeout --kill-after=10 "$LIMIT" "$@" 2>&1 | tee -a "$RESULTS"
    status=${PIPESTATUS[0]}
    local verdict=ok
    if [ "$status" -ne 0 ]; then
        verdict="FAILED (status $status)"
        failed=$((failed + 1))
    fi
    summary+=("$(printf '%-12s %-20s %4d s' "$name" "$verdict" $((SECONDS - started)))")
    return "$status"
}

machine() {
    date -u
    git log -1 --format='commit %h %s' 2> /dev/null
    nvidia-smi
    nvcc --version | tail -2
    "$PYTHON" -c "import sys, torch, triton; print(sys.version); print('torch', torch.__version__, 'triton', triton.__version__)"
}
export -f machine
export PYTHON

# Without pip, or with a setuptools too old to read pyproject.toml: the package put together by hand.
by_hand() {
    rm -rf build/by_hand
    mkdir -p build/by_hand
    cp -r fastdiff csrc bench setup.py build/by_hand/
    cp -r kernels build/by_hand/fastdiff/
    (
        cd build/by_hand
        printf '[project]\nname = "fastdiff"\nversion = "0"\n[tool.setuptools]\npackages = []\n' > pyproject.toml
        "$PYTHON" setup.py build_ext --inplace
    )
}
export -f by_hand

export FASTDIFF_REQUIRE_EXTENSION=1
bench=bench/run.py
part machine bash -c machine
if ! part build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .; then
    part by-hand bash -c by_hand
    export PYTHONPATH=$PWD/build/by_hand
    bench=build/by_hand/bench/run.py
fi
part info "$PYTHON" -P -m fastdiff.cli info
part verify "$PYTHON" -P -m fastdiff.cli verify
part gpu-tests "$PYTHON" -P -m pytest -q -m gpu
part conformance "$PYTHON" -P -m pytest -q -m "not gpu and not slow" -k "triton or cuda"
part sample "$PYTHON" -P -m fastdiff.cli sample --out "$OUT/samples.png"
rm -f "$OUT/results.csv"
part bench-ops "$PYTHON" "$bench" ops --device cuda --csv "$OUT/results.csv"
part bench-brownian "$PYTHON" "$bench" brownian --device cuda --csv "$OUT/results.csv"
part bench-train-ops "$PYTHON" "$bench" train-ops --device cuda --csv "$OUT/results.csv"
part bench-train "$PYTHON" "$bench" train --device cuda --csv "$OUT/results.csv"
part bench-loop "$PYTHON" "$bench" loop --device cuda --csv "$OUT/results.csv"
part bench-norm "$PYTHON" "$bench" norm --device cuda --csv "$OUT/results.csv"
part bench-unet "$PYTHON" "$bench" unet --device cuda --csv "$OUT/results.csv"
part bench-stream "$PYTHON" "$bench" stream --device cuda --csv "$OUT/results.csv"

{
    printf '\n=== summary\n'
    printf '%s\n' "${summary[@]}"
    printf '%d parts failed\n' "$failed"
} | tee -a "$RESULTS"
exit "$failed"
