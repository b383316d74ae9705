"""Caches of a stream of the Wan DiT: keys and values of a window of frames.

All arrays keep their shapes, so a stream compiles once (`nn.kv_cache`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from matrix_jax.dit.wan_config import ACTING, Config
from matrix_jax.nn.kv_cache import KVCache
from matrix_jax.parallel.sharding import constrain, num_shards


@struct.dataclass
class LayerCaches:
    """Caches of a run of layers, stacked along the first axis.

    Attributes:
      video: S frames of all sites.
      mouse: S frames of all sites; None without a mouse.
      keyboard: S frames of one site; None without actions.
      image: the image tokens, as one frame of L sites.
    """

    video: KVCache
    mouse: KVCache | None
    keyboard: KVCache | None
    image: KVCache | None


@struct.dataclass
class Caches:
    """All caches of a stream.

    Attributes:
      runs: `LayerCaches` of each run of equal layers; a tuple of them, one per layer, if the
        parameters of the layers are separate (`dit.segments`).
      start: first latent frame of the current block, int32 [].
    """

    runs: dict[str, LayerCaches]
    start: Any


def init_caches(cfg: Config, batch: int, height: int, width: int, separate: bool = False) -> Caches:
    """Empty caches for `batch` streams of latents of this height and width.

    Args:
      separate: whether each layer has caches of its own.

    Raises:
      ValueError: the network has no window (`local`).
    """
    if cfg.local is None:
        raise ValueError(
            'local: got None, expected a number of latent frames (a network without '
            'a window cannot stream)'
        )
    frame_sites = sites(cfg, height, width)
    frame_sites += -frame_sites % num_shards('tokens')  # padding for the mesh

    def past(name, *layers):
        def empty(*sizes):
            shape = (*layers, batch, *sizes)
            return KVCache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))

        heads, mouse, keyboard = (cfg.heads, cfg.head_dim), None, None
        if name.startswith(ACTING):
            size = cfg.actions
            action_heads = (size.heads, sum(size.axes))
            mouse = empty(cfg.local, frame_sites, *action_heads) if size.mouse else None
            keyboard = empty(cfg.local, 1, *action_heads)
        return sharded(
            LayerCaches(
                empty(cfg.local, frame_sites, *heads),
                mouse,
                keyboard,
                empty(1, cfg.image_length, *heads),
            )
        )

    def run(name, count):
        return tuple(past(name) for _ in range(count)) if separate else past(name, count)

    return Caches(
        {name: run(name, stop - start) for name, (start, stop) in cfg.segments.items()},
        jnp.zeros((), jnp.int32),
    )


def sites(cfg: Config, height: int, width: int) -> int:
    """Tokens of a frame of latents of this height and width."""
    return (height // cfg.patch) * (width // cfg.patch)


def advance(caches: Caches, count: int) -> Caches:
    """Moves on to the block after the current one of `count` latent frames."""
    return dataclasses.replace(caches, start=caches.start + count)


def sharded(past: LayerCaches) -> LayerCaches:
    """Shards caches over the mesh by batch, heads and sites."""

    def one(cache, sites):
        names = (None, 'batch', None, sites, 'heads', None)
        return jax.tree.map(lambda leaf: constrain(leaf, *names[-leaf.ndim :]), cache)

    return LayerCaches(
        one(past.video, 'rows'),
        one(past.mouse, 'rows'),
        one(past.keyboard, None),
        one(past.image, None),
    )
