"""Resampling without parameters: moves values between pixels, frames and channels."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange, reduce


def fold(x, time: int, space: int):
    """Neighbours become channels: [B T H W C] -> [B T/time H/space W/space C*time*space^2]."""
    return rearrange(x, 'b (t u) (h p) (w q) c -> b t h w (c u p q)', u=time, p=space, q=space)


def unfold(x, time: int, space: int):
    """Inverse of `fold`."""
    return rearrange(x, 'b t h w (c u p q) -> b (t u) (h p) (w q) c', u=time, p=space, q=space)


def fold_mean(x, features: int, time: int, space: int):
    """Averages neighbours and channels: [B T H W C] -> [B T/time H/space W/space features]."""
    return reduce(fold(x, time, space), 'b t h w (o g) -> b t h w o', 'mean', o=features)


def unfold_repeat(x, features: int, time: int, space: int):
    """Repeats values to neighbours: [B T H W C] -> [B T*time H*space W*space features]."""
    x = jnp.repeat(x, features * time * space**2 // x.shape[-1], axis=-1)
    return unfold(x, time, space)
