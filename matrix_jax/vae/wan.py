"""Causal video autoencoders of Wan 2.1 and 2.2 (arXiv 2503.20314).

Both compress 4x in time; 2.1 compresses 8x in height and width, 2.2 16x. 2.2 stacks 2x2 pixels as
channels and has a parameter-free shortcut around each level.

The first frame is one latent frame, and each further latent frame is four frames. Layers read
present and past frames only and cache the last ones, so chunks of any length give the same result
as the whole clip.

    encode    frames -> mean, logvar
    decode    latents -> frames
    prefill   latents -> cache, frames           starts a stream
    step      cache, latents -> cache, frames    continues it
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.nn import initializers
from matrix_jax.parallel import spatial
from matrix_jax.vae.chunks import check_latents, in_chunks
from matrix_jax.vae.wan_config import PRESETS as PRESETS
from matrix_jax.vae.wan_config import Config as Config
from matrix_jax.vae.wan_layers import Decoder, Encoder
from matrix_jax.vae.wan_layers import weights as weights


def encode(cfg: Config, params, frames):
    """Encodes frames [B F H W in] in [-1, 1], F = 1 + 4(T-1).

    Returns:
      mean and logvar of the posterior, float32 [B T h w C] each.

    Raises:
      ValueError: the frames do not fit the network.
    """
    return encode_step(cfg, params, None, frames)[1:]


def encode_step(cfg: Config, params, cache, frames):
    """`encode` in chunks: returns (cache, mean, logvar).

    Args:
      cache: cache of the previous call; None starts a clip.
      frames: [B F H W in]; F = 1 + 4(T-1) in the first call, F = 4T later.

    Raises:
      ValueError: the frames do not fit the network.
    """
    scale, time = cfg.spatial_compression, cfg.temporal_compression
    first = 1 if cache is None else 0
    if (
        frames.ndim != 5
        or frames.shape[-1] != cfg.channels
        or frames.shape[1] < first
        or (frames.shape[1] - first) % time
        or frames.shape[2] % scale
        or frames.shape[3] % scale
    ):
        raise ValueError(
            f'vae.encode: got frames {frames.shape}, expected [B F H W '
            f'{cfg.channels}] with F = {first} + {time}k and H, W multiples of '
            f'{scale}'
        )
    frames = patched(frames, cfg.patch_size).astype(cfg.dtype)
    cache, moments = spatial.split_rows(
        _first_and_chunks(Encoder(cfg), cfg.chunk * time),
        params['encoder'],
        cache,
        frames,
        unit=scale // cfg.patch_size,
    )
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return cache, mean, jnp.clip(logvar, -30, 20)


def scaled(cfg: Config, latents):
    """Latents [B T h w C] of this network -> latents of a diffusion model."""
    return (latents - np.asarray(cfg.latent_means or 0, np.float32)) / np.asarray(
        cfg.latent_stds or 1, np.float32
    )


def unscaled(cfg: Config, latents):
    """Inverse of `scaled`."""
    return latents * np.asarray(cfg.latent_stds or 1, np.float32) + np.asarray(
        cfg.latent_means or 0, np.float32
    )


def decode(cfg: Config, params, latents):
    """Latents [B T h w C] -> frames [B F H W out], float32, F = 1 + 4(T-1).

    Raises:
      ValueError: the latents do not fit the network.
    """
    return prefill(cfg, params, latents)[1]


decode_streamed = decode  # a stream gives the same frames as the whole clip


def prefill(cfg: Config, params, latents):
    """`decode` that starts a stream: returns (cache, frames [B F H W out]).

    The cache has the structure and shapes of that of `step`, for any T.
    """
    return step(cfg, params, None, latents)


def step(cfg: Config, params, cache, latents):
    """Decodes the next latents [B T h w C] -> (cache, frames [B 4T H W out]).

    Args:
      cfg: sizes.
      params: parameters.
      cache: cache of `prefill` or the previous step; None starts a clip.
      latents: [B T h w C], unscaled.

    Raises:
      ValueError: the latents do not fit the network.
    """
    check_latents(latents, cfg.latent_channels)
    cache, frames = spatial.split_rows(
        _first_and_chunks(Decoder(cfg), cfg.chunk),
        params['decoder'],
        cache,
        latents.astype(cfg.dtype),
    )
    return cache, unpatched(frames, cfg.patch_size).astype(jnp.float32)


def decode_with_features(cfg: Config, params, latents):
    """`decode`, also with the features of the decoder, for distillation.

    Args:
      cfg: sizes.
      params: parameters.
      latents: [B T h w C], unscaled, T > 1.

    Returns:
      (frames [B F H W out], name -> features [B F' H' W' C'] of all frames but the first one).
      `feature_widths` has the names.
    """
    check_latents(latents, cfg.latent_channels)
    net, z = Decoder(cfg), latents.astype(cfg.dtype)
    variables = {'params': params['decoder']}
    cache, first = net.apply(variables, z[:, :1], None)
    (_, rest), kept = net.apply(
        variables,
        z[:, 1:],
        cache,
        capture_intermediates=lambda module, _: module.name in feature_widths(cfg),
        mutable=['intermediates'],
    )
    frames = unpatched(jnp.concatenate([first, rest], axis=1), cfg.patch_size)
    features = {name: kept['intermediates'][name]['__call__'][0][0] for name in feature_widths(cfg)}
    return frames.astype(jnp.float32), features


def feature_widths(cfg: Config) -> dict[str, int]:
    """Name -> channels of the features behind the decoder's middle and behind each level."""
    widths = cfg.decoder_widths
    last = [width if cfg.residual else width // 2 for width in widths[:-1]] + [widths[-1]]
    return {'mid': widths[0]} | {f'up_{level}': width for level, width in enumerate(last)}


def patched(frames, p: int):
    """Frames [B F h*p w*p C] -> [B F h w C*p*p], p x p pixels as channels, columns outermost."""
    return rearrange(frames, 'b f (h q) (w r) c -> b f h w (c r q)', q=p, r=p)


def unpatched(frames, p: int):
    """Inverse of `patched`."""
    return rearrange(frames, 'b f h w (c r q) -> b f (h q) (w r) c', q=p, r=p)


def _first_and_chunks(net, size: int):
    """The function (params, cache, x [B F ...]) -> (cache, y): the first frame, then chunks."""
    run_chunks = in_chunks(net, size)

    def run(params, cache, x):
        if cache is not None:
            return run_chunks(params, cache, x)
        cache, first = net.apply({'params': params}, x[:, :1], None)
        if x.shape[1] == 1:
            return cache, first
        cache, rest = run_chunks(params, cache, x[:, 1:])
        return cache, jnp.concatenate([first, rest], axis=1)

    return run


def standardised(cfg: Config, params, means, stds):
    """The same autoencoder with latents that `scaled` gives mean 0 and deviation 1.

    Args:
      cfg, params: the autoencoder.
      means, stds: statistics of its latent channels [C].

    Returns:
      (cfg, params).
    """
    means, stds = ([round(float(one), 4) for one in values] for values in (means, stds))
    return dataclasses.replace(cfg, latent_means=means, latent_stds=stds), params


INIT_RULES = ()  # the defaults of `nn.initializers`


def init(cfg: Config, seed: int) -> dict:
    """Initial float32 numpy parameters {'encoder', 'decoder'}."""
    return initializers.draw_tree(INIT_RULES, shapes(cfg), seed)


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    size = 2 ** (cfg.levels - 1)
    frames = jnp.zeros((1, 1, size, size, cfg.channels * cfg.patch_size**2), cfg.dtype)
    latents = jnp.zeros((1, 1, 1, 1, cfg.latent_channels), cfg.dtype)
    key = jax.random.key(0)
    return {
        'encoder': jax.eval_shape(Encoder(cfg).init, key, frames)['params'],
        'decoder': jax.eval_shape(Decoder(cfg).init, key, latents)['params'],
    }
