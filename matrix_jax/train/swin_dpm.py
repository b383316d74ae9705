"""Stage 3, Swin-DPM: the denoising loss at the grouped levels that the stream will visit.

Level of frame f in group g: u + g * 1000/G with one u per sample; the condition frames stay near
level 0 and do not count (reference section 6). Two additions against drift, both told to the
network or paired with clean targets: condition noise, and error recycling on the condition frames.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from matrix_jax.stream import swin
from matrix_jax.train.denoise import Denoising, denoise_loss


def grouped_levels(u, groups: int, group_frames: int, context, train_steps: int = 1000):
    """Levels [B T] of a window: `context` levels [B T_c], then u + g * train_steps / groups.

    Args:
      u: int32 [B], 0 <= u < train_steps / groups.
    """
    offsets = jnp.repeat(jnp.arange(groups) * (train_steps // groups), group_frames)
    return jnp.concatenate([context, u[:, None] + offsets[None]], axis=1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SwinDPM(Denoising):
    """Grouped-level denoising on pre-encoded latents.

    Attributes:
      uniform: share of samples with one level, 0 to 999, in all frames but the condition. There no
        cleaner frame gives the motion away: it must be read off the controls. 0 switches it off
        (reference).
      condition_noise: highest level of the noise on condition frames, told to the network;
        half of the samples get level 0. 0 switches it off (reference).
      recycle: scale of one-step prediction errors that are put back on the condition frames of
        half of the samples, targets staying clean. 0 switches it off (reference).
      late_binding: share of samples whose noisiest slots hold the control of the stream's entry
        slot, as in play, where later controls are not known yet. 0 switches it off (reference).
    """

    uniform: float = 0.0
    condition_noise: int = 0
    recycle: float = 0.0
    late_binding: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_shares('late_binding', 'uniform')
        if not 0 <= self.condition_noise < 250:
            raise ValueError(
                f'stage.condition_noise: got {self.condition_noise}, expected 0 to 249'
            )
        if not 0 <= self.recycle <= 4:
            raise ValueError(f'stage.recycle: got {self.recycle}, expected 0 to 4')

    def lengths(self, world):
        stream, made = world.cfg.stream, super().lengths(world)
        for frames, length in zip(self.clip_frames, made):
            if length <= stream.context or (length - stream.context) % stream.groups:
                raise ValueError(
                    f'stage.clip_frames: got {frames}, which is {length} latent '
                    f'frames, expected context = {stream.context} and a multiple '
                    f'of groups = {stream.groups}'
                )
        return made

    def loss(self, world, params, batch, key):
        keys, schedule = jax.random.split(key, 9), world.schedule
        clean = batch['latents'].astype(jnp.float32)
        stream = world.cfg.stream  # with groups as wide as this batch has them
        width = (clean.shape[1] - stream.context) // stream.groups
        stream = dataclasses.replace(stream, group_frames=width)
        size, context = clean.shape[0], stream.context
        late = jax.random.uniform(keys[7], (size, 1)) < self.late_binding
        controls = jnp.where(late, played(stream, batch['controls']), batch['controls'])
        text, control = self.conditions(world, params, batch['ids'], controls, keys[:2])
        u = jax.random.randint(keys[2], (size,), 0, 1000 // stream.groups)
        told = jax.random.randint(keys[3], (size, 1), 0, self.condition_noise + 1)
        told = jnp.where(jax.random.uniform(keys[4], (size, 1)) < 0.5, 0, told)
        told = jnp.broadcast_to(told, (size, context))
        levels = grouped_levels(u, stream.groups, stream.group_frames, told)
        if self.uniform:
            draws = jax.random.split(keys[8])
            one = jax.random.uniform(draws[0], (size, 1)) < self.uniform
            level = jax.random.randint(draws[1], (size, 1), 0, 1000)
            levels = levels.at[:, context:].set(jnp.where(one, level, levels[:, context:]))
        counted = (jnp.arange(stream.frames) >= context).astype(jnp.float32)
        noise = jax.random.normal(keys[5], clean.shape)

        def denoise(noisy, levels):
            return world.denoise(params, noisy, levels, text, control)

        seen = clean
        if self.recycle:
            seen = self._recycled(schedule, denoise, clean, noise, levels, context, keys[6])
        loss, aux = denoise_loss(schedule, denoise, clean, noise, levels, counted, seen)
        groups = jnp.square(aux['v'] - aux['target'])[:, context:].mean(axis=(0, 2, 3, 4))
        groups = groups.reshape(stream.groups, -1).mean(axis=1)
        return loss, {f'v_loss_{g}': groups[g] for g in range(stream.groups)}

    def _recycled(self, schedule, denoise, clean, noise, levels, context, key):
        """Clean latents whose condition frames carry errors that the network itself makes."""
        from matrix_jax.diffusion import schedules

        noisy = schedules.add_noise(schedule, clean, noise, levels)
        x0 = schedules.x0_from_v(schedule, noisy, denoise(noisy, levels), levels)
        error = jax.lax.stop_gradient(x0 - clean)[:, context:]
        pick = jax.random.split(key, 3)
        size = clean.shape[0]
        frame = jax.random.randint(pick[0], (size, context), 0, max(error.shape[1] // 2, 1))
        error = jnp.take_along_axis(error, frame[:, :, None, None, None], axis=1)
        scale = self.recycle * jax.random.uniform(pick[1], (size, 1, 1, 1, 1))
        scale = jnp.where(jax.random.uniform(pick[2], scale.shape) < 0.5, scale, 0.0)
        return clean.at[:, :context].add(scale * error)


def played(stream, controls):
    """Controls [B T] of a window as a stream has them when its newest control is the last known."""
    newest = controls[:, stream.binding_slot : stream.binding_slot + stream.group_frames]
    return swin.bind(stream, controls[:, : stream.remembered], newest)
