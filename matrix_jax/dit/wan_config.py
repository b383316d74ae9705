"""Sizes of the Wan DiT, its presets and `config.json`, and checks of its inputs."""

from __future__ import annotations

import dataclasses
from typing import Literal

from matrix_jax.dit import wan_diffusers
from matrix_jax.dit.segments import check_span, segments
from matrix_jax.dit.wan_actions import ActionConfig
from matrix_jax.weights.conversion import config_faults
from matrix_jax.weights.schema import check_fields

ACTING = 'acting'  # runs of layers with action modules have names that start with this


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; the defaults are Wan 2.1 of 1.3B with image conditions.

    Attributes:
      heads: attention heads K.
      head_dim: width E of a head; the model width is D = K*E.
      channels: latent channels C, in and out.
      cond_channels: channels Cc of the conditions that are joined to the latents.
      layers: transformer blocks.
      mlp: hidden width M.
      time_dim: width of the code of a noise level.
      image_dim: width Di of the image's features.
      image_length: image tokens L of the caches; `__call__` takes any number.
      patch: side of a square patch.
      eps: epsilon of the norms of blocks, queries and keys.
      local: latent frames that a block sees, including its own; also the slots S of the caches.
        None = all, for networks that do not stream.
      sink: slots of these that keep the first latent frames of the stream.
      actions: action modules, or None.
      dtype, remat, scan_unroll, exchange: as in `cogvideox.Config`.
    """

    heads: int = 12
    head_dim: int = 128
    channels: int = 16
    cond_channels: int = 20
    layers: int = 30
    mlp: int = 8960
    time_dim: int = 256
    image_dim: int = 1280
    image_length: int = 257
    patch: int = 2
    eps: float = 1e-6
    local: int | None = None
    sink: int = 0
    actions: ActionConfig | None = None
    dtype: str = 'float32'
    remat: Literal['none', 'block', 'dots'] = 'none'
    scan_unroll: int = 1
    exchange: Literal['auto', 'heads', 'keys'] = 'auto'

    def __post_init__(self):
        check_fields(self, zero=('sink',))
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f'head_dim: got {self.head_dim}, expected an even number from 6 on '
                '(pairs for frame, row and column)'
            )
        if self.time_dim % 2:
            raise ValueError(f'time_dim: got {self.time_dim}, expected an even number')
        if self.local is not None and not 0 <= self.sink < self.local:
            raise ValueError(
                f'sink: got {self.sink} latent frames, expected fewer than the '
                f'{self.local} of local'
            )
        check_span('actions', self.actions, self.layers)

    @property
    def width(self) -> int:
        """Model width D."""
        return self.heads * self.head_dim

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
        fields, faults = read_sizes(
            cls(), wan_diffusers.published(released), FIELDS, FIXED, IGNORED
        )
        out, joined = fields.get('channels', cls.channels), fields.pop('joined', None)
        if joined is not None:
            fields['cond_channels'] = joined - out
        if fields.get('local') == -1:
            fields['local'] = None
        action_config = released.get('action_config') or {}
        if not action_config.get('enable_keyboard', True):
            faults.append('action_config.enable_keyboard = False (expected True)')
        if faults:
            raise ValueError('transformer config: ' + '; '.join(faults))
        return cls(**fields, actions=read_actions(action_config))

    def to_released(self) -> dict:
        """The config.json of this network."""
        ours = {'width': self.width, 'joined': self.channels + self.cond_channels} | {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        ours['local'] = -1 if self.local is None else self.local
        released = (
            {'_class_name': 'CausalWanModel'}
            | FIXED
            | {theirs: ours[name] for theirs, name in FIELDS.items()}
        )
        released['patch_size'] = [1, self.patch, self.patch]
        for key in [key for key, (name, usual) in OURS.items() if ours[name] == usual]:
            del released[key]
        if self.actions:
            released['action_config'] = released_actions(self.actions, self.width, self.patch)
        return released


def read_sizes(
    base, released: dict, table: dict, fixed: dict, ignored: tuple[str, ...]
) -> tuple[dict, list[str]]:
    """Reads the sizes in the config.json of a Wan transformer.

    Args:
      base: config whose sizes hold where the file has none.
      released: the content of the file.
      table: keys that set a field -> the field; a 'width' becomes `head_dim`.
      fixed: keys with one supported value.
      ignored: keys without effect.

    Returns:
      (fields of the config without `actions`, one text per key that the network cannot follow).
    """
    released = {
        key: value
        for key, value in released.items()
        if not key.startswith('_') and value is not None
    }
    faults = config_faults(released, fixed, ('patch_size', 'action_config', *table, *ignored))
    fields = {ours: released[theirs] for theirs, ours in table.items() if theirs in released}
    width, heads = fields.pop('width', base.width), fields.get('heads', base.heads)
    if width % heads:
        faults.append(f'dim = {width} (expected a multiple of num_heads = {heads})')
    patch = list(released.get('patch_size', (1, base.patch, base.patch)))
    if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        faults.append(f'patch_size = {patch} (expected [1, p, p])')
    faults += action_faults(released.get('action_config') or {}, width)
    return fields | {'head_dim': width // heads, 'patch': patch[-1]}, faults


def action_faults(released: dict, width: int) -> list[str]:
    """One text per key of an `action_config` that a network of this width cannot follow."""
    known = (
        'patch_size',
        *ACTIONS,
        'blocks',
        'enable_mouse',
        'enable_keyboard',
        'img_hidden_size',
        'rope_dim_list',
        'local_attn_size',
    )
    faults = config_faults(released, FIXED_ACTIONS, known, 'action_config.')
    if released and released.get('img_hidden_size', width) != width:
        faults.append(
            f'action_config.img_hidden_size = {released["img_hidden_size"]} (expected '
            f'dim = {width})'
        )
    return faults


def read_actions(released: dict) -> ActionConfig | None:
    """The action modules of an `action_config`; None if no layer has one."""
    parts = [part for part in ('mouse', 'keyboard') if released.get(f'enable_{part}', True)]
    if not released.get('blocks') or not parts:
        return None
    sizes = {ours: released[theirs] for theirs, ours in ACTIONS.items() if theirs in released}
    sizes |= {part: None for part in ('mouse', 'keyboard') if part not in parts}
    if 'axes' in sizes:
        sizes['axes'] = tuple(sizes['axes'])
    return ActionConfig.of_layers(released['blocks'], **sizes)


def released_actions(size: ActionConfig, width: int, patch: int) -> dict:
    """The `action_config` of action modules in a network of this width."""
    released = FIXED_ACTIONS | {theirs: getattr(size, name) for theirs, name in ACTIONS.items()}
    released |= {
        'blocks': list(size.layers),
        'enable_mouse': bool(size.mouse),
        'enable_keyboard': bool(size.keyboard),
        'img_hidden_size': width,
        'rope_dim_list': list(size.axes),
        'mouse_qk_dim_list': list(size.axes),
        'patch_size': [1, patch, patch],
    }
    for key in [key for key, usual in OUR_ACTIONS.items() if released[key] == usual]:
        del released[key]
    for part in ('mouse', 'keyboard'):
        if not getattr(size, part):
            del released[f'{part}_dim_in'], released[f'{part}_hidden_dim']
    return released


# Keys of config.json: those that set a field, those with one supported value, and those without
# effect. `width` and `joined` are computed from fields.
OURS = {'image_dim': ('image_dim', 1280), 'image_length': ('image_length', 257)}  # not released
OUR_ACTIONS = {'gain': 1.0, 'modulate': False, 'norm_scale': False}
FIELDS = {
    'dim': 'width',
    'num_heads': 'heads',
    'in_dim': 'joined',
    'out_dim': 'channels',
    'num_layers': 'layers',
    'ffn_dim': 'mlp',
    'freq_dim': 'time_dim',
    'eps': 'eps',
    'local_attn_size': 'local',
    'sink_size': 'sink',
    **{key: key for key in OURS},
}
FIXED = {'model_type': 'i2v', 'qk_norm': True, 'cross_attn_norm': True}
IGNORED = ('text_len', 'text_dim', 'inject_sample_info', 'window_size')
ACTIONS = {
    'keyboard_dim_in': 'keyboard',
    'mouse_dim_in': 'mouse',
    'hidden_size': 'embed',
    'keyboard_hidden_dim': 'keyboard_width',
    'mouse_hidden_dim': 'mouse_width',
    'heads_num': 'heads',
    'vae_time_compression_ratio': 'ratio',
    'windows_size': 'span',
    'mouse_qk_dim_list': 'axes',
    'rope_theta': 'period',
    **{key: key for key in OUR_ACTIONS},
}
FIXED_ACTIONS = {'qk_norm': True, 'qkv_bias': False}

_RELEASED = dict(dtype='bfloat16', remat='block')
PRESETS = {
    'tiny': Config(
        heads=2,
        head_dim=12,
        channels=4,
        cond_channels=8,
        layers=3,
        mlp=32,
        time_dim=16,
        image_dim=10,
        image_length=5,
        local=4,
        actions=ActionConfig(
            0, 2, embed=6, keyboard_width=32, mouse_width=32, heads=2, axes=(8, 4, 4)
        ),
    ),
    'universal': Config(local=6, actions=ActionConfig(), **_RELEASED),
    'gta_drive': Config(local=4, actions=ActionConfig(keyboard=2), **_RELEASED),
    'templerun': Config(local=6, actions=ActionConfig(keyboard=7, mouse=None), **_RELEASED),
    'foundation': Config(actions=ActionConfig(end=30), **_RELEASED),
}


def check(cfg: Config, latents, level, cond, image, mouse, keyboard, window: bool = False):
    """Checks the shapes of a call, but not those of an `image` that is None.

    Raises:
      ValueError: a shape does not fit the network.
    """
    batch, frames, height, width, channels = latents.shape
    if height % cfg.patch or width % cfg.patch or channels != cfg.channels:
        raise ValueError(
            f'latents: got {latents.shape}, expected [B T H W {cfg.channels}] with '
            f'H and W multiples of {cfg.patch}'
        )
    want = (*latents.shape[:-1], cfg.cond_channels)
    if cond.shape != want:
        raise ValueError(f'cond: got {cond.shape}, expected {want}')
    if level.shape[0] not in (1, batch) or level.shape[1:] not in ((), (1,), (frames,)):
        raise ValueError(f'level: got {level.shape}, expected ({batch}, {frames}) or ({batch},)')
    if image is not None and (image.shape[0] != batch or image.shape[2:] != (cfg.image_dim,)):
        raise ValueError(f'image: got {image.shape}, expected ({batch}, L, {cfg.image_dim})')
    size = cfg.actions
    widths = {'mouse': size and size.mouse, 'keyboard': size and size.keyboard}
    for name, actions in (('mouse', mouse), ('keyboard', keyboard)):
        if (actions is None) != (widths[name] is None):
            raise ValueError(
                f'{name}: got {None if actions is None else actions.shape}, but the '
                f'network has {"no" if actions is not None else "its"} {name}'
            )
        if actions is None or isinstance(actions, dict):  # the keyboard has been read
            continue
        steps = size.steps(frames) if window else size.ratio * (frames - 1) + 1
        if (
            actions.shape[0] != batch
            or actions.shape[2:] != (widths[name],)
            or (actions.shape[1] != steps)
        ):
            raise ValueError(
                f'{name}: got {actions.shape}, expected ({batch}, {steps}, '
                f'{widths[name]}) for {frames} latent frames'
            )
