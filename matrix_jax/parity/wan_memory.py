"""Replays of the Wan 2.2 DiT with memory and camera, and of its action modules."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.dit import wan_memory
from matrix_jax.parity.record import Record, fast_jit, from_bcthw, to_bcthw
from matrix_jax.parity.wan_dit import action_module, action_params
from matrix_jax.weights import conversion


def read_dit(record: Record):
    """(config, parameters) of the recorded network."""
    cfg = wan_memory.Config.from_released(dict(record.config['model']))
    return cfg, conversion.to_jax(wan_memory.weights(cfg), record.weights, wan_memory.shapes(cfg))


def dit(record: Record) -> dict:
    """One call."""
    cfg, params = read_dit(record)
    config, inputs = record.config, record.inputs
    x, memory = from_bcthw(inputs['x']), 0
    batch, frames, height, width, _ = x.shape
    start, _ = config.get('predict_latent_idx') or (0, frames)
    positions = start + np.arange(frames)
    tokens = height * width // cfg.patch**2

    def per_token(level):
        return level if level.shape == (batch,) else rearrange(level, 'b (t n) -> b t n', n=tokens)

    level = per_token(inputs['t'])
    if 'x_memory' in inputs:
        earlier = from_bcthw(inputs['x_memory'])
        memory = earlier.shape[1]
        x = np.concatenate([earlier, x], axis=1)
        level = np.broadcast_to(
            level.reshape(batch, -1, level.shape[-1] if level.ndim > 1 else 1),
            (batch, frames, tokens),
        )
        level = np.concatenate([per_token(inputs['timestep_memory']), level], axis=1)
        positions = np.append(np.asarray(config['memory_latent_idx'], int), positions)
    camera = inputs.get('plucker_emb')
    mouse, keyboard = (
        _windows(cfg.actions, inputs, name, frames) for name in ('mouse_cond', 'keyboard_cond')
    )
    text = np.asarray(inputs['context'])
    text = text[None] if text.ndim == 2 else text

    v = fast_jit(
        lambda params: wan_memory.WanMemoryTransformer(cfg).apply(
            {'params': params},
            x,
            level,
            text,
            positions,
            None if camera is None else from_bcthw(camera),
            mouse,
            keyboard,
            memory,
        )
    )(params)
    return {'out': to_bcthw(v)}


def _windows(cfg, inputs, name: str, frames: int):
    """Windows of recorded actions, memory frames first; None if the recording has no actions or the
    network does not read them."""
    part = name.removesuffix('_cond')
    if inputs.get(name) is None or cfg is None or getattr(cfg, part) is None:
        return None
    return wan_memory.frame_windows(
        cfg, jnp.asarray(inputs[name]), frames, inputs.get(f'{name}_memory')
    )


def action(record: Record) -> dict:
    """An action module alone."""
    config, inputs = record.config, record.inputs
    net, memory = action_module(config['action']), config['memory_length']
    frames = config['tt']
    mouse, keyboard = (
        _windows(net.cfg, inputs, name, frames - memory) for name in ('mouse_cond', 'keyboard_cond')
    )
    x = rearrange(inputs['x'], 'b (t n) d -> b t n d', t=frames)
    first = [part if part is None else part[:, :1] for part in (mouse, keyboard)]
    params = action_params(net, record.weights, x[:, :1], *first)
    pattern = wan_memory.ActionFrames(frames, frames, memory=memory)
    y, _ = fast_jit(net.apply)({'params': params}, x, mouse, keyboard, pattern)
    return {'out': rearrange(np.asarray(y), 'b t n d -> b (t n) d')}


REPLAYS = {'dit': dit, 'action': action}
