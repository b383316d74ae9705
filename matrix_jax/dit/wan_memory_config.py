"""Sizes of the Wan 2.2 DiT with memory and camera, its presets and `config.json`, and checks."""

from __future__ import annotations

import dataclasses
from typing import Literal

from matrix_jax.dit.segments import check_span, segments
from matrix_jax.dit.wan_actions import ActionConfig
from matrix_jax.dit.wan_config import ACTING, read_actions, read_sizes, released_actions
from matrix_jax.weights.schema import check_fields


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are Matrix-Game 3.0 of 5B without action modules.

    Attributes:
      heads: attention heads K.
      head_dim: width E of a head; the model width is D = K*E.
      in_channels: channels of the input latents.
      channels: channels C of the predicted latents.
      layers: transformer blocks.
      mlp: hidden width M.
      time_dim: width of the code of a noise level.
      text_dim: width of encoded text.
      text_length: text tokens L; shorter texts are padded with zeros, which are attended to.
      patch: side of a square patch.
      eps: epsilon of the norms of blocks, queries and keys.
      memory: whether the camera modulates the blocks, and text attention is added to the normalised
        tokens. Plain Wan 2.2 has neither.
      camera_channels: channels of a latent pixel's ray map.
      sigma_theta: spread of the period of RoPE over the heads, from 10000 * (1 - sigma_theta) for
        the first head to 10000 * (1 + sigma_theta) for the last.
      actions: keyboard and mouse, or None.
      int8: layers that multiply in 8 bits: none, or the self-attention and the text attention, as
        in the reference.
      int8_truncate: whether 8-bit activations are rounded towards zero, as in the reference.
      dtype, remat, scan_unroll, exchange: how it runs, as in `cogvideox.Config`.
    """

    heads: int = 24
    head_dim: int = 128
    in_channels: int = 48
    channels: int = 48
    layers: int = 30
    mlp: int = 14336
    time_dim: int = 256
    text_dim: int = 4096
    text_length: int = 512
    patch: int = 2
    eps: float = 1e-6
    memory: bool = True
    camera_channels: int = 1536
    sigma_theta: float = 0.8
    actions: ActionConfig | None = None
    int8: Literal['none', 'attention'] = 'none'
    int8_truncate: bool = False
    dtype: str = 'float32'
    remat: Literal['none', 'block', 'dots'] = 'none'
    scan_unroll: int = 1
    exchange: Literal['auto', 'heads', 'keys'] = 'auto'

    def __post_init__(self):
        check_fields(self)
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f'head_dim: got {self.head_dim}, expected an even number from 6 on '
                '(pairs for frame, row and column)'
            )
        if self.time_dim % 2:
            raise ValueError(f'time_dim: got {self.time_dim}, expected an even number')
        if not 0 <= self.sigma_theta < 1:
            raise ValueError(f'sigma_theta: got {self.sigma_theta}, expected 0 <= sigma_theta < 1')
        check_span('actions', self.actions, self.layers)

    @property
    def width(self) -> int:
        """Model width D."""
        return self.heads * self.head_dim

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """Patterns of the layers that multiply in 8 bits."""
        return ('*/attention/*', '*/text_attention/*') if self.int8 == 'attention' else ()

    @property
    def segments(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, stop) of each run of equal layers; empty runs are absent."""
        return segments(self.layers, self.actions.layers if self.actions else (), ACTING)

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads a released config.json.

        Raises:
          ValueError: a key asks for an operation that this network does not have.
        """
        released = of_diffusers(released)
        fields, faults = read_sizes(cls(), released, FIELDS, FIXED, ('model_type', *IGNORED))
        if released.get('model_type', KINDS[0]) not in KINDS:
            faults.append(
                f'model_type = {released["model_type"]!r} (expected '
                f'{" or ".join(map(repr, KINDS))})'
            )
        if faults:
            raise ValueError('transformer config: ' + '; '.join(faults))
        # The config of plain Wan 2.2 does not name these keys.
        fields = {'memory': False, 'sigma_theta': 0.0} | fields
        return cls(**fields, actions=read_actions(released.get('action_config') or {}))

    def to_released(self) -> dict:
        """The config.json of this network."""
        ours = {'width': self.width} | {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        released = (
            {'_class_name': 'WanModel', 'model_type': KINDS[0]}
            | FIXED
            | {theirs: ours[name] for theirs, name in FIELDS.items()}
        )
        if self.camera_channels == type(self)().camera_channels:
            del released['camera_channels']
        released['patch_size'] = [1, self.patch, self.patch]
        if self.actions:
            # Always written; where it is missing, a reader has to look at the weights.
            released['action_config'] = released_actions(self.actions, self.width, self.patch) | {
                'norm_scale': self.actions.norm_scale
            }
        return released


def of_diffusers(released: dict) -> dict:
    """Returns a config.json with the keys of the reference in place of those of diffusers."""
    if 'num_attention_heads' not in released:
        return released
    renamed = {DIFFUSERS.get(key, key): value for key, value in released.items()}
    if (head_dim := renamed.pop('attention_head_dim', None)) is not None:
        renamed['dim'] = head_dim * renamed['num_heads']
    if renamed.get('qk_norm') == 'rms_norm_across_heads':
        renamed['qk_norm'] = True
    if renamed.get('image_dim') == 0:  # no image features
        del renamed['image_dim']
    return renamed


# Keys of config.json: those that set a field, model types of this network, keys with one supported
# value, and those without effect. Released files have no `camera_channels`.
FIELDS = {
    'dim': 'width',
    'num_heads': 'heads',
    'in_dim': 'in_channels',
    'out_dim': 'channels',
    'num_layers': 'layers',
    'ffn_dim': 'mlp',
    'freq_dim': 'time_dim',
    'eps': 'eps',
    'text_dim': 'text_dim',
    'text_len': 'text_length',
    'use_memory': 'memory',
    'sigma_theta': 'sigma_theta',
    'camera_channels': 'camera_channels',
}
KINDS = ('ti2v', 't2v', 'i2v')
FIXED = {'qk_norm': True, 'cross_attn_norm': True, 'window_size': [-1, -1]}
IGNORED = (
    'local_attn_size',
    'sink_size',
    'inject_sample_info',
    'is_action_model',
    'rope_max_seq_len',
)
# Keys of diffusers for the same values.
DIFFUSERS = {
    'hidden_size': 'dim',
    'num_attention_heads': 'num_heads',
    'in_channels': 'in_dim',
    'out_channels': 'out_dim',
    'camera_embed_in_channels': 'camera_channels',
}

PRESETS = {
    '5b': Config(dtype='bfloat16', remat='block', actions=ActionConfig(keyboard=6)),
    'wan_2_2_5b': Config(dtype='bfloat16', remat='block', memory=False, sigma_theta=0.0),
    # One of the two experts of 14B, with sizes guessed from the public code.
    '14b': Config(
        dtype='bfloat16',
        remat='block',
        heads=40,
        mlp=13824,
        layers=40,
        actions=ActionConfig(keyboard=6),
    ),
    'tiny': Config(
        heads=2,
        head_dim=12,
        in_channels=4,
        channels=4,
        layers=2,
        mlp=32,
        time_dim=16,
        text_dim=10,
        text_length=6,
        camera_channels=24,
        actions=ActionConfig(
            0, 1, keyboard=6, embed=6, keyboard_width=32, mouse_width=32, heads=2, axes=(8, 4, 4)
        ),
    ),
}


def check(cfg: Config, latents, level, text, positions, camera, mouse, keyboard, memory: int):
    """Checks the shapes of a call.

    Raises:
      ValueError: a shape does not fit the network.
    """
    batch, frames, height, width, channels = latents.shape
    made = frames - memory
    if height % cfg.patch or width % cfg.patch or channels != cfg.in_channels or made < 1:
        raise ValueError(
            f'latents: got {latents.shape}, expected [B M+T H W {cfg.in_channels}] '
            f'with M = {memory}, and H and W multiples of {cfg.patch}'
        )
    tokens = height * width // cfg.patch**2
    if level.shape[0] not in (1, batch) or level.shape[1:] not in (
        (),
        (1,),
        (frames,),
        (frames, tokens),
    ):
        raise ValueError(
            f'level: got {level.shape}, expected ({batch},), ({batch}, {frames}) or '
            f'({batch}, {frames}, {tokens})'
        )
    if (
        text.shape[0] not in (1, batch)
        or text.shape[2] != cfg.text_dim
        or (text.shape[1] > cfg.text_length)
    ):
        raise ValueError(
            f'text: got {text.shape}, expected ({batch}, L, {cfg.text_dim}) with L at '
            f'most {cfg.text_length}'
        )
    if positions.shape not in ((frames,), (batch, frames)):
        raise ValueError(
            f'positions: got {positions.shape}, expected ({frames},) or ({batch}, {frames})'
        )
    want = (batch, frames, height, width, cfg.camera_channels)
    read = isinstance(camera, dict)  # of each layer
    if camera is not None and not read and (not cfg.memory or camera.shape != want):
        raise ValueError(f'camera: got {camera.shape}, expected {want if cfg.memory else None}')
    size = cfg.actions
    widths = {'mouse': size and size.mouse, 'keyboard': size and size.keyboard}
    windows = {'mouse': mouse, 'keyboard': keyboard}
    for name in windows if mouse is not None or keyboard is not None else ():
        want = widths[name] and (batch, frames, size.ratio * size.span, widths[name])
        got = None if windows[name] is None else windows[name].shape
        if got != want:
            raise ValueError(f'{name}: got {got}, expected windows of actions {want}')
