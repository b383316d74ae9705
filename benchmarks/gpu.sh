#!/usr/bin/env bash
# The released size on one GPU, in one call of under ten minutes:
#
#     benchmarks/gpu.sh [OUT]
#
# First the_matrix:STAGE4 at 480x720 with random weights: frames per second whole and by part,
# latency, compile times, memory, TFLOP/s. Then, in the time that is left, the recorded cases of the
# reference in float32 (parity.txt), the same with keys that bind at the head (OUT/head), how far
# bfloat16 and 8-bit layers are from float32 at full width (OUT/errors), and the benchmark with 8-bit
# layers (OUT/int8). Each writes what it has after every measured part; what did not fit says so.
#
# PEAK_TFLOPS is the data sheet's dense bfloat16 (989: H100 and H200); PYTHON is the interpreter.
# Options of tools/benchmark.py may follow OUT, such as --world.vae.dtype float32.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-outputs/gpu}
"$python" -c 'import sys, jax; sys.exit(jax.default_backend() != "gpu")' || {
    echo "error: jax finds no GPU: pip install -e '.[cuda12]'" >&2
    exit 2
}
mkdir -p "$out"

code=0
# part NAME LIMIT COMMAND...: within LIMIT seconds and what is left of the call
part() {
    local name=$1 limit=$2 left=$((585 - SECONDS))
    shift 2
    [ "$left" -ge 20 ] || { echo "$name: no time left" >&2; return 0; }
    timeout "$((left < limit ? left : limit))" "$@" || { echo "$name: exit code $?" >&2; code=1; }
}

full=(tools/benchmark.py the_matrix:STAGE4 --random --peak-tflops "${PEAK_TFLOPS:-989}")
part benchmark 300 "$python" "${full[@]}" --steps 40 --entries tail --out "$out" "${@:2}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
JAX_DEFAULT_MATMUL_PRECISION=highest part parity 120 \
    "$python" tools/parity.py tests/goldens/the_matrix/*.{safetensors,json} > "$out/parity.txt"
tail -n 1 "$out/parity.txt"
part head 120 "$python" "${full[@]}" --steps 30 --world.stream.entry head --entries head \
    --out "$out/head" "${@:2}"
part errors 60 "$python" "${full[@]}" --layers 4 --int8 --out "$out/errors"
part int8 150 "$python" "${full[@]}" --steps 30 --entries none --world.dit.int8 blocks \
    --out "$out/int8" "${@:2}"
exit "$code"
