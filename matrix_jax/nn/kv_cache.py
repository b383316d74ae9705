"""Which frames attend to which: blocks within one call, or a ring of cached frames.

A cache has S slots, one per frame, and a constant size. Frame f goes to slot f while slots are
free, then it replaces the oldest frame that is not a sink. So a block has the same slots each time
it is computed, and no frame is moved.

Keys are cached without rotation and rotated by their position relative to the window, whose last
frame always is at S - 1. RoPE depends on relative positions only, so a stream has no last position.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from matrix_jax.nn import token_layout
from matrix_jax.nn.attention import attention, self_attention, softmax


@struct.dataclass
class KVCache:
    """Keys and values of S frames of N sites, [... B S N K E]; leading axes may stack layers."""

    k: Any
    v: Any

    def put(self, new: KVCache, slots) -> KVCache:
        """The cache with frames [... B T N K E] written to the slots [T]."""
        return jax.tree.map(
            lambda old, now: old.at[..., slots, :, :, :].set(now.astype(old.dtype)), self, new
        )


@struct.dataclass
class Blocks:
    """Block-causal attention within one call: a frame sees its own block and earlier ones.

    Attributes:
      frames: latent frames T.
      block: frames of a block.
      local: frames that a block sees, counted from its end; None = all up to there.
      sites: tokens of a frame, without the padding for a mesh; None = all.
      exchange: what devices that share the sites exchange (`nn.attention.route`).
    """

    frames: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)
    local: int | None = struct.field(pytree_node=False, default=None)
    sites: int | None = struct.field(pytree_node=False, default=None)
    exchange: str = struct.field(pytree_node=False, default='auto')

    def __post_init__(self):
        if self.block < 1 or self.frames % self.block:
            raise ValueError(
                f'block: got {self.block} frames, expected a divisor of the '
                f'{self.frames} latent frames'
            )
        if self.local is not None and self.local < self.block:
            raise ValueError(
                f'local: got a window of {self.local} latent frames, expected at '
                f'least the {self.block} of a block'
            )

    def spans(self) -> list[tuple[int, int, int]]:
        """(first key, first query, end of both) of each block, in frames."""
        ends = range(self.block, self.frames + 1, self.block)
        return [
            (0 if self.local is None else max(end - self.local, 0), end - self.block, end)
            for end in ends
        ]

    def positions(self):
        """Positions of queries [T] and keys [T]."""
        return (np.arange(self.frames),) * 2

    def visible(self) -> np.ndarray:
        """Mask bool [T T]: whether a frame (row) sees another."""
        seen = np.zeros((self.frames, self.frames), bool)
        for first, start, end in self.spans():
            seen[start:end, first:end] = True
        return seen

    def keys_and_values(self, past, new: KVCache) -> KVCache:
        """Keys and values for the queries: those of the call."""
        return new

    def attend(self, q, k, v):
        """Attention over all sites: queries, keys and values [B T N K E] -> [B T N K E]."""
        see = partial(attend_each_other, sites=self.sites, exchange=self.exchange)
        return jnp.concatenate(
            [
                see(q[:, start:end], k[:, first:end], v[:, first:end])
                for first, start, end in self.spans()
            ],
            axis=1,
        )


@struct.dataclass
class Ring:
    """Attention of a block of T frames to itself and to cached frames in S slots.

    Attributes:
      start: first frame of the block, int32 [].
      frames: latent frames T of the block.
      size: slots S.
      sink: number of first frames of the stream that are never replaced.
      sites, exchange: as for `Blocks`.
    """

    start: Any
    frames: int = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)
    sink: int = struct.field(pytree_node=False, default=0)
    sites: int | None = struct.field(pytree_node=False, default=None)
    exchange: str = struct.field(pytree_node=False, default='auto')

    def __post_init__(self):
        if self.frames > self.size - self.sink:
            raise ValueError(
                f'local: got {self.size} cached latent frames with {self.sink} of '
                f'them kept, expected room for the {self.frames} of a block'
            )

    @property
    def end(self):
        """Number of the frame after the block."""
        return self.start + self.frames

    @property
    def slots(self):
        """Slots of the frames of the block, int32 [T]."""
        frames = self.start + jnp.arange(self.frames)
        again = self.sink + (frames - self.sink) % (self.size - self.sink)
        return jnp.where(frames < self.size, frames, again)

    def slot_frames(self):
        """Frame number in each slot, int32 [S]; not valid for slots that are not `visible`."""
        slots, last = jnp.arange(self.size), self.end - 1
        newest = last - (last - slots) % (self.size - self.sink)
        return jnp.where(slots < self.sink, slots, newest)

    def positions(self):
        """Positions of queries [T] and keys [S], relative to the window."""
        return (
            np.arange(self.size - self.frames, self.size),
            self.slot_frames() - (self.end - self.size),
        )

    def visible(self):
        """Mask bool [1 S] of the filled slots."""
        return (jnp.arange(self.size) < self.end)[None]

    def keys_and_values(self, past: KVCache, new: KVCache) -> KVCache:
        """Keys and values for the queries: the cache with the frames of the block."""
        return past.put(new, self.slots)

    def attend(self, q, k, v):
        """Attention over all sites: queries [B T N K E], keys [B S N K E] -> [B T N K E]."""
        see = partial(attend_each_other, sites=self.sites, exchange=self.exchange)

        def see_filled(q, k, v):
            return see(q, k, v, self.visible())

        # A full cache needs no bias, so the faster kernels can be used.
        return jax.lax.cond(self.end >= self.size, see, see_filled, q, k, v)


def attend_per_site(q, k, v, visible):
    """Attention of each site to its own frames only; moves no data between devices.

    Args:
      q: [B T N K E].
      k: [B S N K E], or [B S 1 K E] shared by all sites.
      v: like k.
      visible: bool, broadcastable to [T S].

    Returns:
      [B T N K E].
    """
    keys = 'bske' if k.shape[2] < q.shape[2] else 'bsnke'
    k, v = (x if keys == 'bsnke' else x[:, :, 0] for x in (k, v))
    logits = jnp.einsum(
        f'btnke,{keys}->bnkts', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    weights = softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum(f'bnkts,{keys}->btnke', weights.astype(v.dtype), v)


def attend_all(q, k, v):
    """Attention of queries [B T N K E] to keys and values [B 1 L K E] that are on all devices."""
    sites = q.shape[2]
    # Sites first, so that the queries are split over the devices like the sites.
    q = rearrange(q, 'b t n k e -> b (n t) k e')
    y = attention(q, *(rearrange(x, 'b s l k e -> b (s l) k e') for x in (k, v)))
    return rearrange(y, 'b (n t) k e -> b t n k e', n=sites)


def attend_each_other(q, k, v, visible=None, sites=None, exchange='auto'):
    """Attention of queries [B T N K E] to keys and values [B S N K E], over all sites.

    Args:
      q, k, v: split over the devices by sites.
      visible: mask bool [1 S] of the slots; None = all.
      sites, exchange: as for `Blocks`.

    Returns:
      [B T N K E].
    """
    frames, sites, bias = k.shape[1], sites or k.shape[2], None
    if visible is not None:
        shown = jnp.repeat(visible, sites, axis=1)
        bias = jnp.where(token_layout.flatten_rows(shown.T, frames).T, 0.0, -jnp.inf)
    real = token_layout.real_positions(frames, sites)
    y = self_attention(
        *map(token_layout.flatten_frames, (q, k, v)), bias, real=real, exchange=exchange
    )
    return token_layout.unflatten_frames(y, q.shape[1])
