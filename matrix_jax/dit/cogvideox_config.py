"""Sizes of the CogVideoX DiT, its presets, and `transformer/config.json`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from matrix_jax.dit.segments import check_span, segments
from matrix_jax.weights.conversion import config_faults
from matrix_jax.weights.schema import check_fields


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """Control blocks.

    Attributes:
      dim: width A of a control vector.
      start, end: layers [start, end) that a control block follows.
      recency: None weights each earlier control by how often a token sees it, as the released
        networks do. A number lowers the logits of a control of t frames ago by t * recency instead,
        which is easier to learn for a small network.
      modulate: whether the control of a frame is also added to its embedded noise level. A control
        then scales features at every position, so one layer can tell left from right.
    """

    dim: int = 768
    start: int = 15
    end: int = 30
    recency: float | None = None
    modulate: bool = False

    def __post_init__(self):
        check_fields(self, 'control.', zero=('start',))


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are CogVideoX-2b.

    Attributes:
      heads: attention heads K.
      head_dim: width E of a head; the model width is D = K*E.
      channels: latent channels C, in and out.
      layers: transformer blocks.
      time_dim: width of the embedded noise level.
      text_dim: width of the text encoder.
      text_length: text tokens L.
      patch: side of a square patch.
      spatial_scale: divisor of row and column positions.
      temporal_scale: divisor of frame positions.
      eps: epsilon of the block norms; the head norms have 1e-6.
      control: control blocks, or None (stage 1).
      guidance_dim: width of a guidance code that is added to the code of the level, or None.
      sample: native latent width, height and pixel frames; written to config.json, any size works.
      dtype: numpy name of the type of matrix products and of the residual stream.
      remat: what the backward pass recomputes: nothing ('none'), each 'block', or all of a block
        but its matrix products ('dots').
      scan_unroll: layers per scan iteration.
      int8: which linear layers of the blocks multiply in 8 bits at inference.
      exchange: what devices that share the tokens exchange in self-attention: 'heads', 'keys', or
        'auto' (`nn.attention.route`).
    """

    heads: int = 30
    head_dim: int = 64
    channels: int = 16
    layers: int = 30
    time_dim: int = 512
    text_dim: int = 4096
    text_length: int = 226
    patch: int = 2
    spatial_scale: float = 1.875
    temporal_scale: float = 1.0
    eps: float = 1e-5
    control: ControlConfig | None = None
    guidance_dim: int | None = None
    sample: tuple[int, int, int] = (90, 60, 49)
    dtype: str = 'float32'
    remat: Literal['none', 'block', 'dots'] = 'none'
    scan_unroll: int = 1
    int8: Literal['none', 'attention', 'blocks'] = 'none'
    exchange: Literal['auto', 'heads', 'keys'] = 'auto'

    def __post_init__(self):
        check_fields(self)
        if self.width % 16:
            raise ValueError(
                f'heads * head_dim: got {self.heads} * {self.head_dim}, expected a '
                'product that is a multiple of 16 (position codes)'
            )
        check_span('control', self.control, self.layers)

    @property
    def width(self) -> int:
        """Model width D."""
        return self.heads * self.head_dim

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """Patterns of the layers for `nn.linear.quantize`."""
        return {
            'none': (),
            'attention': ('*/attention/*',),
            'blocks': ('*/attention/*', '*/mlp/*'),
        }[self.int8]

    @property
    def segments(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, stop) of each run of equal layers; empty runs are absent."""
        steered = range(self.control.start, self.control.end) if self.control else ()
        return segments(self.layers, steered, 'steered')

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads a released `transformer/config.json`.

        Raises:
          ValueError: a key asks for an operation that this network does not have.
        """
        released = {key: value for key, value in released.items() if not key.startswith('_')}
        faults = config_faults(released, FIXED, {*FIELDS, *CONTROL, *SAMPLE, *IGNORED})
        if released.get('out_channels', released.get('in_channels')) != released.get('in_channels'):
            faults.append(f'out_channels = {released["out_channels"]!r} (expected in_channels)')
        if faults:
            raise ValueError('transformer config: ' + '; '.join(faults))
        fields = {ours: released[theirs] for theirs, ours in FIELDS.items() if theirs in released}
        base = cls()
        control = {
            ours: released[theirs]
            for theirs, ours in CONTROL.items()
            if released.get(theirs) is not None
        }
        if 'dim' in control:
            layers = fields.get('layers', base.layers)
            fields['control'] = ControlConfig(**{'start': 0, 'end': layers} | control)
        fields['sample'] = tuple(
            released.get(key, default) for key, default in zip(SAMPLE, base.sample, strict=True)
        )
        return cls(**fields)

    def to_released(self) -> dict:
        """The `transformer/config.json` of this network."""
        released = {'_class_name': 'CogVideoXTransformer3DModel'} | FIXED
        released |= {theirs: getattr(self, ours) for theirs, ours in FIELDS.items()}
        released |= dict(zip(SAMPLE, self.sample, strict=True))
        released['out_channels'] = self.channels
        if self.control:
            # diffusers has no control blocks, so it must not take this for its own class.
            released['_class_name'] = 'MatrixCogVideoXTransformer3DModel'
            released |= {theirs: getattr(self.control, ours) for theirs, ours in CONTROL.items()}
            released['control_zero_init'] = True
            if not self.control.modulate:  # a key of ours, absent from released files
                del released['control_modulate']
        return {key: value for key, value in released.items() if value is not None}


# Keys of the released config.json: those that set a field, those with one supported value, and
# those without effect.
FIELDS = {
    'num_attention_heads': 'heads',
    'attention_head_dim': 'head_dim',
    'in_channels': 'channels',
    'num_layers': 'layers',
    'time_embed_dim': 'time_dim',
    'text_embed_dim': 'text_dim',
    'max_text_seq_length': 'text_length',
    'patch_size': 'patch',
    'spatial_interpolation_scale': 'spatial_scale',
    'temporal_interpolation_scale': 'temporal_scale',
    'norm_eps': 'eps',
    'cond_proj_dim': 'guidance_dim',
}
CONTROL = {
    'control_dim': 'dim',
    'control_start_layer': 'start',
    'control_end_layer': 'end',
    'control_recency': 'recency',
    'control_modulate': 'modulate',
}
SAMPLE = ('sample_width', 'sample_height', 'sample_frames')
FIXED = {
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'dropout': 0.0,
    'attention_bias': True,
    'activation_fn': 'gelu-approximate',
    'timestep_activation_fn': 'silu',
    'norm_elementwise_affine': True,
    'patch_bias': True,
    'patch_size_t': None,
    'ofs_embed_dim': None,
    'use_rotary_positional_embeddings': False,
    'use_learned_positional_embeddings': False,
}
IGNORED = ('out_channels', 'temporal_compression_ratio', 'control_zero_init')

PRESETS = {
    'tiny': Config(
        heads=2,
        head_dim=16,
        channels=4,
        layers=4,
        time_dim=24,
        text_dim=20,
        text_length=7,
        control=ControlConfig(dim=10, start=1, end=3),
        sample=(12, 8, 17),
    ),
    '2b': Config(dtype='bfloat16', remat='block'),
    '2b_control': Config(dtype='bfloat16', remat='block', control=ControlConfig()),
    'carracing': Config(
        heads=4,
        head_dim=44,
        channels=16,
        layers=6,
        time_dim=48,
        text_dim=64,
        text_length=64,
        patch=2,
        spatial_scale=1.0,
        sample=(12, 8, 33),
        scan_unroll=4,
        control=ControlConfig(64, 2, 6, recency=2.0, modulate=True),
    ),
}


def check(cfg: Config, latents, text, level, control):
    """Checks the shapes of a call.

    Raises:
      ValueError: a shape does not fit the network.
    """
    batch, frames, height, width, channels = latents.shape
    if height % cfg.patch or width % cfg.patch or channels != cfg.channels:
        raise ValueError(
            f'latents: got {latents.shape}, expected [B T H W {cfg.channels}] with '
            f'H and W multiples of {cfg.patch}'
        )
    if text.shape[1:] != (cfg.text_length, cfg.text_dim) or text.shape[0] not in (1, batch):
        raise ValueError(
            f'text: got {text.shape}, expected '
            f'({batch}, {cfg.text_length}, {cfg.text_dim}); pad, do not crop'
        )
    if level.shape[0] not in (1, batch) or level.shape[1] not in (1, frames):
        raise ValueError(f'level: got {level.shape}, expected ({batch}, {frames}) or ({batch},)')
    if (control is None) != (cfg.control is None):
        raise ValueError(
            f'control: got {None if control is None else control.shape}, but the '
            f'network has {"no" if cfg.control is None else "its"} control blocks'
        )
    if control is not None and (
        control.shape[2] != cfg.control.dim or control.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f'control: got {control.shape}, expected ({batch}, {frames}, {cfg.control.dim})'
        )
