"""Causal video autoencoders of Wan (arXiv 2503.20314), 4x in time: 2.1 is 8x in height and width,
2.2 is 16x, as it stacks pixels, and has shortcuts without weights around each level.

The first frame is coded alone; each latent frame behind it stands for the next four. Every layer
sees the present and past frames only and keeps the last ones in a cache, so that chunks of any
length give the same frames as the whole clip.

    encode    frames -> mean, logvar
    decode    latents -> frames
    prefill   latents -> cache, frames   the same, to be continued
    step      cache, latents -> cache, frames
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.nn import initializers
from matrix_jax.parallel import spatial
from matrix_jax.vae.chunks import check_latents, chunked
from matrix_jax.vae.wan_layers import Decoder, Encoder
from matrix_jax.vae.wan_layers import weights as weights  # the table, for whoever loads
from matrix_jax.weights import conversion

# Of the latents of the released networks, as measured by their authors.
MEANS = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
STDS = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)
MEANS_2_2 = (
    -0.2289,
    -0.0052,
    -0.1323,
    -0.2339,
    -0.2799,
    0.0174,
    0.1838,
    0.1557,
    -0.1382,
    0.0542,
    0.2813,
    0.0891,
    0.1570,
    -0.0098,
    0.0375,
    -0.1825,
    -0.2246,
    -0.1207,
    -0.0698,
    0.5109,
    0.2665,
    -0.2108,
    -0.2158,
    0.2502,
    -0.2055,
    -0.0322,
    0.1109,
    0.1567,
    -0.0729,
    0.0899,
    -0.2799,
    -0.1230,
    -0.0313,
    -0.1649,
    0.0117,
    0.0723,
    -0.2839,
    -0.2083,
    -0.0520,
    0.3748,
    0.0152,
    0.1957,
    0.1433,
    -0.2944,
    0.3573,
    -0.0548,
    -0.1681,
    -0.0667,
)
STDS_2_2 = (
    0.4765,
    1.0364,
    0.4514,
    1.1677,
    0.5313,
    0.4990,
    0.4818,
    0.5013,
    0.8158,
    1.0344,
    0.5894,
    1.0901,
    0.6885,
    0.6165,
    0.8454,
    0.4978,
    0.5759,
    0.3523,
    0.7135,
    0.6804,
    0.5833,
    1.4146,
    0.8986,
    0.5659,
    0.7069,
    0.5338,
    0.4889,
    0.4917,
    0.4069,
    0.4999,
    0.6866,
    0.4093,
    0.5709,
    0.6065,
    0.6415,
    0.4944,
    0.5726,
    1.2042,
    0.5458,
    1.6887,
    0.3971,
    1.0600,
    0.3943,
    0.5537,
    0.5444,
    0.4089,
    0.7468,
    0.7744,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are those of 2.1 as released.

    Attributes:
      channels: of a frame.
      latent_channels: channels C of a latent frame.
      dim: width of the first level.
      decoder_dim: width of the decoder's last level, if it is another.
      multiples: of `dim`, one for each level from full to smallest frames; every level but the last
        halves the frame.
      layers: residual blocks of an encoder level; a decoder level has one more.
      halves_time: whether a level that halves the frame also halves time.
      patch_size: pixels of a frame that are one pixel of the first level, in height and in width,
        their values stacked as channels.
      residual: whether means and copies pass by each level, as in 2.2; where not, the decoder's
        levels hand on half their channels.
      time_sees_first: whether what doubles time sees the first frame of a clip as well, as in
        Matrix-Game 3.0.
      norm_eps: under the root of the norms; the released one only keeps zeros from dividing zeros.
      latent_means: what `scaled` takes off each latent channel; none by default of other sizes.
      latent_stds: what it then divides each by.
      chunk: latent frames that are coded at once: memory against loops, the result is the same.
      dtype: type of the convolutions and of the cache, as a numpy name.
    """

    channels: int = 3
    latent_channels: int = 16
    dim: int = 96
    decoder_dim: int | None = None
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    layers: int = 2
    halves_time: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    residual: bool = False
    time_sees_first: bool = False
    norm_eps: float = 1e-24
    latent_means: tuple[float, ...] = MEANS
    latent_stds: tuple[float, ...] = STDS
    chunk: int = 3
    dtype: str = 'float32'

    def __post_init__(self):
        for name in ('multiples', 'halves_time', 'latent_means', 'latent_stds'):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        conversion.check_sizes(self, 'vae.')
        if len(self.halves_time) != self.levels - 1:
            raise ValueError(
                f'vae.halves_time: got {len(self.halves_time)} values, expected '
                f'{self.levels - 1}, one for each level that halves the frame'
            )
        for name in ('latent_means', 'latent_stds'):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(
                    f'vae.{name}: got {len(getattr(self, name))} numbers, expected '
                    f'none, or one for each of the {self.latent_channels} channels'
                )
        if min(self.latent_stds, default=1) <= 0:
            raise ValueError(f'vae.latent_stds: got {min(self.latent_stds)}, expected more than 0')
        odd = [width for width in self.decoder_widths[:-1] if width % 2]
        if odd and not self.residual:
            raise ValueError(
                f'vae.dim: got a decoder level of {odd[0]} channels, expected an even '
                'number, as it is halved with the next level'
            )

    @property
    def levels(self) -> int:
        """Frame sizes."""
        return len(self.multiples)

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the encoder."""
        return tuple(self.dim * multiple for multiple in self.multiples)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder, from the smallest frames on."""
        dim = self.decoder_dim or self.dim
        return tuple(dim * multiple for multiple in self.multiples[::-1])

    @property
    def doubles_time(self) -> tuple[bool, ...]:
        """`halves_time` as the decoder meets it."""
        return self.halves_time[::-1]

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel, in height and in width."""
        return self.patch_size * 2 ** (self.levels - 1)

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, but for the first."""
        return 2 ** sum(self.halves_time)

    @property
    def normalisation(self) -> dict:
        """All that `scaled` depends on."""
        return {'means': self.latent_means, 'stds': self.latent_stds}

    @property
    def settled(self) -> int:
        """Number of the first latent frame that knows nothing of the first frame of the clip: where
        all others are alike, so are the latent frames from there on."""
        reach, step = 2, 1  # frames that are looked back on; frames of a step at this level
        for halves in (*self.halves_time, False):
            reach += 4 * self.layers * step
            if halves:
                reach += 2 * step
                step *= 2
        return (reach + 10 * step) // step + 1  # two residual blocks and the last convolution

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads the `config.json` of a component folder.

        Raises:
          ValueError: a key asks for maths that this network does not have.
        """
        if faults := conversion.config_faults(released, FIXED, FIELDS):
            raise ValueError('vae config: ' + '; '.join(faults))
        return cls(
            **{ours: released[theirs] for theirs, ours in FIELDS.items() if theirs in released}
        )

    def to_released(self) -> dict:
        """The `config.json` of this network; the published file of weights comes without one."""
        values = {theirs: getattr(self, ours) for theirs, ours in FIELDS.items()}
        return {
            '_class_name': 'WanVAE',
            **FIXED,
            **{
                key: list(value) if isinstance(value, tuple) else value
                for key, value in values.items()
            },
        }


# Arguments of the published network under their names, then ours.
FIELDS = {
    'dim': 'dim',
    'dec_dim': 'decoder_dim',
    'z_dim': 'latent_channels',
    'dim_mult': 'multiples',
    'num_res_blocks': 'layers',
    'temperal_downsample': 'halves_time',
    'latents_mean': 'latent_means',
    'latents_std': 'latent_stds',
    'in_channels': 'channels',
    'patch_size': 'patch_size',
    'norm_eps': 'norm_eps',
    'residual': 'residual',
    'time_sees_first': 'time_sees_first',
}
FIXED = {'attn_scales': [], 'dropout': 0.0}

WAN_2_2 = Config(
    latent_channels=48,
    dim=160,
    decoder_dim=256,
    patch_size=2,
    residual=True,
    time_sees_first=True,
    norm_eps=1e-6,
    latent_means=MEANS_2_2,
    latent_stds=STDS_2_2,
)
PRESETS = {
    'wan_2_1': Config(),
    # 2.2 as Matrix-Game 3.0 runs it, and its two decoders of fewer channels.
    'wan_2_2': WAN_2_2,
    'light': dataclasses.replace(WAN_2_2, decoder_dim=128),
    'light_v2': dataclasses.replace(WAN_2_2, decoder_dim=64),
    # A 96x160 game on a laptop CPU, where long chunks cost no memory and loops cost time.
    'doom': Config(
        dim=16,
        multiples=(1, 2, 4),
        layers=1,
        halves_time=(True, True),
        patch_size=2,
        norm_eps=1e-6,
        latent_means=(),
        latent_stds=(),
        chunk=8,
    ),
    # For tests: a frame of 8x12 is enough.
    'tiny': Config(
        latent_channels=4,
        dim=4,
        multiples=(1, 2),
        layers=1,
        halves_time=(True,),
        latent_means=(),
        latent_stds=(),
    ),
}


def encode(cfg: Config, params, frames):
    """Frames [B F H W in] in [-1, 1] -> mean, logvar of the posterior, float32 [B T h w C] each.

    F = 1 + 4(T-1).

    Raises:
      ValueError: the frames do not fit the network.
    """
    return encode_step(cfg, params, None, frames)[1:]


def encode_step(cfg: Config, params, cache, frames):
    """`encode` that can be continued: -> (cache, mean, logvar).

    Args:
      cache: of the call before; None starts anew.
      frames: [B F H W in]; F = 1 + 4(T-1) in the first call, F = 4T in the others.

    Raises:
      ValueError: the frames do not fit the network.
    """
    scale, time = cfg.spatial_compression, cfg.temporal_compression
    alone = 1 if cache is None else 0
    if (
        frames.ndim != 5
        or frames.shape[-1] != cfg.channels
        or frames.shape[1] < alone
        or (frames.shape[1] - alone) % time
        or frames.shape[2] % scale
        or frames.shape[3] % scale
    ):
        raise ValueError(
            f'vae.encode: got frames {frames.shape}, expected [B F H W '
            f'{cfg.channels}] with F = {alone} + {time}k and H, W multiples of '
            f'{scale}'
        )
    frames = patched(frames, cfg.patch_size).astype(cfg.dtype)
    cache, moments = spatial.split_rows(
        _coded(Encoder(cfg), cfg.chunk * time),
        params['encoder'],
        cache,
        frames,
        unit=scale // cfg.patch_size,
    )
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return cache, mean, jnp.clip(logvar, -30, 20)


def scaled(cfg: Config, latents):
    """Latents [B T h w C] of this network -> those of a diffusion model."""
    return (latents - np.asarray(cfg.latent_means or 0, np.float32)) / np.asarray(
        cfg.latent_stds or 1, np.float32
    )


def unscaled(cfg: Config, latents):
    """The inverse of `scaled`."""
    return latents * np.asarray(cfg.latent_stds or 1, np.float32) + np.asarray(
        cfg.latent_means or 0, np.float32
    )


def decode(cfg: Config, params, latents):
    """Latents [B T h w C] -> frames [B F H W out], float32, F = 1 + 4(T-1).

    Raises:
      ValueError: the latents do not fit the network.
    """
    return prefill(cfg, params, latents)[1]


decode_streamed = decode  # what a stream shows of a clip: the same, whatever its chunks


def prefill(cfg: Config, params, latents):
    """`decode` that can be continued: returns (cache, frames [B F H W out]).

    The cache has the same structure and shapes as the one of `step`, whatever T.
    """
    return step(cfg, params, None, latents)


def step(cfg: Config, params, cache, latents):
    """Decodes what follows: latents [B T h w C] -> (cache, frames [B 4T H W out]).

    The cache is that of `prefill` or of the step before; None starts anew.

    Raises:
      ValueError: the latents do not fit the network.
    """
    check_latents(latents, cfg.latent_channels)
    cache, frames = spatial.split_rows(
        _coded(Decoder(cfg), cfg.chunk), params['decoder'], cache, latents.astype(cfg.dtype)
    )
    return cache, unpatched(frames, cfg.patch_size).astype(jnp.float32)


def patched(frames, p: int):
    """Frames [B F h*p w*p C] with p x p pixels as one: [B F h w C*p*p], columns outermost."""
    return rearrange(frames, 'b f (h q) (w r) c -> b f h w (c r q)', q=p, r=p)


def unpatched(frames, p: int):
    """The inverse of `patched`."""
    return rearrange(frames, 'b f h w (c r q) -> b f (h q) (w r) c', q=p, r=p)


def _coded(net, size: int):
    """(params, cache, [B F ...]) through a network: the first of a clip alone, the others `size` at
    a time."""

    def code(params, cache, x):
        def run(cache, chunk):
            return net.apply({'params': params}, chunk, cache)

        if cache is not None:
            return chunked(run, cache, x, size)
        cache, head = run(None, x[:, :1])
        if x.shape[1] == 1:
            return cache, head
        cache, tail = chunked(run, cache, x[:, 1:], size)
        return cache, jnp.concatenate([head, tail], axis=1)

    return code


def standardised(cfg: Config, params, means, stds):
    """The same autoencoder, (cfg, params), whose `scaled` latents have means 0 and deviations 1.

    Args:
      cfg, params: the autoencoder.
      means, stds: of its latent channels [C].
    """
    means, stds = ([round(float(one), 4) for one in values] for values in (means, stds))
    return dataclasses.replace(cfg, latent_means=means, latent_stds=stds), params


INIT_RULES = ()  # how parameters start, beyond the common laws of `nn.fresh`


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
    size = 2 ** (cfg.levels - 1)
    frames = jnp.zeros((1, 1, size, size, cfg.channels * cfg.patch_size**2), cfg.dtype)
    latents = jnp.zeros((1, 1, 1, 1, cfg.latent_channels), cfg.dtype)
    key = jax.random.key(0)
    return {
        'encoder': jax.eval_shape(Encoder(cfg).init, key, frames)['params'],
        'decoder': jax.eval_shape(Decoder(cfg).init, key, latents)['params'],
    }
