"""Flow matching (arXiv 2210.02747): the schedule, and Euler steps along the straight path.

    x = (1 - sigma) x0 + sigma eps          v = eps - x0

A level is 1000 sigma. Levels come from a table of `train_steps` entries that `shift` moves towards
noise (as in Self-Forcing, arXiv 2506.08009). Any other level has the sigma of the nearest entry.
Tables are computed on the host in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Config:
    """The table; the defaults are Matrix-Game 2.0.

    Attributes:
      shift: how far the levels move towards noise; 1 is uniform.
      train_steps: entries of the table.
      weighting: weights of the training loss: 'bell', as published, or 'even'. The bell gives pure
        noise no weight, where a network can only use its actions.
    """

    shift: float = 5.0
    train_steps: int = 1000
    weighting: Literal['bell', 'even'] = 'bell'

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f'flow.shift: got {self.shift}, expected more than 0')
        if self.train_steps < 1:
            raise ValueError(f'flow.train_steps: got {self.train_steps}, expected at least 1')
        if self.weighting not in ('bell', 'even'):
            raise ValueError(f"flow.weighting: got {self.weighting!r}, expected 'bell' or 'even'")


class Table(NamedTuple):
    """Host tables float32 [train_steps], from noise to almost clean.

    Attributes:
      sigmas: share of noise.
      levels: input of the network, 1000 sigma.
      weights: weights of the training loss, with mean 1.
    """

    sigmas: np.ndarray
    levels: np.ndarray
    weights: np.ndarray


def sigma(cfg: Config, u):
    """Shifted share of noise, float64, for an unshifted share `u`."""
    u = np.asarray(u, np.float64)
    return cfg.shift * u / (1 + (cfg.shift - 1) * u)


def table(cfg: Config) -> Table:
    """Computes the tables of a schedule."""
    sigmas = sigma(cfg, 1 - np.arange(cfg.train_steps) / cfg.train_steps)
    bell = np.exp(-2 * (sigmas - 0.5) ** 2)
    weights = bell - bell.min()
    weights *= cfg.train_steps / (weights.sum() or 1)
    if cfg.weighting == 'even':
        weights = np.ones_like(sigmas)
    return Table(*(np.float32(column) for column in (sigmas, 1000 * sigmas, weights)))


def warp(cfg: Config, steps) -> np.ndarray:
    """Shifted levels, float32, of unshifted `steps` such as 1000, 666, 333.

    Raises:
      ValueError: a step is outside the table.
    """
    steps = np.asarray(steps)
    if steps.size == 0 or steps.min() < 0 or steps.max() > cfg.train_steps:
        raise ValueError(f'steps: got {steps.tolist()}, expected 0 to {cfg.train_steps}')
    return np.asarray(1000 * sigma(cfg, steps / cfg.train_steps), np.float32)


def nearest(table: Table, levels):
    """Index of the nearest entry for each of `levels`, the noisier one on ties."""
    levels = jnp.asarray(levels, jnp.float32)[..., None]
    return jnp.abs(jnp.asarray(table.levels) - levels).argmin(axis=-1)


def sigma_at(table: Table, levels):
    """Sigma of levels of any shape."""
    return jnp.asarray(table.sigmas)[nearest(table, levels)]


def weight_at(table: Table, levels):
    """Training weight of levels of any shape."""
    return jnp.asarray(table.weights)[nearest(table, levels)]


def next_sigma(table: Table, levels):
    """Sigma of the entry after each of `levels`, for an Euler step down the table.

    PARITY: if one sample is at the last entry, all samples step to 0.
    """
    after = nearest(table, levels) + 1
    ended = jnp.any(after >= len(table.sigmas))
    after = jnp.minimum(after, len(table.sigmas) - 1)
    return jnp.where(ended, 0.0, jnp.asarray(table.sigmas)[after])


# --- latents [B T H W C]; sigmas are scalars or [B T] -----------------------------------------


def add_noise(sigmas, x0, noise):
    """Latents at sigma on the path from x0 to noise."""
    sigmas = _spread(sigmas, x0)
    return (1 - sigmas) * x0 + sigmas * noise


def velocity(x0, noise):
    """The target of the network, the same at all levels."""
    return noise - x0


def x0_from_v(sigmas, x, v):
    """Clean estimate from noisy latents and predicted v."""
    return x - _spread(sigmas, x) * v


def v_from_x0(sigmas, x, x0):
    """The v that leads from x to x0, for sigma > 0."""
    return (x - x0) / _spread(sigmas, x)


def euler(sigmas, following, x, v):
    """One step along v, from `sigmas` to `following`."""
    return x + _spread(following - sigmas, x) * v


# --- whole clips -------------------------------------------------------------------------------


def sample(cfg: Config, steps: int, denoise: Callable, params, noise, *inputs):
    """Denoises a whole clip [B T H W C] in Euler steps, with one level for all frames.

    Args:
      cfg: the schedule.
      steps: network calls.
      denoise: `denoise(params, x [B T H W C], level [B T], *inputs) -> v`.
      params: parameters of the network.
      noise: start [B T H W C].
      inputs: further inputs of `denoise`.

    Raises:
      ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f'steps: got {steps}, expected at least 1')
    sigmas = np.float32(sigma(cfg, np.linspace(1, 0, steps + 1)))

    def advance(x, now):
        here, there = now
        level = jnp.broadcast_to(1000 * here, x.shape[:2])
        v = denoise(params, x, level, *inputs).astype(jnp.float32)
        return euler(here, there, x, v), None

    x = jnp.asarray(noise, jnp.float32)
    return jax.lax.scan(advance, x, (sigmas[:-1], sigmas[1:]))[0]


def _spread(sigmas, x):
    sigmas = jnp.asarray(sigmas, jnp.float32)
    return sigmas.reshape(sigmas.shape + (1,) * (x.ndim - sigmas.ndim)) if sigmas.ndim else sigmas
