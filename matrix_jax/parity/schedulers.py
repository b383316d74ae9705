"""Replays of schedules and single solver steps; the name of an output says what it is."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from matrix_jax.diffusion import schedules, solvers
from matrix_jax.parity.record import Record, frame_levels, from_btchw, to_btchw


def schedulers(record: Record) -> dict:
    """Tables and single solver steps."""
    replay = SolverReplay(record)
    outputs = {}
    for name in record.outputs:
        for pattern, make in STEPS:
            if part := re.fullmatch(pattern, name):
                outputs[name] = make(replay, *part.groups())
                break
    return outputs


class SolverReplay:
    """Schedules and solver steps of one recording; each method computes one output."""

    def __init__(self, record: Record):
        self.cfg = schedules.SchedulerConfig.from_released(record.config['sched'])
        self.abar = schedules.alphas_cumprod(self.cfg)
        self.inputs = record.inputs

    def video(self, name):
        return from_btchw(self.inputs[name])

    def table(self, spacing, steps):
        cfg = dataclasses.replace(self.cfg, spacing=spacing)
        return schedules.timesteps(cfg, int(steps))

    def lcm_table(self, steps, original):
        return schedules.lcm_timesteps(int(steps), int(original), self.cfg.train_steps)

    def grouped(self, steps, frames, groups):
        size = (int(frames) - 1) // int(groups)
        return schedules.grouped(self.table('trailing', steps), int(groups), size)

    def boundaries(self, phases):
        levels = np.arange(self.cfg.train_steps)
        return schedules.phase_boundary(levels, int(phases), self.cfg.train_steps)

    def lcm_coefficient(self, steps, original, phases, what):
        levels = self.inputs[f'lcm_{steps}_{original}_{phases}_t']
        boundary = self.boundaries(phases)[levels]
        skip, out = solvers.jump(self.abar, levels, boundary)
        return {'boundary': boundary, 'cskip': skip, 'cout': out}[what]

    def lcm_step(self, steps, original, phases, what):
        levels = self.inputs[f'lcm_{steps}_{original}_{phases}_t']
        x, v, noise = (self.video(name)[:1] for name in ('x', 'model_output', 'noise'))
        plan = solvers.lcm(self.cfg, levels[None], self.lcm_table(steps, original), int(phases))
        row = solvers.SolverTable(*(column[0] for column in plan))
        if what == 'denoised':
            skip, out = (
                self.lcm_coefficient(steps, original, phases, name) for name in ('cskip', 'cout')
            )
            row = row._replace(keep=np.float32(skip), clean=np.float32(out), noise=0 * row.noise)
        return to_btchw(solvers.step(row, solvers.init(x), x, v, noise)[1])

    def noised(self, family, what):
        uniform = family in ('ddim', 'dpm')
        levels = frame_levels(self.inputs['t_uniform' if uniform else 't_perframe'])
        function = {'add_noise': schedules.add_noise, 'velocity': schedules.velocity}[what]
        return to_btchw(
            function(schedules.make(self.cfg), self.video('x0'), self.video('noise'), levels)
        )

    def uniform(self, solver, steps, index, order, what):
        levels, index = schedules.timesteps(self.cfg, int(steps))[:, None], int(index)
        back = levels[index - 1] if order == 'second' else None
        return self.step(solver, steps, levels[index], back, what)

    def window(self, solver, steps, which, order, what):
        name = f'swin_{steps}_{which}'
        back = self.inputs[f'{name}_tback'] if order == 'second' else None
        return self.step(
            {'swin': 'dpm', 'swinddim': 'ddim'}[solver], steps, self.inputs[f'{name}_t'], back, what
        )

    def window_row(self, steps, index, what):
        rows, index = self.inputs['swin2_grouped_t'], int(index)
        return self.step('dpm', steps, rows[index], rows[index - 1] if index else None, what)

    def step(self, solver, steps, level, back, what):
        following = level - self.cfg.train_steps // int(steps)
        history = self.video('old_pred') if back is not None else 0 * self.video('x')
        plan = (
            solvers.ddim(self.abar, level, following)
            if solver == 'ddim'
            else solvers.dpm(self.abar, level, following, back)
        )
        x0, x = solvers.step(
            plan, history, self.video('x'), self.video('model_output'), self.video('noise')
        )
        return to_btchw({'prev': x, 'x0': x0}[what])


STEPS = (
    (r'table_alphas_cumprod_\w+', lambda replay: replay.abar),
    (r'table_(trailing|leading|linspace)_timesteps_(\d+)', SolverReplay.table),
    (r'table_lcm_timesteps_(\d+)_of_(\d+)', SolverReplay.lcm_table),
    (r'table_grouped_(\d+)steps_(\d+)frames_(\d+)groups', SolverReplay.grouped),
    (r'table_lcm_all_boundary_(\d+)', SolverReplay.boundaries),
    (r'table_lcm_(\d+)_(\d+)_(\d+)_(boundary|cskip|cout)', SolverReplay.lcm_coefficient),
    (r'lcm_(\d+)_(\d+)_(\d+)_(denoised|prev)', SolverReplay.lcm_step),
    (r'(ddim|dpm|swin|swinddim|lcm)_(add_noise|velocity)', SolverReplay.noised),
    (r'(ddim|dpm)_(\d+)_i(\d+)_(?:(first|second)_)?(prev|x0)', SolverReplay.uniform),
    (r'(swin|swinddim)_(\d+)_([a-z]+)_(?:(first|second)_)?(prev|x0)', SolverReplay.window),
    (r'swin2_(\d+)_row(\d+)_(prev|x0)', SolverReplay.window_row),
)
