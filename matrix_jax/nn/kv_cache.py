"""Which frames look at which: blocks of one call, or a ring of cached frames.

A cache has S slots, one per frame, and its size never changes. Frame f goes to slot f while there
are slots; then it takes the place of the oldest frame that is no sink. So the frames of one block
go to the same slots however often the block is computed, and nothing ever moves.

Keys are kept unrotated and turned by their place relative to the window, whose last frame is always
at S - 1. Attention depends on relative places alone, so that a stream has no last position.
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
from matrix_jax.nn.attention import attention, self_attention


@struct.dataclass
class KVCache:
    """Keys and values of S frames of N sites, [... B S N K E]; layers may be stacked in front."""

    k: Any
    v: Any

    def put(self, new: KVCache, slots) -> KVCache:
        """With frames [... B T N K E] in their slots [T]."""
        return jax.tree.map(
            lambda old, now: old.at[..., slots, :, :, :].set(now.astype(old.dtype)), self, new
        )


@struct.dataclass
class Blocks:
    """All frames are in the call; those of a block see it whole, and what came before.

    Attributes:
      frames: latent frames T.
      block: frames of a block.
      local: how far back a block sees, counted from its end; None = to the first frame.
      sites: of a frame, without the padding of a mesh; None = all.
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

    def places(self):
        """Positions of queries [T] and keys [T]."""
        return (np.arange(self.frames),) * 2

    def visible(self) -> np.ndarray:
        """bool [T T]: does a frame see another?"""
        seen = np.zeros((self.frames, self.frames), bool)
        for first, start, end in self.spans():
            seen[start:end, first:end] = True
        return seen

    def recall(self, past, new: KVCache) -> KVCache:
        """Keys and values that the queries look at: those of the call."""
        return new

    def attend(self, q, k, v):
        """[B T N K E] and keys [B T N K E] -> [B T N K E], over all sites."""
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
    """A block of T frames looks at itself and at what S slots hold.

    Attributes:
      start: first frame of the block, int32 [].
      frames: latent frames T of the block.
      size: slots S.
      sink: first frames of the stream, which are never replaced.
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
        """The frame after the block."""
        return self.start + self.frames

    @property
    def slots(self):
        """int32 [T]: where the frames of the block go."""
        frames = self.start + jnp.arange(self.frames)
        again = self.sink + (frames - self.sink) % (self.size - self.sink)
        return jnp.where(frames < self.size, frames, again)

    def held(self):
        """int32 [S]: the frame in each slot; what an empty slot says is not to be used."""
        slots, last = jnp.arange(self.size), self.end - 1
        newest = last - (last - slots) % (self.size - self.sink)
        return jnp.where(slots < self.sink, slots, newest)

    def places(self):
        """Positions of queries [T] and keys [S], relative to the window."""
        return (np.arange(self.size - self.frames, self.size), self.held() - (self.end - self.size))

    def visible(self):
        """bool [1 S]: which slots are filled."""
        return (jnp.arange(self.size) < self.end)[None]

    def recall(self, past: KVCache, new: KVCache) -> KVCache:
        """Keys and values that the queries look at: all slots, the block's frames in theirs."""
        return past.put(new, self.slots)

    def attend(self, q, k, v):
        """[B T N K E] and keys [B S N K E] -> [B T N K E], over all sites."""
        see = partial(attend_each_other, sites=self.sites, exchange=self.exchange)

        def filling(q, k, v):
            return see(q, k, v, self.visible())

        # A stream spends its life with full caches, and there no bias bars the fast kernels.
        return jax.lax.cond(self.end >= self.size, see, filling, q, k, v)


def attend_per_site(q, k, v, visible):
    """Each site looks at its own frames alone: they are few, and sites stay on their devices.

    Args:
      q: [B T N K E].
      k: [B S N K E], or [B S 1 K E] that all sites share.
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
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum(f'bnkts,{keys}->btnke', weights.astype(v.dtype), v)


def attend_all(q, k, v):
    """Queries [B T N K E] see all keys [B 1 L K E], which every device has whole."""
    sites = q.shape[2]
    # Sites come first, so that the queries split over devices as sites do.
    q = rearrange(q, 'b t n k e -> b (n t) k e')
    y = attention(q, *(rearrange(x, 'b s l k e -> b (s l) k e') for x in (k, v)))
    return rearrange(y, 'b (n t) k e -> b t n k e', n=sites)


def attend_each_other(q, k, v, visible=None, sites=None, exchange='auto'):
    """Queries [B T N K E] see all keys [B S N K E], or those of the slots [1 S] that are visible.

    Devices hold the keys of their sites, as of queries.

    Args:
      sites, exchange: as for `Blocks`.
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
