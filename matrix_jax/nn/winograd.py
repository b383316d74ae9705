"""Convolution along time with fewer multiplies (Winograd's minimal filtering, arXiv 1509.09308).

`m` neighbouring outputs of three taps cost m+2 products in place of 3m: the inputs and the taps are
read as polynomials, multiplied at m+2 points and read back. Each product is here a convolution of
whole frames, which is what the CPU is good at.

Exactness: to rounding. For standard normal inputs the largest error is up to that of the plain sum
for m = 2 and up to 4.5 times as large for m = 4, 4e-6 of the largest value (measured by
`python -m matrix_jax.benchmark.scripts.convolutions`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

# Where the polynomials are evaluated, besides infinity: small numbers, for the sake of rounding.
POINTS = {2: (0, 1, -1), 4: (0, 1, -1, 0.5, -0.5)}
TAPS = 3


def cost(frames: int, m: int) -> int:
    """Products that `frames` outputs take, `m` at a time; m = 1 is the plain sum."""
    return -(-frames // m) * (m + 2)


def best(frames: int) -> int:
    """The cheapest m for so many outputs."""
    return min((1, *POINTS), key=lambda m: cost(frames, m))


def tables(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of inputs [m+2 m+2], of taps [m+2 3] and of outputs [m m+2]."""
    points = np.array(POINTS[m], np.float64)
    others = [np.delete(points, index) for index in range(len(points))]
    inputs = np.zeros((m + 2, m + 2))
    taps, outputs = np.zeros((m + 2, TAPS)), np.zeros((m, m + 2))
    for index, point in enumerate(points):
        inputs[index, :-1] = np.poly(others[index])[::-1]
        taps[index] = point ** np.arange(TAPS) / np.prod(point - others[index])
        outputs[:, index] = point ** np.arange(m)
    inputs[-1] = np.poly(points)[::-1]
    taps[-1, -1] = outputs[-1, -1] = 1
    return inputs, taps, outputs


def convolve(x, kernel, m: int, frames: Callable):
    """Three taps in time.

    Args:
      x: [B T+2 ...].
      kernel: [3 ...].
      m: outputs at a time, a key of `POINTS`.
      frames: what a tap does: (x [B t ...], kernel [...]) -> [B t ...], linear in both.

    Returns:
      [B T ...].
    """
    inputs, taps, outputs = tables(m)
    count = x.shape[1] - TAPS + 1
    tiles = -(-count // m)
    x = jnp.pad(x, ((0, 0), (0, tiles * m - count), *((0, 0),) * (x.ndim - 2)))
    moved = [x[:, shift : shift + (tiles - 1) * m + 1 : m] for shift in range(m + 2)]
    products = [
        frames(part, tap)
        for part, tap in zip(_combined(inputs, moved), _combined(taps, list(kernel)))
    ]
    y = jnp.stack(_combined(outputs, products), axis=2)
    return y.reshape(y.shape[0], tiles * m, *y.shape[3:])[:, :count]


def _combined(table: np.ndarray, parts: list) -> list:
    """Sums of the parts, one for each row of weights."""
    return [
        sum(part * float(weight) for weight, part in zip(row, parts) if weight) for row in table
    ]
