"""Sizes of the Wan autoencoders, their presets and `config.json`."""

from __future__ import annotations

import dataclasses

from matrix_jax.weights import conversion, schema


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


# Statistics of the latent channels of the released networks, as published.
MEANS = _numbers("""
    -0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632
    -0.1922 -0.9497 0.2503 -0.2921
""")
STDS = _numbers("""
    2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382
    1.1253 2.8251 1.9160
""")
MEANS_2_2 = _numbers("""
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891
    0.1570 -0.0098 0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502
    -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723
    -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
""")
STDS_2_2 = _numbers("""
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885
    0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338
    0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458
    1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
""")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are those of 2.1 as released.

    Attributes:
      channels: channels of a frame.
      latent_channels: channels C of a latent frame.
      dim: width of the first level.
      decoder_dim: width of the decoder's last level; None = `dim`.
      multiples: width of each level as a multiple of `dim`, from full to smallest frames; every
        level but the last halves height and width.
      layers: residual blocks of an encoder level; a decoder level has one more.
      halves_time: whether a level that halves the frame also halves time.
      patch_size: pixels of a frame that are one pixel of the first level, in height and in width,
        stacked as channels.
      residual: whether each level has a parameter-free shortcut, as in 2.2; without it, a decoder
        level halves its channels.
      time_sees_first: whether the layers that double time also read the first frame of a clip, as
        in Matrix-Game 3.0.
      norm_eps: epsilon of the norms; the one of 2.1 only avoids 0 / 0.
      latent_means: mean of each latent channel, subtracted by `scaled`; empty = 0.
      latent_stds: standard deviation of each latent channel, divided by in `scaled`; empty = 1.
      chunk: latent frames per network call. More take more memory and less time; the result is
        the same.
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
        schema.check_fields(self, 'vae.')
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
        """Number of frame sizes."""
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
        """`halves_time` in the order of the decoder's levels."""
        return self.halves_time[::-1]

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel, in height and width."""
        return self.patch_size * 2 ** (self.levels - 1)

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, except for the first."""
        return 2 ** sum(self.halves_time)

    @property
    def normalisation(self) -> dict:
        """The parameters of `scaled`."""
        return {'means': self.latent_means, 'stds': self.latent_stds}

    @property
    def settled(self) -> int:
        """Index of the first latent frame outside the receptive field of the clip's first frame.

        If all later frames are equal, the latent frames from here on are equal as well.
        """
        reach, step = 2, 1  # past frames that are read; frames per step of this level
        for halves in (*self.halves_time, False):
            reach += 4 * self.layers * step
            if halves:
                reach += 2 * step
                step *= 2
        return (reach + 10 * step) // step + 1  # two residual blocks and the last convolution

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads the `config.json` of a component folder, ours or that of diffusers.

        Raises:
          ValueError: a key asks for an operation that this network does not have.
        """
        released = of_diffusers(released)
        if faults := conversion.config_faults(released, FIXED, FIELDS):
            raise ValueError('vae config: ' + '; '.join(faults))
        return cls(
            **{ours: released[theirs] for theirs, ours in FIELDS.items() if theirs in released}
        )

    def to_released(self) -> dict:
        """The `config.json` of this network (the published weights have none)."""
        values = {theirs: getattr(self, ours) for theirs, ours in FIELDS.items()}
        return {
            '_class_name': 'WanVAE',
            **FIXED,
            **{
                key: list(value) if isinstance(value, tuple) else value
                for key, value in values.items()
            },
        }


def of_diffusers(released: dict) -> dict:
    """Returns a config.json of `AutoencoderKLWan` with our keys; any other as it is."""
    if 'base_dim' not in released:
        return released
    renamed = {
        DIFFUSERS.get(key, key): value
        for key, value in released.items()
        if value is not None and key not in IGNORED
    }
    # Channels are counted after patches have become channels.
    pixels = renamed.get('patch_size', 1) ** 2
    for key in ('in_channels', 'out_channels'):
        if key in renamed:
            renamed[key] = renamed[key] // pixels
    if renamed.pop('out_channels', None) not in (None, renamed.get('in_channels')):
        raise ValueError('vae config: got other out_channels than in_channels, expected the same')
    return renamed


# Arguments of the published network, then keys of ours.
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
# Keys of diffusers for the same values, and those that follow from others.
DIFFUSERS = {'base_dim': 'dim', 'decoder_base_dim': 'dec_dim', 'is_residual': 'residual'}
IGNORED = ('clip_output', 'scale_factor_spatial', 'scale_factor_temporal')

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
    'wan_2_2_plain': dataclasses.replace(WAN_2_2, time_sees_first=False, norm_eps=1e-24),
    # 2.2 as in Matrix-Game 3.0, and its two decoders with fewer channels.
    'wan_2_2': WAN_2_2,
    'light': dataclasses.replace(WAN_2_2, decoder_dim=128),
    'light_v2': dataclasses.replace(WAN_2_2, decoder_dim=64),
    # A 96x160 game on a laptop CPU: long chunks fit in memory there, and loops are slow.
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
    # For tests, with frames of 8x12.
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
