"""Sizes of the CogVideoX autoencoder, its presets and `config.json`."""

from __future__ import annotations

import dataclasses

from matrix_jax.weights import conversion


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are the released ones.

    Attributes:
      in_channels: channels of a frame that is encoded.
      out_channels: channels of a frame that is decoded.
      latent_channels: channels C of a latent frame.
      block_out_channels: channels of each level, from full to smallest frames; every level but the
        last halves height and width.
      layers_per_block: residual blocks of an encoder level; a decoder level has one more.
      norm_groups: groups of the norms.
      norm_eps: epsilon of the norms.
      temporal_compression: frames of a latent frame, a power of two.
      scaling_factor: factor of the latents in `scaled`.
      latent_means: mean of each latent channel, subtracted before that; empty = 0 (released).
      sample_height: native frame height; tiles are half of it.
      sample_width: native frame width; tiles are half of it.
      patch_size: pixels of a frame that are one pixel of the first level, in height and in width,
        stacked as channels (as in Wan 2.2); 1 in the released network.
      single_latent_frames: frames that a chunk of one latent frame decodes to: 1 (stages 1 and 2)
        or `temporal_compression` (stages 3 and 4, which stream single latent frames).
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
        """Pixels per latent pixel, in height and width."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    @property
    def normalisation(self) -> dict:
        """The parameters of `scaled`."""
        return {'scale': self.scaling_factor, 'means': self.latent_means}

    def halves_time(self, level: int) -> bool:
        """Whether the resampling after a level also halves (or doubles) time."""
        return 2 ** (level + 1) <= self.temporal_compression

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads a released `vae/config.json`.

        Raises:
          ValueError: a key asks for an operation that this network does not have.
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


# Keys of config.json: those that set a field, those with one supported value, and those without
# effect. Released files have no patch_size, latent_means and single_latent_frames.
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
    # For tests, with frames of 16x24.
    'tiny': Config(
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_groups=2,
        sample_height=32,
        sample_width=48,
    ),
    # A 64x96 game on a laptop CPU. 2x2 pixels are stacked, because convolutions of few channels on
    # full frames take as long as convolutions of many channels on halved frames.
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
