"""Attention: one function for every backend, and the multi-head layer around it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm


def attention(q, k, v, bias=None, scale=None):
    """softmax(scale * q k^T + bias) v, with a float32 softmax.

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
    fused = (bias is None and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
             and q.shape[-1] <= 128 and jax.default_backend() == 'gpu')
    if fused:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation='cudnn')
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
    def __call__(self, x, context, bias=None):
        """Tokens [B N D] look at context [B S D] (`bias` [B K N S] or None) -> [B N D]."""
        width = x.shape[-1]

        def heads(tokens, name):
            y = Linear(width, dtype=self.dtype, name=name)(tokens)
            return rearrange(y, 'b n (k e) -> b n k e', k=self.heads)

        q = LayerNorm(self.eps, name='query_norm')(heads(x, 'query'))
        k = LayerNorm(self.eps, name='key_norm')(heads(context, 'key'))
        v = heads(context, 'value')
        y = attention(q.astype(self.dtype), k.astype(self.dtype), v, bias)
        return Linear(width, dtype=self.dtype, name='out')(rearrange(y, 'b n k e -> b n (k e)'))
