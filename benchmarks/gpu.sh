#!/usr/bin/env bash
# The released size on one GPU, in one call of under ten minutes:
#
#     benchmarks/gpu.sh [OUT]
#
# First the recorded cases of the reference in float32, then the_matrix:STAGE4 at 480x720 with random
# weights: frames per second whole and by part, latency, compile times, memory, TFLOP/s. PEAK_TFLOPS
# is the data sheet's dense bfloat16 (989: H100 and H200); PYTHON is the interpreter. Options of
# tools/benchmark.py may follow OUT, such as --world.vae.dtype float32.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-outputs/gpu}
"$python" -c 'import sys, jax; sys.exit(jax.default_backend() != "gpu")' || {
    echo "error: jax finds no GPU: pip install -e '.[cuda12]'" >&2
    exit 2
}
mkdir -p "$out"
XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DEFAULT_MATMUL_PRECISION=highest \
    timeout 120 "$python" tools/parity.py tests/goldens/the_matrix/* > "$out/parity.txt" || {
    echo "parity: ended with exit code $?, see $out/parity.txt" >&2
}
timeout 450 "$python" tools/benchmark.py the_matrix:STAGE4 --random --steps 40 \
    --world.vae.dtype bfloat16 --peak-tflops "${PEAK_TFLOPS:-989}" --out "$out" "${@:2}"
