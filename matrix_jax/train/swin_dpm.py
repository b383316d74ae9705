"""Stage 3, Swin-DPM (arXiv 2412.03568): the denoising loss at the noise levels of the stream.

A frame of group g of G has level u + g * 1000/G, with one u per sample; the condition frames stay
near level 0 and do not count. Two additions reduce drift: noise on the condition frames, whose
level the network is given, and recycled prediction errors on them, with clean targets. Two more
shorten the time until a key shows: controls that take effect at any group, and noisy frames that
the network predicted before it knew the new control.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from matrix_jax.config import UsageError
from matrix_jax.diffusion import schedules
from matrix_jax.train.denoise import Denoising, denoise_loss


def grouped_levels(u, groups: int, group_frames: int, context, train_steps: int = 1000):
    """Levels int32 [B T] of a window: `context`, then u + g * train_steps / groups.

    Args:
      u: int32 [B], 0 <= u < train_steps / groups.
      groups, group_frames: groups of the window, and latent frames in each.
      context: levels [B C] of the condition frames.
      train_steps: levels of the schedule.
    """
    offsets = jnp.repeat(jnp.arange(groups) * (train_steps // groups), group_frames)
    return jnp.concatenate([context, u[:, None] + offsets[None]], axis=1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SwinDPM(Denoising):
    """Denoising of windows at grouped levels, on encoded latents; the defaults are published.

    Attributes:
      uniform: share of samples with one level, 0 to 999, in all frames but the condition. No
        cleaner frame then reveals the motion, so the network must read it from the controls.
      condition_noise: highest noise level of the condition frames, which the network is given;
        half of the samples have level 0.
      recycle: scale of one-step prediction errors added to the condition frames of half of the
        samples, with clean targets.
      late_binding: share of samples whose noisiest slots repeat the control of the binding slot, as
        in play, where later controls are not known yet.
      binding_groups: groups that controls take effect at in those samples, each as often as the
        others. Empty = the group of the stream.
      stale: share of those samples whose frames from the binding slot on are predictions under the
        control before, as in play after a key was pressed. The targets stay recorded frames.
    """

    uniform: float = 0.0
    condition_noise: int = 0
    recycle: float = 0.0
    late_binding: float = 0.0
    binding_groups: tuple[int, ...] = ()
    stale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(
            late_binding=(0, 1),
            uniform=(0, 1),
            condition_noise=(0, 249),
            recycle=(0, 4),
            stale=(0, 1),
        )

    def check_world(self, world):
        super().check_world(world)
        check_binding_groups(self.binding_groups, world.cfg.stream)

    def lengths(self, world):
        stream, lengths = world.cfg.stream, super().lengths(world)
        for frames, length in zip(self.clip_frames, lengths):
            if length <= stream.context or (length - stream.context) % stream.groups:
                raise ValueError(
                    f'stage.clip_frames: got {frames}, which is {length} latent '
                    f'frames, expected context = {stream.context} and a multiple '
                    f'of groups = {stream.groups}'
                )
        return lengths

    def loss(self, world, params, batch, key):
        keys, schedule = jax.random.split(key, 11), world.schedule
        clean = batch['latents'].astype(jnp.float32)
        stream = world.cfg.stream  # with the group width of this batch
        width = (clean.shape[1] - stream.context) // stream.groups
        stream = dataclasses.replace(stream, group_frames=width)
        size, context = clean.shape[0], stream.context
        late = jax.random.uniform(keys[7], (size, 1)) < self.late_binding
        group = draw_binding_group(stream, self.binding_groups, keys[9], size)
        in_play = controls_in_play(stream, batch['controls'], group)
        controls = jnp.where(late, in_play, batch['controls'])
        text, control = self.conditions(world, params, batch['ids'], controls, keys[:2])
        spacing = 1000 // stream.groups
        u = jax.random.randint(keys[2], (size,), 0, spacing)
        condition = jax.random.randint(keys[3], (size, 1), 0, self.condition_noise + 1)
        condition = jnp.where(jax.random.uniform(keys[4], (size, 1)) < 0.5, 0, condition)
        condition = jnp.broadcast_to(condition, (size, context))
        one = jnp.zeros([size, 1], bool)
        if self.uniform:
            draws = jax.random.split(keys[8])
            one = jax.random.uniform(draws[0], (size, 1)) < self.uniform
        stale = late & ~one & (jax.random.uniform(keys[10], (size, 1)) < self.stale)
        # A shift begins in the upper half of these levels. Near level 0 no noise would be left to
        # turn into other motion, and the loss weight would be large.
        u = jnp.where(stale[:, 0], spacing // 2 + u // 2, u)
        levels = grouped_levels(u, stream.groups, stream.group_frames, condition)
        if self.uniform:
            level = jax.random.randint(draws[1], (size, 1), 0, 1000)
            levels = levels.at[:, context:].set(jnp.where(one, level, levels[:, context:]))
        counted = (jnp.arange(stream.frames) >= context).astype(jnp.float32)
        noise = jax.random.normal(keys[5], clean.shape)

        def denoise(noisy, levels, controls=None):
            vectors = control
            if controls is not None:
                vectors = jnp.where(
                    stale[..., None], world.embed_controls(params)[controls], control
                )
            return world.denoise(params, noisy, levels, text, vectors)

        inputs = clean
        if self.stale:
            before = controls_before(stream, batch['controls'], group)
            # One shift earlier every group was one level noisier.
            raised = levels.at[:, context:].add(jnp.where(stale, spacing, 0))
            error = self._error(
                schedule, lambda x, t: denoise(x, t, before), clean, noise, jnp.minimum(raised, 999)
            )
            slot = jnp.arange(stream.frames) - context
            reached = stale & (slot >= group[:, None] * stream.group_frames)
            inputs = inputs + jnp.where(reached[..., None, None, None], error, 0.0)
            if self.recycle:
                inputs = self._recycled(inputs, error, context, keys[6])
        elif self.recycle:
            error = self._error(schedule, denoise, clean, noise, levels)
            inputs = self._recycled(inputs, error, context, keys[6])
        loss, aux = denoise_loss(schedule, denoise, clean, noise, levels, counted, inputs)
        groups = jnp.square(aux['v'] - aux['target'])[:, context:].mean(axis=(0, 2, 3, 4))
        groups = groups.reshape(stream.groups, -1).mean(axis=1)
        return loss, {f'v_loss_{g}': groups[g] for g in range(stream.groups)}

    def _error(self, schedule, denoise, clean, noise, levels):
        """Errors [B T H W C] of the network's prediction of the clean latents."""
        noisy = schedules.add_noise(schedule, clean, noise, levels)
        x0 = schedules.x0_from_v(schedule, noisy, denoise(noisy, levels), levels)
        return jax.lax.stop_gradient(x0 - clean)

    def _recycled(self, inputs, error, context, key):
        """Adds errors of predicted frames to the condition frames of half of the samples."""
        error = error[:, context:]
        pick = jax.random.split(key, 3)
        size = inputs.shape[0]
        frame = jax.random.randint(pick[0], (size, context), 0, max(error.shape[1] // 2, 1))
        error = jnp.take_along_axis(error, frame[:, :, None, None, None], axis=1)
        scale = self.recycle * jax.random.uniform(pick[1], (size, 1, 1, 1, 1))
        scale = jnp.where(jax.random.uniform(pick[2], scale.shape) < 0.5, scale, 0.0)
        return inputs.at[:, :context].add(scale * error)


def check_binding_groups(binding_groups, stream):
    """Checks the groups that controls take effect at.

    Raises:
      UsageError: a group is not one of the stream's.
    """
    if not all(0 <= group < stream.groups for group in binding_groups):
        raise UsageError(
            f'stage.binding_groups: got {binding_groups}, expected groups from 0 to '
            f'{stream.groups - 1}'
        )


def draw_binding_group(stream, binding_groups, key, size: int):
    """Draws the group int32 [B] that a control takes effect at; by default it is the stream's."""
    groups = jnp.array(binding_groups or (stream.lag,), jnp.int32)
    return groups[jax.random.randint(key, (size,), 0, len(groups))]


def controls_in_play(stream, controls, group):
    """Controls [B T] as in play: slots after the binding group [B] repeat its last control."""
    return _held(controls, stream.context + (group + 1) * stream.group_frames - 1)


def controls_before(stream, controls, group):
    """Controls [B T] of a player who kept on holding what came before the binding group [B]."""
    return _held(controls, stream.context + group * stream.group_frames - 1)


def _held(controls, last):
    """Controls [B T] that keep the value of slot `last` [B] from there on."""
    slots = jnp.minimum(jnp.arange(controls.shape[1]), jnp.reshape(last, (-1, 1)))
    return jnp.take_along_axis(controls, jnp.broadcast_to(slots, controls.shape), axis=1)
