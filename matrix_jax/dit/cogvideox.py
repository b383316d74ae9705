"""CogVideoX DiT with per-frame noise levels and interleaved control blocks.

Joint text-video transformer with AdaLN-zero (CogVideoX, arXiv 2408.06072); The Matrix (arXiv
2412.03568) adds a control block behind each of the layers [start, end) and one noise level per
latent frame:

    x, y = block(x, y, t)              x video tokens, y text tokens, t embedded levels
    x    = x + gate_t * attend(x, c)   c embedded control, one token per latent frame

Layers run as three scans, `before`, `steered` and `after`, so thirty layers compile like three.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.dit.actions import ControlEmbedding, visibility
from matrix_jax.dit.cogvideox_layers import Block, SteeredLayer, stack
from matrix_jax.dit.segments import check_span, segments
from matrix_jax.dit.weight_rows import adaln_rows, attention_rows, linear_rows, norm_rows
from matrix_jax.nn import token_layout
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm, TimeEmbedding, modulate
from matrix_jax.nn.precompute import COLLECTION, once
from matrix_jax.nn.rope import scaled_positions, sincos_3d
from matrix_jax.parallel.sharding import constrain
from matrix_jax.weights.conversion import Row, check_sizes, config_faults


@dataclasses.dataclass(frozen=True)
class Control:
    """Control blocks: width A of a control vector, and the layers [start, end) they follow.

    `recency` is None in the released networks: there a frame tells its own control from earlier
    ones by their counts alone, which is hard for a small network. A number replaces the counts: a
    control of t frames ago has logits lower by t * recency. `modulate` also adds the control of a
    frame to its embedded noise level: a product of control and place, which tells left from right,
    is then one layer deep.
    """

    dim: int = 768
    start: int = 15
    end: int = 30
    recency: float | None = None
    modulate: bool = False

    def __post_init__(self):
        check_sizes(self, 'control.', zero=('start',))


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
      guidance_dim: width of a guidance code that is added to the level's, or None.
      sample: native latent width, height and pixel frames; recorded, any size works.
      dtype: type of the multiplies and of the residual stream, as a numpy name.
      remat: what the backward pass recomputes: 'none', each 'block', or of a block all but the
        'dots' (its matrix products are kept).
      scan_unroll: layers per scan iteration.
      int8: which linear layers of the blocks multiply in 8 bits, where the network only runs.
      exchange: what devices that share the tokens exchange in an attention: its 'heads', its
        'keys', or 'auto' (`nn.attention.route`).
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
    control: Control | None = None
    guidance_dim: int | None = None
    sample: tuple[int, int, int] = (90, 60, 49)
    dtype: str = 'float32'
    remat: Literal['none', 'block', 'dots'] = 'none'
    scan_unroll: int = 1
    int8: Literal['none', 'attention', 'blocks'] = 'none'
    exchange: Literal['auto', 'heads', 'keys'] = 'auto'

    def __post_init__(self):
        check_sizes(self)
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
        return segments(self.layers, self.control, 'steered')

    @classmethod
    def from_released(cls, released: dict) -> Config:
        """Reads a released `transformer/config.json`.

        Raises:
          ValueError: a key asks for maths that this network does not have.
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
            fields['control'] = Control(**{'start': 0, 'end': layers} | control)
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
            released |= {theirs: getattr(self.control, ours) for theirs, ours in CONTROL.items()}
            released['control_zero_init'] = True
            if not self.control.modulate:  # a key of ours, absent from released files
                del released['control_modulate']
        return {key: value for key, value in released.items() if value is not None}


# Keys of the released config.json: our fields, those with one value that we implement, and those
# without effect.
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
        control=Control(dim=10, start=1, end=3),
        sample=(12, 8, 17),
    ),
    '2b': Config(dtype='bfloat16', remat='block'),
    '2b_control': Config(dtype='bfloat16', remat='block', control=Control()),
    'carracing': Config(
        heads=4,
        head_dim=44,
        channels=8,
        layers=6,
        time_dim=48,
        text_dim=64,
        text_length=64,
        patch=2,
        spatial_scale=1.0,
        sample=(12, 8, 33),
        scan_unroll=4,
        control=Control(64, 2, 6, recency=2.0, modulate=True),
    ),
}


class DiT(nn.Module):
    """The whole network: latents, text, noise levels and control -> v-prediction.

    Attributes:
      cfg: sizes.
      ready: whether text is given as tokens (`embed_text`) and controls as symbols alone, as the
        rest of them is in the collection of `make_once`.
    """

    cfg: Config
    ready: bool = False

    @nn.compact
    def __call__(self, latents, text, level, control=None, guidance=None, symbols=None):
        """Predicts v.

        Args:
          latents: noisy latents [B T H W C].
          text: encoded text [B L Dt]; tokens [B L D] if `ready`.
          level: noise levels 0 .. 999, [B T] or [B]; the batch may be 1.
          control: control vectors [B T A], None without control blocks; the batch may be 1.
          guidance: guidance codes [B T P] or None; T may be 1.
          symbols: int32 [B T] or None: control is then a table [1 S A] of which these are rows.

        Returns:
          v [B T H W C], float32.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        level = jnp.asarray(level)
        level = level[:, None] if level.ndim == 1 else level
        if not self.ready:
            check(cfg, latents, text, level, control)
        grid = dict(p=cfg.patch, q=cfg.patch)
        frames, rows, columns = latents.shape[1], *(n // cfg.patch for n in latents.shape[2:4])

        time = once(
            self,
            'time',
            lambda: TimeEmbedding(
                cfg.width, cfg.time_dim, cfg.guidance_dim, dtype, name='time_embedding'
            )(level, guidance),
        )
        patches = rearrange(latents, 'b t (h p) (w q) c -> b t (h w) (p q c)', **grid)
        # Every device has the small latents; how tokens are split says nothing about those.
        patches = constrain(patches, 'batch', None, None, None)
        patches = constrain(token_layout.pad(patches, 2), 'batch', None, 'tokens', None)
        video = Linear(cfg.width, dtype=dtype, name='patch')(patches)
        video = video + token_layout.pad(positions(cfg, frames, rows, columns), 1).astype(dtype)
        text = constrain(token_layout.pad(text, 1), 'batch', 'tokens', None)
        text = (
            text.astype(dtype) if self.ready else Linear(cfg.width, dtype=dtype, name='text')(text)
        )
        steering = None
        if cfg.control:
            embedded = once(
                self,
                'control',
                lambda: ControlEmbedding(cfg.width, dtype, name='control_embedding')(control),
            )
            if cfg.control.modulate:
                time = time + Linear(cfg.time_dim, dtype=dtype, name='control_time')(embedded)
            count = (embedded if symbols is None else symbols).shape[1]
            seen = visibility(frames * rows * columns, count, cfg.control.recency)
            steering = (embedded, token_layout.table(seen, frames), symbols)

        tokens = (video, text)
        for name, (start, stop) in cfg.segments.items():
            layer = {'steered': SteeredLayer}.get(name, Block)
            given = (time, steering) if name == 'steered' else (time,)
            layers = stack(layer, cfg, stop - start, len(given))
            tokens, _ = layers(cfg, rows * columns, name=name)(tokens, *given)

        video = LayerNorm(cfg.eps, name='norm_final')(tokens[0])
        parts = once(
            self, 'parts', lambda: Linear(2 * cfg.width, name='modulation_out')(jax.nn.silu(time))
        )
        shift, scale = rearrange(parts, 'b t (c d) -> c b t 1 d', c=2)
        video = modulate(LayerNorm(cfg.eps, name='norm_out')(video), shift, scale)
        patches = Linear(cfg.patch**2 * cfg.channels, dtype=dtype, name='out')(video)
        # Padding goes, and every device has all of the small prediction, by one exchange.
        patches = constrain(patches, 'batch', None, None, None)[:, :, : rows * columns]
        v = rearrange(patches, 'b t (h w) (p q c) -> b t (h p) (w q) c', h=rows, **grid)
        return v.astype(jnp.float32)


def positions(cfg: Config, frames: int, rows: int, columns: int) -> np.ndarray:
    """Position codes [T N/T D] of a window; its first frame is always frame 0."""
    return sincos_3d(
        scaled_positions(frames, cfg.temporal_scale),
        scaled_positions(rows, cfg.spatial_scale),
        scaled_positions(columns, cfg.spatial_scale),
        cfg.width,
    ).astype(np.float32)


def check(cfg: Config, latents, text, level, control):
    """Raises ValueError where shapes do not fit the network."""
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


def embed_text(cfg: Config, params, text):
    """Encoded text [B L Dt] -> tokens [B L D], float32; once per prompt."""
    net = Linear(cfg.width, dtype=jnp.dtype(cfg.dtype))
    return net.apply({'params': params['text']}, text).astype(jnp.float32)


def make_once(cfg: Config, params, level, table) -> dict:
    """What no call at these levels changes: the embedded levels and all that they modulate with,
    and the keys and values of every control.

    Args:
      cfg: sizes.
      params: of the network.
      level: noise levels [T].
      table: control vectors of all symbols [S A].

    Returns:
      The collection that `DiT(cfg, ready=True)` reads.

    Raises:
      ValueError: a frame's control modulates as well.
    """
    if cfg.control is None or cfg.control.modulate:
        raise ValueError('control.modulate: expected False, where levels alone modulate')
    latents, text, _, _ = _inputs(cfg)
    latents = jnp.repeat(latents, len(level), axis=1)
    symbols = jnp.zeros([1, len(level)], jnp.int32)
    given = (latents, text, level[None], table[None], None, symbols)
    return DiT(cfg).apply({'params': params}, *given, mutable=[COLLECTION])[1][COLLECTION]


def init(cfg: Config, key, zero_init: bool = False) -> dict:
    """Fresh float32 parameters.

    Control blocks start as the identity: their modulation is zero.

    Args:
      cfg: sizes.
      key: PRNG key.
      zero_init: also zero every modulation and the output layer, for training from nothing.
    """
    params = jax.jit(DiT(cfg).init)(key, *_inputs(cfg))['params']

    def start(path, leaf):
        names = [entry.key for entry in path]
        modulation = names[-2] == 'linear' and names[-3].startswith('norm')
        control = modulation and 'control' in names
        whole = zero_init and (modulation or names[0] in ('modulation_out', 'out'))
        return jnp.zeros_like(leaf) if control or whole else leaf

    return jax.tree_util.tree_map_with_path(start, params)


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(
        lambda key: DiT(cfg).init(key, *_inputs(cfg))['params'], jax.random.key(0)
    )


def count(cfg: Config) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes(cfg)))


def _inputs(cfg: Config):
    control = jnp.zeros((1, 1, cfg.control.dim)) if cfg.control else None
    return (
        jnp.zeros((1, 1, cfg.patch, cfg.patch, cfg.channels)),
        jnp.zeros((1, cfg.text_length, cfg.text_dim)),
        jnp.zeros((1, 1)),
        control,
    )


def weights(cfg: Config) -> tuple[Row, ...]:
    """Weight table: released state dict <-> our tree."""
    patch = dict(p=cfg.patch, q=cfg.patch)
    rows = [
        Row('patch_embed.proj.weight', 'patch/kernel', 'd c p q -> (p q c) d', sizes=patch),
        Row('patch_embed.proj.bias', 'patch/bias', 'd -> d'),
        *linear_rows('patch_embed.text_proj', 'text', 'i', 'd'),
        *linear_rows('time_embedding.linear_1', 'time_embedding/linear_1', 'd', 'p'),
        *linear_rows('time_embedding.linear_2', 'time_embedding/linear_2', 'i', 'p'),
        *norm_rows('norm_final', 'norm_final', 'd'),
        *norm_rows('norm_out.norm', 'norm_out', 'd'),
        *linear_rows('norm_out.linear', 'modulation_out', 'p', 'd'),
        Row('proj_out.weight', 'out/kernel', '(c p q) d -> d (p q c)', sizes=patch),
        Row('proj_out.bias', 'out/bias', '(c p q) -> (p q c)', sizes=patch),
    ]
    if cfg.guidance_dim is not None:
        rows += [
            Row('time_embedding.cond_proj.weight', 'time_embedding/guidance/kernel', 'd i -> i d')
        ]
    for name, layers in cfg.segments.items():
        path = 'steered/block' if name == 'steered' else name
        torch = 'transformer_blocks.{i}'
        rows += attention_rows(torch, path, layers)
        rows += adaln_rows(f'{torch}.norm2', f'{path}/norm2', layers)
        rows += linear_rows(f'{torch}.ff.net.0.proj', f'{path}/mlp/up', 'd', 'm', layers)
        rows += linear_rows(f'{torch}.ff.net.2', f'{path}/mlp/down', 'm', 'd', layers)
    if cfg.control:
        rows += linear_rows('control_embedding.0', 'control_embedding/linear_1', 'i', 'o')
        rows += linear_rows('control_embedding.2', 'control_embedding/linear_2', 'i', 'd')
        rows += linear_rows('control_embedding.4', 'control_embedding/linear_3', 'd', 'o')
        if cfg.control.modulate:
            rows += linear_rows('control_time', 'control_time', 'd', 'p')
        rows += attention_rows(
            'control_blocks.{i}', 'steered/control', (0, cfg.control.end - cfg.control.start)
        )
    return tuple(rows)
