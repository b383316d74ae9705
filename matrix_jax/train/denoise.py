"""The denoising objective, and what else pretraining, LoRA, control SFT and Swin-DPM share.

x_t = a_t x0 + s_t eps; the network predicts v; x0^ = a_t x_t - s_t v; the published loss is
mean( (x0^ - x0)^2 / (1 - abar_t) ), which equals a plain squared error of v (section 6 of the
reference). The stages differ in the levels they draw, in the frames that count and in what trains.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from matrix_jax.controls.driving import NULL
from matrix_jax.diffusion import schedules
from matrix_jax.train.stage import Stage


@dataclasses.dataclass(frozen=True)
class Denoising(Stage):
    """Base of the stages that train the denoiser on pre-encoded latents.

    Attributes:
      control_dropout: share of samples whose controls become the null (empty prompt) embedding.
      text_dropout: share of samples whose caption becomes the empty prompt.
      labelled: share of windows with controls in each batch, the others having none; None takes
        them as they lie in the data.
      label_share: share of the labelled recordings that keep their label.
      train_encoders: train the text and control encoders too (first stage of a bundled world).
      clip_frames: pixel frames F of the examples, 1 + 4k each; a batch has one of these lengths.
        Without any, it is that of the stream's window.
    """

    control_dropout: float = 0.1
    text_dropout: float = 0.0
    labelled: float | None = None
    label_share: float = 1.0
    train_encoders: bool = False
    clip_frames: tuple[int, ...] = ()

    components = ('transformer', 'text_encoder', 'control_encoder', 'vae')

    def __post_init__(self):
        super().__post_init__()
        self.check_shares('control_dropout', 'text_dropout', 'label_share')
        if self.labelled is not None:
            self.check_shares('labelled')
        for frames in self.clip_frames:
            if frames < 5 or (frames - 1) % 4:
                raise ValueError(
                    f'stage.clip_frames: got {frames}, expected 1 + 4k with k of at '
                    'least 1 (whole latent frames)'
                )

    def check_shares(self, *names: str):
        """Raises ValueError unless the fields are shares of a whole."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'stage.{name}: got {getattr(self, name)}, expected 0 to 1')

    def trainable(self, path):
        component = path.split('/')[0]
        encoders = self.train_encoders and component in ('text_encoder', 'control_encoder')
        return component == 'transformer' or encoders

    def lengths(self, world) -> tuple[int, ...]:
        """Latent frames T that the examples of a batch may have."""
        per = world.cfg.frames_per_control
        made = tuple(1 + (frames - 1) // per for frames in self.clip_frames)
        return made or (world.cfg.stream.frames,)

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data import latents
        from matrix_jax.data.buckets import Buckets

        store = latents.encode(data, world, params, cache)
        ids = world.tokenize(store.texts)
        made = [
            latents.LatentWindows(store, length, batch, seed, ids, self.labelled, self.label_share)
            for length in self.lengths(world)
        ]
        return made[0] if len(made) == 1 else Buckets(made, seed)

    def example(self, world, batch):
        cfg, frames = world.cfg, max(self.lengths(world))
        rows, columns = (side // cfg.vae.spatial_compression for side in (cfg.height, cfg.width))
        shapes = {
            'latents': ('float16', frames, rows, columns, cfg.dit.channels),
            'controls': ('int32', frames),
            'ids': ('int32', cfg.dit.text_length),
        }
        return {
            name: jax.ShapeDtypeStruct((batch, *shape), dtype)
            for name, (dtype, *shape) in shapes.items()
        }

    def conditions(self, world, params, ids, controls, keys):
        """What the network is told, with the shares of dropout.

        Args:
          ids: prompt ids int32 [B L].
          controls: symbols int32 [B T].
          keys: two PRNG keys, of the text and of the control.

        Returns:
          (text [B L D], control [B T A], or None for a network without control blocks).
        """
        text = world.embed_ids(params, self.read(world, ids, keys[0]))
        if world.cfg.dit.control is None:
            return text, None
        return text, world.embed_controls(params)[self.heard(controls, keys[1])]

    def read(self, world, ids, key):
        """Prompt ids [B L] with the share of empty prompts."""
        empty = jax.random.uniform(key, (len(ids), 1)) < self.text_dropout
        return jnp.where(empty, world.empty_ids, ids)

    def heard(self, controls, key):
        """Symbols [B T] with the share of samples under the null control."""
        dropped = jax.random.uniform(key, (len(controls), 1)) < self.control_dropout
        return jnp.where(dropped, NULL, controls)


def denoise_loss(schedule, denoise, latents, noise, levels, counted, seen=None):
    """Published x0-space loss.

    Args:
      schedule: `schedules.Schedule`.
      denoise: `denoise(noisy [B T H W C], levels [B T]) -> v`.
      latents: clean latents [B T H W C], scaled.
      noise: like latents.
      levels: int32 [B T].
      counted: float [T] or [B T], 1 where a frame counts in the loss.
      seen: latents to noise in place of the clean ones, where the input is to carry errors that the
        target does not.

    Returns:
      (loss [], dict with noisy, v, target (the v of the clean latents), x0, weights [B T] and
      per_sample [B]).
    """
    noisy = schedules.add_noise(schedule, latents if seen is None else seen, noise, levels)
    v = denoise(noisy, levels).astype(jnp.float32)
    x0 = schedules.x0_from_v(schedule, noisy, v, levels)
    weights = 1 / (1 - schedule.alphas_cumprod[levels])
    counted = jnp.broadcast_to(counted, levels.shape)
    error = weights * counted * jnp.square(x0 - latents).mean(axis=(2, 3, 4))
    per_sample = error.sum(axis=1) / counted.sum(axis=1)
    target = schedules.velocity(schedule, latents, noise, levels)
    return per_sample.mean(), {
        'noisy': noisy,
        'v': v,
        'target': target,
        'x0': x0,
        'weights': weights,
        'per_sample': per_sample,
    }
