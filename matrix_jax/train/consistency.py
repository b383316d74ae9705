"""Stage 4, stream consistency distillation: one network call per shift, without guidance.

All groups of a window share one u, so the whole window follows a single probability flow from
u = 1000/G - 1 down to the phase boundaries below, which is one shift. Two ways to learn that jump:

    shift    the teacher makes the shift in its own small steps; the student's jump learns the end
    window   the student's jumps from two neighbouring points of the teacher's path agree (phased
             consistency, arXiv 2405.18407, per noise group)

The authors did not publish their stage 4. 'window' is what their sampler points to (reference
section 6); 'shift' needs no bootstrapping, and takes windows that the student itself has made.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.diffusion import sampling, schedules, solvers
from matrix_jax.stream import swin
from matrix_jax.train.denoise import Denoising
from matrix_jax.weights import conversion


class ShiftTables(NamedTuple):
    """Host tables of the points i of a shift: levels [I T], and per graded frame [I G*W].

    `skip` and `out` jump from a point to the phase boundary, `plan` is the teacher's step to the
    next point, `weights` [G*W] balance the groups.
    """

    levels: np.ndarray
    skip: np.ndarray
    out: np.ndarray
    plan: solvers.Plan
    weights: np.ndarray


def tables(
    stream: swin.Config, scheduler: schedules.SchedulerConfig, points: int, balance: float
) -> ShiftTables:
    """Tables of a shift of `points` equal steps, noisiest first."""
    width = scheduler.train_steps // stream.groups
    below = np.arange(points, 0, -1) * width // points - 1
    bases = np.repeat(np.arange(stream.groups) * width, stream.group_frames)
    graded = below[:, None] + bases
    # Level 0 stands for 'clean', as in the few-step sampler, which lands there.
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
    """Distils the stream that `weights` hold into one of `groups` steps.

    Attributes:
      objective: 'shift' or 'window', see above.
      points: teacher steps per shift.
      guidance: classifier-free guidance of the teacher by the prompt, baked into the student; 1 or
        less switches it off.
      control_guidance: the same by the controls, against the null control.
      balance: p of the group weights c_out^(-2p). At 0 the cleanest group has nearly all of the
        loss, at 1 all groups count alike in clean latents.
      start_share: 'window' only: share of samples at the first point, the only one that a stream
        of `groups` steps evaluates.
      rollout: 'shift' only: most shifts that the student makes on its own, under the real controls,
        before the teacher shows the next one. 0 = recorded windows only.
      rollout_share: share of updates on such windows.
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

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in ('shift', 'window'):
            raise ValueError(
                f"stage.objective: got {self.objective!r}, expected 'shift' or 'window'"
            )
        for name, low, high in (
            ('points', 1, 250),
            ('guidance', 0, 100),
            ('control_guidance', 0, 100),
            ('balance', 0, 1),
            ('start_share', 0, 1),
            ('rollout', 0, 1000),
            ('rollout_share', 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f'stage.{name}: got {value}, expected {low} to {high}')
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

    def start(self, world, params, seed):
        params = super().start(world, params, seed)
        return {**params, 'teacher': params['transformer']}

    def axes(self, world):
        student = conversion.axes(world.tables['transformer'])
        return super().axes(world) | conversion.flatten({'teacher': student})

    def lengths(self, world):
        stream = world.cfg.stream
        return (stream.frames + self.rollout * stream.group_frames,)

    def loader(self, world, params, data, batch, seed, cache):
        stream = world.cfg.stream
        if (stream.solver, stream.steps) != ('lcm', stream.groups):
            raise ValueError(
                f'stream: got solver {stream.solver!r} with {stream.steps} steps, '
                f"expected 'lcm' with groups = {stream.groups} steps"
            )
        return super().loader(world, params, data, batch, seed, cache)

    def loss(self, world, params, batch, key):
        stream, keys = world.cfg.stream, jax.random.split(key, 6)
        table = tables(stream, world.cfg.scheduler, self.points, self.balance)
        controls = self.heard(batch['controls'], keys[4])
        batch = {**batch, 'controls': controls, 'ids': self.read(world, batch['ids'], keys[5])}
        text = world.embed_ids(params, batch['ids'])
        null_text = world.embed_ids(params, world.empty_ids)

        def student(params, x, level, control):
            return world.denoise(params, x, level, text, control).astype(jnp.float32)

        def teacher(x, level, control):
            level = jnp.broadcast_to(level, x.shape[:2])
            given = {**params, 'transformer': params['teacher']}
            null_control = jnp.broadcast_to(carry.control_table[-1], control.shape)
            conditions, scales = sampling.conditions(
                text,
                jnp.broadcast_to(null_text, text.shape),
                control,
                null_control,
                self.guidance,
                self.control_guidance,
            )
            return sampling.guide(world.denoise, given, x, level, conditions, scales)

        carry = self._start(world, params, batch, keys[0], text, table)
        carry, control = self._rolled(world, params, batch, keys[1], carry)
        control = carry.control_table[control]
        condition, x = jnp.split(carry.window, [stream.context], axis=1)

        def whole(x):
            return jnp.concatenate([condition, x], axis=1)

        def jumped(params, x, row):
            v = student(params, whole(x), row.levels, control)[:, stream.context :]
            x0 = _column(row.plan.signal) * x - _column(row.plan.sigma) * v
            return _column(row.skip) * x + _column(row.out) * x0

        def taught(x, row):
            v = teacher(whole(x), row.levels, control)[:, stream.context :]
            return solvers.step(row.plan, solvers.init(x), x, v)[1]

        if self.objective == 'shift':
            row = _row(table, jnp.zeros(1, jnp.int32))
            target = jax.lax.scan(
                lambda x, i: (taught(x, _row(table, i[None])), None), x, jnp.arange(self.points)
            )[0]
        else:
            point = jax.random.randint(keys[2], (x.shape[0],), 0, self.points)
            first = jax.random.uniform(keys[3], point.shape) < self.start_share
            point = jnp.where(first, 0, point)
            x = self._noised(world, batch, keys[0], table, point)[:, stream.context :]
            row, last = _row(table, point), point == self.points - 1
            reached = taught(x, row)
            target = jumped(params, reached, _row(table, jnp.where(last, 0, point + 1)))
            target = jnp.where(last[:, None, None, None, None], reached, target)
        error = jnp.square(jumped(params, x, row) - jax.lax.stop_gradient(target))
        groups = error.mean(axis=(0, 2, 3, 4)) / jnp.square(table.out[0])
        loss = (jnp.square(table.out[0]) * table.weights * groups).mean()
        groups = groups.reshape(stream.groups, -1).mean(axis=1)
        return loss, {f'x0_error_{g}': groups[g] for g in range(stream.groups)}

    def finish(self, world, params, loader):
        """Drops the teacher."""
        return world, {name: part for name, part in params.items() if name != 'teacher'}

    def _noised(self, world, batch, key, table, point):
        """Windows [B T H W C] of recorded latents at points [B] of the shift."""
        stream = world.cfg.stream
        clean = batch['latents'][:, : stream.frames].astype(jnp.float32)
        noise = jax.random.normal(key, clean.shape)
        return schedules.add_noise(world.schedule, clean, noise, jnp.asarray(table.levels)[point])

    def _start(self, world, params, batch, key, text, table):
        """The stream that shows a recorded window at the start of a shift."""
        size = batch['controls'].shape[0]
        first = jnp.zeros([size], jnp.int32)
        return swin.Carry(
            window=self._noised(world, batch, key, table, first),
            text=text,
            null_text=None,
            controls=batch['controls'][:, : world.cfg.stream.remembered],
            control_table=world.embed_controls(params),
            shift=first,
            key=jax.random.key_data(jax.random.split(key, size)),
        )

    def _rolled(self, world, params, batch, key, carry):
        """(carry, controls [B T] of its next shift) after some shifts of the student's own."""
        stream, keys = world.cfg.stream, jax.random.split(key, 3)
        size, shape = stream.group_frames, carry.window.shape

        def control(shift):
            begin = stream.binding_slot + shift * size
            return jax.lax.dynamic_slice_in_dim(batch['controls'], begin, size, axis=1)

        if not self.rollout:
            return carry, swin.bind(stream, carry.controls, control(0))
        plan = swin.shift_table(stream, world.cfg.scheduler)
        # A loop of a drawn length has no reverse derivative, and needs none.
        carry, params = jax.lax.stop_gradient((carry, params))

        def advance(shift, carry):
            noise = jax.random.normal(
                jax.random.fold_in(keys[0], shift),
                (shape[0], size * (1 + stream.renoise_condition), *shape[2:]),
            )
            append, renoise = jnp.split(noise, [size], axis=1)
            return swin.shift(
                stream,
                plan,
                world.schedule,
                world.denoise,
                params,
                carry,
                control(shift),
                None,
                append,
                renoise,
            )[0]

        count = jax.random.randint(keys[1], (), 1, self.rollout + 1)
        count = jnp.where(jax.random.uniform(keys[2]) < self.rollout_share, count, 0)
        carry = jax.lax.fori_loop(0, count, advance, carry)
        return carry, swin.bind(stream, carry.controls, control(count))


def _row(table: ShiftTables, point):
    """The rows of points [B] (or [1]) of a table, on the device; `weights` are left out."""
    rows = table._replace(weights=np.zeros(len(table.levels)))
    return jax.tree.map(lambda column: jnp.asarray(column)[point], rows)


def _column(coefficient):
    return coefficient[..., None, None, None]
