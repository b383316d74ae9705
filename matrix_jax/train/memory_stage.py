"""Base of the stages that train a world with memory, and the carry of a stream from recordings.

A batch holds whole clips with the pose of every frame. The frames before a segment fill the memory
bank, and `stream.memory_inputs` moves the camera, retrieves memory frames and stacks rays as in
play.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.config import UsageError
from matrix_jax.data import records
from matrix_jax.nn import camera
from matrix_jax.stream import memory, memory_bank
from matrix_jax.train.stage import Stage, check_clip_frames, example_batch, latent_size


class MemoryClips(NamedTuple):
    """Clips as a stream would have made them; K segments follow segment 0.

    Attributes:
      latents: [B T H W C].
      actions: float32 [B R*T A], R for each latent frame; those of latent frame 0 repeat one.
      poses: float32 [B R*T 5], of the same frames.
      text, null_text: encoded prompts [B L D].
      moves: whether the actions move the camera, not the recorded poses.
    """

    latents: jax.Array
    actions: jax.Array
    poses: jax.Array
    text: jax.Array
    null_text: jax.Array
    moves: bool


@dataclasses.dataclass(frozen=True)
class MemoryStage(Stage):
    """Base of the stages that train a world with memory.

    Attributes:
      clip_frames: pixel frames F = 1 + 4k of a clip; longer clips allow for older memories.
      poses: 'recorded' = cameras are those of the recordings; 'actions' = the actions move the
        camera as in play, even where the recordings were stopped by a wall.
      train_encoders: also train the text encoder (first stage of a bundled world).
    """

    clip_frames: int = 257
    poses: Literal['recorded', 'actions'] = 'recorded'
    train_encoders: bool = False

    prediction: ClassVar = 'flow_prediction'
    components: ClassVar = ('transformer', 'text_encoder', 'vae')

    def __post_init__(self):
        super().__post_init__()
        check_clip_frames(self.clip_frames)
        if self.poses not in ('recorded', 'actions'):
            raise ValueError(f"stage.poses: got {self.poses!r}, expected 'recorded' or 'actions'")

    def check_world(self, world):
        super().check_world(world)
        stream = world.cfg.stream
        if not isinstance(stream, memory.Config) or world.cfg.clip is not None:
            raise UsageError(
                f'stage: {type(self).__name__} trains worlds with memory, got {world.cfg.name}'
            )
        if stream.experts is not None:
            raise UsageError(
                f'stream.experts: got {stream.experts}, expected None: one network trains'
            )
        if self.last_segment(stream) < 1:
            raise UsageError(
                f'stage.clip_frames: got {self.clip_frames}, expected at least '
                f'{stream.first_actions + stream.segment_actions}, two segments'
            )

    def trainable(self, path):
        component = path.split('/')[0]
        return component == 'transformer' or (self.train_encoders and component == 'text_encoder')

    def frames(self, stream: memory.Config) -> int:
        """Latent frames T of a clip."""
        return 1 + (self.clip_frames - 1) // stream.ratio

    def last_segment(self, stream: memory.Config) -> int:
        """Number of the last segment of a clip."""
        return (self.frames(stream) - stream.first) // stream.new

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data import latents

        store = latents.encode(data, world, params, cache)
        if not store.actions:
            raise records.RecordError(f'{data}: expected recordings with keys, mouse or poses')
        ids, _ = world.tokenize_and_cut(store.texts)
        count = self.frames(world.cfg.stream)
        return latents.LatentWindows(store, count, batch, seed, ids, from_start=True)

    def example(self, world, batch):
        cfg, frames = world.cfg, self.clip_frames
        return example_batch(
            batch,
            latents=('float16', self.frames(cfg.stream), *latent_size(cfg), cfg.dit.channels),
            ids=('int32', cfg.dit.text_length),
            keyboard=('int8', frames, len(records.KEYS)),
            mouse=('float32', frames, 2),
            pose=('float32', frames, len(records.POSE)),
        )

    def clips(self, world, params, batch) -> MemoryClips:
        """Clips of a batch, with encoded prompts."""
        cfg = world.cfg
        text = world.embed_ids(params, batch['ids'])
        null_text = jnp.broadcast_to(world.null_text(params), text.shape)
        actions = stream_actions(world.vocabulary.mode.keys, batch['keyboard'], batch['mouse'])
        poses = camera_poses(batch['pose'])
        unknown = jnp.isnan(poses[:, :1, :1]) | (self.poses == 'actions')
        moved = jnp.where(actions == unknown_action(actions.shape[-1]), 0.0, actions)
        keys = actions.shape[-1] - 2
        moved, _ = camera.poses(
            jnp.zeros(5), moved[..., :keys], moved[..., keys:], cfg.stream.camera
        )
        padding = ((0, 0), (cfg.stream.ratio - 1, 0), (0, 0))
        return MemoryClips(
            jnp.asarray(batch['latents'], jnp.float32),
            jnp.pad(actions, padding, mode='edge'),
            jnp.pad(jnp.where(unknown, moved, poses), padding, mode='edge'),
            text,
            null_text,
            self.poses == 'actions',
        )


def denoise_new(net: memory.MemoryNetwork, params, segment: memory.Segment, clean, noisy, sigma):
    """Velocity [B T H W C] of the noisy frames of a segment.

    Args:
      clean: frames before them, at level 0 [B n H W C].
      noisy: [B T H W C].
      sigma: [B 1].
    """
    # As in play: levels are whole numbers, rounded down.
    level = jnp.broadcast_to(jnp.trunc(1000 * sigma), noisy.shape[:2])
    level = jnp.pad(level, ((0, 0), (clean.shape[1], 0)))
    x = jnp.concatenate([clean, noisy], axis=1)
    v = net.denoise(params, x, level, segment).astype(jnp.float32)
    return v[:, clean.shape[1] :]


# --- from recordings to the carry of a stream ----------------------------------------------------


def camera_poses(recorded):
    """Poses of records [... 6] -> poses of `nn.camera` [... 5], without roll.

    The records' y axis points left and their yaw turns left; those of a camera point right.
    """
    x, y, z, yaw, pitch, _ = jnp.moveaxis(recorded, -1, 0)
    return jnp.stack([x, -y, z, jnp.rad2deg(pitch), -jnp.rad2deg(yaw)], axis=-1)


def unknown_action(width: int) -> np.ndarray:
    """Vector [A] of an unknown action."""
    return np.repeat(np.float32([memory.NO_KEY, memory.NO_MOUSE]), [width - 2, 2])


def stream_actions(keys, keyboard, mouse):
    """Actions of records -> actions of a stream, float32 [B F A].

    Records hold the action with which a frame was made, a stream that with which the next one is
    made. Keys that records lack are not pressed. Unknown actions stay unknown.

    Args:
      keys: words of the stream's keys.
      keyboard: int8 [B F 4].
      mouse: float32 [B F 2].
    """
    known = keyboard[..., :1] != records.UNPRESSED
    columns = [
        keyboard[..., records.KEYS.index(key)] if key in records.KEYS else 0 * keyboard[..., 0]
        for key in keys
    ]
    pressed = jnp.stack(columns, axis=-1).astype(jnp.float32)
    pressed = jnp.where(known, pressed, memory.NO_KEY)
    moved = jnp.where(jnp.isnan(mouse), memory.NO_MOUSE, mouse)
    made = jnp.concatenate([pressed, moved], axis=-1)
    return jnp.concatenate([made[:, 1:], made[:, -1:]], axis=1)


def first_carry(cfg: memory.Config, net: memory.MemoryNetwork, clips: MemoryClips):
    """(carry before segment 0, its actions [B F A], its poses [B F 5] or None)."""
    cond = memory.Cond(clips.latents[:, :1], clips.text, clips.null_text)
    keys = jax.random.split(jax.random.key(0), len(clips.latents))
    carry = memory.initial_carry(cfg, net, cond, keys)
    frames = slice(cfg.ratio - 1, cfg.ratio * cfg.first)
    poses = None if clips.moves else clips.poses[:, frames]
    return (dataclasses.replace(carry, pose=clips.poses[:, 0]), clips.actions[:, frames], poses)


def later_carry(cfg: memory.Config, clips: MemoryClips, number):
    """(carry before segment `number` >= 1, its actions [B F A], its poses [B F 5] or None).

    The bank holds what that of a stream would hold.
    """
    batch, total = clips.latents.shape[:2]
    first = memory.first_latent(cfg, number)
    made = first + cfg.overlap
    frames, _ = memory_bank.slot_frames(min(cfg.capacity, total), made)
    frames = jnp.clip(frames, 0, total - 1)
    poses = rearrange(clips.poses, 'b (t r) p -> b t r p', r=cfg.ratio)

    def cut(values, start, count):
        return jax.lax.dynamic_slice_in_dim(values, start, count, axis=1)

    old = cfg.ratio * first, cfg.overlap_actions
    new = cfg.ratio * made, cfg.segment_actions
    carry = memory.Carry(
        bank=memory_bank.Bank(clips.latents[:, frames], poses[:, frames]),
        history=cut(clips.latents, first, cfg.overlap),
        text=clips.text,
        null_text=clips.null_text,
        actions=cut(clips.actions, *old),
        poses=cut(clips.poses, *old),
        pose=cut(clips.poses, new[0], 1)[:, 0],
        key=jnp.zeros((batch, 2), jnp.uint32),
        segment=number,
    )
    return carry, cut(clips.actions, *new), None if clips.moves else cut(clips.poses, *new)


def new_frames(cfg: memory.Config, clips: MemoryClips, number):
    """Latent frames [B new H W C] that segment `number` >= 1 adds."""
    start = memory.first_latent(cfg, number) + cfg.overlap
    return jax.lax.dynamic_slice_in_dim(clips.latents, start, cfg.new, axis=1)
