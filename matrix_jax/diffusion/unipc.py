"""UniPC (arXiv 2302.04867) of second order for flow matching, as tables of coefficients.

    x = (1 - sigma) x0 + sigma eps        v = eps - x0        x0 = x - sigma v

A step first corrects its latents with the new clean estimate, then predicts the latents of the next
sigma (the variant B2(h) = expm1(h) that predicts x0). Both are linear combinations of known values.
The host computes the coefficients in float64 before a run, and `step` applies them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# PARITY: the largest sigma before the shift, a float32 in the reference.
LARGEST = float(np.float32(0.999))


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps of a run; the defaults are those of Matrix-Game 3.0, distilled.

    Attributes:
      steps: network calls.
      shift: shift of the sigmas towards noise; 1 = evenly spaced.

    Raises:
      ValueError: a value is out of range.
    """

    steps: int = 3
    shift: float = 5.0

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ValueError(f'solver.steps: got {self.steps}, expected 1 to 1000')
        if not self.shift > 0:
            raise ValueError(f'solver.shift: got {self.shift}, expected more than 0')


class UniPCTable(NamedTuple):
    """Coefficients of a run, one row per step, float32 [steps], on the host.

    Attributes:
      level: noise level that the network is given.
      sigma: sigma of the latents.
      keep: weight of the uncorrected latents: 1 in the first step, then 0.
      correct: [steps 4], weights in the correction of the corrected latents of the step before, its
        clean estimate, the estimate before that, and the new estimate.
      predict: [steps 3], weights in the prediction of the corrected latents, the new clean estimate
        and the estimate before.
    """

    level: np.ndarray
    sigma: np.ndarray
    keep: np.ndarray
    correct: np.ndarray
    predict: np.ndarray


@struct.dataclass
class History:
    """State between steps, each like the latents.

    Attributes:
      latents: corrected latents of the step before.
      clean: its clean estimate.
      older: the estimate before that.
    """

    latents: jax.Array
    clean: jax.Array
    older: jax.Array


def sigmas(cfg: Config) -> np.ndarray:
    """Sigmas of a run and the final 0, float64 [steps+1]."""
    even = np.linspace(LARGEST, 0, cfg.steps + 1)[:-1]
    return np.append(cfg.shift * even / (1 + (cfg.shift - 1) * even), 0)


def timesteps(cfg: Config) -> np.ndarray:
    """Noise levels that the network is given, int64 [steps]."""
    # PARITY: truncated, not rounded; the sigmas are not.
    return np.trunc(1000 * sigmas(cfg)[:-1]).astype(np.int64)


def step_table(cfg: Config) -> UniPCTable:
    """Returns the coefficients of a run."""
    levels, count = sigmas(cfg), cfg.steps
    sigma = np.float64(np.float32(levels))
    alpha = 1 - sigma
    with np.errstate(divide='ignore'):
        log_snr = np.log(alpha) - np.log(sigma)
    correct, predict = np.zeros((count, 4)), np.zeros((count, 3))
    order = 0  # of the step before
    for i in range(count):
        if i:
            correct[i] = _correction(sigma, alpha, log_snr, i, order)
        order = min(2, count - i, i + 1)
        predict[i] = _prediction(sigma, alpha, log_snr, i, order)
    keep = np.arange(count) == 0
    return UniPCTable(
        *(np.float32(column) for column in (timesteps(cfg), sigma[:-1], keep, correct, predict))
    )


def split(table: UniPCTable, boundary: float) -> tuple[UniPCTable, UniPCTable]:
    """Splits a table into its steps with noise levels from `boundary` on, and those below it."""
    above = table.level >= boundary
    high, low = (UniPCTable(*(column[rows] for column in table)) for rows in (above, ~above))
    return high, low


def _correction(sigma, alpha, log_snr, i: int, order: int):
    """Coefficients of (latents, clean, older, new clean estimate)."""
    h = log_snr[i] - log_snr[i - 1]
    phi = np.expm1(-h)
    scale = alpha[i] * phi
    if order == 1:
        rho_past, rho, reach = 0.0, 0.5, 1.0
    else:
        reach = (log_snr[i - 2] - log_snr[i - 1]) / h
        g = phi / -h - 1
        rho_past, rho = np.linalg.solve([[1, 1], [reach, 1]], [g / phi, 2 * (g / -h - 0.5) / phi])
    past = rho_past / reach
    return sigma[i] / sigma[i - 1], -scale * (1 - past - rho), -scale * past, -scale * rho


def _prediction(sigma, alpha, log_snr, i: int, order: int):
    """Coefficients of (corrected latents, new clean estimate, the one before)."""
    if i == len(sigma) - 2:
        return 0.0, 1.0, 0.0  # the last step ends at sigma 0
    h = log_snr[i + 1] - log_snr[i]
    scale = alpha[i + 1] * np.expm1(-h)
    past = 0.0
    if order == 2:
        past = 0.5 * h / (log_snr[i - 1] - log_snr[i])
    return sigma[i + 1] / sigma[i], -scale * (1 - past), -scale * past


def init(x) -> History:
    """History before the first step on x."""
    return History(*[jnp.zeros_like(x)] * 3)


def step(row: UniPCTable, history: History, x, v):
    """One update.

    Args:
      row: one row of a table.
      history: from `init` or the step before.
      x: latents, float32 of any shape.
      v: prediction like x.

    Returns:
      (history with the corrected x and its clean estimate, latents of the next sigma).
    """
    clean = x - row.sigma * v
    known = (history.latents, history.clean, history.older, clean)
    corrected = row.keep * x + sum(row.correct[i] * part for i, part in enumerate(known))
    known = (corrected, clean, history.clean)
    following = sum(row.predict[i] * part for i, part in enumerate(known))
    return History(corrected, clean, history.clean), following


def run(table: UniPCTable, denoise, history: History, x, hold=lambda x: x):
    """Runs the steps of a table, or of a part of it.

    Args:
      table: consecutive rows of a table.
      denoise: `(x, level []) -> v`.
      history: from `init` or the steps before.
      x: latents before the first of these steps.
      hold: applied to the latents after each step; keeps parts fixed.

    Returns:
      (history, latents, latents before each step [steps ...]).
    """

    def advance(carry, row):
        history, x = carry
        history, following = step(row, history, x, denoise(x, row.level))
        return (history, hold(following)), x

    (history, x), given = jax.lax.scan(advance, (history, x), table)
    return history, x, given


def sample_after(clean, noise, runs):
    """Samples a clip that begins with clean frames.

    Args:
      clean: latents of the first n frames [B n H W C], n >= 0; they stay as they are at level 0.
      noise: [B T H W C]; its first n frames are not used.
      runs: for each network in turn, (rows of a table, `begin`). `begin(x)` is called with the
        latents before these steps and returns `denoise`: `(x, levels [B T]) -> v`.

    Returns:
      (latents [B T H W C], latents before each step [steps B T H W C]).
    """
    count, noisy = clean.shape[1], np.arange(noise.shape[1]) >= clean.shape[1]

    def hold(x):
        return jnp.concatenate([clean, x[:, count:]], axis=1)

    x = hold(jnp.asarray(noise, jnp.float32))
    history, given = init(x), []
    for table, begin in runs:
        predict = begin(x)

        def denoise(x, level, predict=predict):
            return predict(x, jnp.broadcast_to(jnp.where(noisy, level, 0.0), x.shape[:2]))

        history, x, before = run(table, denoise, history, x, hold)
        given.append(before)
    return x, jnp.concatenate(given)
