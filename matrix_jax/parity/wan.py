"""Replays of the Wan 2.1 autoencoder, the image encoder and image conditioning."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.encoders import clip_image
from matrix_jax.parity.record import Record, fast_jit, from_bcthw, to_bcthw, to_btchw
from matrix_jax.vae import condition, wan
from matrix_jax.weights import conversion


def autoencoder(record: Record) -> dict:
    """Encoding of a clip and of an image; decoding whole and in chunks."""
    cfg, params = _vae(record)
    frames = from_bcthw(record.inputs['video'])
    latents = wan.unscaled(cfg, from_bcthw(record.inputs['z']))
    encode = fast_jit(lambda params, frames: wan.scaled(cfg, wan.encode(cfg, params, frames)[0]))
    outputs = {
        'latent_normalized': to_bcthw(encode(params, frames)),
        'latent_single_image': to_bcthw(encode(params, frames[:, :1])),
        'decoded_unclamped': to_bcthw(
            fast_jit(functools.partial(wan.decode, cfg))(params, latents)
        ),
    }
    chunk, cache = record.config['chunk'], None
    prefill = fast_jit(functools.partial(wan.prefill, cfg))
    step = fast_jit(functools.partial(wan.step, cfg))
    for index, start in enumerate(range(0, latents.shape[1], chunk)):
        part = latents[:, start : start + chunk]
        cache, frames = step(params, cache, part) if index else prefill(params, part)
        outputs[f'stream_pixels_chunk{index}'] = to_btchw(jnp.clip(frames, -1, 1))
    leaves = conversion.flatten(cache)
    outputs['n_cache_used'] = len(leaves)
    for slot, path in enumerate(decoder_cache_paths(cfg)):
        outputs[f'stream_cache_{slot:02}_final'] = to_bcthw(leaves[path])
    return outputs


def decoder_cache_paths(cfg: wan.Config) -> list[str]:
    """Paths of the decoder's cache, in the order of the reference."""

    def resnets(where, count):
        return [f'{where}/resnet_{i}/conv{part}' for i in range(count) for part in (1, 2)]

    paths = ['conv_in', *resnets('mid', 2)]
    for level in range(cfg.levels):
        paths += resnets(f'up_{level}', cfg.layers + 1)
        if level < cfg.levels - 1 and cfg.doubles_time[level]:
            paths.append(f'up_{level}/time')
    return [*paths, 'conv_out']


def cond_concat(record: Record) -> dict:
    """The condition channels of an image."""
    cfg, params = _vae(record)
    config, photo = record.config, record.inputs['image_uint8'].astype(np.uint8)
    size = config['height'], config['width']
    top, left, bottom, right = condition.crop(*photo.shape[:2], *size)
    image = condition.pixels(condition.fit(photo, *size))[None]
    channels = fast_jit(
        lambda params, image: condition.condition(cfg, params, image, config['num_output_frames'])
    )(params, image)
    channels = to_bcthw(channels)
    return {
        'cropped_hw': np.array([bottom - top, right - left]),
        'image_normalized': to_bcthw(image[:, None]),
        'cond_concat': channels,
        'img_cond': channels[:, cfg.temporal_compression :],
    }


def clip_visual(record: Record) -> dict:
    """The preprocessed image, and its features."""
    cfg = clip_image.Config.from_released(record.config['vision'])
    params = conversion.to_jax(clip_image.weights(cfg), record.weights, clip_image.shapes(cfg))
    image = from_bcthw(record.inputs['video'])[:, 0]
    pixels = fast_jit(functools.partial(clip_image.pixels, cfg))(image)
    return {
        'clip_pixels': rearrange(np.asarray(pixels), 'b h w c -> b c h w'),
        'visual_context': fast_jit(functools.partial(clip_image.encode, cfg))(params, image),
    }


ARGUMENTS = ('dim', 'z_dim', 'dim_mult', 'num_res_blocks', 'temperal_downsample')


def _vae(record: Record):
    cfg = wan.Config.from_released({name: record.config[name] for name in ARGUMENTS})
    return cfg, read_params(cfg, record)


def read_params(cfg: wan.Config, record: Record) -> dict:
    """Parameters of the encoder, the decoder or both, as the recording has them."""
    found = {
        part: shapes
        for part, shapes in wan.shapes(cfg).items()
        if any(name.startswith(part) for name in record.weights)
    }
    table = [
        row
        for row in wan.weights(cfg)
        if not isinstance(row, conversion.Row) or row.path.split('/')[0] in found
    ]
    return conversion.to_jax(table, record.weights, found)


REPLAYS = {'vae': autoencoder, 'cond_concat': cond_concat, 'clip_visual': clip_visual}
