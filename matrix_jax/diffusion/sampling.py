"""The clip sampler of stages 1 and 2: one noise level for all frames, dynamic guidance."""

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
    """A text-to-video run.

    Attributes:
      steps: network calls.
      guidance: classifier-free guidance g; 1 or less switches it off.
      dynamic_guidance: whether the scale moves within [1, 1 + g] from step to step.
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
    """Guidance scale of every step, float64 [steps]."""
    levels = np.asarray(levels, np.float64)
    if not cfg.dynamic_guidance:
        return np.full(len(levels), cfg.guidance)
    # PARITY: the raw level stands where a step index is meant, so the base is large and negative
    # and its fifth power needs double precision.
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
      noise: where to start, [B T H W C].
      draw: `draw(i) -> noise` like the first, for step i; only called by solvers that add noise.
      text: [B L D].
      null_text: like text, of the negative prompt; needed if guidance is on.
      control: [B T A], or None for a network without control.

    Returns:
      Latents [B T H W C], float32.
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
    """What `guide` takes for guidance by text, by control or by both.

    Args:
      text, null_text: [B L D]; null_text may be None where `guidance` is 1 or less.
      control, null_control: [B T A], or None for a network without control.
      guidance: how far to go from the null text to the text.
      control_guidance: how far to go from the null control to the control.

    Returns:
      (conditions, scales), from the least to the fully conditioned one.
    """
    chain, scales = [(text, control)], []
    if control_guidance > 1:
        chain, scales = [(text, null_control), *chain], [control_guidance]
    if guidance > 1:
        chain, scales = [(null_text, chain[0][1]), *chain], [guidance, *scales]
    return chain, scales


def guide(denoise, params, x, level, conditions, scales):
    """v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1) .. of conditions 0, 1, .., in float32 and one call.

    Args:
      conditions: (text [B L D], control [B T A] or None) each, every one adding to that before.
      scales: s_1, s_2, ..
    """

    def together(parts):
        # Those of an example are neighbours: examples that a mesh splits stay where they are, and
        # where there is one alone it splits its conditions.
        parts = jnp.stack(parts, axis=1)
        parts = constrain(parts, 'batch', *[None] * (parts.ndim - 1))
        return rearrange(parts, 'b c ... -> (b c) ...')

    count = len(conditions)
    text, control = zip(*conditions, strict=True)
    control = None if control[0] is None else together(control)
    v = denoise(params, together([x] * count), together([level] * count), together(text), control)
    v = rearrange(v.astype(jnp.float32), '(b c) ... -> b c ...', c=count)
    first, *others = jnp.moveaxis(constrain(v, 'batch', *[None] * (v.ndim - 1)), 1, 0)
    made, before = first, first
    for scale, now in zip(scales, others, strict=True):
        made, before = made + scale * (now - before), now
    return made
