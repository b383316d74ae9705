"""Long clips in chunks of frames, with constant memory and compile time."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jax import lax

UNROLLED = 4  # most chunks that are unrolled


def check_latents(latents, channels: int) -> None:
    """Checks latents for decoding.

    Raises:
      ValueError: they are not [B T h w channels] with T > 0.
    """
    if latents.ndim != 5 or latents.shape[-1] != channels or not latents.shape[1]:
        raise ValueError(
            f'vae.decode: got latents {latents.shape}, expected [B T h w {channels}] with T > 0'
        )


def in_chunks(net, size: int):
    """The function (params, cache, x [B F H W C]) -> (cache, y) that runs a network in chunks."""

    def run(params, cache, x):
        return chunked(
            lambda cache, chunk: net.apply({'params': params}, chunk, cache), cache, x, size
        )

    return run


def chunked(run, cache, x, size: int):
    """Runs x [B F ...] in chunks of `size` frames, the first of which also has the remainder.

    The chunks after the first are one scan. A few chunks are unrolled, because the convolutions of
    XLA are many times slower inside a loop on the CPU.

    Args:
      run: `run(cache, chunk) -> (cache, y)`.
      cache: cache for the first chunk.
      x: [B F H W C].
      size: frames of a chunk.

    Returns:
      (cache, y [B F' H' W' C']).
    """
    count = max(x.shape[1] // size, 1)
    first = x.shape[1] - size * (count - 1)
    cache, head = run(cache, x[:, :first])
    if count == 1:
        return cache, head
    rest = rearrange(x[:, first:], 'b (n f) h w c -> n b f h w c', f=size)
    cache, tail = lax.scan(run, cache, rest, unroll=count - 1 if count <= UNROLLED else 1)
    return cache, jnp.concatenate([head, rearrange(tail, 'n b f h w c -> b (n f) h w c')], axis=1)
