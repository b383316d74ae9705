"""Swin-DPM: a window of latents graded from almost clean to pure noise that shifts forever.

The Matrix (arXiv 2412.03568). The window is [condition | group 0 | ... | group G-1]; one `step` is
one shift: `steps / G` denoising calls take every group to the level of its left neighbour, group 0
comes out clean and is popped, its last frames become the condition, and pure noise is pushed.
Nothing but the window is carried from shift to shift, so the carry is a small plain pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from matrix_jax.diffusion import sampling, schedules, solvers
from matrix_jax.stream.base import Stream, fold, normal, player_keys

SOLVERS = ('dpm', 'ddim', 'lcm')
CONTROL_BINDINGS = ('late', 'early')
BINDING_NAMES = {
    'late': 'late',
    'early': 'early',
    'tail': 'late',
    'head': 'early',
}  # with older names


@dataclasses.dataclass(frozen=True)
class Config:
    """Geometry and solver of the window; the defaults are stage 3 with small groups.

    Attributes:
      groups: noise groups G.
      group_frames: latent frames of a group, popped and pushed by each shift.
      context: condition frames in front.
      steps: solver steps from pure noise to clean; each shift makes steps / G of them.
      solver: 'dpm' (stage 3), 'ddim' or 'lcm' (stage 4).
      guidance: classifier-free guidance by the prompt; 1 or less switches it off.
      control_guidance: the same by the controls, against the null control.
      control_binding: where a new control binds. 'late' (reference): at the group of pure noise,
        seen about G shifts later. 'early': at group `head_group` and all noisier ones.
      head_group: first group that a control binds at with 'early' binding.
      original_steps: teacher steps that 'lcm' picks from.
      lcm_multiplier: phases of 'lcm' per group.
      condition_level: noise level of the condition frames that the network is told.
      renoise_condition: whether popped frames are noised to `condition_level` when they become the
        condition, as in training. The reference does not.
    """

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

    def __post_init__(self):
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
    def passes(self) -> int:
        """Windows that go through the network in a shift, those of the guidance included."""
        branches = 1 + (self.guidance > 1) + (self.control_guidance > 1)
        return self.steps // self.groups * branches

    @property
    def compiled_passes(self) -> int:
        """Those that the program of a shift has."""
        return self.passes

    @property
    def remembered(self) -> int:
        """Window slots whose controls are known before a step brings new ones."""
        return self.frames - self.group_frames

    @property
    def binding_slot(self) -> int:
        """First window slot that takes the controls of a step."""
        group = self.groups - 1 if self.control_binding == 'late' else self.head_group
        return self.context + group * self.group_frames

    @property
    def controls_per_step(self) -> int:
        """Controls that a step takes."""
        return self.group_frames

    @property
    def step_frames(self) -> int:
        """Latent frames that a step makes."""
        return self.group_frames

    @property
    def lag(self) -> int:
        """Steps from the one that takes a control to the one whose frames were bound to it."""
        return (self.binding_slot - self.context) // self.group_frames

    def with_control_binding(self, control_binding: str) -> Config:
        """The same stream with controls that bind 'late' or 'early'."""
        return dataclasses.replace(self, control_binding=control_binding)


@struct.dataclass
class Cond:
    """What a stream starts from.

    Attributes:
      latents: clean initial clip [B T' H W C]; cut or padded with zeros to the window.
      text: [B L D].
      control_table: embedding of each symbol, the null control last [symbols+1 A].
      controls: symbol indices of the first `cfg.remembered` slots, int32 [B R].
      null_text: like text or [1 L D], of the negative prompt; only needed if guidance is on.
    """

    latents: jax.Array
    text: jax.Array
    control_table: jax.Array
    controls: jax.Array
    null_text: jax.Array | None = None


@struct.dataclass
class Carry:
    """All that a shift hands to the next; arrays only, so that saving it is saving the stream.

    Attributes:
      window: float32 [B T H W C].
      controls: int32 [B T-group_frames], symbols of the slots that stay.
      text: [B L D].
      null_text: [B L D] or None.
      control_table: [symbols+1 A].
      key: uint32 [B 2], raw key data of each player.
      shift: int32 [B], shifts made so far.
    """

    window: jax.Array
    controls: jax.Array
    text: jax.Array
    null_text: jax.Array | None
    control_table: jax.Array
    key: jax.Array
    shift: jax.Array


@dataclasses.dataclass(frozen=True)
class ShiftTable:
    """Host tables of one shift: levels int32 [inner T], and coefficients [inner G*group_frames]."""

    levels: np.ndarray
    plan: solvers.Plan


def shift_table(cfg: Config, scheduler: schedules.SchedulerConfig) -> ShiftTable:
    """Levels and solver coefficients of a shift.

    Raises:
      ValueError: the steps do not fit the schedule, or 'lcm' would jump over a phase boundary.
    """
    total = scheduler.train_steps
    if cfg.condition_level >= total:
        raise ValueError(f'stream.condition_level: got {cfg.condition_level}, expected < {total}')
    if cfg.solver == 'lcm':
        levels = schedules.lcm_timesteps(cfg.steps, cfg.original_steps, total)
    else:
        # Only trailing levels start at pure noise, which is what a shift pushes.
        scheduler = dataclasses.replace(scheduler, spacing='trailing')
        levels = schedules.timesteps(scheduler, cfg.steps)
    rows = schedules.grouped(levels, cfg.groups, cfg.group_frames, cfg.context, cfg.condition_level)
    graded = rows[:, cfg.context :]
    if cfg.solver == 'lcm':
        plan = solvers.lcm(scheduler, graded, levels, cfg.groups * cfg.lcm_multiplier)
    else:
        plan = solvers.make(cfg.solver, scheduler, graded, cfg.steps)
    return ShiftTable(rows.astype(np.int32), plan)


def make(cfg: Config, scheduler: schedules.SchedulerConfig, denoise: Callable) -> Stream:
    """The stream of a network.

    `init(params, cond, key)`: `cond` is a `Cond`, `key` one key, or one per player [B].
    `step(params, carry, control)`: control int32 [B group_frames], symbol indices; gives latents
    [B group_frames H W C]. There is no odd first chunk: `prefill` is `step`.

    Args:
      denoise: `denoise(params, x [B T H W C], level [B T], text [B L D], control [B T A]) -> v`.
    """
    table = shift_table(cfg, scheduler)
    schedule = schedules.make(scheduler)

    def init(params, cond: Cond, key) -> Carry:
        check(cfg, cond)
        keys = player_keys(key, cond.latents.shape[0])
        first = jnp.zeros(keys.shape, jnp.int32)
        noise = normal(fold(keys, first), (cfg.frames, *cond.latents.shape[2:]))
        return initial_carry(cfg, table, schedule, cond, keys, noise)

    def step(params, carry: Carry, control):
        batch, _, *frame = carry.window.shape
        if control.shape != (batch, cfg.group_frames):
            raise ValueError(
                f'control: got {control.shape}, expected [B group_frames] = '
                f'{(batch, cfg.group_frames)}'
            )
        size, graded = cfg.group_frames, cfg.frames - cfg.context
        inner = len(table.levels) if table.plan.noisy else 0
        noise = normal(
            fold(jax.random.wrap_key_data(carry.key), carry.shift + 1),
            (size * (1 + cfg.renoise_condition) + inner * graded, *frame),
        )
        append, renoise, noises = jnp.split(noise, [size, noise.shape[1] - inner * graded], axis=1)
        noises = rearrange(noises, 'b (i t) h w c -> i b t h w c', i=inner) if inner else None
        return shift(cfg, table, schedule, denoise, params, carry, control, noises, append, renoise)

    return Stream(init, step, step, with_text)


def initial_carry(cfg: Config, table: ShiftTable, schedule, cond: Cond, keys, noise) -> Carry:
    """Carry of a new stream from clean latents and noise [B T H W C]."""
    latents = jnp.asarray(cond.latents, jnp.float32)[:, : cfg.frames]
    batch, given = latents.shape[:2]
    latents = jnp.pad(latents, ((0, 0), (0, cfg.frames - given)) + ((0, 0),) * 3)
    window = schedules.add_noise(schedule, latents, noise, table.levels[:1])
    null_text = cond.null_text
    if null_text is not None:
        null_text = jnp.broadcast_to(null_text, cond.text.shape)
    return Carry(
        window=window,
        controls=jnp.asarray(cond.controls, jnp.int32),
        text=jnp.asarray(cond.text),
        null_text=null_text,
        control_table=jnp.asarray(cond.control_table),
        key=jax.random.key_data(keys),
        shift=jnp.zeros([batch], jnp.int32),
    )


def shift(
    cfg: Config,
    table: ShiftTable,
    schedule,
    denoise,
    params,
    carry: Carry,
    control,
    noise_step,
    noise_append,
    noise_condition=None,
):
    """One shift with its noise given; `make(...).step` draws the noise and calls this.

    Args:
      control: int32 [B group_frames].
      noise_step: [inner B G*group_frames H W C], or None for a solver that adds no noise.
      noise_append: [B group_frames H W C].
      noise_condition: [B group_frames H W C], only read with `renoise_condition`.

    Returns:
      (carry, popped latents [B group_frames H W C]).
    """
    slots = bind(cfg, carry.controls, control)
    embedded = carry.control_table[slots]
    condition, graded = jnp.split(carry.window, [cfg.context], axis=1)

    null_control = jnp.broadcast_to(carry.control_table[-1], embedded.shape)
    conditions, scales = sampling.conditions(
        carry.text, carry.null_text, embedded, null_control, cfg.guidance, cfg.control_guidance
    )

    def advance(state, now):
        history, graded = state
        level, row, noise = now
        x = jnp.concatenate([condition, graded], axis=1)
        level = jnp.broadcast_to(level, x.shape[:2])
        v = sampling.guide(denoise, params, x, level, conditions, scales)
        return solvers.step(row, history, graded, v[:, cfg.context :], noise), None

    state = (solvers.init(graded), graded)
    (_, graded), _ = jax.lax.scan(advance, state, (table.levels, table.plan, noise_step))
    popped, rest = jnp.split(graded, [cfg.group_frames], axis=1)
    # PARITY: the newest clean latents become the condition as they are; training noises them.
    newest = popped
    if cfg.renoise_condition:
        level = np.full([1, cfg.group_frames], cfg.condition_level)
        newest = schedules.add_noise(schedule, popped, noise_condition, level)
    condition = jnp.concatenate([condition, newest], axis=1)[:, -cfg.context :]
    window = jnp.concatenate([condition, rest, noise_append], axis=1)
    return carry.replace(
        window=window, controls=slots[:, cfg.group_frames :], shift=carry.shift + 1
    ), popped


def bind(cfg: Config, remembered, control):
    """Controls of all window slots [B T] from remembered [B R] and new ones [B group_frames].

    The new ones take the slots from `cfg.binding_slot` on; noisier slots than those they fill expect
    the last of them to be held, and are overwritten by the steps to come.
    """
    room = cfg.frames - cfg.binding_slot - cfg.group_frames
    held = jnp.repeat(control[:, -1:], room, axis=1)
    return jnp.concatenate([remembered[:, : cfg.binding_slot], control, held], axis=1)


def split_controls(cfg: Config, symbols, shifts: int):
    """Cuts a whole control sequence into what `init` and `shifts` steps take.

    The slot f that a control binds at has symbol s * group_frames + f at shift s, so a frame is
    shown under the same symbol whatever the binding.

    Args:
      symbols: int [B N], at least `needed_controls(cfg, shifts)` per player.

    Returns:
      (controls of `Cond` [B R], controls of a rollout [shifts B group_frames]).
    """
    symbols = np.asarray(symbols, np.int32)
    needed = needed_controls(cfg, shifts)
    if symbols.shape[1] < needed:
        raise ValueError(
            f'controls: got {symbols.shape[1]}, expected at least {needed} for {shifts} shifts'
        )
    starts = cfg.binding_slot + cfg.group_frames * np.arange(shifts)
    steps = symbols[:, starts[:, None] + np.arange(cfg.group_frames)]
    return symbols[:, : cfg.remembered], np.moveaxis(steps, 1, 0)


def video_controls(cfg: Config, symbols: list[str]) -> tuple[list[str], list[list[str]]]:
    """Symbols of a video that is known in advance -> (of the first window, of each step).

    For 'late' binding: the window knows what is to come, so that every symbol steers the frames that
    it stands for.
    """
    known = symbols[:1] * cfg.context + symbols + symbols[-1:] * (cfg.frames - cfg.context)
    steps = known[cfg.remembered :][: len(symbols)]
    return known[: cfg.remembered], [
        steps[at : at + cfg.group_frames] for at in range(0, len(steps), cfg.group_frames)
    ]


def needed_controls(cfg: Config, shifts: int) -> int:
    """Controls that a run of `shifts` consumes, those of the initial window included."""
    return max(cfg.binding_slot + shifts * cfg.group_frames, cfg.remembered)


def with_text(carry: Carry, text) -> Carry:
    """The carry with another prompt [B L D], which applies to the whole window at once."""
    if text.shape != carry.text.shape:
        raise ValueError(f'text: got {text.shape}, expected {carry.text.shape}')
    return carry.replace(text=jnp.asarray(text, carry.text.dtype))


def check(cfg: Config, cond: Cond):
    """Raises ValueError where a condition does not fit the stream."""
    if np.ndim(cond.latents) != 5:
        raise ValueError(f'cond.latents: got {np.shape(cond.latents)}, expected [B T H W C]')
    batch = cond.latents.shape[0]
    if cond.controls.shape != (batch, cfg.remembered):
        raise ValueError(
            f'cond.controls: got {cond.controls.shape}, expected '
            f'{(batch, cfg.remembered)} (all window frames but the last group)'
        )
    if np.ndim(cond.text) != 3 or cond.text.shape[0] != batch:
        raise ValueError(f'cond.text: got {np.shape(cond.text)}, expected [{batch} L D]')
    given = np.shape(cond.null_text) if cond.null_text is not None else ()
    if (cfg.guidance > 1 or given) and (
        given[1:] != cond.text.shape[1:] or given[:1] not in ((1,), (batch,))
    ):
        raise ValueError(
            f'cond.null_text: got {given or None}, expected {cond.text.shape} '
            f'(guidance is {cfg.guidance})'
        )
