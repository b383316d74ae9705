"""Layers of the Wan DiT: projections of attentions, embeddings and the plain norm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax.dit.wan_config import Config
from matrix_jax.nn.kv_cache import KVCache
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm, RMSNorm, stored
from matrix_jax.nn.rope import level_code


class Projections(nn.Module):
    """Projections of an attention; RMS norms of queries and keys span all heads.

    Those of `merge_projections` have one product for queries, keys and values.
    """

    cfg: Config

    def setup(self):
        width, eps, dtype = self.cfg.width, self.cfg.eps, jnp.dtype(self.cfg.dtype)
        self.out = Linear(width, dtype=dtype)
        self.merged = MERGED in self.variables.get('params', {})
        if self.merged:
            self.query_key_value = Linear(3 * width, dtype=dtype)
            self.norm_scale = self.param('norm_scale', nn.initializers.ones_init(), (2, width))
            return
        self.query, self.key, self.value = (Linear(width, dtype=dtype) for _ in range(3))
        self.query_norm, self.key_norm = RMSNorm(eps), RMSNorm(eps)

    def queries_and_keys(self, x):
        """[B T n D] -> (queries [B T n K E], `KVCache` [B T n K E])."""
        if not self.merged:
            return self.queries(x), self.keys(x)
        y, width = self.query_key_value(x), self.cfg.width
        both = rearrange(y[..., : 2 * width], '... (c d) -> ... c d', c=2).astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.square(both).mean(-1, keepdims=True) + self.cfg.eps)
        both = both * (factor * self.norm_scale.astype(jnp.float32))
        query, key = (self._heads(both[..., index, :]) for index in (0, 1))
        return query, KVCache(key, self._heads(y[..., 2 * width :]))

    def queries(self, x):
        """[B T n D] -> [B T n K E]."""
        return stored(self._heads(self.query_norm(self.query(x))))

    def keys(self, x):
        """[B T n D] -> `KVCache` [B T n K E]."""
        key = stored(self._heads(self.key_norm(self.key(x))))
        return KVCache(key, self._heads(self.value(x)))

    def output(self, y):
        """[B T n K E] -> [B T n D]."""
        return self.out(rearrange(y, 'b t n k e -> b t n (k e)'))

    def _heads(self, x):
        return rearrange(x.astype(self.cfg.dtype), 'b t n (k e) -> b t n k e', k=self.cfg.heads)


MERGED = 'query_key_value'


def merge_projections(params: dict) -> dict:
    """Parameters of `Projections` with one product for queries, keys and values of equal inputs."""
    linear = jax.tree.map(
        lambda *leaves: join(leaves, -1), *(params[name] for name in ('query', 'key', 'value'))
    )
    scales = [params[f'{name}_norm']['scale'] for name in ('query', 'key')]
    return {MERGED: linear, 'norm_scale': join(scales, None), 'out': params['out']}


def join(leaves, axis: int | None):
    """Concatenates arrays or ShapeDtypeStructs of one shape along an axis; None = a new first."""
    first = leaves[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.stack(leaves) if axis is None else jnp.concatenate(leaves, axis)
    shape = jax.eval_shape(lambda *given: join(given, axis), *map(_unplaced, leaves)).shape
    return jax.ShapeDtypeStruct(shape, first.dtype, sharding=first.sharding)


def _unplaced(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


class LevelEmbedding(nn.Module):
    """Noise levels [B T] -> embeddings [B T D] float32."""

    cfg: Config

    @nn.compact
    def __call__(self, level):
        width, dtype = self.cfg.width, jnp.dtype(self.cfg.dtype)
        code = level_code(level, self.cfg.time_dim)
        hidden = jax.nn.silu(Linear(width, dtype=dtype, name='linear_1')(code))
        return Linear(width, dtype=dtype, name='linear_2')(hidden).astype(jnp.float32)


class ImageEmbedding(nn.Module):
    """Image features [B L Di] -> context [B L D]."""

    cfg: Config

    @nn.compact
    def __call__(self, image):
        dtype = jnp.dtype(self.cfg.dtype)
        x = LayerNorm(1e-5, name='norm_in')(image)
        x = jax.nn.gelu(Linear(x.shape[-1], dtype=dtype, name='linear_1')(x), approximate=False)
        x = LayerNorm(1e-5, name='norm_out')(
            Linear(self.cfg.width, dtype=dtype, name='linear_2')(x)
        )
        return x.astype(dtype)


def standardize(x, eps):
    """LayerNorm without parameters, float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
