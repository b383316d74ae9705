"""Stage 4, stream consistency distillation: one network call per shift, without guidance.

All groups of a window share one u, so a shift takes the whole window along a single probability
flow from u = 1000/G - 1 down to the phase boundaries below. The student learns this jump from x:

    shift    the teacher solves the shift in `points` small steps; the target is where it ends
    window   the jumps from two neighbouring points of the teacher's path must agree (phased
             consistency, arXiv 2405.18407, for each noise group; LCM, arXiv 2310.04378)

    jump(x) = skip x + out x0^,   x0^ = a x - s v
    loss    = mean over groups g of  w_g |jump(x) - target|^2,   w_g ~ out_g^(-2 balance)

The authors of The Matrix did not publish their stage 4. Their sampler suggests 'window'; 'shift'
needs no bootstrapping and can train on windows that the student made itself.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.diffusion import sampling, schedules, solvers
from matrix_jax.stream import swin
from matrix_jax.train.denoise import Denoising
from matrix_jax.train.swin_dpm import check_binding_groups, controls_in_play, draw_binding_group
from matrix_jax.weights import conversion


class ShiftTables(NamedTuple):
    """Host tables of the I points of a shift; N = groups * group_frames frames are noisy.

    Attributes:
      levels: noise levels int32 [I T].
      skip, out: coefficients [I N] of the jump from a point to the phase boundary.
      plan: the teacher's step to the next point, coefficients [I N].
      weights: loss weight of each noisy frame [N].
    """

    levels: np.ndarray
    skip: np.ndarray
    out: np.ndarray
    plan: solvers.SolverTable
    weights: np.ndarray


def tables(
    stream: swin.Config, scheduler: schedules.SchedulerConfig, points: int, balance: float
) -> ShiftTables:
    """Tables of a shift of `points` equal steps, noisiest first."""
    width = scheduler.train_steps // stream.groups
    below = np.arange(points, 0, -1) * width // points - 1
    bases = np.repeat(np.arange(stream.groups) * width, stream.group_frames)
    graded = below[:, None] + bases
    # Level 0 means clean, as in the few-step sampler.
    boundary = np.broadcast_to(np.maximum(bases - 1, 0), graded.shape)
    following = np.append(graded[1:], boundary[:1], axis=0)
    abar = schedules.alphas_cumprod(scheduler)
    skip, out = solvers.jump(abar, graded, boundary)
    levels = np.pad(graded, ((0, 0), (stream.context, 0)), constant_values=stream.condition_level)
    weights = out[0] ** (-2 * balance)
    return ShiftTables(
        levels.astype(np.int32),
        skip.astype(np.float32),
        out.astype(np.float32),
        solvers.ddim(abar, graded, following),
        (weights / weights.mean()).astype('f4'),
    )


@dataclasses.dataclass(frozen=True)
class StreamConsistency(Denoising):
    """Distils a stream into one of `groups` solver steps.

    Attributes:
      objective: 'shift' or 'window', see the module.
      points: teacher steps per shift.
      guidance: scale of the teacher's classifier-free guidance by the prompt, which the student
        absorbs; 1 or less switches it off.
      control_guidance: scale of the same against the null control.
      balance: exponent p of the group weights out^(-2p). With 0 the cleanest group dominates the
        loss, with 1 all groups count alike in clean latents.
      start_share: 'window' only: share of samples at the first point, the only one that a stream of
        `groups` steps visits.
      rollout: 'shift' only: largest number of shifts that the student makes itself, under recorded
        controls, before the teacher makes the next one. 0 = recorded windows only.
      rollout_share: share of updates on such windows.
      binding_groups: groups that new controls take effect at, each in as many samples as the
        others. Empty = the group of the stream.
    """

    objective: Literal['shift', 'window'] = 'shift'
    points: int = 5
    guidance: float = 1.0
    control_guidance: float = 1.0
    balance: float = 0.5
    start_share: float = 0.4
    rollout: int = 0
    rollout_share: float = 0.5
    control_dropout: float = 0.0
    binding_groups: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in ('shift', 'window'):
            raise ValueError(
                f"stage.objective: got {self.objective!r}, expected 'shift' or 'window'"
            )
        self.check_fields(
            points=(1, 250),
            guidance=(0, 100),
            control_guidance=(0, 100),
            balance=(0, 1),
            start_share=(0, 1),
            rollout=(0, 1000),
            rollout_share=(0, 1),
        )
        if self.rollout and self.objective == 'window':
            raise ValueError(
                f'stage.rollout: got {self.rollout}, expected 0 with objective '
                "'window' (its points lie on paths of recorded clips)"
            )
        for name in ('train_encoders', 'clip_frames'):
            if getattr(self, name):
                raise ValueError(
                    f'stage.{name}: got {getattr(self, name)}, expected none: the '
                    'student reads what its teacher reads'
                )

    def start(self, world, params, seed, allow_non_finite=False):
        params = super().start(world, params, seed, allow_non_finite)
        return {**params, 'teacher': params['transformer']}

    def axes(self, world):
        student = conversion.axes(world.tables['transformer'])
        return super().axes(world) | conversion.flatten({'teacher': student})

    def lengths(self, world):
        stream = world.cfg.stream
        return (stream.frames + self.rollout * stream.group_frames,)

    def check_world(self, world):
        super().check_world(world)
        stream = world.cfg.stream
        if (stream.solver, stream.steps) != ('lcm', stream.groups):
            raise UsageError(
                f'stream: got solver {stream.solver!r} with {stream.steps} steps, '
                f"expected 'lcm' with groups = {stream.groups} steps"
            )
        check_binding_groups(self.binding_groups, stream)

    def loss(self, world, params, batch, key):
        stream, keys = world.cfg.stream, jax.random.split(key, 6)
        table = tables(stream, world.cfg.scheduler, self.points, self.balance)
        controls = self.drop_controls(batch['controls'], keys[4])
        ids = self.drop_text(world, batch['ids'], keys[5])
        batch = {**batch, 'controls': controls, 'ids': ids}
        text = world.embed_ids(params, batch['ids'])
        null_text = world.embed_ids(params, world.empty_ids)

        def student(params, x, level, control):
            return world.denoise(params, x, level, text, control).astype(jnp.float32)

        def teacher(x, level, control):
            level = jnp.broadcast_to(level, x.shape[:2])
            teacher_params = {**params, 'transformer': params['teacher']}
            null_control = jnp.broadcast_to(carry.control_table[-1], control.shape)
            conditions, scales = sampling.conditions(
                text,
                jnp.broadcast_to(null_text, text.shape),
                control,
                null_control,
                self.guidance,
                self.control_guidance,
            )
            return sampling.guide(world.denoise, teacher_params, x, level, conditions, scales)

        carry = self._start(world, params, batch, keys[0], text, table)
        carry, control = self._rolled(world, params, batch, keys[1], carry)
        control = carry.control_table[control]
        condition, x = jnp.split(carry.window, [stream.context], axis=1)

        def window(x):
            return jnp.concatenate([condition, x], axis=1)

        def jump(params, x, row):
            v = student(params, window(x), row.levels, control)[:, stream.context :]
            x0 = _column(row.plan.signal) * x - _column(row.plan.sigma) * v
            return _column(row.skip) * x + _column(row.out) * x0

        def teacher_step(x, row):
            v = teacher(window(x), row.levels, control)[:, stream.context :]
            return solvers.step(row.plan, solvers.init(x), x, v)[1]

        if self.objective == 'shift':
            row = _row(table, jnp.zeros(1, jnp.int32))
            target = jax.lax.scan(
                lambda x, i: (teacher_step(x, _row(table, i[None])), None),
                x,
                jnp.arange(self.points),
            )[0]
        else:
            point = jax.random.randint(keys[2], (x.shape[0],), 0, self.points)
            first = jax.random.uniform(keys[3], point.shape) < self.start_share
            point = jnp.where(first, 0, point)
            x = self._noised(world, batch, keys[0], table, point)[:, stream.context :]
            row, last = _row(table, point), point == self.points - 1
            reached = teacher_step(x, row)
            target = jump(params, reached, _row(table, jnp.where(last, 0, point + 1)))
            target = jnp.where(last[:, None, None, None, None], reached, target)
        error = jnp.square(jump(params, x, row) - jax.lax.stop_gradient(target))
        groups = error.mean(axis=(0, 2, 3, 4)) / jnp.square(table.out[0])
        loss = (jnp.square(table.out[0]) * table.weights * groups).mean()
        groups = groups.reshape(stream.groups, -1).mean(axis=1)
        return loss, {f'x0_error_{g}': groups[g] for g in range(stream.groups)}

    def finish(self, world, params, loader):
        """Drops the teacher."""
        return world, {name: part for name, part in params.items() if name != 'teacher'}

    def _noised(self, world, batch, key, table, point):
        """Recorded windows [B T H W C] with the noise of points [B] of the shift."""
        stream = world.cfg.stream
        clean = batch['latents'][:, : stream.frames].astype(jnp.float32)
        noise = jax.random.normal(key, clean.shape)
        return schedules.add_noise(world.schedule, clean, noise, jnp.asarray(table.levels)[point])

    def _start(self, world, params, batch, key, text, table):
        """Carry of a stream that holds a recorded window at the start of a shift."""
        size = batch['controls'].shape[0]
        first = jnp.zeros([size], jnp.int32)
        return swin.Carry(
            window=self._noised(world, batch, key, table, first),
            text=text,
            null_text=None,
            controls=batch['controls'][:, : world.cfg.stream.known_controls],
            control_table=world.embed_controls(params),
            shift=first,
            key=jax.random.key_data(jax.random.split(key, size)),
        )

    def _rolled(self, world, params, batch, key, carry):
        """Lets the student make some shifts -> (carry, controls [B T] of the next one)."""
        keys, shape = jax.random.split(key, 4), carry.window.shape
        stream = world.cfg.stream
        size = stream.group_frames
        group = draw_binding_group(stream, self.binding_groups, keys[3], shape[0])

        def slots(shift):
            window = jax.lax.dynamic_slice_in_dim(
                batch['controls'], shift * size, stream.frames, axis=1
            )
            return controls_in_play(stream, window, group)

        if not self.rollout:
            return carry, slots(0)
        plan = swin.shift_table(stream, world.cfg.scheduler)
        # With late binding a shift takes the controls of all slots as they are.
        late = stream.with_control_binding('late')
        # A loop of random length has no reverse derivative, and needs none.
        carry, params = jax.lax.stop_gradient((carry, params))

        def advance(shift, carry):
            noise = jax.random.normal(
                jax.random.fold_in(keys[0], shift),
                (shape[0], size * (1 + stream.renoise_condition), *shape[2:]),
            )
            append, renoise = jnp.split(noise, [size], axis=1)
            known, control = jnp.split(slots(shift), [late.known_controls], axis=1)
            return swin.shift(
                late,
                plan,
                world.schedule,
                world.denoise,
                params,
                dataclasses.replace(carry, controls=known),
                control,
                None,
                append,
                renoise,
            )[0]

        count = jax.random.randint(keys[1], (), 1, self.rollout + 1)
        count = jnp.where(jax.random.uniform(keys[2]) < self.rollout_share, count, 0)
        carry = jax.lax.fori_loop(0, count, advance, carry)
        return carry, slots(count)


def _row(table: ShiftTables, point):
    """Rows of points [B] (or [1]) of a table, on the device; `weights` are meaningless."""
    rows = table._replace(weights=np.zeros(len(table.levels)))
    return jax.tree.map(lambda column: jnp.asarray(column)[point], rows)


def _column(coefficient):
    return coefficient[..., None, None, None]
