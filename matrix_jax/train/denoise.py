"""The denoising objective that pretraining, LoRA, control SFT and Swin-DPM share.

x_t = a_t x0 + s_t eps; the network predicts v; x0^ = a_t x_t - s_t v; the published loss is
mean( (x0^ - x0)^2 / (1 - abar_t) ), which equals a plain squared error of v (section 6 of the
reference). The stages differ in the levels they draw, in the frames that count and in what trains.
"""

from __future__ import annotations

import jax.numpy as jnp

from matrix_jax.diffusion import schedules


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
    return per_sample.mean(), {'noisy': noisy, 'v': v, 'target': target, 'x0': x0,
                               'weights': weights, 'per_sample': per_sample}
