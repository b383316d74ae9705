"""Attention: one function for every backend, and the multi-head layer around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax import sharding
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm
from matrix_jax.nn.once import once

LOGITS = 2**28     # logits of one block of queries, where a device has to hold them


def attention(q, k, v, bias=None, scale=None):
    """softmax(scale * q k^T + bias) v, with a float32 softmax.

    Without a bias, a mesh splits batch, heads and queries; each device then sees all keys.

    Args:
      q: [B N K E].
      k: [B S K E].
      v: [B S K E].
      bias: added to the logits; broadcastable to [B K N S], or None.
      scale: 1/sqrt(E) by default.

    Returns:
      [B N K E], in the type of v.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        return _dense(q, k, v, bias, scale)
    names = ('batch', None, 'heads', None)
    queries = ('batch', 'tokens', 'heads', None)
    return sharding.spread(partial(_plain, scale=scale), (queries, names, names), 0)(q, k, v)


def _plain(q, k, v, scale):
    """Attention without a bias on one device, by the kernel that it has."""
    fused = (q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
             and q.shape[-1] <= 128 and jax.default_backend() == 'gpu')
    if fused:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation='cudnn')
    batch, tokens, heads, _ = q.shape
    size = max(LOGITS // (batch * heads * k.shape[1]), 1)
    if size >= tokens:
        return _dense(q, k, v, None, scale)
    q = jnp.pad(q, ((0, 0), (0, -tokens % size), (0, 0), (0, 0)))
    # Neither pass holds the logits of more than one block.
    one = jax.checkpoint(lambda block: _dense(block, k, v, None, scale), prevent_cse=False)
    y = jax.lax.map(one, rearrange(q, 'b (c n) k e -> c b n k e', n=size))
    return rearrange(y, 'c b n k e -> b (c n) k e')[:, :tokens]


def _dense(q, k, v, bias, scale):
    logits = jnp.einsum('bnke,bske->bkns', q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum('bkns,bske->bnke', weights.astype(v.dtype), v)


class MultiHead(nn.Module):
    """Multi-head attention with a LayerNorm on each head's queries and keys.

    Attributes:
      heads: number of heads K; the width of the inputs is K*E.
      eps: epsilon of the two head norms.
      dtype: type of the multiplies.
    """
    heads: int
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context, bias=None, rows=None):
        """Tokens look at a context.

        Args:
          x: [B N D].
          context: [B S D].
          bias: [B K N S] or None.
          rows: int32 [B S] or None: context is then a table [1 R D] that never changes, of which
            each example sees these rows; its keys and values are made once (`nn.once`).

        Returns:
          [B N D].
        """
        width = x.shape[-1]

        def heads(tokens, name):
            y = Linear(width, dtype=self.dtype, name=name)(tokens)
            return rearrange(y, 'b n (k e) -> b n k e', k=self.heads)

        def keys_and_values():
            k = LayerNorm(self.eps, name='key_norm')(heads(context, 'key'))
            return k.astype(self.dtype), heads(context, 'value')

        q = LayerNorm(self.eps, name='query_norm')(heads(x, 'query')).astype(self.dtype)
        if rows is None:
            k, v = keys_and_values()
        else:
            k, v = (table[0][rows] for table in once(self, 'rows', keys_and_values))
        y = attention(q, k, v, bias)
        return Linear(width, dtype=self.dtype, name='out')(rearrange(y, 'b n k e -> b n (k e)'))
