"""Replays of segments with memory: the solver's tables and steps, and the sampling loop."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from matrix_jax.diffusion import unipc
from matrix_jax.parity.record import Record, fast_jit, from_bcthw, to_bcthw
from matrix_jax.parity.wan_memory import read_dit
from matrix_jax.stream import memory
from matrix_jax.stream.base import player_keys
from matrix_jax.worlds.matrix_game_3 import network


def scheduler_tables(record: Record) -> dict:
    """Sigmas and levels of runs, and the table before any shift."""
    even = np.linspace(unipc.LARGEST, 0, record.config['num_train_timesteps'])
    outputs = {'train.sigmas': even, 'train.sigma_max_min': even[[0, -1]]}
    for name in record.outputs:
        if part := re.fullmatch(r'n(\d+)_shift([\d.]+)\.(sigmas|timesteps)', name):
            cfg = unipc.Config(int(part[1]), float(part[2]))
            outputs[name] = getattr(unipc, part[3])(cfg)
    return outputs


def solver_steps(record: Record) -> dict:
    """Steps of the solver on recorded predictions."""
    config, inputs = record.config, record.inputs
    table = unipc.step_table(unipc.Config(config['num_inference_steps'], config['shift']))
    x, outputs = jnp.asarray(inputs['sample0']), {}
    history, step = unipc.init(x), fast_jit(unipc.step)
    for i in range(config['num_inference_steps']):
        row = unipc.UniPCTable(*(column[i] for column in table))
        history, x = step(row, history, x, inputs[f'v{i}'])
        outputs |= {f'corrected{i}': history.latents, f'x0_{i}': history.clean, f'sample{i + 1}': x}
    return outputs


def sampling(record: Record) -> dict:
    """The loop over segments with recorded noise."""
    config, inputs = record.config, record.inputs
    dit, params = read_dit(record)
    params = {'transformer': params}
    image = jnp.moveaxis(jnp.asarray(inputs['img_latent']), 0, -1)[None]
    pixels = config['height'] // image.shape[2]
    net = network(dit, pixels)
    guidance = config['guide_scale'] if config['use_base_model'] else None
    cfg = memory.Config(
        capacity=16 + 10 * config['num_clips'],
        guidance=guidance or 1.0,
        overlap=config['past_frame'] // 4,
        first=1 + (config['first_clip_frame'] - 1) // 4,
        new=(config['clip_frame'] - config['past_frame']) // 4,
        solver=unipc.Config(config['num_inference_steps'], config['shift']),
    )
    text, null = (jnp.asarray(inputs[name])[None] for name in ('context', 'neg_context'))
    keys = player_keys(np.zeros(2, np.uint32), 1)
    carry = memory.initial_carry(cfg, net, memory.Cond(image, text, null), keys)
    actions = np.concatenate([inputs['keyboard'], inputs['mouse']], axis=-1)[None]
    calls = [
        fast_jit(lambda *args, make=make: make(cfg, net, *args))
        for make in (memory.first_segment, memory.next_segment)
    ]
    # Single calls, for the recorded velocities.
    denoise = fast_jit(net.denoise)
    remove = fast_jit(lambda carry, segment: memory.without_conditions(net, carry, segment))
    outputs, used = {}, 0
    for index in range(config['num_clips']):
        count = cfg.segment_actions if index else cfg.first_actions
        before, control = carry, actions[:, used : used + count]
        used += count
        noise = from_bcthw(inputs[f'clip{index}.noise'])
        carry, x, trace = calls[min(index, 1)](params, carry, control, noise)
        made = _trace(cfg, trace, index)
        level = np.where(made['level'], unipc.timesteps(cfg.solver)[0], 0)[None].astype(np.float32)
        made['step0.model_out'] = to_bcthw(denoise(params, trace.latents[0], level, trace.segment))
        if cfg.guidance > 1:
            null = remove(before, trace.segment)
            made['step0.model_out_null'] = to_bcthw(denoise(params, trace.latents[0], level, null))
        tokens = x.shape[2] * x.shape[3] // dit.patch**2
        recorded = unipc.timesteps(cfg.solver)[_recorded_step(record, index, cfg)]
        made['t_tokens'] = np.repeat(np.where(made.pop('level'), recorded, 0), tokens)[None]
        made['decoded_latents'] = to_bcthw(x)
        outputs |= {f'clip{index}.{name}': value for name, value in made.items()}
    return outputs


def _recorded_step(record: Record, index: int, cfg: memory.Config) -> int:
    """The step for which the recording has the level of each token."""
    recorded = record.outputs.get(f'clip{index}.t_tokens')
    levels = unipc.timesteps(cfg.solver)
    return 0 if recorded is None else int(np.abs(levels - recorded.max()).argmin())


def _trace(cfg: memory.Config, trace: memory.Trace, index: int) -> dict:
    """Internals of a segment in the layout of the recording; `level` is a mask of noisy frames."""
    frames = trace.latents.shape[2]
    start = memory.first_latent(cfg, index)
    made = {
        'level': np.arange(frames) >= (cfg.overlap if index else 1),
        'timesteps': unipc.timesteps(cfg.solver),
        'predict_latent_idx': np.array([start, start + frames]),
        'plucker_mean_over_hw': trace.segment.rays[0].mean(axis=(1, 2))[:, ::64],
    }
    made |= {f'step{step}.x_in': to_bcthw(x) for step, x in enumerate(trace.latents)}
    if trace.retrieved is not None:
        count = trace.retrieved.shape[1]
        made |= {
            'selected_raw': trace.retrieved[0],
            'x_memory': to_bcthw(trace.segment.memory),
            'memory_latent_idx': trace.segment.positions[0, :count],
        }
    return made


REPLAYS = {'scheduler_tables': scheduler_tables, 'unipc': solver_steps, 'sampling': sampling}
