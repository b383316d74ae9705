"""Sizes and options of the CogVideoX autoencoder, its presets and `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from matrix_jax.weights import conversion, schema

Resampling = Literal['average', 'shortcut', 'fold']
NormFrames = Literal['chunk', 'one']
# If the norms read one frame, longer chunks give the same result in fewer calls.
LONG_CHUNKS = 4


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
      spatial_levels: number of levels, from the first, that halve height and width; None = all but
        the last. The levels after them can still halve time.
      time_taps: frames that the convolutions of each level read, 1 or 3; empty = 3 in all levels.
      resampling: how a level changes the frame size. 'average' (released): a convolution in space,
        means of two frames in time; the decoder repeats frames. 'shortcut': in addition, a path
        without parameters around the level (as in Wan 2.2). 'fold': one matrix for all channels of
        neighbouring pixels and frames.
      norm_frames: what the norms average over: a 'chunk' (released), or 'one' frame, so that the
        result does not depend on the length of the chunks.
      modulated: whether the norms of the decoder have a scale and a shift computed from the
        latents.
      dtype: type of the convolutions and of the cache, as a numpy name.

    Raises:
      ValueError: sizes or options that do not fit together.
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
    spatial_levels: int | None = None
    time_taps: tuple[int, ...] = ()
    resampling: Resampling = 'average'
    norm_frames: NormFrames = 'chunk'
    modulated: bool = True
    dtype: str = 'float32'

    def __post_init__(self):
        object.__setattr__(self, 'block_out_channels', tuple(self.block_out_channels))
        object.__setattr__(self, 'latent_means', tuple(self.latent_means))
        object.__setattr__(self, 'time_taps', tuple(self.time_taps))
        schema.check_fields(self, 'vae.', zero=('layers_per_block', 'spatial_levels'))
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
        self._check_options()

    def _check_options(self):
        levels = len(self.block_out_channels)
        if self.spatial_levels is not None and self.spatial_levels >= levels:
            raise ValueError(
                f'vae.spatial_levels: got {self.spatial_levels}, expected at most '
                f'{levels - 1}, because the last level is not resampled'
            )
        if self.time_taps and (len(self.time_taps) != levels or set(self.time_taps) - {1, 3}):
            raise ValueError(
                f'vae.time_taps: got {self.time_taps}, expected none, or 1 or 3 for '
                f'each of the {levels} levels'
            )
        for name, known in (
            ('resampling', get_args(Resampling)),
            ('norm_frames', get_args(NormFrames)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f'vae.{name}: got {getattr(self, name)!r}, expected one of {", ".join(known)}'
                )
        if self.resampling == 'shortcut':
            self._check_shortcuts()

    def _check_shortcuts(self):
        """Whether the channels around each level are whole multiples of each other."""
        widths = self.block_out_channels
        for level in range(len(widths) - 1):
            before = max(level - 1, 0)
            time = 1 + self.halves_time(level)
            down = time * (1 + self.halves_space(level)) ** 2
            up = time * (1 + self.doubles_space(level)) ** 2
            if (
                widths[before] * down % widths[level]
                or widths[-1 - level] * up % widths[-1 - before]
            ):
                raise ValueError(
                    f'vae.block_out_channels: got {widths}, expected widths whose '
                    'shortcuts divide (resampling shortcut)'
                )

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel, in height and width."""
        levels = range(len(self.block_out_channels) - 1)
        return self.patch_size * 2 ** sum(map(self.halves_space, levels))

    @property
    def in_diffusers(self) -> bool:
        """Whether diffusers has this network."""
        default = type(self)()
        names = set(OPTIONS) - {'single_latent_frames'}
        return all(getattr(self, name) == getattr(default, name) for name in names)

    @property
    def normalisation(self) -> dict:
        """The parameters of `scaled`."""
        return {'scale': self.scaling_factor, 'means': self.latent_means}

    def halves_time(self, level: int) -> bool:
        """Whether the resampling after a level also halves (or doubles) time."""
        return 2 ** (level + 1) <= self.temporal_compression

    def halves_space(self, level: int) -> bool:
        """Whether the resampling after an encoder level halves height and width."""
        return self.spatial_levels is None or level < self.spatial_levels

    def doubles_space(self, level: int) -> bool:
        """Whether the resampling after a decoder level doubles height and width.

        Decoder levels count from the smallest frames.
        """
        return self.halves_space(len(self.block_out_channels) - 2 - level)

    def taps(self, level: int) -> int:
        """Frames that the convolutions of an encoder level read."""
        return self.time_taps[level] if self.time_taps else 3

    @property
    def chunk_factor(self) -> int:
        """Length of the chunks of a clip, in multiples of the released length."""
        return 1 if self.norm_frames == 'chunk' else LONG_CHUNKS

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
        levels, default = len(self.block_out_channels), type(self)()
        name = 'AutoencoderKLCogVideoX' if self.in_diffusers else 'MatrixAutoencoderKLCogVideoX'
        released = {'_class_name': name} | FIXED
        released |= {
            theirs: _plain(getattr(self, ours))
            for theirs, ours in FIELDS.items()
            if ours not in OPTIONS or getattr(self, ours) != getattr(default, ours)
        }
        return released | {
            'down_block_types': ['CogVideoXDownBlock3D'] * levels,
            'up_block_types': ['CogVideoXUpBlock3D'] * levels,
        }


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# Keys of config.json: those that set a field, those with one supported value, and those without
# effect. Released files have none of OPTIONS.
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
    'spatial_levels': 'spatial_levels',
    'time_taps': 'time_taps',
    'resampling': 'resampling',
    'norm_frames': 'norm_frames',
    'modulated': 'modulated',
}
# Fields that are written only if they differ from the default: diffusers does not know them.
OPTIONS = ('patch_size', 'latent_means', 'single_latent_frames')
OPTIONS += ('spatial_levels', 'time_taps', 'resampling', 'norm_frames', 'modulated')
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
    # A 64x96 game on a laptop CPU. 4x4 pixels are stacked, a learned matrix folds frames into
    # channels, and each level of the decoder has one residual block, of the encoder none. So most
    # layers work on small frames, where a convolution costs least.
    'carracing': Config(
        latent_channels=16,
        block_out_channels=(48, 96, 96),
        layers_per_block=0,
        norm_groups=4,
        sample_height=64,
        sample_width=96,
        patch_size=4,
        spatial_levels=1,
        time_taps=(1, 1, 3),
        resampling='fold',
        norm_frames='one',
        modulated=False,
    ),
}
