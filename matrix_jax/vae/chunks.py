"""Long clips in chunks of a few frames, so that neither memory nor compile time grows with them."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jax import lax

UNROLLED = 4  # chunks of a clip that are not worth a loop


def check_latents(latents, channels: int) -> None:
    """ValueError if what is to be decoded is not [B T h w C] of that many channels, T > 0."""
    if latents.ndim != 5 or latents.shape[-1] != channels or not latents.shape[1]:
        raise ValueError(
            f'vae.decode: got latents {latents.shape}, expected [B T h w {channels}] with T > 0'
        )


def chunked(run, cache, x, size: int):
    """Feeds x [B F ...] through `run(cache, chunk) -> (cache, y)`: remainder first, then by `size`.

    The chunks behind the first are one scan, so that a long clip compiles like a short one; a few
    are unrolled, because XLA's CPU convolutions are many times slower inside a loop.
    """
    count = max(x.shape[1] // size, 1)
    first = x.shape[1] - size * (count - 1)
    cache, head = run(cache, x[:, :first])
    if count == 1:
        return cache, head
    rest = rearrange(x[:, first:], 'b (n f) h w c -> n b f h w c', f=size)
    cache, tail = lax.scan(run, cache, rest, unroll=count - 1 if count <= UNROLLED else 1)
    return cache, jnp.concatenate([head, rearrange(tail, 'n b f h w c -> b (n f) h w c')], axis=1)
