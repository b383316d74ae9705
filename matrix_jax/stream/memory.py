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
import numpy as np
from flax import struct

from matrix_jax.diffusion import unipc
from matrix_jax.nn import camera
from matrix_jax.stream import memory_bank
from matrix_jax.stream.base import PyTree, Stream, fold, normal, player_keys
from matrix_jax.stream.memory_bank import Bank
from matrix_jax.stream.memory_segments import Config, Experts, first_latent, latent_times

__all__ = ['Config', 'Experts', 'first_latent', 'latent_times']

NO_MOUSE, NO_KEY = 1.0, -1.0  # PARITY: values of an unknown action


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


@struct.dataclass
class Carry:
    """State between segments. It only holds arrays, so saving it saves the stream.

    Attributes:
      bank: the latent frames so far, as many as fit.
      history: the last latent frames [B overlap H W C].
      text, null_text: as in `Cond`.
      actions: float32 [B R*overlap A], actions of the last pixel frames.
      poses: float32 [B R*overlap 5], poses of the same frames.
      pose: float32 [B 5], pose of the next pixel frame.
      key: uint32 [B 2], raw key data of each player.
      segment: int32 [], segments made so far.
    """

    bank: Bank
    history: jax.Array
    text: jax.Array
    null_text: jax.Array
    actions: jax.Array
    poses: jax.Array
    pose: jax.Array
    key: jax.Array
    segment: jax.Array


@struct.dataclass
class Segment:
    """Inputs of the network that stay the same over the denoising steps of a segment.

    Attributes:
      text: [B L D].
      actions: [B F A], F = 1 + R(T-1) in segment 0 and R*T in any other.
      rays: ray maps of M memory frames and of the segment [B M+T H W 6*p*p].
      memory: latents of memory frames [B M H W C]; M = 0 for none.
      positions: number of each frame in the video, in latent frames, int32 [B M+T].
    """

    text: jax.Array
    actions: jax.Array
    rays: jax.Array
    memory: jax.Array
    positions: jax.Array


class MemoryNetwork(NamedTuple):
    """A network with memory frames, as the function that a stream calls.

    Attributes:
      denoise: `(params, x [B T H W C], level [B T], Segment) -> v [B T H W C]`.
      keyboard, mouse: widths of the two parts of an action, in this order.
      pixels: pixels of a latent pixel, in height and in width.
      expert: `(params, index, x) -> params` that `denoise` takes in the run of network `index`;
        x are the latents before its first step.
    """

    denoise: Callable[..., jax.Array]
    keyboard: int
    mouse: int
    pixels: int
    expert: Callable[[PyTree, int, jax.Array], PyTree] = lambda params, index, x: params


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
    control = _checked(net, control, len(carry.key), cfg.first_actions)
    poses, pose = camera.poses(carry.pose, *_split(net, control))
    views = camera.extrinsics(poses[:, :: cfg.ratio])
    segment = Segment(
        text=carry.text,
        actions=control,
        rays=_rays(net, carry, camera.relative_poses(views)),
        memory=carry.bank.latents[:, :0],
        positions=_positions(carry, cfg, cfg.first),
    )
    x, given = _denoise(cfg, net, params, carry, segment, noise, carry.history[:, -1:])
    padding = jnp.repeat(poses[:, :1], cfg.ratio - 1, axis=1)  # latent frame 0 has one pixel frame
    added = jnp.concatenate([padding, poses], axis=1)
    carry = _remember(cfg, carry, x, added, control, poses, pose)
    return carry, x, Trace(segment, given)


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
    control = _checked(net, control, len(carry.key), cfg.segment_actions)
    added, pose = camera.poses(carry.pose, *_split(net, control))
    poses = jnp.concatenate([carry.poses, added], axis=1)
    actions = jnp.concatenate([carry.actions, control], axis=1)
    views = camera.extrinsics(poses)
    first = first_latent(cfg, carry.segment)
    places = views.shape[1] - 1 - np.asarray(cfg.reference_offsets)
    found = memory_bank.retrieve(
        carry.bank, first + cfg.overlap, first, views[:, places], cfg.fixed_memory
    )
    # The camera of a latent frame is that of its last pixel frame.
    own = camera.relative_poses(views[:, cfg.ratio - 1 :: cfg.ratio])
    segment = Segment(
        text=carry.text,
        actions=actions,
        rays=_rays(net, carry, jnp.concatenate([found.cameras, own], axis=1)),
        memory=found.latents,
        positions=jnp.concatenate(
            [found.frames, _positions(carry, cfg, cfg.overlap + cfg.new)], axis=1
        ),
    )
    x, given = _denoise(cfg, net, params, carry, segment, noise, carry.history)
    x = x[:, cfg.overlap :]
    carry = _remember(cfg, carry, x, added, actions, poses, pose)
    return carry, x, Trace(segment, given, found.pixels)


def _remember(
    cfg: Config,
    carry: Carry,
    x: jax.Array,
    added: jax.Array,
    actions: jax.Array,
    poses: jax.Array,
    pose: jax.Array,
) -> Carry:
    """Returns the carry with new latent frames.

    Args:
      x: latents of the new frames [B T H W C].
      added: poses of their pixel frames [B R*T 5].
      actions, poses: actions and poses of all pixel frames of the segment.
      pose: pose of the next pixel frame.
    """
    first = first_latent(cfg, carry.segment) + (carry.segment > 0) * cfg.overlap
    return dataclasses.replace(
        carry,
        bank=memory_bank.write(carry.bank, first, x, added),
        history=jnp.concatenate([carry.history, x], axis=1)[:, -cfg.overlap :],
        actions=actions[:, -cfg.overlap_actions :],
        poses=poses[:, -cfg.overlap_actions :],
        pose=pose,
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

        def denoise(x: jax.Array, levels: jax.Array) -> jax.Array:
            v = net.denoise(expert, x, levels, segment).astype(jnp.float32)
            if scale == 1:
                return v
            null = net.denoise(expert, x, levels, null_segment).astype(jnp.float32)
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


def without_conditions(net: MemoryNetwork, carry: Carry, segment: Segment) -> Segment:
    """Returns the null condition of guidance: the negative prompt, no actions, no memory."""
    count = segment.memory.shape[1]
    values = np.array([NO_KEY, NO_MOUSE], np.float32)
    unknown = np.repeat(values, [net.keyboard, net.mouse])
    return dataclasses.replace(
        segment,
        text=carry.null_text,
        memory=segment.memory[:, :0],
        rays=segment.rays[:, count:],
        actions=jnp.broadcast_to(unknown, segment.actions.shape),
        positions=segment.positions[:, count:],
    )


def _positions(carry: Carry, cfg: Config, count: int) -> jax.Array:
    """Latent frame numbers of the next segment, int32 [B count]."""
    frames = first_latent(cfg, carry.segment) + jnp.arange(count)
    return jnp.broadcast_to(frames, (len(carry.key), count))


def _rays(net: MemoryNetwork, carry: Carry, relative: jax.Array) -> jax.Array:
    """Ray maps [B T H W 6*p*p] of relative cameras [B T 4 4]."""
    height, width = (size * net.pixels for size in carry.history.shape[2:4])
    rays: jax.Array = camera.plucker(relative, height, width, net.pixels)
    return rays


def _noise(carry: Carry, frames: int) -> jax.Array:
    keys = jax.random.wrap_key_data(carry.key)
    keys = fold(keys, jnp.broadcast_to(carry.segment, keys.shape))
    return normal(keys, (frames, *carry.history.shape[2:]))


def _split(net: MemoryNetwork, control: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [... A] -> (keyboard, mouse)."""
    return control[..., : net.keyboard], control[..., net.keyboard :]


def _checked(net: MemoryNetwork, control: jax.Array, batch: int, count: int) -> jax.Array:
    """A control as float32; raises ValueError unless it has the right shape."""
    shape = (batch, count, net.keyboard + net.mouse)
    if control.shape != shape:
        raise ValueError(f'control: got {control.shape}, expected [B N A] = {shape}')
    return jnp.asarray(control, jnp.float32)
