"""Times convolutions on the CPU: taps stacked on channels, and the forms that `nn/conv_cpu` uses.

    taskset -c 0 python -m matrix_jax.benchmark.scripts.convolutions

Prints milliseconds (best of seven) of the forward pass and of the gradients of inputs and weights,
and the largest error relative to the largest value, against float64.
"""

import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from matrix_jax.nn import conv3d, conv_cpu

# Frames, height, width, channels in and out: decoders of the bundled and the middle-sized worlds.
SIZES = (
    (2, 12, 20, 128, 128),
    (4, 16, 24, 32, 32),
    (4, 24, 40, 64, 64),
    (8, 48, 80, 64, 64),
    (8, 96, 160, 32, 32),
)


def plain3d(x, kernel):
    """Convolution with the taps stacked on the channels."""
    with mock.patch.object(conv_cpu, 'best_tile', lambda frames: 1):
        return conv3d.conv3d(x, kernel)


def plain2d(x, kernel):
    """Convolution of repeated pixels."""
    x = repeat(x, 'b t h w c -> b t (h p) (w q) c', p=2, q=2)
    return conv3d.conv2d(x, kernel, ((1, 1), (1, 1)))


def milliseconds(function, *given):
    function = jax.jit(function)
    jax.block_until_ready(function(*given))
    took = []
    for _ in range(7):
        began = time.perf_counter()
        jax.block_until_ready(function(*given))
        took.append(time.perf_counter() - began)
    return 1e3 * min(took)


def both(function):
    """Gradients with respect to inputs and weights."""
    return jax.grad(lambda x, kernel: jnp.square(function(x, kernel)).sum(), (0, 1))


def exact(x, kernel):
    """First eight rows of a 3x3x3 convolution in float64."""
    rows, (frames, columns) = min(8, x.shape[2]), (x.shape[1] - 2, x.shape[3])
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, t : t + frames, i : i + rows, j : j + columns] @ kernel[t, i, j].astype(np.float64)
        for t in range(3)
        for i in range(3)
        for j in range(3)
    )


def error(made, wanted):
    made = np.asarray(made)[:, :, : wanted.shape[2]]
    return np.abs(made - wanted).max() / np.abs(wanted).max()


def main():
    draw = np.random.default_rng(0).standard_normal
    print(
        '| frames, size, channels | plain | taken | gradients: plain | taken | error: plain '
        '| taken |\n|---|---|---|---|---|---|---|'
    )
    for frames, height, width, inputs, outputs in SIZES:
        x = draw((1, frames + 2, height, width, inputs)).astype(np.float32)
        kernel = (draw((3, 3, 3, inputs, outputs)) / np.sqrt(27 * inputs)).astype(np.float32)
        ways, wanted = (plain3d, conv3d.conv3d), exact(x, kernel)
        times = [
            milliseconds(turn(way), x, kernel) for turn in (lambda way: way, both) for way in ways
        ]
        errors = [error(jax.jit(way)(x, kernel), wanted) for way in ways]
        print(
            f'| {frames} x {height}x{width}, {inputs} to {outputs}, '
            f'm = {conv_cpu.best_tile(frames)} '
            f'| {" | ".join(f"{one:.1f}" for one in times)} '
            f'| {" | ".join(f"{one:.0e}" for one in errors)} |',
            flush=True,
        )
    for frames, height, width, inputs, outputs in SIZES[:-1]:
        x = draw((1, frames, height, width, inputs)).astype(np.float32)
        kernel = (draw((3, 3, inputs, outputs)) / np.sqrt(9 * inputs)).astype(np.float32)
        ways = plain2d, conv3d.upsample_conv2d
        times = [
            milliseconds(turn(way), x, kernel) for turn in (lambda way: way, both) for way in ways
        ]
        apart = error(jax.jit(ways[1])(x, kernel), np.asarray(jax.jit(ways[0])(x, kernel)))
        print(
            f'| {frames} x {height}x{width} doubled, {inputs} to {outputs} '
            f'| {" | ".join(f"{one:.1f}" for one in times)} | | {apart:.0e} |',
            flush=True,
        )


if __name__ == '__main__':
    main()
