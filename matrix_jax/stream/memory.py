"""Segments with memory (Matrix-Game 3.0): each segment sees the last frames and retrieved ones.

Segment 0 has 15 latent frames, the first of which is the start picture. Every later segment has 14:
the last 4 of the segment before, kept clean, and 10 new ones. With R = 4 pixel frames per latent
frame, these are 57 pixel frames, then 40 more per segment.

Actions move a camera. A bank (`memory_bank`) stores all latent frames and the pose of every pixel
frame. For some pixel frames of a new segment, the step retrieves the earlier frame whose view
overlaps most with the camera there. The network sees the retrieved frames as memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from matrix_jax.diffusion import unipc
from matrix_jax.stream import memory_bank
from matrix_jax.stream.base import PyTree, Stream, fold, normal, player_keys
from matrix_jax.stream.memory_inputs import (
    NO_KEY,
    NO_MOUSE,
    Carry,
    MemoryNetwork,
    Prepared,
    Segment,
    prepare_first,
    prepare_next,
    without_conditions,
)
from matrix_jax.stream.memory_segments import Config, Experts, first_latent, latent_times

__all__ = [
    'NO_KEY',
    'NO_MOUSE',
    'Carry',
    'Config',
    'Experts',
    'MemoryNetwork',
    'Segment',
    'first_latent',
    'latent_times',
    'prepare_first',
    'prepare_next',
    'without_conditions',
]


@struct.dataclass
class Cond:
    """What a stream starts from.

    Attributes:
      latents: of the start picture [B 1 H W C].
      text: encoded prompt [B L D].
      null_text: encoded negative prompt [B L D] or [1 L D]; unused without guidance.
    """

    latents: jax.Array
    text: jax.Array
    null_text: jax.Array


def make(cfg: Config, net: MemoryNetwork) -> Stream:
    """Returns the stream of a network.

    `init(params, cond, key)`: `cond` is a `Cond`, `key` one key or one per player [B].
    `prefill(params, carry, control)`: control float32 [B first_actions A]; returns all latent
    frames of segment 0, [B first H W C].
    `step(params, carry, control)`: control float32 [B segment_actions A]; returns the new latent
    frames of the next segment, [B new H W C].

    Args:
      cfg: segments, memory and solver.
      net: the network.

    Raises:
      ValueError: a control has a wrong shape.
    """

    def init(params: PyTree, cond: Cond, key: jax.Array) -> Carry:
        return initial_carry(cfg, net, cond, player_keys(key, len(cond.latents)))

    def prefill(params: PyTree, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
        noise = _noise(carry, cfg.first)
        return first_segment(cfg, net, params, carry, control, noise)[:2]

    def step(params: PyTree, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
        noise = _noise(carry, cfg.overlap + cfg.new)
        return next_segment(cfg, net, params, carry, control, noise)[:2]

    def with_prompt(carry: Carry, text: jax.Array) -> Carry:
        return dataclasses.replace(carry, text=text)

    return Stream(init, prefill, step, with_prompt)


def initial_carry(cfg: Config, net: MemoryNetwork, cond: Cond, keys: jax.Array) -> Carry:
    """Returns the carry of a new stream."""
    batch, _, height, width, channels = cond.latents.shape

    def empty(*shape: int) -> jax.Array:
        return jnp.zeros((batch, *shape), jnp.float32)

    # Only the last frame of this history is used: the start picture.
    history = jnp.broadcast_to(
        jnp.asarray(cond.latents, jnp.float32), (batch, cfg.overlap, height, width, channels)
    )
    null_text = jnp.broadcast_to(cond.null_text, cond.text.shape)
    return Carry(
        bank=memory_bank.empty(batch, cfg.capacity, cfg.ratio, (height, width, channels)),
        history=history,
        text=cond.text,
        null_text=null_text,
        actions=empty(cfg.overlap_actions, net.keyboard + net.mouse),
        poses=empty(cfg.overlap_actions, 5),
        pose=empty(5),
        key=jax.random.key_data(keys),
        segment=jnp.zeros((), jnp.int32),
    )


class Trace(NamedTuple):
    """Internals of a segment, for comparisons.

    Attributes:
      segment: inputs of the network.
      latents: latents before each denoising step [steps B T H W C].
      retrieved: retrieved pixel frames, before one is fixed [B M]; None in segment 0.
    """

    segment: Segment
    latents: jax.Array
    retrieved: jax.Array | None = None


def first_segment(
    cfg: Config,
    net: MemoryNetwork,
    params: PyTree,
    carry: Carry,
    control: jax.Array,
    noise: jax.Array,
) -> tuple[Carry, jax.Array, Trace]:
    """Makes segment 0 with its noise given -> (carry, latents [B first H W C], `Trace`).

    Args:
      control: float32 [B first_actions A].
      noise: [B first H W C].
    """
    return _make(cfg, net, params, carry, noise, prepare_first(cfg, net, carry, control))


def next_segment(
    cfg: Config,
    net: MemoryNetwork,
    params: PyTree,
    carry: Carry,
    control: jax.Array,
    noise: jax.Array,
) -> tuple[Carry, jax.Array, Trace]:
    """Makes any other segment with its noise given -> (carry, new latents [B new H W C], `Trace`).

    Args:
      control: float32 [B segment_actions A].
      noise: [B overlap+new H W C].
    """
    prepared = prepare_next(cfg, net, carry, control)
    return _make(cfg, net, params, carry, noise, prepared, cfg.overlap)


def _make(
    cfg: Config,
    net: MemoryNetwork,
    params: PyTree,
    carry: Carry,
    noise: jax.Array,
    prepared: Prepared,
    overlap: int = 0,
) -> tuple[Carry, jax.Array, Trace]:
    """Makes a segment whose first `overlap` latent frames are those of the segment before."""
    x, given = _denoise(cfg, net, params, carry, prepared.segment, noise, prepared.clean)
    x = x[:, overlap:]
    trace = Trace(prepared.segment, given, prepared.retrieved)
    return _remember(cfg, carry, x, prepared), x, trace


def _remember(cfg: Config, carry: Carry, x: jax.Array, prepared: Prepared) -> Carry:
    """Returns the carry with the new latent frames [B T H W C] of a segment."""
    first = first_latent(cfg, carry.segment) + (carry.segment > 0) * cfg.overlap
    return dataclasses.replace(
        carry,
        bank=memory_bank.write(carry.bank, first, x, prepared.added),
        history=jnp.concatenate([carry.history, x], axis=1)[:, -cfg.overlap :],
        actions=prepared.actions[:, -cfg.overlap_actions :],
        poses=prepared.poses[:, -cfg.overlap_actions :],
        pose=prepared.pose,
        segment=carry.segment + 1,
    )


def _denoise(
    cfg: Config,
    net: MemoryNetwork,
    params: PyTree,
    carry: Carry,
    segment: Segment,
    noise: jax.Array,
    clean: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the solver on a segment that starts with clean frames [B n H W C].

    Returns:
      (latents [B T H W C], latents before each step [steps B T H W C]).
    """
    null_segment = without_conditions(net, carry, segment)

    def begin(index: int, scale: float, x: jax.Array) -> Callable[..., jax.Array]:
        expert = net.expert(params, index, x)
        begun = net.begin(expert, segment)
        null_begun = net.begin(expert, null_segment) if scale != 1 else None

        def denoise(x: jax.Array, levels: jax.Array) -> jax.Array:
            v = net.denoise(expert, x, levels, begun).astype(jnp.float32)
            if null_begun is None:
                return v
            null = net.denoise(expert, x, levels, null_begun).astype(jnp.float32)
            return null + scale * (v - null)

        return denoise

    made: tuple[jax.Array, jax.Array] = unipc.sample_after(
        clean,
        noise,
        [
            (table, functools.partial(begin, index, scale))
            for index, (table, scale) in enumerate(cfg.runs)
        ],
    )
    return made


def _noise(carry: Carry, frames: int) -> jax.Array:
    keys = jax.random.wrap_key_data(carry.key)
    keys = fold(keys, jnp.broadcast_to(carry.segment, keys.shape))
    return normal(keys, (frames, *carry.history.shape[2:]))
