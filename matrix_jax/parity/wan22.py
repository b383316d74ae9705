"""Replays of the autoencoder of Wan 2.2 as Matrix-Game 3.0 runs it."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from matrix_jax.parity.record import Record, clip, torch_clip
from matrix_jax.parity.wan import compiled, halves, slots
from matrix_jax.vae import wan
from matrix_jax.weights import conversion

ARGUMENTS = (
    'dim',
    'dec_dim',
    'z_dim',
    'dim_mult',
    'num_res_blocks',
    'temperal_downsample',
    'attn_scales',
    'dropout',
)


def autoencoder(record: Record) -> dict:
    """Encoding of a clip; decoding of its latents and of others, the latter also as the first
    release of Wan 2.2 does."""
    cfg, params = _vae(record)
    plain = dataclasses.replace(cfg, time_sees_first=False, norm_eps=wan.Config.norm_eps)
    latents = compiled(lambda params, frames: wan.scaled(cfg, wan.encode(cfg, params, frames)[0]))(
        params, clip(record.inputs['video'])
    )
    decode = compiled(lambda params, latents: wan.decode(cfg, params, wan.unscaled(cfg, latents)))
    other = clip(record.inputs['z'])
    return {
        'latent': torch_clip(latents),
        'decode_raw': torch_clip(decode(params, latents)),
        'decode_z_raw': torch_clip(decode(params, other)),
        'upstream_wan22_decode_z_raw': torch_clip(
            compiled(functools.partial(wan.decode, plain))(params, wan.unscaled(cfg, other))
        ),
    }


def stream(record: Record) -> dict:
    """Decoding of clips that go on, in chunks."""
    cfg, params = _vae(record)
    cfg = dataclasses.replace(cfg, chunk=record.config['segment_size'])
    got, cache = {}, None
    for index in range(len(record.config['chunks'])):
        latents = wan.unscaled(cfg, clip(record.inputs[f'chunk{index}.z']))
        cache, frames = compiled(functools.partial(wan.step, cfg))(params, cache, latents)
        got[f'chunk{index}.video'] = torch_clip(jnp.clip(frames, -1, 1))
    leaves = conversion.flatten(cache)
    shapes = [leaves[path].shape for path in slots(cfg)]
    got['cache_shapes_flat'] = np.array([(b, c, t, h, w) for b, t, h, w, c in shapes], np.float32)
    return got


def _vae(record: Record):
    told = record.config['vae']
    sizes = {name: told[name] for name in ARGUMENTS}
    for name in ('dim', 'dec_dim'):  # a pruned network is declared with its full widths
        sizes[name] = round(sizes[name] * (1 - told['pruning_rate']))
    cfg = wan.Config.from_released(
        sizes
        | {
            'latents_mean': record.inputs['mean'].tolist(),
            'latents_std': record.inputs['std'].tolist(),
            'patch_size': 2,
            'residual': True,
            'time_sees_first': True,
            'norm_eps': 1e-6,
        }
    )
    return cfg, halves(cfg, record)


REPLAYS = {'vae': autoencoder, 'vae_stream': stream, 'lightvae_stream': stream}
