"""Memory bank: latent frames and the poses of their pixel frames, in a fixed number of slots.

Latent frame 0 has one pixel frame, and latent frame j has pixel frames R(j-1)+1 .. Rj. A frame is
retrieved by the overlap of its view with that of a reference camera. When the bank is full, a new
frame replaces the oldest one, but never one of the first two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from matrix_jax.nn import camera
from matrix_jax.nn.kv_cache import Ring

KEPT = 2  # first latent frames, which are never replaced


@struct.dataclass
class Bank:
    """S slots, one latent frame each.

    Attributes:
      latents: [B S H W C].
      poses: float32 [B S R 5], of the pixel frames of each latent frame.
    """

    latents: jax.Array
    poses: jax.Array


class Found(NamedTuple):
    """Retrieved frames, one for each reference camera.

    Attributes:
      frames: numbers of the latent frames, int32 [B M].
      latents: [B M H W C].
      cameras: relative to the reference cameras [B M 4 4].
      pixels: pixel frames of the largest overlap, before one is fixed, int32 [B M].
    """

    frames: jax.Array
    latents: jax.Array
    cameras: jax.Array
    pixels: jax.Array


def empty(batch: int, capacity: int, ratio: int, shape: tuple[int, ...]) -> Bank:
    """Returns a bank of S = `capacity` slots for latent frames of this shape (H, W, C)."""
    return Bank(
        jnp.zeros((batch, capacity, *shape), jnp.float32),
        jnp.zeros((batch, capacity, ratio, 5), jnp.float32),
    )


def write(bank: Bank, first: Any, latents: jax.Array, poses: jax.Array) -> Bank:
    """Returns the bank with T more latent frames.

    Args:
      bank: the bank.
      first: number of the first of them, int or int32 [].
      latents: [B T H W C].
      poses: of their pixel frames [B R*T 5].
    """
    batch, count = latents.shape[:2]
    slots = Ring(first, count, bank.latents.shape[1], KEPT).slots
    poses = poses.reshape(batch, count, -1, 5)
    return Bank(bank.latents.at[:, slots].set(latents), bank.poses.at[:, slots].set(poses))


def slot_frames(capacity: int, made: Any) -> tuple[jax.Array, jax.Array]:
    """(latent frame in each slot int32 [S], whether there is one bool [S]) after `made` frames."""
    frames = Ring(made - 1, 1, capacity, KEPT).slot_frames()
    # An empty slot may name one of the first frames, which have slots of their own.
    return frames, (frames >= 0) & ((frames >= KEPT) | (np.arange(capacity) < KEPT))


def retrieve(
    bank: Bank,
    made: Any,
    before: Any,
    references: jax.Array,
    fixed: int | None = None,
    cfg: camera.Config = camera.RELEASED,
) -> Found:
    """Retrieves the frames whose views overlap most with those of reference cameras.

    Args:
      bank: the bank.
      made: latent frames so far, int32 [].
      before: latent frames 1 .. before-1 may be retrieved.
      references: cameras [B M 4 4].
      fixed: pixel frame that replaces the last retrieved one, or None.
      cfg: field of view of the cameras.
    """
    batch, capacity, ratio = bank.poses.shape[:3]
    frames, filled = slot_frames(capacity, made)
    known = filled & (frames >= 1) & (frames < before)
    pixels = (ratio * (frames[:, None] - 1) + 1 + jnp.arange(ratio)).reshape(-1)
    cameras = camera.extrinsics(bank.poses)  # [B S R 4 4]
    overlap = camera.view_overlap(references, cameras.reshape(batch, -1, 4, 4), cfg)
    chosen, _ = camera.best_views(overlap, pixels[None], jnp.repeat(known, ratio)[None])
    slots = chosen // ratio
    if fixed is not None:
        slots = slots.at[:, -1].set((fixed - 1) // ratio + 1)

    def at(leaf: jax.Array) -> jax.Array:
        picked: jax.Array = jax.vmap(lambda leaf, slots: leaf[slots])(leaf, slots)
        return picked

    # The camera of a latent frame is that of its last pixel frame.
    return Found(
        frames[slots],
        at(bank.latents),
        camera.memory_poses(references, at(cameras[:, :, -1])),
        pixels[chosen],
    )
