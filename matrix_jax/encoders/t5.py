"""T5 v1.1 and UMT5 text encoders (arXiv 1910.10683, gated feed-forward of arXiv 2002.05202).

    x <- x + o(softmax(q k' + bias) v)          q, k, v, o of rms(x), logits not scaled
    x <- x + wo(gelu(wi_0 rms(x)) * wi_1 rms(x))

The bias is learned per head and per bucket of (key position - query position). In T5 all layers
share it, in UMT5 (arXiv 2304.09151) each layer has its own. Released weights: google/t5-v1_1-xxl,
google/umt5-xxl.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.encoders import transformers_keys
from matrix_jax.nn import initializers, token_layout
from matrix_jax.nn.attention import self_attention
from matrix_jax.nn.linear import Linear
from matrix_jax.parallel.sharding import constrain
from matrix_jax.weights.conversion import Drop, Rename, Row
from matrix_jax.weights.schema import check_fields


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder; D = dim, K = heads, E = head_dim, M = mlp_dim.

    `layer_bias` says whether each layer has its own position bias, as in UMT5.
    `dtype` is the numpy name of the type of matrix products and of the residual stream.
    """

    vocab: int = 32128
    dim: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_dim: int = 10240
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    layer_bias: bool = False
    dtype: str = 'float32'

    def __post_init__(self):
        check_fields(self, 't5.')

    @classmethod
    def from_released(cls, released: Mapping) -> Config:
        """Reads `text_encoder/config.json`.

        Raises:
          ValueError: a size is missing, or the file asks for another kind of T5.
        """
        for key, wanted in (_FIXED | _ENCODER).items():
            if released.get(key, wanted) != wanted:
                raise ValueError(f't5 config.json: {key} is {released[key]!r}, expected {wanted!r}')
        known = (*_NAMES.values(), *_FIXED, *_ENCODER, *_IGNORED)
        if unknown := transformers_keys.unknown(released, known):
            raise ValueError(f't5 config.json: unknown keys {", ".join(unknown)}')
        if 'feed_forward_proj' not in released:  # the default of the format is relu
            raise ValueError(
                f"t5 config.json: no 'feed_forward_proj', expected {_FIXED['feed_forward_proj']!r}"
            )
        missing = [key for name, key in _NAMES.items() if name in _SIZES and key not in released]
        if missing:
            raise ValueError(f't5 config.json: missing {", ".join(missing)}')
        kind = released.get('model_type', KINDS[False])
        if kind not in KINDS.values():
            raise ValueError(f"t5 config.json: model_type is {kind!r}, expected 't5' or 'umt5'")
        sizes = {name: released[key] for name, key in _NAMES.items() if key in released}
        return cls(layer_bias=kind == KINDS[True], **sizes)

    def to_released(self) -> dict:
        """The `text_encoder/config.json` of this encoder."""
        sizes = {key: getattr(self, name) for name, key in _NAMES.items()}
        name = 'UMT5EncoderModel' if self.layer_bias else 'T5EncoderModel'
        return {
            '_class_name': name,
            'architectures': [name],
            'model_type': KINDS[self.layer_bias],
            'is_encoder_decoder': False,
            'pad_token_id': 0,
            'eos_token_id': 1,
            **_FIXED,
            **sizes,
        }


_NAMES = {
    'vocab': 'vocab_size',
    'dim': 'd_model',
    'layers': 'num_layers',
    'heads': 'num_heads',
    'head_dim': 'd_kv',
    'mlp_dim': 'd_ff',
    'buckets': 'relative_attention_num_buckets',
    'max_distance': 'relative_attention_max_distance',
    'eps': 'layer_norm_epsilon',
}
KINDS = {False: 't5', True: 'umt5'}  # `layer_bias` -> `model_type`
_SIZES = ('vocab', 'dim', 'layers', 'heads', 'head_dim', 'mlp_dim')
_FIXED = {'feed_forward_proj': 'gated-gelu', 'dense_act_fn': 'gelu_new', 'is_gated_act': True}
_ENCODER = {'is_decoder': False}
# Keys of the decoder, of training and of former versions.
_IGNORED = (
    *('classifier_dropout', 'd_type', 'dropout_rate', 'initializer_factor', 'n_positions'),
    *('num_decoder_layers', 'output_past', 'scalable_attention', 'scale_decoder_outputs'),
)

PRESETS = {
    'v1_1_xxl': Config(),
    'umt5_xxl': Config(vocab=256384, layer_bias=True),
    # 259 ids: pad, end and unknown, then the bytes of UTF-8 (`tokenizers.write_byte_tokenizer`).
    'carracing': Config(vocab=259, dim=64, layers=2, heads=4, head_dim=16, mlp_dim=128),
    'tiny': Config(
        vocab=259, dim=16, layers=2, heads=2, head_dim=8, mlp_dim=32, buckets=8, max_distance=16
    ),
}


class T5Encoder(nn.Module):
    """Token ids [B L] -> features [B L D]."""

    cfg: Config

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encodes token ids.

        Args:
          ids: [B L].
          mask: bool [B L], tokens that are attended to; None = all. Features of the other tokens
            have no meaning.
        """
        # PARITY: The Matrix has no attention mask, so tokens attend to padding as to text.
        cfg, length = self.cfg, ids.shape[1]
        ids = token_layout.pad(ids, 1)
        table = self.param('embedding', nn.initializers.normal(1.0), (cfg.vocab, cfg.dim))
        x = jnp.take(table, ids, axis=0).astype(cfg.dtype)
        x = constrain(x, 'batch', 'tokens', None)
        bias = None if cfg.layer_bias else relative_bias(self, cfg, ids.shape[1])
        if mask is not None:
            hidden = jnp.where(token_layout.pad(jnp.asarray(mask, bool), 1), 0.0, -jnp.inf)
            mask = rearrange(hidden, 'b s -> b 1 1 s')
        layers = nn.scan(
            Layer,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        x, _ = layers(cfg, length, name='layers')(x, bias, mask)
        return constrain(rms_norm(cfg, 'final_norm')(x), 'batch', None, None)[:, :length]


class Layer(nn.Module):
    """Self-attention, then the gated feed-forward; tokens from `length` on are mesh padding."""

    cfg: Config
    length: int

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, mask: jax.Array | None):
        cfg = self.cfg
        if cfg.layer_bias:
            bias = relative_bias(self, cfg, x.shape[1])
        if mask is not None:
            bias = bias + mask

        def linear(features, name):
            return Linear(features, use_bias=False, dtype=cfg.dtype, name=name)

        def heads(y):
            return rearrange(y, 'b n (k e) -> b n k e', k=cfg.heads)

        inner = cfg.heads * cfg.head_dim
        h = rms_norm(cfg, 'norm_attention')(x)
        q, k, v = (heads(linear(inner, name)(h)) for name in 'qkv')
        real = np.arange(self.length) if self.length < x.shape[1] else None
        h = self_attention(q, k, v, bias=bias, scale=1.0, real=real)
        h = rearrange(h, 'b n k e -> b n (k e)')
        x = x + linear(cfg.dim, 'o')(h)

        h = rms_norm(cfg, 'norm_mlp')(x)
        gate = nn.gelu(linear(cfg.mlp_dim, 'wi_0')(h), approximate=True)
        return x + linear(cfg.dim, 'wo')(gate * linear(cfg.mlp_dim, 'wi_1')(h)), None


def rms_norm(cfg: Config, name: str) -> nn.Module:
    """Root-mean-square norm with a learned scale; statistics in float32."""
    return nn.RMSNorm(epsilon=cfg.eps, dtype=cfg.dtype, name=name)


def relative_bias(module: nn.Module, cfg: Config, length: int):
    """Position bias [1 K L L] from the table of a module."""
    table = module.param(
        'relative_bias', nn.initializers.normal(cfg.dim**-0.5), (cfg.buckets, cfg.heads)
    )
    return rearrange(table[relative_buckets(length, cfg)], 'n s k -> 1 k n s')


def relative_buckets(length: int, cfg: Config) -> np.ndarray:
    """Bucket of each (query, key) pair, int [L L].

    Half of the buckets are for keys behind the query. In each half, the first buckets are single
    distances and the others grow logarithmically up to `max_distance`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = cfg.buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1) / exact) / np.log(cfg.max_distance / exact)
    # The small term keeps floor from rounding 1.9999999 down.
    wide = exact + np.floor(ratio * (half - exact) + 1e-6).astype(np.int32)
    near = np.where(distance < exact, distance, np.minimum(wide, half - 1))
    return np.where(offset > 0, half, 0) + near


def init_rules(cfg: Config) -> initializers.InitRules:
    """Rules for initial parameters; queries start small, as logits are not scaled."""
    return (
        ('embedding', initializers.normal(1.0)),
        ('*relative_bias', initializers.normal(cfg.dim**-0.5)),
        ('layers/q/kernel', initializers.xavier(1 / cfg.head_dim)),
    )


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(T5Encoder(cfg).init, jax.random.key(0), ids)['params']


def weights(cfg: Config) -> tuple[Row | Drop | Rename, ...]:
    """Weight table: `T5EncoderModel` or `UMT5EncoderModel` <-> parameter tree.

    Also reads the names of UMT5 in the files of Wan.
    """
    layer = 'encoder.block.{i}.layer.'
    stack = (0, cfg.layers)

    def rows(torch, names, layout):
        return [
            Row(f'{layer}{torch}.{name}.weight', f'layers/{name}/kernel', layout, layers=stack)
            for name in names
        ]

    bias = 'layer.0.SelfAttention.relative_attention_bias.weight'
    if cfg.layer_bias:
        bias_row = Row(
            f'encoder.block.{{i}}.{bias}', 'layers/relative_bias', 'r k -> r k', layers=stack
        )
    else:
        bias_row = Row(f'encoder.block.0.{bias}', 'relative_bias', 'r k -> r k')
    return (
        Row('shared.weight', 'embedding', 'v d -> v d'),
        Rename('encoder.embed_tokens.weight', 'shared.weight', tied=True),
        bias_row,
        *rows('0.SelfAttention', 'qkv', 'k d -> d k'),
        *rows('0.SelfAttention', 'o', 'd k -> k d'),
        Row(f'{layer}0.layer_norm.weight', 'layers/norm_attention/scale', 'd -> d', layers=stack),
        *rows('1.DenseReluDense', ('wi_0', 'wi_1'), 'm d -> d m'),
        *rows('1.DenseReluDense', ('wo',), 'd m -> m d'),
        Row(f'{layer}1.layer_norm.weight', 'layers/norm_mlp/scale', 'd -> d', layers=stack),
        Row('encoder.final_layer_norm.weight', 'final_norm/scale', 'd -> d'),
        Drop('decoder.*', why='the decoder is not used'),
        Drop('lm_head.weight', why='the output layer of the decoder'),
        *(WAN_NAMES if cfg.layer_bias else ()),
    )


# Names of `models_t5_umt5-xxl-enc-bf16.pth`.
_ATTENTION, _MLP = 'encoder.block.{i}.layer.0', 'encoder.block.{i}.layer.1'
WAN_NAMES = (
    Rename('token_embedding.weight', 'shared.weight'),
    Rename('blocks.{i}.norm1.weight', f'{_ATTENTION}.layer_norm.weight'),
    Rename('blocks.{i}.norm2.weight', f'{_MLP}.layer_norm.weight'),
    Rename(
        'blocks.{i}.pos_embedding.embedding.weight',
        f'{_ATTENTION}.SelfAttention.relative_attention_bias.weight',
    ),
    Rename('blocks.{i}.attn.{name}.weight', _ATTENTION + '.SelfAttention.{name}.weight'),
    Rename('blocks.{i}.ffn.gate.0.weight', f'{_MLP}.DenseReluDense.wi_0.weight'),
    Rename('blocks.{i}.ffn.fc1.weight', f'{_MLP}.DenseReluDense.wi_1.weight'),
    Rename('blocks.{i}.ffn.fc2.weight', f'{_MLP}.DenseReluDense.wo.weight'),
    Rename('norm.weight', 'encoder.final_layer_norm.weight'),
)
