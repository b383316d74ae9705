"""Sin-cos codes from explicit positions.

Tables over a grid are numpy, made at trace time in float64; codes of traced values are float32.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

PERIOD = 10000.0


def sincos(positions, width: int) -> np.ndarray:
    """Positions [N] -> codes [N width]: all sines, then all cosines, in float64."""
    frequencies = PERIOD ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def sincos_3d(frames, rows, columns, width: int) -> np.ndarray:
    """Codes of a grid: positions [T], [H], [W] -> [T H*W width], float64.

    A quarter of the width is for the frame, then three eighths each for column and row.

    Raises:
      ValueError: the width does not split into these even parts.
    """
    if width % 16:
        raise ValueError(f'sincos_3d.width: got {width}, expected a multiple of 16 '
                         '(1/4 frame, 3/8 column, 3/8 row; each half sine, half cosine)')
    grid = (len(frames), len(rows), len(columns))
    temporal = sincos(frames, width // 4)[:, None, None]
    # PARITY: the "height half" of the released table holds the column, and it comes first.
    column = sincos(columns, width * 3 // 8)[None, None]
    row = sincos(rows, width * 3 // 8)[None, :, None]
    parts = [np.broadcast_to(part, grid + part.shape[-1:]) for part in (temporal, column, row)]
    return np.concatenate(parts, axis=-1).reshape(grid[0], grid[1] * grid[2], width)


def scaled_positions(count: int, scale: float) -> np.ndarray:
    """0 .. count-1 divided by an interpolation scale, in float32 as the released tables are."""
    return np.arange(count, dtype=np.float32) / np.float32(scale)


def timestep_code(level, width: int):
    """Noise levels [...] (0 .. 999) -> [... width] float32, cosines first."""
    half = width // 2
    frequencies = _exp(np.float32(-math.log(PERIOD)) * np.arange(half, dtype=np.float32)
                       / np.float32(half))
    angles = jnp.asarray(level, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_code(scale, width: int):
    """Guidance scales [...] -> [... width] float32, sines first; an odd width ends in a zero."""
    half = width // 2
    frequencies = _exp(np.arange(half, dtype=np.float32)
                       * np.float32(-math.log(PERIOD) / (half - 1)))
    angles = jnp.asarray(scale, jnp.float32)[..., None] * 1000.0 * frequencies
    code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, width % 2)])


def _exp(exponents):
    """exp of float32 to the last bit; numpy's own is a few bits off, and angles magnify them."""
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
