"""Replays of the autoregressive stream: noise schedule, sampler and benchmark actions."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.diffusion import flow
from matrix_jax.dit import wan
from matrix_jax.parity.record import Record, fast_jit, from_bcthw, from_btchw, to_bcthw
from matrix_jax.parity.wan_dit import layer_caches
from matrix_jax.stream import causal
from matrix_jax.weights import conversion
from matrix_jax.worlds.matrix_game_2 import network


def scheduler(record: Record) -> dict:
    """Tables, warped step lists and conversions, one level per sample."""
    cfg = flow.Config(
        shift=record.config['shift'], train_steps=record.config['num_train_timesteps']
    )
    table, inputs = flow.table(cfg), record.inputs
    levels = inputs['t']
    sigmas = flow.sigma_at(table, levels)
    outputs = {
        'sigmas': table.sigmas,
        'timesteps': table.levels,
        'training_weights': table.weights,
        'sigma_nearest': sigmas,
        'training_weight_at_t': flow.weight_at(table, levels),
        'add_noise': flow.add_noise(sigmas, inputs['x0'], inputs['noise']),
        'x0_from_flow': flow.x0_from_v(sigmas, inputs['xt'], inputs['flow']),
        'flow_from_x0': flow.v_from_x0(sigmas, inputs['xt'], inputs['x0']),
        'euler_step': flow.euler(
            sigmas, flow.next_sigma(table, levels), inputs['xt'], inputs['flow']
        ),
    }
    for mode, steps in record.config['lists'].items():
        outputs[f'warped_{mode}'] = flow.warp(cfg, steps)
        outputs[f'sigma_at_warped_{mode}'] = flow.sigma_at(table, outputs[f'warped_{mode}'])
    return outputs


def sampler(record: Record) -> dict:
    """The streaming loop on recorded noise, after an initial clip if there is one."""
    config, inputs = record.config, record.inputs
    cfg = wan.Config.from_released(
        config['model'] | {'image_dim': config['clip_dim'], 'image_length': config['clip_tokens']}
    )
    params = {'transformer': conversion.to_jax(wan.weights(cfg), record.weights, wan.shapes(cfg))}
    schedule = flow.Config(shift=config['timestep_shift'])
    size = config['num_frame_per_block']
    stream = causal.Config(
        frames=size,
        steps=tuple(config['denoising_step_list']),
        context_level=config['context_noise'],
        window=cfg.actions.span,
        ratio=cfg.actions.ratio,
    )
    table, levels = causal.step_table(stream, schedule), flow.table(schedule)
    actions = [inputs[name] for name in ('keyboard_cond', 'mouse_cond') if name in inputs]
    actions = np.concatenate(actions, axis=-1)
    initial = from_bcthw(inputs['initial_latent']) if 'initial_latent' in inputs else None
    noise = from_bcthw(inputs['noise'])
    initial_blocks = 0 if initial is None else initial.shape[1] // size
    blocks = initial_blocks + noise.shape[1] // size
    renoise = from_btchw(inputs['renoise']).reshape(
        blocks - initial_blocks, len(stream.steps) - 1, 1, size, *noise.shape[2:]
    )
    calls = len(table.level) * (blocks - initial_blocks) + initial_blocks
    net = network(cfg)

    def denoise(params, caches, x, level, cond, actions):
        caches, log, count = caches
        v, caches = net.denoise(params, caches, x, level, cond, actions)
        x0 = flow.x0_from_v(flow.sigma_at(levels, level), x, v)
        return v, (caches, (log[0].at[count].set(x0), log[1].at[count].set(level[0, 0])), count + 1)

    def read(params, cond):
        shape = (calls, 1, size, *cond.latents.shape[2:4], net.channels)
        return net.read(params, cond), (jnp.zeros(shape), jnp.zeros([calls])), jnp.int32(0)

    recording = net._replace(
        denoise=denoise,
        read=read,
        advance=lambda caches, frames: (net.advance(caches[0], frames), *caches[1:]),
    )

    @fast_jit
    def run_blocks(params):
        cond = causal.Cond(
            latents=from_bcthw(inputs['cond_concat']), image=inputs['visual_context']
        )
        carry = causal.initial_carry(
            stream, recording, params, cond, jax.random.split(jax.random.key(0), 1)
        )
        latents = []
        for block in range(blocks):
            if block:
                last = stream.first_actions + block * stream.block_actions
                control = actions[:, last - stream.block_actions : last]
            else:
                carry, control = causal.pad_first_block(
                    stream, carry, actions[:, : stream.first_actions]
                )
            if block < initial_blocks:
                latents.append(initial[:, block * size : (block + 1) * size])
                carry = causal.read_block(
                    stream, table, recording, params, carry, control, latents[-1]
                )
            else:
                start = (block - initial_blocks) * size
                carry, block_latents = causal.make_block(
                    stream,
                    table,
                    recording,
                    params,
                    carry,
                    control,
                    noise[:, start : start + size],
                    renoise[block - initial_blocks],
                )
                latents.append(block_latents)
        return jnp.concatenate(latents, axis=1), carry.caches

    latents, (caches, (x0, called), _) = run_blocks(params)
    grid = noise.shape[2] // cfg.patch, noise.shape[3] // cfg.patch
    first_layer = layer_caches(cfg, caches.replace(start=caches.start - size), size, grid, 0)
    return {
        'cache_k_layer0': first_layer['cache_k'],
        'latents': to_bcthw(latents),
        'call_timesteps': called,
        'pred_x0_all_calls': np.moveaxis(np.asarray(x0), -1, 2),
        'denoising_step_list_warped': flow.warp(schedule, stream.steps),
    }


def bench_actions(record: Record) -> dict:
    """Action sequences of the published benchmark, drawn by Python's random generator."""
    outputs = {}
    for name in record.outputs:
        part = re.fullmatch(r'(\w+)_seed(\d+)_frames(\d+)_(keyboard|mouse)_condition', name)
        vocabulary = KeyboardMouseVocabulary(part[1])
        vectors = vocabulary.encode(vocabulary.random(int(part[3]), int(part[2])))
        keys = len(vocabulary.mode.keys)
        outputs[name] = vectors[:, :keys] if part[4] == 'keyboard' else vectors[:, keys:]
    return outputs


REPLAYS = {'scheduler': scheduler, 'sampler': sampler, 'bench_actions': bench_actions}
