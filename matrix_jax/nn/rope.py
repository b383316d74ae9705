"""Sinusoidal codes and rotary embeddings (RoPE, arXiv 2104.09864) of explicit positions.

RoPE rotates the pair p of a head by the angle position * theta_p, theta_p = period^(-p/P)
(equations 14 and 15). Tables of constant positions are numpy, computed at trace time in float64.
Codes of traced values are float32, and rotations of traced positions are exact to float32 for any
int32 position.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.parallel import compilation

PERIOD = 10000.0


def sincos(positions, width: int) -> np.ndarray:
    """Positions [N] -> codes [N width], float64: all sines, then all cosines."""
    frequencies = PERIOD ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def sincos_3d(frames, rows, columns, width: int) -> np.ndarray:
    """Codes of a grid: positions [T], [H], [W] -> [T H*W width], float64.

    The first quarter of the width codes the frame, then three eighths each the column and the row.

    Raises:
      ValueError: the width is no multiple of 16.
    """
    if width % 16:
        raise ValueError(
            f'sincos_3d.width: got {width}, expected a multiple of 16 '
            '(1/4 frame, 3/8 column, 3/8 row; each half sine, half cosine)'
        )
    grid = (len(frames), len(rows), len(columns))
    temporal = sincos(frames, width // 4)[:, None, None]
    # PARITY: the "height half" of the released table holds the column, and it comes first.
    column = sincos(columns, width * 3 // 8)[None, None]
    row = sincos(rows, width * 3 // 8)[None, :, None]
    parts = [np.broadcast_to(part, grid + part.shape[-1:]) for part in (temporal, column, row)]
    return np.concatenate(parts, axis=-1).reshape(grid[0], grid[1] * grid[2], width)


def scaled_positions(count: int, scale: float) -> np.ndarray:
    """0 .. count-1 divided by an interpolation scale, in float32 like the released tables."""
    return np.arange(count, dtype=np.float32) / np.float32(scale)


def timestep_code(level, width: int):
    """Noise levels [...] (0 .. 999) -> [... width] float32, cosines first."""
    half = width // 2
    frequencies = _exp(
        np.float32(-math.log(PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    )
    angles = jnp.asarray(level, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_code(scale, width: int):
    """Guidance scales [...] -> [... width] float32, sines first; an odd width ends in a zero."""
    half = width // 2
    frequencies = _exp(
        np.arange(half, dtype=np.float32) * np.float32(-math.log(PERIOD) / (half - 1))
    )
    angles = jnp.asarray(scale, jnp.float32)[..., None] * 1000.0 * frequencies
    code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, width % 2)])


def frequencies(pairs: int, period: float = PERIOD) -> np.ndarray:
    """Angles theta_p per position of P pairs, float64 [P]."""
    return period ** (-np.arange(pairs, dtype=np.float64) / pairs)


def rotations(positions, speeds: np.ndarray):
    """Cosines and sines [N P] float32 of integer positions [N] times angles per position [P].

    For traced positions, the rotations of their base-256 digits are composed. The float32 product
    of a large position and an angle would lose the phase after some thousands of positions.
    """
    if isinstance(positions, np.ndarray):
        angles = positions[:, None] * speeds
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    cos, sin = (make((*positions.shape, len(speeds))) for make in (jnp.ones, jnp.zeros))
    for power in range(4):
        angles = np.arange(256)[:, None] * (256.0**power * speeds)
        digit = (jnp.abs(positions) >> (8 * power)) & 255
        more_cos = jnp.asarray(np.cos(angles), jnp.float32)[digit]
        more_sin = jnp.asarray(np.sin(angles), jnp.float32)[digit]
        cos, sin = cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
    return cos, sin * jnp.sign(positions)[..., None]


def rotations_3d(frames, rows: int, columns: int, width: int):
    """Cosines and sines [T H*W width/2] of a grid; a third of the pairs each for row and column.

    Args:
      frames: integer positions [T].
      rows, columns: sizes of the grid, positions from 0.
      width: head width E.
    """
    third = width // 6
    grid = (len(frames), rows, columns)
    parts = zip(
        (frames, np.arange(rows), np.arange(columns)),
        (width // 2 - 2 * third, third, third),
        ('t p -> t 1 1 p', 'h p -> 1 h 1 p', 'w p -> 1 1 w p'),
        strict=True,
    )
    axes = [
        [rearrange(part, layout) for part in rotations(positions, frequencies(pairs))]
        for positions, pairs, layout in parts
    ]
    return tuple(
        rearrange(
            jnp.concatenate([jnp.broadcast_to(part, grid + part.shape[-1:]) for part in parts], -1),
            't h w p -> t (h w) p',
        )
        for parts in zip(*axes, strict=True)
    )


def rotate(x, rotation):
    """Rotates neighbouring pairs of the first 2P elements of heads [... K E] by [... P]."""
    return rotate_heads(x, tuple(part[..., None, :] for part in rotation))


def rotate_heads(x, rotation):
    """`rotate` with cosines and sines of each head [... K P]."""
    cos, sin = rotation
    size = 2 * cos.shape[-1]
    if compilation.backend() == 'gpu':
        return _rotate_in_place(x, cos, sin)
    a, b = rearrange(x[..., :size].astype(jnp.float32), '... (p c) -> c ... p', c=2)
    turned = rearrange([a * cos - b * sin, b * cos + a * sin], 'c ... p -> ... (p c)')
    return jnp.concatenate([turned.astype(x.dtype), x[..., size:]], axis=-1)


def _rotate_in_place(x, cos, sin):
    """`rotate_heads` without joining parts, so that it fuses with what reads the result."""
    rest = x.shape[-1] - 2 * cos.shape[-1]

    def of_elements(table, unrotated):
        widths = [(0, 0)] * (table.ndim - 1) + [(0, rest)]
        table = jnp.repeat(jnp.asarray(table, jnp.float32), 2, axis=-1)
        return jnp.pad(table, widths, constant_values=unrotated)

    wide = x.astype(jnp.float32)
    pairs = rearrange(wide, '... (p c) -> ... p c', c=2)
    others = rearrange(jnp.flip(pairs, -1), '... p c -> ... (p c)')
    signs = np.resize(np.float32([-1, 1]), x.shape[-1])
    turned = wide * of_elements(cos, 1) + others * (of_elements(sin, 0) * signs)
    return turned.astype(x.dtype)


def level_code(level, width: int):
    """Noise levels [...] (0 .. 1000, also fractions) -> [... width] float32, cosines first.

    `timestep_code` with the accuracy of float64: whole levels come from tables.
    """
    speeds = frequencies(width // 2)
    level = jnp.asarray(level, jnp.float32)
    whole = jnp.floor(level)
    cos, sin = rotations(whole.astype(jnp.int32), speeds)
    rest = (level - whole)[..., None] * speeds.astype(np.float32)
    return jnp.concatenate(
        [cos * jnp.cos(rest) - sin * jnp.sin(rest), sin * jnp.cos(rest) + cos * jnp.sin(rest)],
        axis=-1,
    )


def _exp(exponents):
    """Exactly rounded exp of float32; numpy's is a few bits off, which the angles magnify."""
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
