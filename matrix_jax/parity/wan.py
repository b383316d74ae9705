"""Replays of the Wan autoencoder, of the image tower and of conditioning on a picture."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.encoders import clip_image
from matrix_jax.parity.record import Record, clip, torch_clip, torch_video
from matrix_jax.vae import condition, wan
from matrix_jax.weights import conversion

# Recordings are tiny: compiling takes far longer than running, so the compiler is to hurry.
compiled = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def autoencoder(record: Record) -> dict:
    """Encoding of a clip and of a picture, decoding in one go and in chunks."""
    cfg, params = _vae(record)
    frames = clip(record.inputs['video'])
    latents = wan.unscaled(cfg, clip(record.inputs['z']))
    encode = compiled(lambda params, frames: wan.scaled(cfg, wan.encode(cfg, params, frames)[0]))
    got = {
        'latent_normalized': torch_clip(encode(params, frames)),
        'latent_single_image': torch_clip(encode(params, frames[:, :1])),
        'decoded_unclamped': torch_clip(
            compiled(functools.partial(wan.decode, cfg))(params, latents)
        ),
    }
    chunk, cache = record.config['chunk'], None
    prefill = compiled(functools.partial(wan.prefill, cfg))
    step = compiled(functools.partial(wan.step, cfg))
    for index, start in enumerate(range(0, latents.shape[1], chunk)):
        part = latents[:, start : start + chunk]
        cache, made = step(params, cache, part) if index else prefill(params, part)
        got[f'stream_pixels_chunk{index}'] = torch_video(jnp.clip(made, -1, 1))
    leaves = conversion.flatten(cache)
    got['n_cache_used'] = len(leaves)
    for slot, path in enumerate(slots(cfg)):
        got[f'stream_cache_{slot:02}_final'] = torch_clip(leaves[path])
    return got


def slots(cfg: wan.Config) -> list[str]:
    """Paths in the cache of the decoder, in the order in which the reference counts them."""

    def resnets(where, count):
        return [f'{where}/resnet_{i}/conv{part}' for i in range(count) for part in (1, 2)]

    paths = ['conv_in', *resnets('mid', 2)]
    for level in range(cfg.levels):
        paths += resnets(f'up_{level}', cfg.layers + 1)
        if level < cfg.levels - 1 and cfg.doubles_time[level]:
            paths.append(f'up_{level}/time')
    return [*paths, 'conv_out']


def cond_concat(record: Record) -> dict:
    """A picture to the channels next to the noise."""
    cfg, params = _vae(record)
    told, picture = record.config, record.inputs['image_uint8'].astype(np.uint8)
    size = told['height'], told['width']
    top, left, bottom, right = condition.crop(*picture.shape[:2], *size)
    image = condition.pixels(condition.fit(picture, *size))[None]
    made = compiled(
        lambda params, image: condition.condition(cfg, params, image, told['num_output_frames'])
    )(params, image)
    made = torch_clip(made)
    return {
        'cropped_hw': np.array([bottom - top, right - left]),
        'image_normalized': torch_clip(image[:, None]),
        'cond_concat': made,
        'img_cond': made[:, cfg.temporal_compression :],
    }


def clip_visual(record: Record) -> dict:
    """The picture as the tower sees it, and its tokens."""
    cfg = clip_image.Config.from_released(record.config['vision'])
    params = conversion.to_jax(clip_image.weights(cfg), record.weights, clip_image.shapes(cfg))
    image = clip(record.inputs['video'])[:, 0]
    seen = compiled(functools.partial(clip_image.pixels, cfg))(image)
    return {
        'clip_pixels': rearrange(np.asarray(seen), 'b h w c -> b c h w'),
        'visual_context': compiled(functools.partial(clip_image.encode, cfg))(params, image),
    }


ARGUMENTS = ('dim', 'z_dim', 'dim_mult', 'num_res_blocks', 'temperal_downsample')


def _vae(record: Record):
    cfg = wan.Config.from_released({name: record.config[name] for name in ARGUMENTS})
    return cfg, halves(cfg, record)


def halves(cfg: wan.Config, record: Record) -> dict:
    """Parameters of the encoder, of the decoder or of both, whichever a recording has."""
    both = wan.shapes(cfg)
    found = {
        half: both[half] for half in both if any(name.startswith(half) for name in record.weights)
    }
    table = [row for row in wan.weights(cfg) if row.path.split('/')[0] in found]
    return conversion.to_jax(table, record.weights, found)


REPLAYS = {'vae': autoencoder, 'cond_concat': cond_concat, 'clip_visual': clip_visual}
