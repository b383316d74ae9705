"""What a stream of the Wan DiT remembers: keys and values of a window of frames.

Every array keeps its shape, so that a stream compiles once; `nn/kv_cache.py` has the ring.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from matrix_jax.dit.wan_config import Config
from matrix_jax.nn.kv_cache import KVCache
from matrix_jax.parallel.sharding import constrain, num_shards


@struct.dataclass
class Past:
    """Caches of a run of layers, stacked in front.

    Attributes:
      video: S frames of all sites.
      mouse: S frames of all sites, None for layers or networks without.
      keyboard: S frames of one site, likewise.
      image: the image's tokens, as one frame of L sites.
    """

    video: KVCache
    mouse: KVCache | None
    keyboard: KVCache | None
    image: KVCache | None


@struct.dataclass
class Caches:
    """All that a stream remembers; every leaf keeps its shape.

    Attributes:
      runs: `Past` of each run of equal layers.
      start: first latent frame of the block that is being made, int32 [].
    """

    runs: dict[str, Past]
    start: Any


def init_caches(cfg: Config, batch: int, height: int, width: int) -> Caches:
    """Empty caches for `batch` streams of latents of this height and width.

    Raises:
      ValueError: the network has no window (`local`).
    """
    if cfg.local is None:
        raise ValueError(
            'local: got None, expected a number of latent frames (a network without '
            'a window cannot stream)'
        )
    held = sites(cfg, height, width)
    held += -held % num_shards('tokens')  # of padding, on a mesh

    def empty(layers, slots, places, heads, elements):
        shape = (layers, batch, slots, places, heads, elements)
        return KVCache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))

    def past(name, layers):
        own, mouse, keyboard = (cfg.heads, cfg.head_dim), None, None
        if name == 'acting':
            size = cfg.actions
            theirs = (size.heads, sum(size.axes))
            mouse = empty(layers, cfg.local, held, *theirs) if size.mouse else None
            keyboard = empty(layers, cfg.local, 1, *theirs)
        return split(
            Past(
                empty(layers, cfg.local, held, *own),
                mouse,
                keyboard,
                empty(layers, 1, cfg.image_length, *own),
            )
        )

    return Caches(
        {name: past(name, stop - start) for name, (start, stop) in cfg.segments.items()},
        jnp.zeros((), jnp.int32),
    )


def sites(cfg: Config, height: int, width: int) -> int:
    """Tokens of a frame of latents of this height and width."""
    return (height // cfg.patch) * (width // cfg.patch)


def advance(caches: Caches, count: int) -> Caches:
    """The block of `count` latent frames is done: the next call makes those after it."""
    return caches.replace(start=caches.start + count)


def split(past: Past) -> Past:
    """Caches over the mesh: batch and heads, and the sites of a frame as its tokens."""

    def one(cache, sites):
        names = (None, 'batch', None, sites, 'heads', None)
        return jax.tree.map(lambda leaf: constrain(leaf, *names), cache)

    return Past(
        one(past.video, 'rows'),
        one(past.mouse, 'rows'),
        one(past.keyboard, None),
        one(past.image, None),
    )
