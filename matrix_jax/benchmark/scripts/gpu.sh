#!/usr/bin/env bash
# The released sizes on one GPU, each in one call of under ten minutes:
#
#     matrix_jax/benchmark/scripts/gpu.sh [OUT]
#     WORLD=matrix_game_2 matrix_jax/benchmark/scripts/gpu.sh [OUT]
#
# First the world's stream with random weights (the_matrix:STAGE4 at 480x720, or
# matrix_game_2:UNIVERSAL at 352x640): frames per second whole and by part, latency, compile times,
# memory, TFLOP/s. Then, in the time that is left, the recorded cases of the reference in float32
# (parity.txt), and of The Matrix the same with keys that bind at the head (OUT/head), how far
# bfloat16 and 8-bit layers are from float32 at full width (OUT/errors), and the benchmark with
# 8-bit layers (OUT/int8); of Matrix-Game 2.0 the other modes (OUT/templerun, OUT/gta_drive). Each
# writes what it has after every measured part; what did not fit says so.
#
# PEAK_TFLOPS is the data sheet's dense bfloat16 (989: H100 and H200); PYTHON is the interpreter.
# Options of tools/benchmark.py may follow OUT, such as --world.vae.dtype float32.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../../.."
python=${PYTHON:-python}
world=${WORLD:-the_matrix}
out=${1:-outputs/gpu-$world}
case $world in
    the_matrix) recipe=STAGE4 replay=120 ;;
    matrix_game_2) recipe=UNIVERSAL replay=240 ;;
    *) echo "error: WORLD: got $world, expected the_matrix or matrix_game_2" >&2; exit 2 ;;
esac
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
# bench NAME LIMIT RECIPE OPTIONS...: a benchmark of random weights
bench() {
    local name=$1 limit=$2 recipe=$3
    shift 3
    part "$name" "$limit" "$python" tools/benchmark.py "$world:$recipe" --random \
        --peak-tflops "${PEAK_TFLOPS:-989}" "$@"
}

bench benchmark 300 $recipe --steps 40 --entries tail --out "$out" "${@:2}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
JAX_DEFAULT_MATMUL_PRECISION=highest part parity $replay \
    "$python" tools/parity.py "tests/goldens/$world"/*.{safetensors,json} > "$out/parity.txt"
tail -n 1 "$out/parity.txt"
if [ "$world" = the_matrix ]; then
    bench head 120 $recipe --steps 30 --world.stream.entry head --entries head --out "$out/head" \
        "${@:2}"
    bench errors 60 $recipe --layers 4 --int8 --out "$out/errors"
    bench int8 150 $recipe --steps 30 --entries none --world.dit.int8 blocks --out "$out/int8" \
        "${@:2}"
else
    bench templerun 150 TEMPLERUN --steps 30 --entries none --out "$out/templerun" "${@:2}"
    bench gta_drive 150 GTA_DRIVE --steps 30 --entries none --out "$out/gta_drive" "${@:2}"
fi
exit "$code"
