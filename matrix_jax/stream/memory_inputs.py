"""What the network reads of a segment with memory: actions, camera rays, retrieved frames, times.

`prepare_first` and `prepare_next` make these inputs from the carry of a stream, in play and in
training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from matrix_jax.nn import camera
from matrix_jax.stream import memory_bank
from matrix_jax.stream.base import PyTree
from matrix_jax.stream.memory_bank import Bank
from matrix_jax.stream.memory_segments import Config, first_latent

NO_MOUSE, NO_KEY = 1.0, -1.0  # PARITY: values of an unknown action


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
      rays: ray maps of M memory frames and of the segment [B M+T H W 6*p*p], or what the network
        has read of text and rays.
      memory: latents of memory frames [B M H W C]; M = 0 for none.
      positions: number of each frame in the video, in latent frames, int32 [B M+T].
    """

    text: jax.Array
    actions: jax.Array
    rays: PyTree
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
      begin: `(params, Segment) -> Segment` before the first step of a run: what all steps have in
        common.
    """

    denoise: Callable[..., jax.Array]
    keyboard: int
    mouse: int
    pixels: int
    expert: Callable[[PyTree, int, jax.Array], PyTree] = lambda params, index, x: params
    begin: Callable[[PyTree, Segment], Segment] = lambda params, segment: segment


class Prepared(NamedTuple):
    """A segment before it is denoised.

    Attributes:
      segment: inputs of the network.
      clean: its first latent frames, which stay as they are [B n H W C].
      actions: of all its pixel frames [B F A].
      poses: of the same frames [B F 5].
      added: poses of the pixel frames of its new latent frames [B R*T 5].
      pose: pose of the next pixel frame [B 5].
      retrieved: retrieved pixel frames, before one is fixed [B M]; None in segment 0 and without
        memory.
    """

    segment: Segment
    clean: jax.Array
    actions: jax.Array
    poses: jax.Array
    added: jax.Array
    pose: jax.Array
    retrieved: jax.Array | None = None


def prepare_first(
    cfg: Config,
    net: MemoryNetwork,
    carry: Carry,
    control: jax.Array,
    poses: jax.Array | None = None,
) -> Prepared:
    """Prepares segment 0.

    Args:
      control: float32 [B first_actions A].
      poses: recorded poses of these frames [B first_actions 5]; None = the actions move the camera.
    """
    control = _checked(net, control, len(carry.key), cfg.first_actions)
    poses, pose = _moved(cfg, net, carry, control, poses)
    views = camera.extrinsics(poses[:, :: cfg.ratio])
    segment = Segment(
        text=carry.text,
        actions=control,
        rays=_rays(cfg, net, carry, camera.relative_poses(views)),
        memory=carry.bank.latents[:, :0],
        positions=_positions(carry, cfg, cfg.first),
    )
    padding = jnp.repeat(poses[:, :1], cfg.ratio - 1, axis=1)  # latent frame 0 has one pixel frame
    added = jnp.concatenate([padding, poses], axis=1)
    return Prepared(segment, carry.history[:, -1:], control, poses, added, pose)


def prepare_next(
    cfg: Config,
    net: MemoryNetwork,
    carry: Carry,
    control: jax.Array,
    poses: jax.Array | None = None,
) -> Prepared:
    """Prepares any other segment: moves the camera and retrieves memory frames.

    Args:
      control: float32 [B segment_actions A].
      poses: recorded poses of these frames [B segment_actions 5]; None = the actions move the
        camera.
    """
    control = _checked(net, control, len(carry.key), cfg.segment_actions)
    added, pose = _moved(cfg, net, carry, control, poses)
    poses = jnp.concatenate([carry.poses, added], axis=1)
    actions = jnp.concatenate([carry.actions, control], axis=1)
    views = camera.extrinsics(poses)
    first = first_latent(cfg, carry.segment)
    # The camera of a latent frame is that of its last pixel frame.
    cameras = camera.relative_poses(views[:, cfg.ratio - 1 :: cfg.ratio])
    positions = _positions(carry, cfg, cfg.overlap + cfg.new)
    memory, retrieved = carry.bank.latents[:, :0], None
    if cfg.reference_offsets:
        places = views.shape[1] - 1 - np.asarray(cfg.reference_offsets)
        found = memory_bank.retrieve(
            carry.bank, first + cfg.overlap, first, views[:, places], cfg.fixed_memory, cfg.camera
        )
        oldest = 0 if cfg.furthest is None else first - cfg.furthest
        positions = jnp.concatenate([jnp.maximum(found.frames, oldest), positions], axis=1)
        cameras = jnp.concatenate([found.cameras, cameras], axis=1)
        memory, retrieved = found.latents, found.pixels
    segment = Segment(
        text=carry.text,
        actions=actions,
        rays=_rays(cfg, net, carry, cameras),
        memory=memory,
        positions=positions,
    )
    return Prepared(segment, carry.history, actions, poses, added, pose, retrieved)


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


def _rays(cfg: Config, net: MemoryNetwork, carry: Carry, relative: jax.Array) -> jax.Array:
    """Ray maps [B T H W 6*p*p] of relative cameras [B T 4 4]."""
    height, width = (size * net.pixels for size in carry.history.shape[2:4])
    rays: jax.Array = camera.plucker(relative, height, width, net.pixels, cfg.camera)
    return rays


def _moved(
    cfg: Config, net: MemoryNetwork, carry: Carry, control: jax.Array, poses: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(poses of the frames of a control [B F 5], pose of the frame after them [B 5])."""
    made: tuple[jax.Array, jax.Array]
    if poses is None:
        made = camera.poses(carry.pose, *_split(net, control), cfg.camera)
    else:
        made = poses, poses[:, -1]
    return made


def _split(net: MemoryNetwork, control: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [... A] -> (keyboard, mouse)."""
    return control[..., : net.keyboard], control[..., net.keyboard :]


def _checked(net: MemoryNetwork, control: jax.Array, batch: int, count: int) -> jax.Array:
    """A control as float32; raises ValueError unless it has the right shape."""
    shape = (batch, count, net.keyboard + net.mouse)
    if control.shape != shape:
        raise ValueError(f'control: got {control.shape}, expected [B N A] = {shape}')
    return jnp.asarray(control, jnp.float32)
