"""Faster forms of the convolutions of `conv3d` for the CPU, equal up to rounding.

XLA's 3-D convolution on the CPU is several times slower than its 2-D one, forward and backward.
So convolutions over time become 2-D convolutions of whole frames: by Winograd's minimal filtering
(Lavin and Gray, arXiv 1509.09308) where that saves multiplies, otherwise with the taps stacked on
the channels.

Winograd F(m, 3) computes m neighbouring outputs y of three taps g from inputs d with m + 2
products instead of 3m (equation 5 of the paper, in one dimension):

    y = A^T [(G g) * (B^T d)]

B^T evaluates the input as a polynomial at m + 1 points and infinity, G the taps, and A^T reads the
outputs back. For standard normal inputs the largest error is that of the plain sum for m = 2 and
up to 4.5 times as large for m = 4, which is 4e-6 of the largest value
(`benchmark/scripts/convolutions.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.nn.conv2d import conv2d
from matrix_jax.parallel import compilation

# Points of F(m, 3) besides infinity: small numbers keep the rounding errors small.
POINTS = {2: (0, 1, -1), 4: (0, 1, -1, 0.5, -0.5)}
TAPS = 3

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar('conv_cpu', default=True)


@contextlib.contextmanager
def disabled():
    """Traces programs with the plain convolutions on the CPU too, to count their costs."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def enabled() -> bool:
    """Whether programs are traced with the convolutions of this module."""
    return compilation.backend() == 'cpu' and _enabled.get()


def conv3d(x, kernel, pad):
    """`nn.conv3d.conv3d` with explicit zero rows and columns.

    Args:
      x: [B T+kt-1 H W in].
      kernel: [kt kh kw in out].
      pad: zero rows (above, below) and columns (left, right).

    Returns:
      [B T H' W' out].
    """
    taps, frames = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    m = best_tile(frames)
    # With few channels the copies cost more than the products; the differences of Winograd
    # lose too many of bfloat16's digits.
    if taps == TAPS and m > 1 and x.shape[-1] > 16 and x.dtype == jnp.float32:
        return winograd(x, kernel, m, lambda x, tap: conv2d(x, tap, pad))
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(taps)], axis=-1)
    return conv2d(x, rearrange(kernel, 't h w i o -> h w (t i) o'), pad)


# --- Winograd convolution along time ----------------------------------------------------------


def winograd(x, kernel, m: int, product: Callable):
    """Convolution of three taps in time by F(m, 3).

    Args:
      x: [B T+2 ...].
      kernel: [3 ...].
      m: outputs per tile, a key of `POINTS`.
      product: (x [B t ...], tap [...]) -> [B t ...], linear in both.

    Returns:
      [B T ...].
    """
    inputs, taps, outputs = winograd_matrices(m)
    frames = x.shape[1] - TAPS + 1
    tiles = -(-frames // m)
    x = jnp.pad(x, ((0, 0), (0, tiles * m - frames), *((0, 0),) * (x.ndim - 2)))
    shifted = [x[:, shift : shift + (tiles - 1) * m + 1 : m] for shift in range(m + 2)]
    products = [
        product(part, tap)
        for part, tap in zip(_combine(inputs, shifted), _combine(taps, list(kernel)), strict=True)
    ]
    y = jnp.stack(_combine(outputs, products), axis=2)
    return y.reshape(y.shape[0], tiles * m, *y.shape[3:])[:, :frames]


def products(frames: int, m: int) -> int:
    """Products for that many output frames; m = 1 is the plain sum of three taps."""
    return -(-frames // m) * (m + 2)


def best_tile(frames: int) -> int:
    """The m with the fewest products for that many output frames."""
    return min((1, *POINTS), key=lambda m: products(frames, m))


def winograd_matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T [m+2 m+2], G [m+2 3] and A^T [m m+2] of F(m, 3)."""
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


def _combine(matrix: np.ndarray, parts: list) -> list:
    """The weighted sum of the parts for each row of the matrix."""
    return [
        sum(part * float(weight) for weight, part in zip(row, parts, strict=True) if weight)
        for row in matrix
    ]
