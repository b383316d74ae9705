"""The window of Swin-DPM: its geometry, and which control each of its slots has.

The Matrix (arXiv 2412.03568); `stream/swin.py` has the stream itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

SOLVERS = ('dpm', 'ddim', 'lcm')
CONTROL_BINDINGS = ('late', 'early')
BINDING_NAMES = {'late': 'late', 'early': 'early', 'tail': 'late', 'head': 'early'}  # older names


@dataclasses.dataclass(frozen=True)
class Config:
    """Geometry and solver of the window; the defaults are stage 3 with small groups.

    Attributes:
      groups: noise groups G.
      group_frames: latent frames of a group, which is what a shift makes.
      context: condition frames in front of the groups.
      steps: solver steps from pure noise to clean; a shift makes steps / G of them.
      solver: 'dpm' (stage 3), 'ddim' or 'lcm' (stage 4).
      guidance: scale of classifier-free guidance by the prompt; 1 or less switches it off.
      control_guidance: the same by the controls, against the null control.
      control_binding: where a new control takes effect. 'late' (the reference): at the group of
        pure noise, so that it is shown about G shifts later. 'early': at group `head_group` and
        all noisier groups. The older names 'tail' and 'head' mean the same.
      head_group: first group that a control with early binding takes effect at.
      original_steps: steps of the teacher, from which 'lcm' picks its own.
      lcm_multiplier: phases of 'lcm' per group.
      condition_level: noise level of the condition frames, as passed to the network.
      renoise_condition: whether output frames are noised to `condition_level` when they become the
        condition, as in training. The reference does not do this.

    Raises:
      ValueError: a value is out of range.
    """

    ALIASES: ClassVar[dict[str, str]] = {'entry': 'control_binding'}  # older names of fields

    groups: int = 4
    group_frames: int = 2
    context: int = 1
    steps: int = 20
    solver: str = 'dpm'
    guidance: float = 1.0
    control_guidance: float = 1.0
    control_binding: str = 'late'
    head_group: int = 2
    original_steps: int = 40
    lcm_multiplier: int = 1
    condition_level: int = 0
    renoise_condition: bool = False

    def __post_init__(self) -> None:
        binding = BINDING_NAMES.get(self.control_binding, self.control_binding)
        object.__setattr__(self, 'control_binding', binding)
        for name in ('groups', 'group_frames', 'context', 'lcm_multiplier'):
            if getattr(self, name) < 1:
                raise ValueError(f'stream.{name}: got {getattr(self, name)}, expected at least 1')
        if self.steps < 1 or self.steps % self.groups:
            raise ValueError(
                f'stream.steps: got {self.steps}, expected a positive multiple of '
                f'groups = {self.groups} (each shift makes steps / groups)'
            )
        for name, known in (('solver', SOLVERS), ('control_binding', CONTROL_BINDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f'stream.{name}: got {getattr(self, name)!r}, '
                    f'expected one of {", ".join(known)}'
                )
        if self.control_binding == 'early' and not 0 <= self.head_group < self.groups:
            raise ValueError(
                f'stream.head_group: got {self.head_group}, expected 0 to {self.groups - 1}'
            )
        for name in ('guidance', 'control_guidance'):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f'stream.{name}: got {getattr(self, name)}, expected 0 to 100')
        if self.condition_level < 0:
            raise ValueError(f'stream.condition_level: got {self.condition_level}, expected >= 0')

    @property
    def frames(self) -> int:
        """Latent frames T of the window."""
        return self.context + self.groups * self.group_frames

    @property
    def step_frames(self) -> int:
        """Latent frames that a step makes."""
        return self.group_frames

    @property
    def controls_per_step(self) -> int:
        """Controls that a step takes: one per latent frame."""
        return self.group_frames

    @property
    def known_controls(self) -> int:
        """Window slots whose controls are known before a step brings new ones."""
        return self.frames - self.group_frames

    @property
    def binding_slot(self) -> int:
        """First window slot that takes the controls of a step."""
        group = self.groups - 1 if self.control_binding == 'late' else self.head_group
        return self.context + group * self.group_frames

    @property
    def lag(self) -> int:
        """Steps between the step that takes a control and the step that shows it."""
        return (self.binding_slot - self.context) // self.group_frames

    @property
    def passes(self) -> int:
        """Windows that go through the network in a step, guidance included."""
        branches = 1 + (self.guidance > 1) + (self.control_guidance > 1)
        return self.steps // self.groups * branches

    @property
    def compiled_passes(self) -> int:
        """The same, as every compiled pass runs."""
        return self.passes

    def with_control_binding(self, control_binding: str) -> Config:
        """Returns the same config with 'late' or 'early' binding."""
        return dataclasses.replace(self, control_binding=control_binding)


def bind(cfg: Config, known: jax.Array, control: jax.Array) -> jax.Array:
    """Controls of all slots [B T], from known ones [B R] and those of a step [B group_frames].

    The new controls take the slots from `cfg.binding_slot` on. The noisier slots behind them repeat
    the last new control until later steps overwrite it.
    """
    room = cfg.frames - cfg.binding_slot - cfg.group_frames
    repeated = jnp.repeat(control[:, -1:], room, axis=1)
    return jnp.concatenate([known[:, : cfg.binding_slot], control, repeated], axis=1)


def split_controls(
    cfg: Config, symbols: Any, shifts: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cuts a whole control sequence into what `init` and `shifts` steps take.

    Slot f has symbol s * group_frames + f at shift s, so a frame is shown under the same symbol
    with any control binding.

    Args:
      symbols: int [B N], at least `needed_controls(cfg, shifts)` per player.

    Returns:
      (controls of `Cond` [B R], controls of a rollout [shifts B group_frames]).

    Raises:
      ValueError: there are too few symbols.
    """
    symbols = np.asarray(symbols, np.int32)
    needed = needed_controls(cfg, shifts)
    if symbols.shape[1] < needed:
        raise ValueError(
            f'controls: got {symbols.shape[1]}, expected at least {needed} for {shifts} shifts'
        )
    starts = cfg.binding_slot + cfg.group_frames * np.arange(shifts)
    steps = symbols[:, starts[:, None] + np.arange(cfg.group_frames)]
    return symbols[:, : cfg.known_controls], np.moveaxis(steps, 1, 0)


def video_controls(cfg: Config, symbols: list[str]) -> tuple[list[str], list[list[str]]]:
    """Symbols of a video that is known in advance -> (of the first window, of each step).

    For 'late' binding: the window then knows the coming controls, and every symbol steers the
    frames that it stands for.
    """
    known = symbols[:1] * cfg.context + symbols + symbols[-1:] * (cfg.frames - cfg.context)
    steps = known[cfg.known_controls :][: len(symbols)]
    return known[: cfg.known_controls], [
        steps[at : at + cfg.group_frames] for at in range(0, len(steps), cfg.group_frames)
    ]


def needed_controls(cfg: Config, shifts: int) -> int:
    """Number of controls for `shifts` shifts, those of the first window included."""
    return max(cfg.binding_slot + shifts * cfg.group_frames, cfg.known_controls)
