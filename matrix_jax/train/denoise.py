"""Denoising loss, and what pretraining, LoRA, control SFT and Swin-DPM share (The Matrix).

    x_t = a_t x0 + s_t eps;   the network predicts v = a_t eps - s_t x0
    x0^ = a_t x_t - s_t v;    loss = mean( (x0^ - x0)^2 / (1 - abar_t) )

with a_t^2 = abar_t and s_t^2 = 1 - abar_t (arXiv 2412.03568). The loss equals the plain squared
error of v. Stages differ in the noise levels they draw, the frames that count and what trains.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from matrix_jax.controls.driving import NULL
from matrix_jax.diffusion import schedules
from matrix_jax.train.stage import Stage, check_clip_frames, example_batch, latent_size


@dataclasses.dataclass(frozen=True)
class Denoising(Stage):
    """Base of the stages that train the denoiser on encoded latents.

    Attributes:
      control_dropout: share of samples whose controls become the null (empty prompt) embedding.
      text_dropout: share of samples whose caption becomes the empty prompt.
      labelled: share of windows with controls in each batch; None = as in the data.
      label_share: share of the labelled recordings that keep their labels.
      train_encoders: also train the text and control encoders (first stage of a bundled world).
      clip_frames: pixel frames F = 1 + 4k of the examples; each batch has one of these lengths.
        Empty = the length of the stream's window.
    """

    control_dropout: float = 0.1
    text_dropout: float = 0.0
    labelled: float | None = None
    label_share: float = 1.0
    train_encoders: bool = False
    clip_frames: tuple[int, ...] = ()

    prediction: ClassVar = 'v_prediction'
    components: ClassVar = ('transformer', 'text_encoder', 'control_encoder', 'vae')

    def __post_init__(self):
        super().__post_init__()
        names = ('control_dropout', 'text_dropout', 'label_share', 'labelled')
        self.check_fields(**dict.fromkeys(names, (0, 1)))
        for frames in self.clip_frames:
            check_clip_frames(frames)

    def trainable(self, path):
        component = path.split('/')[0]
        encoders = self.train_encoders and component in ('text_encoder', 'control_encoder')
        return component == 'transformer' or encoders

    def lengths(self, world) -> tuple[int, ...]:
        """Latent frames T that the examples of a batch may have."""
        per = world.cfg.frames_per_control
        lengths = tuple(1 + (frames - 1) // per for frames in self.clip_frames)
        return lengths or (world.cfg.stream.frames,)

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data import latents
        from matrix_jax.data.buckets import Buckets

        store = latents.encode(data, world, params, cache)
        ids = world.tokenize(store.texts)
        loaders = [
            latents.LatentWindows(store, length, batch, seed, ids, self.labelled, self.label_share)
            for length in self.lengths(world)
        ]
        return loaders[0] if len(loaders) == 1 else Buckets(loaders, seed)

    def example(self, world, batch):
        cfg, frames = world.cfg, max(self.lengths(world))
        return example_batch(
            batch,
            latents=('float16', frames, *latent_size(cfg), cfg.dit.channels),
            controls=('int32', frames),
            ids=('int32', cfg.dit.text_length),
        )

    def conditions(self, world, params, ids, controls, keys):
        """Conditions of the network after dropout.

        Args:
          ids: prompt ids int32 [B L].
          controls: symbols int32 [B T].
          keys: two PRNG keys, for text and control.

        Returns:
          (text [B L D], control [B T A], or None for a network without control blocks).
        """
        text = world.embed_ids(params, self.drop_text(world, ids, keys[0]))
        if world.cfg.dit.control is None:
            return text, None
        return text, world.embed_controls(params)[self.drop_controls(controls, keys[1])]

    def drop_text(self, world, ids, key):
        """Prompt ids [B L], some of them replaced by the empty prompt."""
        empty = jax.random.uniform(key, (len(ids), 1)) < self.text_dropout
        return jnp.where(empty, world.empty_ids, ids)

    def drop_controls(self, controls, key):
        """Symbols [B T], those of some samples replaced by the null control."""
        dropped = jax.random.uniform(key, (len(controls), 1)) < self.control_dropout
        return jnp.where(dropped, NULL, controls)


def denoise_loss(schedule, denoise, latents, noise, levels, counted, inputs=None):
    """Published loss in x0 space.

    Args:
      schedule: `schedules.Schedule`.
      denoise: `denoise(noisy [B T H W C], levels [B T]) -> v`.
      latents: clean latents [B T H W C], scaled.
      noise: like latents.
      levels: int32 [B T].
      counted: float [T] or [B T], 1 where a frame counts in the loss.
      inputs: latents to add the noise to instead of the clean ones, for inputs that carry errors
        which the target does not have.

    Returns:
      (loss [], dict with noisy, v, target (v of the clean latents) and x0, each [B T H W C],
      weights [B T] and per_sample [B]).
    """
    noisy = schedules.add_noise(schedule, latents if inputs is None else inputs, noise, levels)
    v = denoise(noisy, levels).astype(jnp.float32)
    x0 = schedules.x0_from_v(schedule, noisy, v, levels)
    weights = 1 / (1 - schedule.alphas_cumprod[levels])
    counted = jnp.broadcast_to(counted, levels.shape)
    error = weights * counted * jnp.square(x0 - latents).mean(axis=(2, 3, 4))
    per_sample = error.sum(axis=1) / counted.sum(axis=1)
    target = schedules.velocity(schedule, latents, noise, levels)
    aux = {'noisy': noisy, 'v': v, 'target': target, 'x0': x0}
    return per_sample.mean(), aux | {'weights': weights, 'per_sample': per_sample}
