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
from matrix_jax.nn.attention import attention, self_attention, softmax, takes_lengths
from matrix_jax.parallel import compilation
from matrix_jax.parallel.sharding import num_shards

FEW_PAIRS = 32  # pairs of frames, up to which a GPU attends to the frames of a site at once


@struct.dataclass
class KVCache:
    """Keys and values of S frames of N sites, [... B S N K E]; leading axes may stack layers."""

    k: Any
    v: Any


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
      start: first frame of the block, int32 []; a multiple of T.
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

    def put(self, past: KVCache, new: KVCache) -> KVCache:
        """The cache [... B S N K E] with the frames of the block [... B T N K E] in their slots."""
        # Slices are updated in place, each by one copy. Blocks that fit the ring are never divided.
        parts = 1 if self.sink % self.frames == self.size % self.frames == 0 else self.frames
        count, slots = self.frames // parts, self.slots

        def write(old, now):
            now = now.astype(old.dtype)
            for part in range(parts):
                first = part * count
                piece = jax.lax.slice_in_dim(now, first, first + count, axis=-4)
                old = jax.lax.dynamic_update_slice_in_dim(old, piece, slots[first], axis=-4)
            return old

        return jax.tree.map(write, past, new)

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
        return self.put(past, new)

    def attend(self, q, k, v):
        """Attention over all sites: queries [B T N K E], keys [B S N K E] -> [B T N K E]."""
        see = partial(attend_each_other, sites=self.sites, exchange=self.exchange)

        def see_filled(q, k, v):
            return see(q, k, v, self.visible())

        if takes_lengths(q):
            # The first slots are filled first.
            filled = jnp.minimum(self.end, self.size) * k.shape[2]
            return see(q, k, v, filled=jnp.broadcast_to(filled, q.shape[:1]))
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
    if takes_lengths(q) and isinstance(visible, np.ndarray) and visible.all():
        return _attend_fused(q, k, v)
    keys = 'bske' if k.shape[2] < q.shape[2] else 'bsnke'
    k, v = (x if keys == 'bsnke' else x[:, :, 0] for x in (k, v))
    logits = jnp.einsum(
        f'btnke,{keys}->bnkts', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    weights = softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum(f'bnkts,{keys}->btnke', weights.astype(v.dtype), v)


def _attend_fused(q, k, v):
    """`attend_per_site` where all frames are visible, by the kernel for GPUs."""
    if k.shape[2] < q.shape[2]:
        return attend_all(q, k, v)
    heads = (rearrange(x, 'b t n k e -> (b n) t k e') for x in (q, k, v))
    return rearrange(attention(*heads), '(b n) t k e -> b t n k e', n=q.shape[2])


def few_frames(queries: int, keys: int) -> bool:
    """Whether `attend_few` is used for that many frames of queries and of keys."""
    return compilation.backend() == 'gpu' and queries * keys <= FEW_PAIRS


def few_logits(q, k, visible, factors):
    """Masked logits [B T N K S] of queries [B T N K E] and keys [B 1|T S N|1 K E].

    Args:
      factors: what the logits are multiplied by [B T N K].
    """
    k = rearrange(k, 'b t s n k e -> b t n k s e').astype(jnp.float32)
    logits = (q[..., None, :].astype(jnp.float32) * k).sum(-1) * factors[..., None]
    return jnp.where(jnp.asarray(visible)[:, None, None], logits, -jnp.inf)


def attend_few(q, k, v, visible, factors):
    """`attend_per_site` of few frames without matrix products.

    A GPU would pad products of so few frames to eight, and one per site and head would decide the
    layout of all tokens.

    Args:
      q, k, v, visible: as for `attend_per_site`.
      factors: see `few_logits`.
    """
    weights = softmax(few_logits(q, k[:, None], visible, factors)).astype(v.dtype)
    v = rearrange(v, 'b s n k e -> b 1 n k s e').astype(jnp.float32)
    return (weights[..., None].astype(jnp.float32) * v).sum(-2).astype(weights.dtype)


def attend_all(q, k, v):
    """Attention of queries [B T N K E] to keys and values [B 1 L K E] that are on all devices."""
    frames, sites = q.shape[1:3]
    # On a mesh, sites first, so that the queries are split over the devices like the sites.
    order = 't n' if num_shards('tokens') == 1 else 'n t'
    q = rearrange(q, f'b t n k e -> b ({order}) k e')
    y = attention(q, *(rearrange(x, 'b s l k e -> b (s l) k e') for x in (k, v)))
    return rearrange(y, f'b ({order}) k e -> b t n k e', t=frames, n=sites)


def attend_each_other(q, k, v, visible=None, filled=None, sites=None, exchange='auto'):
    """Attention of queries [B T N K E] to keys and values [B S N K E], over all sites.

    Args:
      q, k, v: split over the devices by sites.
      visible: mask bool [1 S] of the slots; None = all.
      filled: keys that are seen, the first ones, int32 [B]; only where `takes_lengths`.
      sites, exchange: as for `Blocks`.

    Returns:
      [B T N K E].
    """
    frames, sites, bias = k.shape[1], sites or k.shape[2], None
    if visible is not None:
        shown = jnp.repeat(visible, sites, axis=1)
        bias = jnp.where(token_layout.flatten_rows(shown.T, frames).T, 0.0, -jnp.inf)
    real = token_layout.real_positions(frames, sites)
    q_tokens, k, v = map(token_layout.flatten_frames, (q, k, v))
    if filled is not None:
        y = attention(q_tokens, k, v, filled=filled)
    else:
        y = self_attention(q_tokens, k, v, bias, real=real, exchange=exchange)
    return token_layout.unflatten_frames(y, q.shape[1])
