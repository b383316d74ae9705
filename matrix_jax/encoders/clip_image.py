"""CLIP image encoder (arXiv 2103.00020), for the start image of a stream.

    x = norm([class, patches] + positions)
    x <- x + attention(norm(x))
    x <- x + mlp(norm(x))           gelu

The features are the tokens before the last layer. Released weights: the image encoder of
open-clip-xlm-roberta-large-vit-huge-14.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.encoders import transformers_keys
from matrix_jax.nn import initializers
from matrix_jax.nn.attention import attention
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm
from matrix_jax.weights.conversion import Drop, Join, Rename, Row
from matrix_jax.weights.schema import check_fields

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CUBIC = -0.75  # coefficient a of PyTorch's bicubic resize


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder; D = dim, K = heads.

    Attributes:
      image: height and width of an input image.
      patch: height and width of a patch.
      dim: width of a token.
      heads: attention heads.
      layers: layers of the released network; the last one is not used.
      mlp_ratio: width of the feed-forward as a multiple of `dim`.
      eps: epsilon of the norms.
      dtype: numpy name of the type of matrix products and of the residual stream.
    """

    image: int = 224
    patch: int = 14
    dim: int = 1280
    heads: int = 16
    layers: int = 32
    mlp_ratio: int = 4
    eps: float = 1e-5
    dtype: str = 'float32'

    def __post_init__(self):
        check_fields(self, 'clip.')
        if self.dim % self.heads:
            raise ValueError(f'clip.heads: {self.heads} does not divide width {self.dim}')
        if self.image % self.patch:
            raise ValueError(
                f'clip.image: got {self.image}, expected a multiple of patch {self.patch}'
            )
        if self.layers < 2:
            raise ValueError(
                f'clip.layers: got {self.layers}, expected at least 2, as the last one is not used'
            )

    @property
    def tokens(self) -> int:
        """Tokens of an image: the class token and the patches."""
        return 1 + (self.image // self.patch) ** 2

    @classmethod
    def from_released(cls, released: Mapping) -> Config:
        """Reads `config.json` of a component folder.

        Raises:
          ValueError: a size is missing or a key is unknown.
        """
        if 'hidden_size' in released or 'vision_config' in released:
            return cls._from_transformers(released.get('vision_config') or released)
        faults = [f'missing {key}' for key in _NAMES if key not in released]
        faults += [
            f'unknown key {key}'
            for key in released
            if key not in _NAMES and key not in _IGNORED and not key.startswith('_')
        ]
        if faults:
            raise ValueError('image encoder config: ' + '; '.join(faults))
        return cls(**{name: released[key] for key, name in _NAMES.items()})

    @classmethod
    def _from_transformers(cls, released: Mapping) -> Config:
        """Reads the config of a `CLIPVisionModel`, as in the diffusers layout of Wan."""
        faults = [f'missing {key}' for key in _TRANSFORMERS if key not in released]
        known = (*_TRANSFORMERS, *_FIXED, 'layer_norm_eps', 'projection_dim')
        faults += [f'unknown key {key}' for key in transformers_keys.unknown(released, known)]
        faults += [
            f'{key} = {released[key]!r} (expected {want!r})'
            for key, want in _FIXED.items()
            if released.get(key, want) != want
        ]
        width, mlp = released.get('hidden_size'), released.get('intermediate_size')
        if not faults and mlp % width:
            faults.append(f'intermediate_size = {mlp} (expected a multiple of {width})')
        if faults:
            raise ValueError('image encoder config: ' + '; '.join(faults))
        sizes = {name: released[key] for key, name in _TRANSFORMERS.items() if name != 'mlp_ratio'}
        return cls(**sizes, mlp_ratio=mlp // width, eps=released.get('layer_norm_eps', cls.eps))

    def to_released(self) -> dict:
        """The `config.json` of this encoder (the published weights have none)."""
        return {
            '_class_name': 'VisionTransformer',
            **{key: getattr(self, name) for key, name in _NAMES.items()},
        }


# Arguments of the published network; `out_dim` is the width of a projection that is not used.
_NAMES = {
    'image_size': 'image',
    'patch_size': 'patch',
    'dim': 'dim',
    'num_heads': 'heads',
    'num_layers': 'layers',
    'mlp_ratio': 'mlp_ratio',
}
_IGNORED = ('out_dim',)
# Keys of a `CLIPVisionModel`; `intermediate_size` is mlp_ratio * dim.
_TRANSFORMERS = {
    'image_size': 'image',
    'patch_size': 'patch',
    'hidden_size': 'dim',
    'num_attention_heads': 'heads',
    'num_hidden_layers': 'layers',
    'intermediate_size': 'mlp_ratio',
}
_FIXED = {'hidden_act': 'gelu', 'num_channels': 3}

PRESETS = {'vit_h_14': Config(), 'tiny': Config(image=28, dim=16, heads=2, layers=3, mlp_ratio=2)}


def pixels(cfg: Config, images):
    """Preprocesses images [B H W 3] in [-1, 1] of any size -> [B image image 3]."""
    height, width = images.shape[1:3]
    x = images.astype(jnp.float32)
    x = jnp.einsum('ih,bhwc->biwc', cubic(height, cfg.image), x)
    x = jnp.einsum('jw,biwc->bijc', cubic(width, cfg.image), x)
    return (x * 0.5 + 0.5 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def cubic(size: int, target: int) -> np.ndarray:
    """Matrix [target size] of bicubic interpolation of `size` values at `target` positions.

    PARITY: without a low-pass filter, so shrinking skips pixels. The border value is repeated.
    """
    # PARITY: positions in float32, which matters for large images.
    positions = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * np.float32(size / target)
    positions = positions - np.float32(0.5)
    whole = np.floor(positions)
    part = (positions - whole).astype(np.float64)
    a, matrix = CUBIC, np.zeros((target, size))
    for tap in range(-1, 3):
        far = np.abs(part - tap)
        near = ((a + 2) * far - (a + 3)) * far**2 + 1
        weight = np.where(far <= 1, near, a * (((far - 5) * far + 8) * far - 4))
        column = np.clip(whole + tap, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(target), column), weight)
    return matrix.astype(np.float32)


class ImageTower(nn.Module):
    """Images [B image image 3] of `pixels` -> tokens [B 1+patches D] before the last layer."""

    cfg: Config

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.cfg
        if images.shape[1:] != (cfg.image, cfg.image, 3):
            raise ValueError(
                f'clip: got pictures {images.shape}, expected [B {cfg.image} {cfg.image} 3]'
            )
        patches = rearrange(images, 'b (h p) (w q) c -> b (h w) (p q c)', p=cfg.patch, q=cfg.patch)
        x = Linear(cfg.dim, use_bias=False, dtype=cfg.dtype, name='patch')(patches)
        normal = nn.initializers.normal(0.02)
        first = self.param('class_embedding', normal, (cfg.dim,)).astype(cfg.dtype)
        positions = self.param('position_embedding', normal, (cfg.tokens, cfg.dim))
        first = jnp.broadcast_to(first, (x.shape[0], 1, cfg.dim))
        x = jnp.concatenate([first, x], axis=1) + positions.astype(cfg.dtype)
        x = LayerNorm(cfg.eps, name='norm_in')(x).astype(cfg.dtype)
        layers = nn.scan(
            Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=cfg.layers - 1
        )
        return layers(cfg, name='layers')(x)[0]


class Layer(nn.Module):
    """Self-attention, then the feed-forward."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array):
        cfg = self.cfg

        def linear(features, name):
            return Linear(features, dtype=cfg.dtype, name=name)

        h = linear(3 * cfg.dim, 'qkv')(LayerNorm(cfg.eps, name='norm1')(x))
        q, k, v = rearrange(h, 'b n (q k e) -> q b n k e', q=3, k=cfg.heads)
        x = x + linear(cfg.dim, 'o')(rearrange(attention(q, k, v), 'b n k e -> b n (k e)'))

        h = linear(cfg.mlp_ratio * cfg.dim, 'fc1')(LayerNorm(cfg.eps, name='norm2')(x))
        return x + linear(cfg.dim, 'fc2')(nn.gelu(h, approximate=False)), None


def encode(cfg: Config, params, images):
    """Images [B H W 3] in [-1, 1] of any size -> tokens [B 1+patches D]."""
    return ImageTower(cfg).apply({'params': params}, pixels(cfg, images))


INIT_RULES = (('*_embedding', initializers.normal(0.02)),)


def init(cfg: Config, seed: int) -> dict:
    """Initial float32 numpy parameters."""
    return initializers.draw_tree(INIT_RULES, shapes(cfg), seed)


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    images = jnp.zeros((1, cfg.image, cfg.image, 3), cfg.dtype)
    return jax.eval_shape(ImageTower(cfg).init, jax.random.key(0), images)['params']


def weights(cfg: Config) -> tuple[Row | Drop | Rename | Join, ...]:
    """Weight table of the published `.pth`, without text encoder, last layer and projection."""

    def rows(torch, ours, axes):
        layers = (0, cfg.layers - 1) if '{i}' in torch else None
        leaf, out = 'kernel' if '->' in axes else 'scale', axes[-1]
        kernel = axes if '->' in axes else f'{axes} -> {axes}'
        return (
            Row(f'visual.{torch}.weight', f'{ours}/{leaf}', kernel, layers=layers),
            Row(f'visual.{torch}.bias', f'{ours}/bias', f'{out} -> {out}', layers=layers),
        )

    layer = 'transformer.{i}.'
    return (
        Row(
            'visual.patch_embedding.weight',
            'patch/kernel',
            'd c p q -> (p q c) d',
            sizes={'p': cfg.patch, 'q': cfg.patch},
        ),
        Row('visual.cls_embedding', 'class_embedding', '1 1 d -> d'),
        Row('visual.pos_embedding', 'position_embedding', '1 s d -> s d'),
        *rows('pre_norm', 'norm_in', 'd'),
        *rows(f'{layer}norm1', 'layers/norm1', 'd'),
        *rows(f'{layer}attn.to_qkv', 'layers/qkv', 'o d -> d o'),
        *rows(f'{layer}attn.proj', 'layers/o', 'd k -> k d'),
        *rows(f'{layer}norm2', 'layers/norm2', 'd'),
        *rows(f'{layer}mlp.0', 'layers/fc1', 'm d -> d m'),
        *rows(f'{layer}mlp.2', 'layers/fc2', 'd m -> m d'),
        Drop(f'visual.transformer.{cfg.layers - 1}.*', why='the last layer is not used'),
        Drop('visual.post_norm.*', why='follows the last layer'),
        Drop('visual.head', why='the projection of the class token, not used'),
        Drop('textual.*', why='the text encoder is not used'),
        Drop('log_scale', why='only the contrastive loss uses it'),
        *_transformers_names(),
    )


def _transformers_names() -> Iterator[Drop | Rename | Join]:
    """Names of a `CLIPVisionModel`, with the prefix of transformers 4 and without it."""
    ours, theirs = 'visual.transformer.{i}.', 'encoder.layers.{i}.'
    for before in ('', 'vision_model.'):
        start = f'{before}embeddings.'
        yield Rename(f'{start}class_embedding', 'visual.cls_embedding', 'd -> 1 1 d')
        yield Rename(f'{start}position_embedding.weight', 'visual.pos_embedding', 's d -> 1 s d')
        yield Rename(f'{start}patch_embedding.weight', 'visual.patch_embedding.weight')
        yield Drop(f'{start}position_ids', why='a buffer: 0, 1, 2, ...')
        for name, known in (
            ('pre_layrnorm.{p}', 'visual.pre_norm.{p}'),
            ('post_layernorm.{p}', 'visual.post_norm.{p}'),
            (f'{theirs}layer_norm1.{{p}}', f'{ours}norm1.{{p}}'),
            (f'{theirs}layer_norm2.{{p}}', f'{ours}norm2.{{p}}'),
            (f'{theirs}self_attn.out_proj.{{p}}', f'{ours}attn.proj.{{p}}'),
            (f'{theirs}mlp.fc1.{{p}}', f'{ours}mlp.0.{{p}}'),
            (f'{theirs}mlp.fc2.{{p}}', f'{ours}mlp.2.{{p}}'),
        ):
            yield Rename(before + name, known)
        parts = tuple(f'{before}{theirs}self_attn.{name}_proj.{{p}}' for name in 'qkv')
        yield Join(parts, f'{ours}attn.to_qkv.{{p}}')
    for name in ('visual_projection.*', 'text_projection.*', 'text_model.*', 'logit_scale'):
        yield Drop(name, why='not used')
