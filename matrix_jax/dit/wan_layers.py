"""Layers of the Wan DiT: projections of attentions, embeddings and the plain norm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax.dit.wan_config import Config
from matrix_jax.nn.kv_cache import KVCache
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm
from matrix_jax.nn.rope import level_code


class Projections(nn.Module):
    """Projections of an attention; RMS norms of queries and keys span all heads."""

    cfg: Config

    def setup(self):
        width, eps, dtype = self.cfg.width, self.cfg.eps, jnp.dtype(self.cfg.dtype)
        self.query, self.key, self.value, self.out = (Linear(width, dtype=dtype) for _ in range(4))
        self.query_norm = nn.RMSNorm(eps, dtype=jnp.float32)
        self.key_norm = nn.RMSNorm(eps, dtype=jnp.float32)

    def queries(self, x):
        """[B T n D] -> [B T n K E]."""
        return self._heads(self.query_norm(self.query(x)))

    def keys(self, x):
        """[B T n D] -> `KVCache` [B T n K E]."""
        return KVCache(self._heads(self.key_norm(self.key(x))), self._heads(self.value(x)))

    def output(self, y):
        """[B T n K E] -> [B T n D]."""
        return self.out(rearrange(y, 'b t n k e -> b t n (k e)'))

    def _heads(self, x):
        return rearrange(x.astype(self.cfg.dtype), 'b t n (k e) -> b t n k e', k=self.cfg.heads)


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
