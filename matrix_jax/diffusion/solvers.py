"""Solvers as tables: DDIM, SDE-DPM-Solver++ 2M and phased LCM are all one linear update.

    x0 = signal * x - sigma * v
    x' = keep * x + clean * x0 + past * x0_previous + fresh * eps

Only the coefficients differ. They depend on levels that are known before a run, so they are
computed on the host in float64, limits included (at abar = 0 the log-SNR is infinite), and `step`
on the device is a few products. Levels are per frame: coefficients are [steps T] (or [steps 1]).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from matrix_jax.diffusion import schedules


class Plan(NamedTuple):
    """Coefficients float32 [steps T] of every update of a run; a row of it drives one `step`."""

    signal: np.ndarray
    sigma: np.ndarray
    keep: np.ndarray
    clean: np.ndarray
    past: np.ndarray
    fresh: np.ndarray

    @property
    def noisy(self) -> bool:
        """Whether any update draws noise (only known of a plan on the host)."""
        return bool(np.any(self.fresh))


def init(x):
    """History of a run on x [B T H W C]: the previous clean estimate, none yet."""
    return jnp.zeros_like(x)


def step(row: Plan, history, x, v, noise=None):
    """One update.

    Args:
      row: one row of a plan, leaves [T] or [1].
      history: from `init` or the last `step`.
      x: latents [B T H W C], float32.
      v: prediction like x.
      noise: like x; None if the plan is not noisy.

    Returns:
      (history, x) one step cleaner.
    """
    row = Plan(*(coefficient[..., None, None, None] for coefficient in row))
    x0 = row.signal * x - row.sigma * v
    x = row.keep * x + row.clean * x0 + row.past * history
    return x0, x if noise is None else x + row.fresh * noise


def make(solver: str, scheduler: schedules.SchedulerConfig, rows, steps: int) -> Plan:
    """The plan of 'ddim' or 'dpm' over rows of levels [R T] of a run of `steps` in all."""
    if solver not in ('ddim', 'dpm'):
        raise ValueError(f"solver: got {solver!r}, expected 'ddim' or 'dpm'")
    abar = schedules.alphas_cumprod(scheduler)
    rows = np.asarray(rows)
    # PARITY: a fixed stride, even where it is not quite the distance to the next row.
    following = rows - scheduler.train_steps // steps
    if solver == 'ddim':
        return ddim(abar, rows, following)
    plans = [dpm(abar, rows[i], following[i], rows[i - 1] if i else None) for i in range(len(rows))]
    return Plan(*(np.stack(column) for column in zip(*plans)))


def ddim(abar, level, following) -> Plan:
    """DDIM without noise from `level` to `following` (negative = clean), equal shapes."""
    here, there = _abar(abar, level), _abar(abar, following)
    keep = np.sqrt((1 - there) / (1 - here))
    return _plan(here, keep, np.sqrt(there) - np.sqrt(here) * keep)


def dpm(abar, level, following, back=None) -> Plan:
    """SDE-DPM-Solver++ from `level` to `following`, of second order if the level `back` is given.

    `back` is the level of the step before, whose clean estimate is the history.

    PARITY: one frame that becomes clean in this update makes it first order for all frames.
    """
    here, there = _abar(abar, level), _abar(abar, following)
    with np.errstate(divide='ignore', invalid='ignore'):
        decay = np.exp(_log_snr(here) - _log_snr(there))  # e^-h, 0 from pure noise
        keep = np.sqrt((1 - there) / (1 - here)) * decay
        clean = -np.expm1(2 * np.log(decay)) * np.sqrt(there)
        fresh = np.sqrt((1 - there) * (1 - decay**2))
        past = np.zeros_like(clean)
        if back is not None and np.all(np.asarray(following) >= 0):
            # 1/(2r) with r = (lambda - lambda_back) / h; from pure noise r is infinite.
            h = _log_snr(there) - _log_snr(here)
            reach = _log_snr(here) - _log_snr(_abar(abar, back))
            half = np.where(np.isinf(reach) | np.isinf(h), 0.0, h / (2 * reach))
            clean, past = clean * (1 + half), -clean * half
    return _plan(here, keep, clean, past, fresh)


def jump(abar, level, target):
    """(c_skip, c_out) of one Euler step of the probability flow: x_target = c_skip x + c_out x0."""
    here, there = abar[np.asarray(level)], abar[np.asarray(target)]
    skip = np.sqrt((1 - there) / (1 - here))
    return skip, np.sqrt(there) - np.sqrt(here) * skip


def lcm(scheduler: schedules.SchedulerConfig, rows, levels, phases: int) -> Plan:
    """Phased consistency steps: jump to the phase boundary, then noise up to the next level.

    Args:
      rows: levels [R T], each one of `levels`.
      levels: the descending levels of the run [steps].
      phases: number of noise ranges; every boundary between two must be one of `levels`.

    Raises:
      ValueError: a step would jump over a phase boundary (the noise to add has negative variance).
    """
    levels = np.asarray(levels)
    following = np.append(levels[1:], -1)
    boundary = schedules.phase_boundary(levels, phases, scheduler.train_steps)
    skipped = (boundary > 0) & (following < boundary)
    if skipped.any():
        at = int(np.argmax(skipped))
        raise ValueError(
            f'lcm: the step from level {levels[at]} to {following[at]} jumps over the phase '
            f'boundary {boundary[at]}; got levels {", ".join(map(str, levels))}, expected every '
            f'boundary of {phases} phases among them (such as original_steps=40, steps={phases})'
        )
    abar = schedules.alphas_cumprod(scheduler)
    skip, out = jump(abar, levels, boundary)
    # PARITY: the last phase lands at level 0 (sigma 0.05) but is noised up as if it were clean.
    ratio = _abar(abar, following) / np.where(boundary == 0, 1.0, abar[boundary])
    scale, fresh = np.sqrt(ratio), np.sqrt(np.maximum(1 - ratio, 0))
    plan = _plan(abar[levels], scale * skip, scale * out, 0 * skip, fresh)
    index = np.searchsorted(-levels, -np.asarray(rows))
    return Plan(*(column[index] for column in plan))


def _plan(here, keep, clean, past=0.0, fresh=0.0):
    columns = np.broadcast_arrays(np.sqrt(here), np.sqrt(1 - here), keep, clean, past, fresh)
    return Plan(*(np.asarray(column, np.float32) for column in columns))


def _abar(abar, level):
    return np.where(np.asarray(level) < 0, 1.0, abar[np.maximum(level, 0)])


def _log_snr(abar):
    return 0.5 * (np.log(abar) - np.log1p(-abar))
