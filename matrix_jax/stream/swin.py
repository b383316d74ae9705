"""Swin-DPM: a window of latents, graded from almost clean to pure noise, that shifts forever.

The Matrix (arXiv 2412.03568). The window is [condition | group 0 | ... | group G-1], and group g
has a lower noise level than group g+1. One `step` is one shift:

    1. steps / G solver steps take every group to the noise level of its left neighbour;
    2. group 0 is now clean, and is the output of the step;
    3. its last frames become the condition, and a group of pure noise is appended on the right.

The carry is the window and what conditions it; nothing else passes from shift to shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from matrix_jax.diffusion import sampling, schedules, solvers
from matrix_jax.stream.base import PyTree, Stream, fold, normal, player_keys
from matrix_jax.stream.swin_window import (
    Config,
    bind,
    needed_controls,
    split_controls,
    video_controls,
)

__all__ = ['Config', 'bind', 'needed_controls', 'split_controls', 'video_controls']

Denoise = Callable[..., jax.Array]  # (params, x, level, text, control) -> v


@struct.dataclass
class Cond:
    """What a stream starts from.

    Attributes:
      latents: clean start clip [B T' H W C]; cut, or padded with zeros, to the window.
      text: [B L D].
      control_table: vector of each symbol, the null control last [symbols+1 A].
      controls: symbol indices of the first `cfg.known_controls` slots, int32 [B R].
      null_text: text of the negative prompt, [B L D] or [1 L D]; needed if guidance is on.
    """

    latents: jax.Array
    text: jax.Array
    control_table: jax.Array
    controls: jax.Array
    null_text: jax.Array | None = None


@struct.dataclass
class Carry:
    """State between shifts. It only holds arrays, so saving it saves the stream.

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
    """Constants of the solver steps of one shift, on the host.

    Attributes:
      levels: noise level of every slot before each step, int32 [inner T].
      plan: solver coefficients, [inner G*group_frames].
    """

    levels: np.ndarray[Any, Any]
    plan: solvers.SolverTable


def shift_table(cfg: Config, scheduler: schedules.SchedulerConfig) -> ShiftTable:
    """Returns the noise levels and solver coefficients of a shift.

    Raises:
      ValueError: the steps do not fit the schedule, or 'lcm' would jump over a phase boundary.
    """
    total = scheduler.train_steps
    if cfg.condition_level >= total:
        raise ValueError(f'stream.condition_level: got {cfg.condition_level}, expected < {total}')
    if cfg.solver == 'lcm':
        levels = schedules.lcm_timesteps(cfg.steps, cfg.original_steps, total)
    else:
        # Only 'trailing' levels start at pure noise, which is what a shift appends.
        scheduler = dataclasses.replace(scheduler, spacing='trailing')
        levels = schedules.timesteps(scheduler, cfg.steps)
    slots = schedules.grouped(
        levels, cfg.groups, cfg.group_frames, cfg.context, cfg.condition_level
    )
    graded = slots[:, cfg.context :]
    if cfg.solver == 'lcm':
        plan = solvers.lcm(scheduler, graded, levels, cfg.groups * cfg.lcm_multiplier)
    else:
        plan = solvers.make(cfg.solver, scheduler, graded, cfg.steps)
    return ShiftTable(slots.astype(np.int32), plan)


def make(cfg: Config, scheduler: schedules.SchedulerConfig, denoise: Denoise) -> Stream:
    """Returns the stream of a network.

    `init(params, cond, key)`: `cond` is a `Cond`, `key` one key or one per player [B].
    `step(params, carry, control)`: control int32 [B group_frames], symbol indices -> latents
    [B group_frames H W C]. The first step is like any other: `prefill` is `step`.

    Args:
      cfg: the window.
      scheduler: the noise schedule.
      denoise: `denoise(params, x [B T H W C], level [B T], text [B L D], control [B T A]) -> v`.

    Raises:
      ValueError: the steps do not fit the schedule; a condition or a control has a wrong shape.
    """
    table = shift_table(cfg, scheduler)
    schedule = schedules.make(scheduler)

    def init(params: PyTree, cond: Cond, key: jax.Array) -> Carry:
        check(cfg, cond)
        keys = player_keys(key, cond.latents.shape[0])
        first = jnp.zeros(keys.shape, jnp.int32)
        noise = normal(fold(keys, first), (cfg.frames, *cond.latents.shape[2:]))
        return initial_carry(cfg, table, schedule, cond, keys, noise)

    def step(params: PyTree, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
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
        append, renoise, rest = jnp.split(noise, [size, noise.shape[1] - inner * graded], axis=1)
        inside = rearrange(rest, 'b (i t) h w c -> i b t h w c', i=inner) if inner else None
        return shift(cfg, table, schedule, denoise, params, carry, control, inside, append, renoise)

    return Stream(init, step, step, with_text)


def initial_carry(
    cfg: Config,
    table: ShiftTable,
    schedule: schedules.Schedule,
    cond: Cond,
    keys: jax.Array,
    noise: jax.Array,
) -> Carry:
    """Returns the carry of a new stream, with its noise [B T H W C] given."""
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
    schedule: schedules.Schedule,
    denoise: Denoise,
    params: PyTree,
    carry: Carry,
    control: jax.Array,
    noise_step: jax.Array | None,
    noise_append: jax.Array,
    noise_condition: jax.Array | None = None,
) -> tuple[Carry, jax.Array]:
    """Makes one shift with its noise given; `make(...).step` draws the noise and calls this.

    Args:
      control: int32 [B group_frames].
      noise_step: [inner B G*group_frames H W C], or None for a solver that adds no noise.
      noise_append: [B group_frames H W C].
      noise_condition: [B group_frames H W C], only read with `renoise_condition`.

    Returns:
      (carry, clean latents [B group_frames H W C]).
    """
    slots = bind(cfg, carry.controls, control)
    embedded = carry.control_table[slots]
    condition, graded = jnp.split(carry.window, [cfg.context], axis=1)

    null_control = jnp.broadcast_to(carry.control_table[-1], embedded.shape)
    conditions, scales = sampling.conditions(
        carry.text, carry.null_text, embedded, null_control, cfg.guidance, cfg.control_guidance
    )

    def solve(state: PyTree, now: PyTree) -> tuple[PyTree, None]:
        history, graded = state
        level, coefficients, noise = now
        x = jnp.concatenate([condition, graded], axis=1)
        level = jnp.broadcast_to(level, x.shape[:2])
        v = sampling.guide(denoise, params, x, level, conditions, scales)
        return solvers.step(coefficients, history, graded, v[:, cfg.context :], noise), None

    state = (solvers.init(graded), graded)
    (_, graded), _ = jax.lax.scan(solve, state, (table.levels, table.plan, noise_step))
    clean, rest = jnp.split(graded, [cfg.group_frames], axis=1)
    # PARITY: the newest clean latents become the condition as they are; training noises them.
    newest = clean
    if cfg.renoise_condition:
        level = np.full([1, cfg.group_frames], cfg.condition_level)
        newest = schedules.add_noise(schedule, clean, noise_condition, level)
    condition = jnp.concatenate([condition, newest], axis=1)[:, -cfg.context :]
    window = jnp.concatenate([condition, rest, noise_append], axis=1)
    carry = dataclasses.replace(
        carry, window=window, controls=slots[:, cfg.group_frames :], shift=carry.shift + 1
    )
    return carry, clean


def with_text(carry: Carry, text: jax.Array) -> Carry:
    """Returns the carry with another prompt [B L D], which applies to the whole window at once.

    Raises:
      ValueError: the shape differs from that of the prompt before.
    """
    if text.shape != carry.text.shape:
        raise ValueError(f'text: got {text.shape}, expected {carry.text.shape}')
    return dataclasses.replace(carry, text=jnp.asarray(text, carry.text.dtype))


def check(cfg: Config, cond: Cond) -> None:
    """Checks that a condition fits the stream.

    Raises:
      ValueError: a shape is wrong, or guidance is on without a negative prompt.
    """
    if np.ndim(cond.latents) != 5:
        raise ValueError(f'cond.latents: got {np.shape(cond.latents)}, expected [B T H W C]')
    batch = cond.latents.shape[0]
    if cond.controls.shape != (batch, cfg.known_controls):
        raise ValueError(
            f'cond.controls: got {cond.controls.shape}, expected '
            f'{(batch, cfg.known_controls)} (all window frames but the last group)'
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
