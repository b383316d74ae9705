"""RoPE of the Wan DiT with memory: each head may have its own period."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.dit.wan_memory_config import Config
from matrix_jax.nn import token_layout
from matrix_jax.nn.rope import PERIOD, frequencies, rotate_heads, rotations
from matrix_jax.parallel import compilation
from matrix_jax.parallel.sharding import constrain, num_shards


def rotation_tables(cfg: Config, positions, rows: int, columns: int):
    """Tables of `rotate` for a grid of tokens; arguments as for `head_rotations`."""
    if compilation.backend() == 'gpu' and num_shards('tokens') == 1:
        axes = axis_rotations(cfg, positions, rows, columns)
        batch = _batch(positions)
        frames = [rearrange(part, '(b t) ... -> b t ...', b=batch) for part in axes[0]]
        return (frames, *axes[1:])
    return tuple(_split_sites(part) for part in head_rotations(cfg, positions, rows, columns))


def head_rotations(cfg: Config, positions, rows: int, columns: int):
    """Cosines and sines [1|B T H*W K P] of a grid, for each head; K is 1 if all heads are alike.

    Args:
      cfg: sizes.
      positions: of the frames, [T] or [B T].
      rows, columns: sizes of the grid, positions from 0.
    """
    axes = axis_rotations(cfg, positions, rows, columns)
    batch, count = _batch(positions), axes[0][0].shape[0]

    def join(parts):
        parts = [jnp.broadcast_to(part, (count, rows, columns, *part.shape[3:])) for part in parts]
        return rearrange(jnp.concatenate(parts, axis=-1), '(b t) h w k p -> b t (h w) k p', b=batch)

    return tuple(join(parts) for parts in zip(*axes, strict=True))


def axis_rotations(cfg: Config, positions, rows: int, columns: int):
    """(cos, sin) of frames [B*T 1 1 K P], of rows [1 H 1 K P'] and of columns [1 1 W K P']."""
    spread = np.linspace(-1, 1, cfg.heads) if cfg.sigma_theta else np.zeros(1)
    periods = PERIOD * (1 + cfg.sigma_theta * spread)
    pairs, third = cfg.head_dim // 2, cfg.head_dim // 6

    def axis(positions, pairs, layout):
        speeds = np.concatenate([frequencies(pairs, period) for period in periods])
        return [rearrange(part, layout, k=len(periods)) for part in rotations(positions, speeds)]

    return (
        axis(positions.ravel(), pairs - 2 * third, 't (k p) -> t 1 1 k p'),
        axis(np.arange(rows), third, 'h (k p) -> 1 h 1 k p'),
        axis(np.arange(columns), third, 'w (k p) -> 1 1 w k p'),
    )


def rotate(x, tables):
    """Rotates the last frames of a grid.

    Args:
      x: heads [B T' n K E].
      tables: (cos, sin) [B T n K P] of T frames; or those of frames [B T 1 1 K P], of rows and of
        columns (`axis_rotations`), of which a GPU reads much less.
    """
    if len(tables) == 2:
        return rotate_heads(x, [part[:, part.shape[1] - x.shape[1] :] for part in tables])
    x, made, start = rearrange(x, 'b t (h w) k e -> b t h w k e', h=tables[1][0].shape[1]), [], 0
    frames = [part[:, part.shape[1] - x.shape[1] :] for part in tables[0]]
    for cos, sin in (frames, *tables[1:]):
        size = 2 * cos.shape[-1]
        made.append(rotate_heads(x[..., start : start + size], (cos, sin)))
        start += size
    return rearrange(jnp.concatenate(made, axis=-1), 'b t h w k e -> b t (h w) k e')


def _batch(positions) -> int:
    return positions.shape[0] if positions.ndim > 1 else 1


def _split_sites(table):
    """Splits rotations [B T n K P] over the devices like the tokens."""
    table = token_layout.pad(constrain(table, None, None, None, None, None), 2)
    return constrain(table, None, None, 'tokens', None, None)
