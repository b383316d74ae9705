"""Solvers as tables of coefficients: DDIM, SDE-DPM-Solver++ 2M and phased LCM.

DDIM (arXiv 2010.02502), DPM-Solver++ (arXiv 2211.01095) and phased consistency (arXiv 2405.18407)
all are one linear update, with x0_previous the clean estimate of the step before:

    x0 = signal * x - sigma * v
    x' = keep * x + clean * x0 + past * x0_previous + noise * eps

The coefficients depend on levels that are known before a run. They are computed on the host in
float64, including the limit of infinite log-SNR at abar = 0. Levels are per frame, so coefficients
are [steps T] or [steps 1].
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from matrix_jax.diffusion import schedules


class SolverTable(NamedTuple):
    """Coefficients float32 [steps T] of all updates of a run; `step` takes one row."""

    signal: np.ndarray
    sigma: np.ndarray
    keep: np.ndarray
    clean: np.ndarray
    past: np.ndarray
    noise: np.ndarray

    @property
    def noisy(self) -> bool:
        """Whether any update adds noise; only for tables on the host."""
        return bool(np.any(self.noise))


def init(x):
    """Initial history of a run on x [B T H W C]: a clean estimate of zeros, which has no weight."""
    return jnp.zeros_like(x)


def step(row: SolverTable, history, x, v, noise=None):
    """Computes one update.

    Args:
      row: one row of a table, leaves [T] or [1].
      history: from `init` or the previous `step`.
      x: latents [B T H W C], float32.
      v: prediction like x.
      noise: like x; None if the table is not `noisy`.

    Returns:
      (history, x) at the next level.
    """
    row = SolverTable(*(coefficient[..., None, None, None] for coefficient in row))
    x0 = row.signal * x - row.sigma * v
    x = row.keep * x + row.clean * x0 + row.past * history
    return x0, x if noise is None else x + row.noise * noise


def make(solver: str, scheduler: schedules.SchedulerConfig, rows, steps: int) -> SolverTable:
    """Table of 'ddim' or 'dpm' for the levels [R T] of a run of `steps` steps.

    Raises:
      ValueError: unknown solver.
    """
    if solver not in ('ddim', 'dpm'):
        raise ValueError(f"solver: got {solver!r}, expected 'ddim' or 'dpm'")
    abar = schedules.alphas_cumprod(scheduler)
    rows = np.asarray(rows)
    # PARITY: a fixed stride, even where the next row is a little nearer or further.
    following = rows - scheduler.train_steps // steps
    if solver == 'ddim':
        return ddim(abar, rows, following)
    plans = [dpm(abar, rows[i], following[i], rows[i - 1] if i else None) for i in range(len(rows))]
    return SolverTable(*(np.stack(column) for column in zip(*plans)))


def ddim(abar, level, following) -> SolverTable:
    """DDIM with eta = 0 from `level` to `following` (negative = clean), of equal shapes."""
    here, there = _abar(abar, level), _abar(abar, following)
    keep = np.sqrt((1 - there) / (1 - here))
    return _table(here, keep, np.sqrt(there) - np.sqrt(here) * keep)


def dpm(abar, level, following, back=None) -> SolverTable:
    """SDE-DPM-Solver++ from `level` to `following`.

    Second order if `back` is given, the level of the step before, whose clean estimate is the
    history; otherwise first order.

    PARITY: if one frame becomes clean in this update, it is first order for all frames.
    """
    here, there = _abar(abar, level), _abar(abar, following)
    with np.errstate(divide='ignore', invalid='ignore'):
        decay = np.exp(_log_snr(here) - _log_snr(there))  # e^-h, 0 from pure noise
        keep = np.sqrt((1 - there) / (1 - here)) * decay
        clean = -np.expm1(2 * np.log(decay)) * np.sqrt(there)
        noise = np.sqrt((1 - there) * (1 - decay**2))
        past = np.zeros_like(clean)
        if back is not None and np.all(np.asarray(following) >= 0):
            # 1/(2r) with r = (lambda - lambda_back) / h; from pure noise r is infinite.
            h = _log_snr(there) - _log_snr(here)
            reach = _log_snr(here) - _log_snr(_abar(abar, back))
            half = np.where(np.isinf(reach) | np.isinf(h), 0.0, h / (2 * reach))
            clean, past = clean * (1 + half), -clean * half
    return _table(here, keep, clean, past, noise)


def jump(abar, level, target):
    """(c_skip, c_out) of an Euler step of the probability flow: x_target = c_skip x + c_out x0."""
    here, there = abar[np.asarray(level)], abar[np.asarray(target)]
    skip = np.sqrt((1 - there) / (1 - here))
    return skip, np.sqrt(there) - np.sqrt(here) * skip


def lcm(scheduler: schedules.SchedulerConfig, rows, levels, phases: int) -> SolverTable:
    """Phased consistency steps: jump to the phase boundary, then add noise up to the next level.

    Args:
      rows: levels [R T], each one of `levels`.
      levels: the descending levels of the run [steps].
      phases: number of noise ranges; each boundary must be one of `levels`.

    Raises:
      ValueError: a step would jump over a phase boundary (noise of negative variance).
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
    # PARITY: the last phase ends at level 0 (sigma 0.05), but noise is added as if it were clean.
    ratio = _abar(abar, following) / np.where(boundary == 0, 1.0, abar[boundary])
    scale, noise = np.sqrt(ratio), np.sqrt(np.maximum(1 - ratio, 0))
    plan = _table(abar[levels], scale * skip, scale * out, 0 * skip, noise)
    index = np.searchsorted(-levels, -np.asarray(rows))
    return SolverTable(*(column[index] for column in plan))


def _table(here, keep, clean, past=0.0, noise=0.0):
    columns = np.broadcast_arrays(np.sqrt(here), np.sqrt(1 - here), keep, clean, past, noise)
    return SolverTable(*(np.asarray(column, np.float32) for column in columns))


def _abar(abar, level):
    return np.where(np.asarray(level) < 0, 1.0, abar[np.maximum(level, 0)])


def _log_snr(abar):
    return 0.5 * (np.log(abar) - np.log1p(-abar))
