"""CLIP text encoder (arXiv 2103.00020), for control prompts.

    x <- x + attention(norm(x))     causal
    x <- x + mlp(norm(x))           quick gelu: x * sigmoid(1.702 x)
    features = projection @ norm(x)[end of text]

Released weights: the text encoder of openai/clip-vit-large-patch14.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax.encoders import transformers_keys
from matrix_jax.nn import initializers
from matrix_jax.nn.attention import attention
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm
from matrix_jax.weights.conversion import Drop, Rename, Row
from matrix_jax.weights.schema import check_fields

PROJECTED, PLAIN = 'CLIPTextModelWithProjection', 'CLIPTextModel'
LEGACY_EOS = 2  # in old config files; the end of text is then the largest id of a prompt
MASKED = -1e30

ACTIVATIONS = {
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'gelu': lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder; D = dim, K = heads, M = mlp_dim, A = projection.

    `projection` None means no projection, as in `CLIPTextModel`, and A = D.
    `eos` is the id of the end of text, `dtype` the numpy name of the type of matrix products and of
    the residual stream.
    """

    vocab: int = 49408
    dim: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    positions: int = 77
    projection: int | None = 768
    activation: str = 'quick_gelu'
    eps: float = 1e-5
    eos: int = LEGACY_EOS
    dtype: str = 'float32'

    def __post_init__(self):
        check_fields(self, 'clip.', zero=('eos',))
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f'clip.activation: got {self.activation!r}, '
                f'expected one of {", ".join(ACTIVATIONS)}'
            )
        if self.dim % self.heads:
            raise ValueError(f'clip.heads: {self.heads} does not divide width {self.dim}')

    @classmethod
    def from_released(cls, released: Mapping) -> Config:
        """Reads config.json of a text encoder, or the `text_config` of a whole CLIP.

        Raises:
          ValueError: a size is missing or a value is not supported.
        """
        nested = released.get('text_config')
        text = dict(nested if nested is not None else released)
        if nested is not None and 'projection_dim' in released:
            text['projection_dim'] = released['projection_dim']
        if unknown := transformers_keys.unknown(text, (*_NAMES.values(), *_OF_WHOLE)):
            raise ValueError(f'clip config.json: unknown keys {", ".join(unknown)}')
        if nested is None and released.get('architectures') == [PLAIN]:
            text['projection_dim'] = None
        missing = [key for name, key in _NAMES.items() if name in _SIZES and key not in text]
        if missing:
            raise ValueError(f'clip config.json: missing {", ".join(missing)}')
        return cls(**{name: text[key] for name, key in _NAMES.items() if key in text})

    def to_released(self) -> dict:
        """The config.json of this encoder."""
        return {
            '_class_name': PROJECTED if self.projection else PLAIN,
            'architectures': [PROJECTED if self.projection else PLAIN],
            'model_type': 'clip_text_model',
            **{key: getattr(self, name) for name, key in _NAMES.items()},
        }


_NAMES = {
    'vocab': 'vocab_size',
    'dim': 'hidden_size',
    'layers': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'mlp_dim': 'intermediate_size',
    'positions': 'max_position_embeddings',
    'projection': 'projection_dim',
    'activation': 'hidden_act',
    'eps': 'layer_norm_eps',
    'eos': 'eos_token_id',
}
_OF_WHOLE = ('text_config', 'vision_config', 'logit_scale_init_value')
_SIZES = ('vocab', 'dim', 'layers', 'heads', 'mlp_dim', 'positions', 'projection')

PRESETS = {
    'vit_l_14': Config(),
    # 514 ids: every byte, every byte that ends a word, start and end of text
    # (`tokenizers.write_clip_byte_tokenizer`).
    'carracing': Config(vocab=514, dim=64, layers=2, heads=4, mlp_dim=256, projection=64, eos=513),
    'tiny': Config(vocab=514, dim=16, layers=2, heads=2, mlp_dim=32, projection=16, eos=513),
}


class TextTower(nn.Module):
    """Token ids [B L] -> features [B A], not normalised."""

    cfg: Config

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        cfg = self.cfg
        length = ids.shape[1]
        if length > cfg.positions:
            raise ValueError(f'clip: got {length} tokens, expected at most {cfg.positions}')
        tokens = self.param('token_embedding', nn.initializers.normal(0.02), (cfg.vocab, cfg.dim))
        positions = self.param(
            'position_embedding', nn.initializers.normal(0.01), (cfg.positions, cfg.dim)
        )
        x = (jnp.take(tokens, ids, axis=0) + positions[:length]).astype(cfg.dtype)
        causal = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, MASKED)[None, None]
        layers = nn.scan(
            Layer,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        x, _ = layers(cfg, name='layers')(x, causal)
        x = LayerNorm(cfg.eps, name='final_norm')(x)
        end = jnp.argmax(ids if cfg.eos == LEGACY_EOS else ids == cfg.eos, axis=1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        if cfg.projection is None:
            return pooled
        return Linear(cfg.projection, use_bias=False, dtype=cfg.dtype, name='projection')(pooled)


class Layer(nn.Module):
    """Causal self-attention, then the feed-forward."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array):
        cfg = self.cfg

        def linear(features, name):
            return Linear(features, dtype=cfg.dtype, name=name)

        def heads(y):
            return rearrange(y, 'b n (k e) -> b n k e', k=cfg.heads)

        h = LayerNorm(cfg.eps, name='norm1')(x)
        q, k, v = (heads(linear(cfg.dim, name)(h)) for name in 'qkv')
        h = rearrange(attention(q, k, v, bias=bias), 'b n k e -> b n (k e)')
        x = x + linear(cfg.dim, 'o')(h)

        h = LayerNorm(cfg.eps, name='norm2')(x)
        h = ACTIVATIONS[cfg.activation](linear(cfg.mlp_dim, 'fc1')(h))
        return x + linear(cfg.dim, 'fc2')(h), None


INIT_RULES = (
    ('token_embedding', initializers.normal(0.02)),
    ('position_embedding', initializers.normal(0.01)),
)


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(TextTower(cfg).init, jax.random.key(0), ids)['params']


def weights(cfg: Config) -> tuple[Row | Drop | Rename, ...]:
    """Weight table of `CLIPTextModelWithProjection`, or of a whole CLIP without its image half."""

    def both(torch, ours, layout):
        layers = (0, cfg.layers) if '{i}' in torch else None
        leaf = 'scale' if layout == 'd -> d' else 'kernel'
        out = layout[-1]
        return (
            Row(f'text_model.{torch}.weight', f'{ours}/{leaf}', layout, layers=layers),
            Row(f'text_model.{torch}.bias', f'{ours}/bias', f'{out} -> {out}', layers=layers),
        )

    layer = 'encoder.layers.{i}.'
    return (
        Row('text_model.embeddings.token_embedding.weight', 'token_embedding', 'v d -> v d'),
        Row('text_model.embeddings.position_embedding.weight', 'position_embedding', 's d -> s d'),
        *both(f'{layer}layer_norm1', 'layers/norm1', 'd -> d'),
        *both(f'{layer}self_attn.q_proj', 'layers/q', 'k d -> d k'),
        *both(f'{layer}self_attn.k_proj', 'layers/k', 'k d -> d k'),
        *both(f'{layer}self_attn.v_proj', 'layers/v', 'k d -> d k'),
        *both(f'{layer}self_attn.out_proj', 'layers/o', 'd k -> k d'),
        *both(f'{layer}layer_norm2', 'layers/norm2', 'd -> d'),
        *both(f'{layer}mlp.fc1', 'layers/fc1', 'm d -> d m'),
        *both(f'{layer}mlp.fc2', 'layers/fc2', 'd m -> m d'),
        *both('final_layer_norm', 'final_norm', 'd -> d'),
        *(
            [Row('text_projection.weight', 'projection/kernel', 'a d -> d a')]
            * bool(cfg.projection)
        ),
        Drop('text_model.embeddings.position_ids', why='a buffer: 0, 1, 2, ...'),
        Drop('vision_model.*', why='the image encoder is not used'),
        Drop('visual_projection.*', why='the image encoder is not used'),
        Drop('logit_scale', why='only the contrastive loss uses it'),
        # A CLIPTextModel of transformers 5.
        *(
            Rename(f'{part}.{{name}}', f'text_model.{part}.{{name}}')
            for part in ('embeddings', 'encoder', 'final_layer_norm')
        ),
    )
