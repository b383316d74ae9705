"""Causal video autoencoder of CogVideoX (arXiv 2408.06072): 4x in time, 8x in height and width.

Each convolution reads the present and two past frames, so a clip is coded in chunks, with those
frames as a cache. The norms read one chunk only, so the result depends on the length of the chunks:
8 frames or 2 latent frames, with the remainder in the first chunk. The option `norm_frames = 'one'`
removes this dependence.

    encode    frames -> mean, logvar             chunks of 8 frames
    decode    latents -> frames                  chunks of 2 latent frames
    prefill   latents -> cache, frames           starts a stream
    step      cache, latents -> cache, frames    continues it

On a mesh the rows of the frames are split (`parallel.spatial`), with the result of one device; the
cache stays on the devices that made it.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.nn import initializers
from matrix_jax.parallel import spatial
from matrix_jax.vae.chunks import check_latents, in_chunks
from matrix_jax.vae.cogvideox_config import OPTIONS as OPTIONS
from matrix_jax.vae.cogvideox_config import PRESETS as PRESETS
from matrix_jax.vae.cogvideox_config import Config as Config
from matrix_jax.vae.cogvideox_layers import Decoder, Encoder
from matrix_jax.vae.cogvideox_layers import weights as weights
from matrix_jax.vae.tiling import Tiles, covers, tiled, windowed
from matrix_jax.weights import conversion

ENCODE_CHUNK = 8  # frames
DECODE_CHUNK = 2  # latent frames


def encode(cfg: Config, params, frames):
    """Encodes frames [B F H W in] in [-1, 1].

    T = ceil(F / 4) for a clip of one chunk (F < 16) of 4k+1 frames; further chunks of 8 add 2 each.

    Returns:
      mean and logvar of the posterior, float32 [B T h w C] each.

    Raises:
      ValueError: the frames do not fit the network.
    """
    scale = cfg.spatial_compression
    if (
        frames.ndim != 5
        or frames.shape[-1] != cfg.in_channels
        or not frames.shape[1]
        or (frames.shape[2] % scale or frames.shape[3] % scale)
    ):
        raise ValueError(
            f'vae.encode: got frames {frames.shape}, expected [B F H W '
            f'{cfg.in_channels}] with F > 0 and H, W multiples of {scale}'
        )
    return encode_step(cfg, params, None, frames)[1:]


def encode_step(cfg: Config, params, cache, frames):
    """`encode` in chunks: returns (cache, mean, logvar).

    Equal to one `encode` if both have the same chunks (of 8, with the remainder first).

    Args:
      cache: cache of the previous call; None starts a clip.
      frames: [B F H W in], not checked; after the first call F is a multiple of 4. Odd rows and
        columns (of tiles) are dropped.
    """
    p, run = cfg.patch_size, in_chunks(Encoder(cfg), ENCODE_CHUNK * cfg.chunk_factor)
    frames = rearrange(frames, 'b f (h p) (w q) c -> b f h w (p q c)', p=p, q=p)
    cache, moments = spatial.split_rows(
        run, params['encoder'], cache, frames.astype(cfg.dtype), unit=cfg.spatial_compression // p
    )
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return cache, mean, jnp.clip(logvar, -30, 20)


def scaled(cfg: Config, latents):
    """Latents [B T h w C] of this network -> latents of a diffusion model."""
    return (latents - np.asarray(cfg.latent_means or 0, np.float32)) * cfg.scaling_factor


def unscaled(cfg: Config, latents):
    """Inverse of `scaled`."""
    return latents / cfg.scaling_factor + np.asarray(cfg.latent_means or 0, np.float32)


def sample(mean, logvar, noise):
    """A sample of the posterior; all arguments [B T h w C]."""
    return mean + jnp.exp(0.5 * logvar) * noise


def decode(cfg: Config, params, latents):
    """Latents [B T h w C] -> frames [B F H W out], float32.

    F = 4T for even T, 4T-3 for odd T (the first latent frame is then one frame), and
    `cfg.single_latent_frames` for T = 1.

    Raises:
      ValueError: the latents do not fit the network.
    """
    return prefill(cfg, params, latents)[1]


def prefill(cfg: Config, params, latents):
    """`decode` that starts a stream: returns (cache, frames [B F H W out]).

    The cache has the structure and shapes of that of `step`, for any T.
    """
    return step(cfg, params, None, latents)


def step(cfg: Config, params, cache, latents):
    """Decodes the next latents [B T h w C] -> (cache, frames [B F H W out]).

    Equal to one `decode` if both have the same chunks (of 2, with the remainder first). F is that
    of `decode`: 4T for an even number of latent frames, or for one with
    `single_latent_frames = 4`.

    Args:
      cfg: sizes.
      params: parameters.
      cache: cache of `prefill` or the previous step; None starts a clip.
      latents: [B T h w C], unscaled.

    Raises:
      ValueError: the latents do not fit the network.
    """
    check_latents(latents, cfg.latent_channels)
    p, run = cfg.patch_size, in_chunks(Decoder(cfg), DECODE_CHUNK * cfg.chunk_factor)
    cache, frames = spatial.split_rows(run, params['decoder'], cache, latents.astype(cfg.dtype))
    frames = rearrange(frames, 'b f h w (p q c) -> b f (h p) (w q) c', p=p, q=p)
    return cache, frames.astype(jnp.float32)


def decode_streamed(cfg: Config, params, latents):
    """Latents [B T h w C] -> the last frames [B 4(T-1) H W out] of the clip, decoded as a stream.

    Each latent frame but the first is one chunk, and the first of these starts the cache.
    """
    if cfg.norm_frames == 'one':  # the length of the chunks makes no difference
        # Decodes an even number, because the first of an odd number gives a single frame.
        count = latents.shape[1] - 1
        even = jnp.concatenate([latents[:, 1:], latents[:, -1:]], axis=1)[:, : count + count % 2]
        return decode(cfg, params, even)[:, : count * cfg.temporal_compression]
    cache, frames = prefill(cfg, params, latents[:, 1:2])
    parts = [frames]
    for index in range(2, latents.shape[1]):  # no scan: convolutions in a loop are slow on the CPU
        cache, frames = step(cfg, params, cache, latents[:, index : index + 1])
        parts.append(frames)
    return jnp.concatenate(parts, axis=1)


def encode_tiled(cfg: Config, params, frames, tiles: Tiles | None = None):
    """`encode` in tiles of half a native frame, to save memory; plain if one tile is enough.

    Raises:
      ValueError: the tiles do not cover whole latent pixels.
    """
    tiles = tiles or Tiles.of(cfg)
    if covers(tiles.sample, frames):
        return encode(cfg, params, frames)

    def run(tile):
        return jnp.concatenate(encode_step(cfg, params, None, tile)[1:], axis=-1)

    moments = tiled(run, frames, tiles.sample, tiles.latent, tiles.overlap)
    want = tuple(size // cfg.spatial_compression for size in frames.shape[2:4])
    if moments.shape[2:4] != want:
        raise ValueError(
            f'vae.encode_tiled: got {tiles} for frames {frames.shape}, expected '
            f'strides of whole latent pixels: these make latents of '
            f'{moments.shape[2:4]}, not {want}'
        )
    return tuple(jnp.split(moments, 2, axis=-1))


def decode_tiled(cfg: Config, params, latents, tiles: Tiles | None = None):
    """`decode` in tiles of half a native frame, to save memory; plain if one tile is enough."""
    tiles = tiles or Tiles.of(cfg)
    if covers(tiles.latent, latents):
        return decode(cfg, params, latents)
    return tiled(
        lambda tile: decode(cfg, params, tile), latents, tiles.latent, tiles.sample, tiles.overlap
    )


def decode_sliced(cfg: Config, params, latents, window: int = 128, overlap: int = 4, decode=decode):
    """Decodes a long video [B T h w C] in windows that share `overlap` latent frames.

    Each window starts from an empty cache; the frames of the overlap come from the earlier window.
    `decode` maps (cfg, params, latents) of one window to frames.
    """
    return windowed(
        lambda part: decode(cfg, params, part),
        latents,
        window,
        overlap,
        cfg.temporal_compression * overlap,
    )


def standardised(cfg: Config, params, means, stds):
    """The same autoencoder with latents that `scaled` gives mean 0 and deviation 1.

    Args:
      cfg, params: the autoencoder.
      means, stds: statistics of its latent channels [C]. The deviations go into the weights.

    Returns:
      (cfg, params).
    """
    flat, channels = conversion.flatten(params), len(stds)
    for path, leaf in flat.items():
        if path == 'encoder/conv_out/kernel':
            flat[path] = leaf / np.append(stds, np.ones(channels, stds.dtype))
        elif path == 'encoder/conv_out/bias':
            flat[path] = np.append(leaf[:channels] / stds, leaf[channels:] - 2 * np.log(stds))
        elif LATENT_INPUT.search(path):
            flat[path] = leaf * stds[:, None]
    means = [round(float(one), 4) for one in means / stds]
    return (
        dataclasses.replace(cfg, scaling_factor=1.0, latent_means=means),
        conversion.unflatten(flat),
    )


# Kernels that read latents: the first convolution and the spatial norms.
LATENT_INPUT = re.compile(r'^decoder/conv_in/kernel$|^decoder/.*/conv_[yb]/kernel$')

# Initial spatial norms are close to the plain group norm.
INIT_RULES = (
    ('*/conv_y/bias', initializers.ones),
    ('*/conv_[by]/kernel', initializers.uniform(0.1)),
)


def init(cfg: Config, seed: int) -> dict:
    """Initial float32 numpy parameters {'encoder', 'decoder'}."""
    return initializers.draw_tree(INIT_RULES, shapes(cfg), seed)


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    scale = cfg.spatial_compression
    size = scale // cfg.patch_size
    frames = jnp.zeros((1, 1, size, size, cfg.in_channels * cfg.patch_size**2), cfg.dtype)
    latents = jnp.zeros((1, 1, 1, 1, cfg.latent_channels), cfg.dtype)
    key = jax.random.key(0)
    return {
        'encoder': jax.eval_shape(Encoder(cfg).init, key, frames)['params'],
        'decoder': jax.eval_shape(Decoder(cfg).init, key, latents)['params'],
    }
