"""Noise schedule of CogVideoX with v-prediction, and the levels of a run.

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps        v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0

abar is a scaled-linear schedule with shifted SNR and zero terminal SNR (arXiv 2305.08891), so
abar_999 = 0. Tables are computed on the host in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.weights import conversion, schema

SPACINGS = ('trailing', 'leading', 'linspace')
SOLVERS = {'ddim': 'CogVideoXDDIMScheduler', 'dpm': 'CogVideoXDPMScheduler'}
FIXED = {
    'beta_schedule': 'scaled_linear',
    'prediction_type': 'v_prediction',
    'clip_sample': False,
    'set_alpha_to_one': True,
}
FIELDS = {
    'num_train_timesteps': 'train_steps',
    'beta_start': 'beta_start',
    'beta_end': 'beta_end',
    'snr_shift_scale': 'snr_shift',
    'rescale_betas_zero_snr': 'zero_terminal_snr',
    'timestep_spacing': 'spacing',
    'steps_offset': 'steps_offset',
}
IGNORED = (
    'clip_sample_range',
    'sample_max_value',
    'dynamic_thresholding_ratio',
    'timestep_scaling',
    'original_inference_steps',
    'lcm_multiplier',
)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Noise schedule and default solver; the defaults are CogVideoX-2b.

    Attributes:
      train_steps: levels 0 .. train_steps - 1.
      beta_start: first beta (square roots are interpolated linearly).
      beta_end: last beta.
      snr_shift: divisor of the signal-to-noise ratio.
      zero_terminal_snr: whether the last level is pure noise.
      spacing: rule for the levels of a run, one of `SPACINGS`.
      steps_offset: offset of the levels of 'leading'.
      solver: 'ddim' or 'dpm', from the class name in the released file.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift: float = 3.0
    zero_terminal_snr: bool = True
    spacing: str = 'trailing'
    steps_offset: int = 0
    solver: str = 'ddim'

    def __post_init__(self):
        schema.check_fields(self, 'scheduler.', zero=('steps_offset',))
        if self.spacing not in SPACINGS:
            raise ValueError(
                f'spacing: got {self.spacing!r}, expected one of {", ".join(SPACINGS)}'
            )
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: got {self.solver!r}, expected 'ddim' or 'dpm'")

    @classmethod
    def from_released(cls, released: dict) -> SchedulerConfig:
        """Reads a released `scheduler/scheduler_config.json`.

        Raises:
          ValueError: the file asks for a schedule that is not supported.
        """
        # Variants of a class (Swin, LCM) have the same noise schedule.
        name = str(released.get('_class_name', SOLVERS['ddim']))
        faults = (
            []
            if name.startswith('CogVideoX')
            else [f'_class_name = {name!r} (expected a CogVideoX scheduler)']
        )
        known = {*FIELDS, *IGNORED}
        off = {key for key, value in released.items() if value in (None, False)}
        faults += conversion.config_faults(released, FIXED, known | off)
        if faults:
            raise ValueError('scheduler config: ' + '; '.join(faults))
        fields = {ours: released[theirs] for theirs, ours in FIELDS.items() if theirs in released}
        return cls(solver='dpm' if 'DPM' in name else 'ddim', **fields)

    def to_released(self) -> dict:
        """The `scheduler/scheduler_config.json` of this schedule."""
        fields = {theirs: getattr(self, ours) for theirs, ours in FIELDS.items()}
        return {'_class_name': SOLVERS[self.solver], **FIXED, **fields}


class Schedule(NamedTuple):
    """Device tables indexed by level, all float32 [train_steps]."""

    alphas_cumprod: jax.Array
    signal: jax.Array  # sqrt(abar)
    sigma: jax.Array  # sqrt(1 - abar)


def alphas_cumprod(cfg: SchedulerConfig) -> np.ndarray:
    """abar in float64 on the host [train_steps], without the clean level -1."""
    betas = np.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.train_steps) ** 2
    abar = np.cumprod(1 - betas)
    abar = abar / (cfg.snr_shift + (1 - cfg.snr_shift) * abar)
    if cfg.zero_terminal_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return abar


def make(cfg: SchedulerConfig) -> Schedule:
    """Computes the device tables of a schedule."""
    abar = alphas_cumprod(cfg)
    return Schedule(
        *(jnp.asarray(table, jnp.float32) for table in (abar, np.sqrt(abar), np.sqrt(1 - abar)))
    )


def add_noise(schedule: Schedule, x0, noise, levels):
    """Noisy latents x_t [B T H W C] at levels [B T]."""
    signal, sigma = _at(schedule, levels)
    return signal * x0 + sigma * noise


def velocity(schedule: Schedule, x0, noise, levels):
    """The target v [B T H W C] of the network at levels [B T]."""
    signal, sigma = _at(schedule, levels)
    return signal * noise - sigma * x0


def x0_from_v(schedule: Schedule, x, v, levels):
    """Clean estimate [B T H W C] from noisy latents and predicted v at levels [B T]."""
    signal, sigma = _at(schedule, levels)
    return signal * x - sigma * v


def _at(schedule, levels):
    return tuple(
        jnp.asarray(table)[levels][..., None, None, None]
        for table in (schedule.signal, schedule.sigma)
    )


def timesteps(cfg: SchedulerConfig, steps: int) -> np.ndarray:
    """Levels of a run of `steps` network calls, descending int64 [steps].

    Raises:
      ValueError: more steps than levels, or none.
    """
    count = cfg.train_steps
    if not 1 <= steps <= count:
        raise ValueError(f'steps: got {steps}, expected 1 to {count}')
    if cfg.spacing == 'trailing':
        levels = np.round(np.arange(count, 0, -count / steps)) - 1
    elif cfg.spacing == 'leading':
        levels = (np.arange(steps) * (count // steps))[::-1] + cfg.steps_offset
    else:
        levels = np.round(np.linspace(0, count - 1, steps))[::-1]
    return levels.astype(np.int64)


def lcm_timesteps(steps: int, original: int, train_steps: int = 1000) -> np.ndarray:
    """Levels of a few-step run, a subset of the `original` ones of its teacher; descending [steps].

    Raises:
      ValueError: more steps than original levels.
    """
    if not 1 <= steps <= original <= train_steps:
        raise ValueError(
            f'steps: got {steps} of {original} original ones, expected '
            f'1 <= steps <= original <= {train_steps}'
        )
    teacher = (np.arange(1, original + 1) * (train_steps // original) - 1)[::-1]
    return teacher[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]


def phase_boundary(levels, phases: int, train_steps: int = 1000) -> np.ndarray:
    """Target level of a phased consistency jump from each of `levels`."""
    width = train_steps // phases
    return np.maximum(np.asarray(levels) // width * width - 1, 0)


def grouped(levels, groups: int, group_frames: int, context: int = 1, context_level: int = 0):
    """Levels per frame of a Swin-DPM window, one row per inner step.

    Group g (0 = first and cleanest) goes down the g-th slice of the ascending levels. The `context`
    condition frames in front stay at `context_level`.

    Args:
      levels: descending [steps].
      groups: noise groups G.
      group_frames: latent frames of a group.
      context: condition frames.
      context_level: their level.

    Returns:
      int64 [steps/G, context + G*group_frames].

    Raises:
      ValueError: the levels do not divide into groups.
    """
    levels = np.asarray(levels)
    if len(levels) % groups:
        raise ValueError(
            f'steps: got {len(levels)}, expected a multiple of the {groups} noise groups'
        )
    rows = levels[::-1].reshape(groups, -1).T[::-1]
    rows = np.repeat(rows, group_frames, axis=1)
    return np.pad(rows, ((0, 0), (context, 0)), constant_values=context_level)
