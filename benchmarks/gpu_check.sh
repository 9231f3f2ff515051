#!/usr/bin/env bash
# Everything that needs a GPU, in one command: benchmarks/gpu_check.sh, from a bare copy of the working tree. Nothing is
# downloaded; the machine has torch with CUDA, nvcc, triton, pybind11, ninja and pytest.
#
#   OUT        where the results go, at most eight files (default benchmarks/results/<date>-gpu)
#   PEERS_DIR  folder with further peers to import (higher, torchopt, learn2learn)
#   PYTHON     interpreter (default python3)
#   TESTS      files to test (default: all)
#
# Files: summary.txt, tests.log, sanitizer.log, bench.log, results.json, report.md and two pictures.
#
# A step that fails or cannot run does not stop the others: the table at the end says what became of each, and the exit
# status is that of the worst.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-benchmarks/results/$(date +%F)-gpu}")
CHOSEN=${TESTS:-}
TESTS=${TESTS:-$(ls tests/test_*.py)}
export PYTHONPATH="$PWD${PEERS_DIR:+:$PEERS_DIR}${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
table="$OUT/summary.txt"
: >"$table"
worst=0

note() { printf '%-12s %-44s %s\n' "$1" "$2" "$3" >>"$table"; echo "$1: $2"; }

# step NAME SECONDS FUNCTION: its output goes to NAME.log
step() {
    local name=$1 limit=$2 begin=$SECONDS status
    timeout --kill-after=10 "$limit" bash -c "$3" >"$OUT/$name.log" 2>&1
    status=$?
    local said="ok"
    [ $status -eq 124 ] && said="not finished in $limit s"
    [ $status -ne 0 ] && [ $status -ne 124 ] && said="FAILED, status $status: see $name.log"
    [ $status -ne 0 ] && worst=1
    note "$name" "$said" "$((SECONDS - begin)) s"
    return $status
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no NVIDIA GPU"
    nvcc --version | tail -n 2 || echo "no nvcc"
    "$PYTHON" - <<'EOF'
import importlib, platform, sys
print("python", platform.python_version())
for name in ("torch", "triton", "pybind11", "numpy", "learn2learn", "higher", "torchopt", "jax"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "there"))
    except Exception as error:
        print(name, "absent:", f"{type(error).__name__}: {error}".splitlines()[0])
import torch
print("CUDA in torch:", torch.version.cuda, "| usable:", torch.cuda.is_available())
EOF
}

# Dealt out to as many processes as there are cores, which may be without pytest-xdist.
run_tests() {
    local folder shard failed=0
    folder=$(mktemp -d)
    trap 'tail -n 60 "$folder"/ids.*.log; exit 1' TERM # the time is up: what each was doing
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && [ -z "$CHOSEN" ]; then
        TESTS="$TESTS $(ls tests/triton_cases_*.py) --deselect tests/test_triton_executor.py::test_on_a_gpu" # one by one: each compiles its kernels
    fi
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest -q --collect-only -p no:cacheprovider $TESTS >"$folder/collected"
    grep '::' "$folder/collected" | split -n "r/$(nproc)" - "$folder/ids."
    for shard in "$folder"/ids.*; do
        ("$PYTHON" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=150 "@$shard" >"$shard.log" 2>&1; echo $? >"$shard.status") &
    done
    wait
    tail -n 1 "$folder/collected"
    for shard in "$folder"/ids.??; do
        tail -n 1 "$shard.log"
        [ "$(cat "$shard.status")" -eq 0 ] || { failed=1 && tail -n 80 "$shard.log"; }
    done
    rm -r "$folder"
    return $failed
}

build() { "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m fastmaml; }

# memcheck and racecheck on the device tests of the CUDA kernel: those that do not repeat themselves.
sanitizer() {
    local tool failed=0
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda_device.py \
            -k "maml or left_out or infinite or (nets and sinusoid) or (nets and tanh)" || failed=1
    done
    return $failed
}

# On the GPU where torch sees one, each peer also in a CUDA graph; else on the CPU, so that the script itself can be tried.
bench() {
    local device
    device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    "$PYTHON" -m benchmarks.run --device "$device" --parts speed --budget 1 --agreement 8 --time-limit 150 --threads "$(nproc)" --out "$OUT"
}

report() { "$PYTHON" -m benchmarks.report "$OUT/results.json"; }

export PYTHON OUT TESTS CHOSEN
export OMP_WAIT_POLICY=passive  # the threads of many processes share the cores
export -f machine build run_tests sanitizer bench report

echo "results: $OUT"
step machine 60 machine
if step build 240 build; then
    step tests 270 run_tests
    step bench 240 bench
    if [ -f "$OUT/results.json" ] && [ ! -f "$OUT/report.md" ]; then # of what was measured before the limit
        step report 60 report && rm "$OUT/report.log"
    fi
    if ! "$PYTHON" -c 'import fastmaml._cuda' 2>/dev/null; then
        note sanitizer "not run: there is no fastmaml._cuda" -
    elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        note sanitizer "not run: there is no device" -
    elif ! command -v compute-sanitizer >/dev/null; then
        note sanitizer "not run: there is no compute-sanitizer" -
    else
        step sanitizer 180 sanitizer
    fi
    rm "$OUT/build.log"
fi
{ echo && cat "$OUT/machine.log"; } >>"$table" && rm "$OUT/machine.log"
echo
cat "$table"
exit $worst
