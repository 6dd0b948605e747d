#!/usr/bin/env bash
# Everything that needs a GPU in one call of at most 10 minutes:  benchmarks/gpu_session.sh [--dry-run] [DIR]
# Times updates and samplers with CUDA graphs and without, U-Nets against PyTorch's and diffusers', and every kernel
# against eager PyTorch, torch.compile and SDPA; measures where our attention beats PyTorch's; tests kernels and graphs.
# DIR (results) gets rows, the attention table, the prediction and a log of each part. The table of times comes last.
# --dry-run goes through all parts without a GPU, in Triton's interpreter on tiny shapes, in under 2 minutes.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-.venv/bin/python}
command -v "$PYTHON" >/dev/null || PYTHON=python3

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
out=${1:-results}
together=(tests/fastdiff/test_graph.py tests/train/test_recipes.py::test_an_update_never_waits_for_the_device)

if [ -n "$dry_run" ]; then
    echo "DRY RUN in Triton's interpreter on tiny shapes: no time below says anything about a GPU"
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= tiny=--tiny
    tests=(tests/kernels/fused/test_shim.py "${together[@]}")
elif "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    tiny=
    tests=(tests/kernels/fused "${together[@]}")
else
    echo "gpu_session.sh: PyTorch sees no GPU here; run it where there is one, or try its parts with --dry-run" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
failed=()

part() { # part NAME SECONDS COMMAND...: run it within its time, keep its output, go on whatever happens
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    [ -z "$dry_run" ] || seconds=$((4 * seconds)) # the limits are for a GPU
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    local status=$?
    case $status in
        0) echo "$name: done in $((SECONDS - start)) s" ;;
        124) echo "$name: stopped after its $seconds s; what it had measured is kept" ;;
        *) echo "$name: failed ($status), see $out/$name.log" ;;
    esac
    [ $status -eq 0 ] || failed+=("$name")
}

# The most important first: the whole has to fit 10 minutes.
# shellcheck disable=SC2086  # $tiny is one word or none
part times 310 "$PYTHON" -m benchmarks.gpu_time --minutes 5 --out "$out" $tiny
part attention 50 "$PYTHON" -m benchmarks.attention_table --out "$out/attention.json" $tiny
export FASTDIFF_ATTENTION_TABLE=$out/attention.json # from here on attention chooses by what was measured
part tests 110 "$PYTHON" -m pytest "${tests[@]}"
part kernels 90 "$PYTHON" -m pytest -o 'python_files=bench_*.py' --benchmark-only --benchmark-columns=median \
    --results "$out" $tiny benchmarks/bench_kernels.py
part prediction 30 "$PYTHON" -m benchmarks.roofline --no-occupancy --json "$out/prediction.json"

cat "$out/times.log"
echo "results in $out: $(ls "$out" | tr '\n' ' ')"
if [ ${#failed[@]} -gt 0 ]; then
    echo "not complete: ${failed[*]}" >&2
    exit 1
fi
