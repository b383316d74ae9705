"""Causal video autoencoder of CogVideoX (arXiv 2408.06072): 4x in time, 8x in height and width.

Every convolution sees the present and two past frames, so a clip is coded in chunks that carry
those frames along. The norms see one chunk only: its length is part of the maths (8 frames, or 2
latent frames, with the remainder in the first chunk).

    encode    frames -> mean, logvar     chunks of 8 frames
    decode    latents -> frames          chunks of 2 latent frames
    prefill   latents -> cache, frames   the same, to be continued
    step      cache, latents -> cache, frames

On a mesh the rows of the picture are split (`nn/rows.py`), equal to one device; a cache then lies
where it was made.
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
from matrix_jax.vae.chunks import check_latents, chunked
from matrix_jax.vae.cogvideox_layers import Decoder, Encoder
from matrix_jax.vae.cogvideox_layers import weights as weights  # the table, for whoever loads
from matrix_jax.vae.tiling import Tiles, covers, tiled, windowed
from matrix_jax.weights import conversion

ENCODE_CHUNK = 8  # frames
DECODE_CHUNK = 2  # latent frames


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are the released ones.

    Attributes:
      in_channels: channels of a frame that is encoded.
      out_channels: channels of a frame that is decoded.
      latent_channels: channels C of a latent frame.
      block_out_channels: channels of each level, from full to smallest frames; every level but the
        last halves the frame.
      layers_per_block: residual blocks of an encoder level; a decoder level has one more.
      norm_groups: groups of the norms.
      norm_eps: epsilon of the norms.
      temporal_compression: frames of a latent frame, a power of two.
      scaling_factor: what latents are multiplied with before diffusion, by `scaled`.
      latent_means: what each channel is reduced by before that; the released network has none.
      sample_height: native frame height; tiles are half of it.
      sample_width: native frame width; tiles are half of it.
      patch_size: pixels of a frame that are one pixel of the first level, in height and in width,
        their values stacked as channels (as in Wan 2.2's autoencoder); 1 in the released network.
      single_latent_frames: frames of a chunk of one latent frame: 1 (an image; stages 1 and 2) or
        `temporal_compression` (stages 3 and 4, which stream one latent frame at a time).
      dtype: type of the convolutions and of the cache, as a numpy name.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    norm_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression: int = 4
    scaling_factor: float = 1.15258426
    sample_height: int = 480
    sample_width: int = 720
    patch_size: int = 1
    latent_means: tuple[float, ...] = ()
    single_latent_frames: int = 4
    dtype: str = 'float32'

    def __post_init__(self):
        object.__setattr__(self, 'block_out_channels', tuple(self.block_out_channels))
        object.__setattr__(self, 'latent_means', tuple(self.latent_means))
        conversion.check_sizes(self, 'vae.', zero=('layers_per_block',))
        if len(self.latent_means) not in (0, self.latent_channels):
            raise ValueError(
                f'vae.latent_means: got {len(self.latent_means)} numbers, expected '
                f'none, or one for each of the {self.latent_channels} channels'
            )
        for width in self.block_out_channels:
            if width % self.norm_groups:
                raise ValueError(
                    f'vae.block_out_channels: got {self.block_out_channels}, expected '
                    f'multiples of norm_groups = {self.norm_groups}'
                )
        if self.temporal_compression not in [2**n for n in range(len(self.block_out_channels))]:
            raise ValueError(
                f'vae.temporal_compression: got {self.temporal_compression}, expected '
                f'a power of two within {len(self.block_out_channels) - 1} halvings'
            )
        if self.single_latent_frames not in (1, self.temporal_compression):
            raise ValueError(
                f'vae.single_latent_frames: got {self.single_latent_frames}, expected '
                f'1 or temporal_compression = {self.temporal_compression}'
            )

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel, in height and in width."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    @property
    def normalisation(self) -> dict:
        """All that `scaled` depends on."""
        return {'scale': self.scaling_factor, 'means': self.latent_means}

    def halves_time(self, level: int) -> bool:
        """Whether the resampling behind a level also halves (or doubles) time."""
        return 2 ** (level + 1) <= self.temporal_compression

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads a released `vae/config.json`.

        Raises:
          ValueError: a key asks for maths that this network does not have.
        """
        levels = len(released.get('block_out_channels', cls.block_out_channels))
        fixed = FIXED | {
            'down_block_types': ['CogVideoXDownBlock3D'] * levels,
            'up_block_types': ['CogVideoXUpBlock3D'] * levels,
        }
        if faults := conversion.config_faults(released, fixed, {*FIELDS, *IGNORED}):
            raise ValueError('vae config: ' + '; '.join(faults))
        return cls(
            **{ours: released[theirs] for theirs, ours in FIELDS.items() if theirs in released}
        )

    def to_released(self) -> dict:
        """The `vae/config.json` of this network."""
        levels = len(self.block_out_channels)
        released = {'_class_name': 'AutoencoderKLCogVideoX'} | FIXED
        released |= {theirs: _plain(getattr(self, ours)) for theirs, ours in FIELDS.items()}
        return released | {
            'down_block_types': ['CogVideoXDownBlock3D'] * levels,
            'up_block_types': ['CogVideoXUpBlock3D'] * levels,
        }


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# Keys of the released config.json: ours, those with one value we implement, those without effect.
# The last three but the sample sizes are ours, absent from released files.
FIELDS = {
    'in_channels': 'in_channels',
    'out_channels': 'out_channels',
    'latent_channels': 'latent_channels',
    'block_out_channels': 'block_out_channels',
    'layers_per_block': 'layers_per_block',
    'norm_num_groups': 'norm_groups',
    'norm_eps': 'norm_eps',
    'temporal_compression_ratio': 'temporal_compression',
    'scaling_factor': 'scaling_factor',
    'patch_size': 'patch_size',
    'latent_means': 'latent_means',
    'sample_height': 'sample_height',
    'sample_width': 'sample_width',
    'single_latent_frames': 'single_latent_frames',
}
FIXED = {'act_fn': 'silu', 'use_quant_conv': False, 'use_post_quant_conv': False}
IGNORED = ('force_upcast', 'shift_factor', 'latents_mean', 'latents_std', 'invert_scale_latents')

PRESETS = {
    'released': Config(),
    # For tests: a frame of 16x24 is enough.
    'tiny': Config(
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_groups=2,
        sample_height=32,
        sample_width=48,
    ),
    # A 64x96 game on a laptop CPU: 2x2 pixels make one, because convolutions of a few channels on
    # full-size frames cost as much as those of many channels on halved ones.
    'carracing': Config(
        latent_channels=8,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_groups=4,
        sample_height=64,
        sample_width=96,
        patch_size=2,
    ),
}


def encode(cfg: Config, params, frames):
    """Frames [B F H W in] in [-1, 1] -> mean, logvar of the posterior, float32 [B T h w C] each.

    T = ceil(F / 4) for a clip of one chunk (F < 16) of 4k+1 frames; further chunks of 8 add 2 each.

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
    return encode_chunks(cfg, params, frames)


def encode_chunks(cfg: Config, params, frames):
    """`encode` of any frame size: an odd row or column is cut, as tiles need it."""
    return encode_step(cfg, params, None, frames)[1:]


def encode_step(cfg: Config, params, cache, frames):
    """`encode` that can be continued: -> (cache, mean, logvar).

    Equal to one long `encode` if the chunks, counted 8 by 8 with the remainder first, coincide.

    Args:
      cache: of the call before; None starts anew.
      frames: [B F H W in]; after the first call F is a multiple of 4.
    """
    net, p = Encoder(cfg), cfg.patch_size
    frames = rearrange(frames, 'b f (h p) (w q) c -> b f h w (p q c)', p=p, q=p)

    def run(params, cache, frames):
        return chunked(
            lambda cache, chunk: net.apply({'params': params}, chunk, cache),
            cache,
            frames,
            ENCODE_CHUNK,
        )

    cache, moments = spatial.split_rows(
        run, params['encoder'], cache, frames.astype(cfg.dtype), unit=cfg.spatial_compression // p
    )
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return cache, mean, jnp.clip(logvar, -30, 20)


def scaled(cfg: Config, latents):
    """Latents [B T h w C] of this network -> those of a diffusion model."""
    return (latents - np.asarray(cfg.latent_means or 0, np.float32)) * cfg.scaling_factor


def unscaled(cfg: Config, latents):
    """The inverse of `scaled`."""
    return latents / cfg.scaling_factor + np.asarray(cfg.latent_means or 0, np.float32)


def sample(mean, logvar, noise):
    """One draw of the posterior; all arguments [B T h w C]."""
    return mean + jnp.exp(0.5 * logvar) * noise


def decode(cfg: Config, params, latents):
    """Latents [B T h w C] -> frames [B F H W out], float32.

    F = 4T for even T; 4T-3 for odd T, as the first latent frame is then an image; and
    `cfg.single_latent_frames` for T = 1.

    Raises:
      ValueError: the latents do not fit the network.
    """
    return prefill(cfg, params, latents)[1]


def prefill(cfg: Config, params, latents):
    """`decode` that can be continued: returns (cache, frames [B F H W out]).

    The cache has the same structure and shapes as the one of `step`, whatever T.
    """
    return step(cfg, params, None, latents)


def step(cfg: Config, params, cache, latents):
    """Decodes what follows: latents [B T h w C] -> (cache, frames [B F H W out]).

    Equal to one long `decode` if all chunks, counted 2 by 2 with the remainder first, coincide.
    F counts as in `decode`: stream an even number of latent frames, or one with
    `single_latent_frames = 4`, to get 4T frames.

    Args:
      cfg: sizes.
      params: weights.
      cache: of `prefill` or of the step before; None starts anew.
      latents: [B T h w C], unscaled.

    Raises:
      ValueError: the latents do not fit the network.
    """
    check_latents(latents, cfg.latent_channels)
    net = Decoder(cfg)

    def run(params, cache, latents):
        return chunked(
            lambda cache, chunk: net.apply({'params': params}, chunk, cache),
            cache,
            latents,
            DECODE_CHUNK,
        )

    cache, frames = spatial.split_rows(run, params['decoder'], cache, latents.astype(cfg.dtype))
    p = cfg.patch_size
    frames = rearrange(frames, 'b f h w (p q c) -> b f (h p) (w q) c', p=p, q=p)
    return cache, frames.astype(jnp.float32)


def decode_streamed(cfg: Config, params, latents):
    """Latents [B T h w C] of a clip -> its last frames [B 4(T-1) H W out], as a stream shows them:
    one latent frame per chunk, from an empty cache behind the first."""
    cache, frames = prefill(cfg, params, latents[:, 1:2])
    parts = [frames]
    for index in range(2, latents.shape[1]):  # not a scan: convolutions are slow in a CPU loop
        cache, frames = step(cfg, params, cache, latents[:, index : index + 1])
        parts.append(frames)
    return jnp.concatenate(parts, axis=1)


def encode_tiled(cfg: Config, params, frames, tiles: Tiles | None = None):
    """`encode` with the memory of one tile; the plain one if a tile (half a native frame) does.

    Raises:
      ValueError: tiles of this size do not add up to the latents of the frames.
    """
    tiles = tiles or Tiles.of(cfg)
    if covers(tiles.sample, frames):
        return encode(cfg, params, frames)

    def run(tile):
        return jnp.concatenate(encode_chunks(cfg, params, tile), axis=-1)

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
    """`decode` with the memory of one tile; the plain one if a tile (half a native frame) does."""
    tiles = tiles or Tiles.of(cfg)
    if covers(tiles.latent, latents):
        return decode(cfg, params, latents)
    return tiled(
        lambda tile: decode(cfg, params, tile), latents, tiles.latent, tiles.sample, tiles.overlap
    )


def decode_sliced(cfg: Config, params, latents, window: int = 128, overlap: int = 4, decode=decode):
    """Decodes a long video in windows that share `overlap` latent frames: [B T h w C] -> frames.

    Each window starts from an empty cache; the frames of the overlap are taken from the window
    before. `decode` decodes one window (cfg, params, latents -> frames).
    """
    return windowed(
        lambda part: decode(cfg, params, part),
        latents,
        window,
        overlap,
        cfg.temporal_compression * overlap,
    )


def standardised(cfg: Config, params, means, stds):
    """The same autoencoder, (cfg, params), whose `scaled` latents have means 0 and deviations 1.

    Args:
      cfg, params: the autoencoder.
      means, stds: of its latent channels [C]. The deviations go into the weights.
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


# Kernels that read latents: of the first convolution and of the modulated norms.
LATENT_INPUT = re.compile(r'^decoder/conv_in/kernel$|^decoder/.*/conv_[yb]/kernel$')

# How parameters start: the modulation by the latents is mild, around the identity.
INIT_RULES = (
    ('*/conv_y/bias', initializers.ones),
    ('*/conv_[by]/kernel', initializers.uniform(0.1)),
)


def init(cfg: Config, seed: int) -> dict:
    """Fresh float32 numpy parameters {'encoder', 'decoder'} to train from."""
    return conversion.unflatten(
        {
            path: initializers.draw(INIT_RULES, path, leaf.shape, (seed,))
            for path, leaf in conversion.flatten(shapes(cfg)).items()
        }
    )


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
