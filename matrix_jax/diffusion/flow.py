"""Flow matching: noise levels of a straight path from clean to noise, and the few steps down it.

    x = (1 - sigma) x0 + sigma eps          v = eps - x0

A level is 1000 sigma. Levels come from a table of `train_steps` entries, pushed towards noise by
`shift` (as in Self-Forcing, arXiv 2506.08009); sigma of any other level is that of the nearest
entry. Tables are computed on the host in float64 and rounded once.
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
      shift: how far the table leans towards noise; 1 is even.
      train_steps: entries.
      weighting: of the training loss over the table: 'bell', as published, or 'even'. A bell leaves
        out pure noise, where a network has nothing but its actions to go by.
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
      levels: what the network is told, 1000 sigma.
      weights: of the training loss, mean 1; of a bell largest in the middle.
    """

    sigmas: np.ndarray
    levels: np.ndarray
    weights: np.ndarray


def sigma(cfg: Config, u):
    """Share of noise, float64, where a fraction `u` of an even path is left."""
    u = np.asarray(u, np.float64)
    return cfg.shift * u / (1 + (cfg.shift - 1) * u)


def table(cfg: Config) -> Table:
    """The tables of a schedule."""
    sigmas = sigma(cfg, 1 - np.arange(cfg.train_steps) / cfg.train_steps)
    bell = np.exp(-2 * (sigmas - 0.5) ** 2)
    weights = bell - bell.min()
    weights *= cfg.train_steps / (weights.sum() or 1)
    if cfg.weighting == 'even':
        weights = np.ones_like(sigmas)
    return Table(*(np.float32(column) for column in (sigmas, 1000 * sigmas, weights)))


def warp(cfg: Config, steps) -> np.ndarray:
    """Levels float32 of a run whose even `steps` (such as 1000, 666, 333) the shift moves.

    Raises:
      ValueError: a step is outside the table.
    """
    steps = np.asarray(steps)
    if steps.size == 0 or steps.min() < 0 or steps.max() > cfg.train_steps:
        raise ValueError(f'steps: got {steps.tolist()}, expected 0 to {cfg.train_steps}')
    return np.float32(1000 * sigma(cfg, steps / cfg.train_steps))


def nearest(table: Table, levels):
    """Index of the entry whose level is nearest to each of `levels`, the noisier one on ties."""
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

    PARITY: one sample at the last entry sends all samples to 0.
    """
    after = nearest(table, levels) + 1
    ended = jnp.any(after >= len(table.sigmas))
    after = jnp.minimum(after, len(table.sigmas) - 1)
    return jnp.where(ended, 0.0, jnp.asarray(table.sigmas)[after])


# --- what a sigma does to latents [B T H W C]; sigmas are scalars or [B T] ---------------------


def add_noise(sigmas, x0, noise):
    """Latents at sigma on the path from x0 to noise."""
    sigmas = _spread(sigmas, x0)
    return (1 - sigmas) * x0 + sigmas * noise


def velocity(x0, noise):
    """The network's target; the same all along the path."""
    return noise - x0


def x0_from_v(sigmas, x, v):
    """Clean estimate of noisy latents and predicted v."""
    return x - _spread(sigmas, x) * v


def v_from_x0(sigmas, x, x0):
    """The v that leads from x to x0; sigma > 0."""
    return (x - x0) / _spread(sigmas, x)


def euler(sigmas, following, x, v):
    """One step along v, from `sigmas` to `following`."""
    return x + _spread(following - sigmas, x) * v


# --- whole clips -------------------------------------------------------------------------------


def sample(cfg: Config, steps: int, denoise: Callable, params, noise, *given):
    """A clip from noise [B T H W C] in even Euler steps, one level for all frames.

    Args:
      denoise: `denoise(params, x [B T H W C], level [B T], *given) -> v`.

    Raises:
      ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f'steps: got {steps}, expected at least 1')
    sigmas = np.float32(sigma(cfg, np.linspace(1, 0, steps + 1)))

    def advance(x, now):
        here, there = now
        level = jnp.broadcast_to(1000 * here, x.shape[:2])
        v = denoise(params, x, level, *given).astype(jnp.float32)
        return euler(here, there, x, v), None

    x = jnp.asarray(noise, jnp.float32)
    return jax.lax.scan(advance, x, (sigmas[:-1], sigmas[1:]))[0]


def _spread(sigmas, x):
    sigmas = jnp.asarray(sigmas, jnp.float32)
    return sigmas.reshape(sigmas.shape + (1,) * (x.ndim - sigmas.ndim)) if sigmas.ndim else sigmas
