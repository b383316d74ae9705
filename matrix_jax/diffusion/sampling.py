"""Sampler of whole clips for stages 1 and 2, with dynamic classifier-free guidance.

One noise level for all frames; guidance as in arXiv 2207.12598.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.diffusion import schedules, solvers
from matrix_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a text-to-video run.

    Attributes:
      steps: network calls.
      guidance: scale g of classifier-free guidance; 1 or less switches it off.
      dynamic_guidance: whether the scale varies within [1, 1 + g] from step to step.
      solver: 'ddim', 'dpm', or None for the scheduler's own.
      longest: seconds of the longest clip.
    """

    steps: int = 50
    guidance: float = 6.0
    dynamic_guidance: bool = True
    solver: str | None = None
    longest: int = 4

    def __post_init__(self):
        for name in ('steps', 'longest'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}: got {getattr(self, name)}, expected at least 1')
        if self.solver not in (None, 'ddim', 'dpm'):
            raise ValueError(f"solver: got {self.solver!r}, expected 'ddim', 'dpm' or None")


def guidance_scales(cfg: Config, levels) -> np.ndarray:
    """Guidance scale of each step, float64 [steps]."""
    levels = np.asarray(levels, np.float64)
    if not cfg.dynamic_guidance:
        return np.full(len(levels), cfg.guidance)
    # PARITY: uses the level instead of the step index, so the base is large and negative and its
    # fifth power needs double precision.
    turn = ((cfg.steps - levels) / cfg.steps) ** 5
    return 1 + cfg.guidance * (1 - np.cos(np.pi * turn)) / 2


def sample(
    cfg: Config,
    scheduler: schedules.SchedulerConfig,
    denoise: Callable,
    params,
    noise,
    draw: Callable,
    text,
    null_text=None,
    control=None,
):
    """Denoises a whole clip in one scan.

    Args:
      denoise: `denoise(params, x [B T H W C], level [B T], text [B L D], control [B T A]) -> v`.
      noise: start [B T H W C].
      draw: `draw(i)` -> noise [B T H W C] of step i, for solvers that add noise.
      text: [B L D].
      null_text: text of the negative prompt; required with guidance.
      control: [B T A], or None for a network without control.

    Returns:
      Latents [B T H W C], float32.

    Raises:
      ValueError: guidance without a null text.
    """
    guided = cfg.guidance > 1
    if guided and null_text is None:
        raise ValueError(f'null_text: got None, expected an array as guidance is {cfg.guidance}')
    levels = schedules.timesteps(scheduler, cfg.steps)
    plan = solvers.make(cfg.solver or scheduler.solver, scheduler, levels[:, None], cfg.steps)
    scales = np.asarray(guidance_scales(cfg, levels), np.float32)

    def advance(carry, now):
        history, x = carry
        index, level, scale, row = now
        level = jnp.broadcast_to(level, x.shape[:2])
        if guided:
            v = guide(denoise, params, x, level, [(null_text, control), (text, control)], [scale])
        else:
            v = denoise(params, x, level, text, control).astype(jnp.float32)
        return solvers.step(row, history, x, v, draw(index) if plan.noisy else None), None

    x = jnp.asarray(noise, jnp.float32)
    steps = (np.arange(cfg.steps), levels.astype(np.int32), scales, plan)
    (_, x), _ = jax.lax.scan(advance, (solvers.init(x), x), steps)
    return x


def conditions(text, null_text, control, null_control, guidance=1.0, control_guidance=1.0):
    """Inputs of `guide` for guidance by text, control or both.

    Args:
      text, null_text: [B L D]; null_text may be None where `guidance` is 1 or less.
      control, null_control: [B T A], or None for a network without control.
      guidance: scale of the step from null text to text.
      control_guidance: scale of the step from null control to control.

    Returns:
      (conditions, scales), the least conditioned first.
    """
    chain, scales = [(text, control)], []
    if control_guidance > 1:
        chain, scales = [(text, null_control), *chain], [control_guidance]
    if guidance > 1:
        chain, scales = [(null_text, chain[0][1]), *chain], [guidance, *scales]
    return chain, scales


def guide(denoise, params, x, level, conditions, scales):
    """Guided prediction v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1) + ..., by one network call.

    Args:
      denoise, params, x, level: as for `sample`.
      conditions: (text [B L D], control [B T A] or None) of v_0, v_1, ...
      scales: s_1, s_2, ...

    Returns:
      [B T H W C], float32.
    """

    def stack(parts):
        # The conditions of an example are neighbours, so a mesh that splits the batch moves no
        # data, and splits the conditions of a single example.
        parts = jnp.stack(parts, axis=1)
        parts = constrain(parts, 'batch', *[None] * (parts.ndim - 1))
        return rearrange(parts, 'b c ... -> (b c) ...')

    count = len(conditions)
    text, control = zip(*conditions, strict=True)
    control = None if control[0] is None else stack(control)
    v = denoise(params, stack([x] * count), stack([level] * count), stack(text), control)
    v = rearrange(v.astype(jnp.float32), '(b c) ... -> b c ...', c=count)
    first, *others = jnp.moveaxis(constrain(v, 'batch', *[None] * (v.ndim - 1)), 1, 0)
    guided, previous = first, first
    for scale, now in zip(scales, others, strict=True):
        guided, previous = guided + scale * (now - previous), now
    return guided
