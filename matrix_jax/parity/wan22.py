"""Replays of the Wan 2.2 autoencoder: with the settings of Matrix-Game 3.0, and of diffusers."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from matrix_jax.parity.record import Record, fast_jit, from_bcthw, to_bcthw
from matrix_jax.parity.wan import decoder_cache_paths, read_params
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
    """Encoding of a clip, decoding of its latents and of recorded ones.

    The recorded latents are also decoded with the settings of the first release of Wan 2.2.
    """
    cfg, params = _vae(record)
    plain = dataclasses.replace(cfg, time_sees_first=False, norm_eps=wan.Config.norm_eps)
    latents = fast_jit(lambda params, frames: wan.scaled(cfg, wan.encode(cfg, params, frames)[0]))(
        params, from_bcthw(record.inputs['video'])
    )
    decode = fast_jit(lambda params, latents: wan.decode(cfg, params, wan.unscaled(cfg, latents)))
    other = from_bcthw(record.inputs['z'])
    return {
        'latent': to_bcthw(latents),
        'decode_raw': to_bcthw(decode(params, latents)),
        'decode_z_raw': to_bcthw(decode(params, other)),
        'upstream_wan22_decode_z_raw': to_bcthw(
            fast_jit(functools.partial(wan.decode, plain))(params, wan.unscaled(cfg, other))
        ),
    }


def stream(record: Record) -> dict:
    """Decoding in chunks with a carried cache."""
    cfg, params = _vae(record)
    cfg = dataclasses.replace(cfg, chunk=record.config['segment_size'])
    outputs, cache = {}, None
    for index in range(len(record.config['chunks'])):
        latents = wan.unscaled(cfg, from_bcthw(record.inputs[f'chunk{index}.z']))
        cache, frames = fast_jit(functools.partial(wan.step, cfg))(params, cache, latents)
        outputs[f'chunk{index}.video'] = to_bcthw(jnp.clip(frames, -1, 1))
    leaves = conversion.flatten(cache)
    shapes = [leaves[path].shape for path in decoder_cache_paths(cfg)]
    outputs['cache_shapes_flat'] = np.array(
        [(b, c, t, h, w) for b, t, h, w, c in shapes], np.float32
    )
    return outputs


def autoencoder_kl_wan(record: Record) -> dict:
    """Encoding of a clip, and decoding of other latents, by the autoencoder of diffusers."""
    cfg = wan.Config.from_released(record.config['model'])
    params = read_params(cfg, record)
    latents = fast_jit(lambda params, frames: wan.scaled(cfg, wan.encode(cfg, params, frames)[0]))(
        params, from_bcthw(record.inputs['video'])
    )
    frames = fast_jit(lambda params, latents: wan.decode(cfg, params, wan.unscaled(cfg, latents)))(
        params, from_bcthw(record.inputs['z'])
    )
    return {'latent': to_bcthw(latents), 'frames': to_bcthw(jnp.clip(frames, -1, 1))}


def _vae(record: Record):
    config = record.config['vae']
    sizes = {name: config[name] for name in ARGUMENTS}
    for name in ('dim', 'dec_dim'):  # the config of a pruned network has the full widths
        sizes[name] = round(sizes[name] * (1 - config['pruning_rate']))
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
    return cfg, read_params(cfg, record)


REPLAYS = {
    'vae': autoencoder,
    'vae_stream': stream,
    'lightvae_stream': stream,
    'autoencoder_kl_wan': autoencoder_kl_wan,
}
