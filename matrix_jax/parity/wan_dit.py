"""Replays of the Wan DiT and its action modules, on whole clips and block by block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.dit import wan, wan_actions
from matrix_jax.nn.kv_cache import Blocks, KVCache, Ring
from matrix_jax.nn.rope import frequencies, rotate, rotations, rotations_3d
from matrix_jax.parity.record import Record, fast_jit, from_bcthw, to_bcthw
from matrix_jax.weights import conversion


def action(record: Record) -> dict:
    """One action module on a whole clip."""
    net, params, windows = _actions(record)
    frames = record.config['grid'][0]
    masks = {
        'y_causal': Blocks(
            frames, record.config['num_frame_per_block'], record.config['local_attn_size']
        ),
        'y_bidirectional': Blocks(frames, frames),
    }
    x, mouse, keyboard = (_tokens(record, record.inputs['x']), *windows(0, frames))
    outputs = {
        name: _flat(fast_jit(net.apply)({'params': params}, x, mouse, keyboard, mask)[0])
        for name, mask in masks.items()
    }
    return outputs | {'block_causal_mask': masks['y_causal'].visible()}


def action_cached(record: Record) -> dict:
    """One action module block by block; each block is computed twice, on the same cache slots."""
    net, params, windows = _actions(record)
    config, inputs = record.config, record.inputs
    (frames, rows, columns), size = config['grid'], config['local_attn_size']
    count, cfg = config['num_frame_per_block'], net.cfg
    caches = [
        KVCache(*(jnp.zeros((1, size, sites, cfg.heads, sum(cfg.axes))) for _ in 'kv'))
        for sites in (rows * columns, 1)
    ]
    caches[0] = caches[0] if cfg.mouse else None

    @fast_jit
    def call(start, x, mouse, keyboard, caches):
        ring = Ring(start, count, size)
        y, new = net.apply({'params': params}, x, mouse, keyboard, ring, caches)
        return y, [past and ring.put(past, now) for past, now in zip(caches, new, strict=True)]

    outputs = {}
    for block in range(frames // count):
        span = slice(block * count, (block + 1) * count)
        for index, x in enumerate((inputs['x'] + 0.3 * inputs['x_delta'], inputs['x'])):
            y, caches = call(
                jnp.int32(span.start),
                _tokens(record, x)[:, span],
                *windows(span.start, count),
                caches,
            )
            outputs[f'y_block{block}_call{index}'] = _flat(y)
        ends = [span.stop, min(span.stop, size)]
        outputs[f'idx_block{block}'] = np.array(ends + (ends if cfg.mouse else [0, 0]))
    ring = Ring(jnp.int32(span.start), count, size)
    for name, cache in zip(('mouse', 'keyboard'), caches, strict=True):
        if cache:
            outputs |= {
                f'{name}_cache_{part}': leaf
                for part, leaf in _action_cache(cfg, ring, cache).items()
            }
    return outputs


def dit_whole(record: Record) -> dict:
    """A whole clip, block-causal or bidirectional, with the output of each layer."""
    cfg, params = _dit(record)
    inputs, config = record.inputs, record.config
    block = config.get('num_frame_per_block')
    parts = ('patch', 'time_projection', 'image_embedding')

    @fast_jit
    def call(params, *args):
        return wan.WanTransformer(cfg).apply(
            {'params': params},
            *args,
            block=block,
            mutable='intermediates',
            capture_intermediates=lambda module, method: (
                method == '__call__'
                and (type(module) is wan.Block or module.path in [(part,) for part in parts])
            ),
        )

    latents = from_bcthw(inputs['x'])
    v, variables = call(
        params,
        latents,
        inputs['t'],
        from_bcthw(inputs['cond_concat']),
        inputs['visual_context'],
        inputs.get('mouse_cond'),
        inputs['keyboard_cond'],
    )
    intermediates = variables['intermediates']
    patches, modulation, image = (intermediates[part]['__call__'][0] for part in parts)
    rows, frames = latents.shape[2] // cfg.patch, latents.shape[1]
    outputs = {
        'flow': to_bcthw(v),
        'img_context': image,
        'patch_embedding': rearrange(patches, 'b t (h w) d -> b d t h w', h=rows),
        'time_projection': rearrange(modulation, 'b t d -> (b t) d'),
    }
    for name, (start, _) in cfg.segments.items():
        for layer, tokens in enumerate(intermediates[name]['__call__'][0][0], start):
            outputs[f'after_block{layer}'] = _flat(tokens)
    if block:
        mask = Blocks(frames, block, cfg.local).visible()
        outputs['action_mask'] = mask
        outputs['self_attn_mask'] = np.kron(mask, np.ones([patches.shape[2]] * 2))
    return outputs


def dit_cached(record: Record) -> dict:
    """Block by block: two denoising calls, then the clean pass."""
    cfg, params = _dit(record)
    inputs, config = record.inputs, record.config
    count, net = config['num_frame_per_block'], wan.WanTransformer(cfg)
    calls = [
        (from_bcthw(inputs[f'x_noisy{i}']), level) for i, level in enumerate(config['timesteps'])
    ]
    calls.append((from_bcthw(inputs['x0']), float(config['context_noise'])))
    cond = from_bcthw(inputs['cond_concat'])
    batch, frames, height, width, _ = cond.shape
    sites = height * width // cfg.patch**2
    call = fast_jit(functools.partial(net.apply, method='cached'))
    caches = fast_jit(functools.partial(net.apply, method='read_image'))(
        {'params': params}, inputs['visual_context'], wan.init_caches(cfg, batch, height, width)
    )
    outputs = {}
    for block in range(frames // count):
        span = slice(block * count, (block + 1) * count)
        actions = [
            part if part is None else wan.windows(part, span.start, count)
            for part in (inputs.get('mouse_cond'), inputs['keyboard_cond'])
        ]
        for index, (latents, level) in enumerate(calls):
            levels = np.full((batch, count), level, np.float32)
            v, caches = call(
                {'params': params}, caches, latents[:, span], levels, cond[:, span], *actions
            )
            outputs[f'flow_block{block}_call{index}'] = to_bcthw(v)
        ends = np.array([span.stop, min(span.stop, cfg.local)])
        outputs[f'idx_block{block}'] = np.concatenate(
            [ends * sites, ends * bool(cfg.actions.mouse), ends]
        )
        caches, last = wan.advance(caches, count), caches
    grid = height // cfg.patch, width // cfg.patch
    for name in record.outputs:
        if '_layer' in name:
            kind, layer = name.split('_layer')
            outputs[name] = layer_caches(cfg, last, count, grid, int(layer))[kind]
    return outputs


def layer_caches(cfg: wan.Config, caches: wan.Caches, count: int, grid, layer: int) -> dict:
    """Caches of a layer in the layout of the reference."""
    name, start = next(
        (name, start) for name, (start, stop) in cfg.segments.items() if start <= layer < stop
    )
    past = jax.tree.map(lambda leaf: leaf[layer - start], caches.runs[name])
    ring, action_ring = (Ring(caches.start, count, cfg.local, sink) for sink in (cfg.sink, 0))
    cached, frames = _in_order(ring, past.video)
    k = rotate(cached.k, rotations_3d(frames, *grid, cfg.head_dim))
    outputs = {'cache_k': k, 'cache_v': cached.v}
    outputs = {
        kind: rearrange(_padded(leaf, cfg.local), 'b s n k e -> b (s n) k e')
        for kind, leaf in outputs.items()
    }
    outputs |= {'cross_k': past.image.k[:, 0], 'cross_v': past.image.v[:, 0]}
    for kind, cache in (('mouse', past.mouse), ('keyboard', past.keyboard)):
        if cache:
            outputs |= {
                f'{kind}_cache_{part}': leaf
                for part, leaf in _action_cache(cfg.actions, action_ring, cache).items()
            }
    return outputs


def _action_cache(cfg: wan_actions.ActionConfig, ring: Ring, cache: KVCache) -> dict:
    """Keys and values of an action cache in the layout of the reference, [B*N S K E]."""
    cached, frames = _in_order(ring, cache)
    rotation = rotations(frames, frequencies(cfg.axes[0] // 2, cfg.period))
    k = rotate(cached.k, tuple(part[:, None] for part in rotation))
    return {
        name: rearrange(_padded(leaf, ring.size), 'b s n k e -> (b n) s k e')
        for name, leaf in (('k', k), ('v', cached.v))
    }


def _in_order(ring: Ring, cache: KVCache):
    """(filled slots, their frame numbers), oldest frame first."""
    frames = np.asarray(ring.slot_frames())[: int(ring.end)]
    order = np.argsort(frames)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, order], cache), frames[order]


def _padded(leaf, slots: int):
    return np.pad(leaf, [(0, 0), (0, slots - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2))


def _tokens(record: Record, x):
    """Recorded tokens [B T*N D] -> [B T N D]."""
    return rearrange(x, 'b (t n) d -> b t n d', t=record.config['grid'][0])


def _flat(x):
    return rearrange(np.asarray(x), 'b t n d -> b (t n) d')


def _actions(record: Record):
    """(network, parameters, `(start, count)` -> windows of mouse and keyboard)."""
    inputs, net = record.inputs, action_module(record.config['action_config'])
    cfg = net.cfg

    def windows(start, count):
        return [
            part if part is None else wan.windows(part, start, count, cfg.ratio, cfg.span)
            for part in (inputs.get('mouse_cond'), inputs['keyboard_cond'])
        ]

    x = _tokens(record, inputs['x'])[:, :1]
    return net, action_params(net, record.weights, x, *windows(0, 1)), windows


def action_module(config: dict) -> wan_actions.ActionBlock:
    """The module of a recorded `action_config`."""
    width = config['img_hidden_size']
    cfg = wan.Config.from_released(
        {
            'dim': width,
            'num_heads': 1,
            'num_layers': 1 + max(config['blocks']),
            'action_config': config,
        }
    ).actions
    return wan_actions.ActionBlock(cfg, width)


def action_params(net: wan_actions.ActionBlock, weights, x, mouse, keyboard) -> dict:
    """Parameters of an action module from recorded ones.

    Args:
      net: the module.
      weights: recorded weights.
      x, mouse, keyboard: tokens and windows of one latent frame, for their shapes.
    """
    tensors = {f'blocks.0.action_model.{key}': tensor for key, tensor in weights.items()}
    shapes = jax.eval_shape(
        lambda key: net.init(key, x, mouse, keyboard, Blocks(1, 1)), jax.random.key(0)
    )['params']
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shapes)
    rows = wan_actions.action_rows(net.cfg, 'blocks.{i}.action_model', 'layers', (0, 1))
    params = conversion.to_jax(rows, tensors, {'layers': stacked})['layers']
    return jax.tree.map(lambda leaf: leaf[0], params)


def _dit(record: Record):
    config = record.config
    cfg = wan.Config.from_released(
        dict(config['model'])
        | {'image_dim': config['clip_dim'], 'image_length': config['clip_tokens']}
    )
    return cfg, conversion.to_jax(wan.weights(cfg), record.weights, wan.shapes(cfg))


REPLAYS = {
    'action': action,
    'action_cached': action_cached,
    'dit_causal': dit_whole,
    'dit_bidirectional': dit_whole,
    'dit_cached': dit_cached,
}
