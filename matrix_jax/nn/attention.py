"""Attention for all backends and meshes, and the multi-head layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax.nn.linear import Int8, Linear
from matrix_jax.nn.modulation import LayerNorm
from matrix_jax.parallel import compilation, sharding

FEW_KEYS = 16  # keys, up to which a GPU computes logits without a matrix product
LOGITS = 2**28  # most logits that a device computes at a time
QUERIES = ('batch', 'tokens', 'heads', None)


def attention(q, k, v, bias=None, scale=None, filled=None):
    """softmax(scale * q k^T + bias) v, with a float32 softmax.

    A mesh splits batch, heads and queries; each device has all keys.

    Args:
      q: [B N K E].
      k: [B S K E].
      v: [B S K E].
      bias: added to the logits; broadcastable to [B K N S], or None.
      scale: 1/sqrt(E) by default.
      filled: number of the first keys that are seen, int32 [B]; None = all. Only where
        `takes_lengths`, and without a bias.

    Returns:
      [B N K E], in the type of v.
    """
    keys = ('batch', None, 'heads', None)
    if filled is not None:
        function = partial(_fused, scale=_scale(scale, q))
        names = (QUERIES, keys, keys, ('batch',))
        return sharding.per_device(function, names, 0)(q, k, v, filled)
    return _spread(
        partial(_local, scale=_scale(scale, q)),
        (QUERIES, keys, keys),
        ('batch', 'heads', 'tokens', None),
        q,
        k,
        v,
        bias,
    )


def self_attention(q, k, v, bias=None, scale=None, real=None, exchange='auto'):
    """`attention` among tokens, where a mesh splits keys and queries alike.

    Tokens that do not divide evenly are not split; callers pad them and name the `real` ones.

    Args:
      q, k, v, bias, scale: as for `attention`.
      real: positions int [R] of the keys that are no padding, the only ones that queries see;
        None = all.
      exchange: see `route`.
    """
    scale, parts = _scale(scale, q), sharding.num_shards('tokens')
    if parts == 1 or q.shape[1] % parts or k.shape[1] % parts:
        k, v, bias = _keep(k, v, bias, real)
        return attention(q, k, v, bias, scale)
    if route(q.shape[2], parts, exchange, sharding.num_shards('heads')) == 'heads':
        # Heads that `tensor` does not divide are replicated over its devices.
        split = 'shared heads' if q.shape[2] % sharding.num_shards('heads') == 0 else 'tokens'
        function, biases = _by_heads, ('batch', split, None, None)
    else:
        function, biases = _by_keys, ('batch', 'heads', 'tokens', None)
    return _spread(partial(function, scale=scale, real=real), (QUERIES,) * 3, biases, q, k, v, bias)


def route(heads: int, parts: int, exchange: str = 'auto', tensor: int = 1) -> str:
    """How devices that share the tokens attend to all of them: 'heads' or 'keys'.

    With 'heads', two all-to-alls exchange a device's tokens of all heads for all tokens of its
    heads (as in DeepSpeed-Ulysses, arXiv 2309.14509). With 'keys', one all-gather collects all keys
    and values, which are parts / 2 times as many bytes.

    Args:
      heads: heads K of the layer.
      parts: devices that share the tokens.
      exchange: 'heads', 'keys', or 'auto' (heads where they divide).
      tensor: devices that already share the heads.

    Raises:
      ValueError: the heads do not divide, or the exchange is unknown.
    """
    if exchange not in ('auto', 'heads', 'keys'):
        raise ValueError(f"exchange: got {exchange!r}, expected 'auto', 'heads' or 'keys'")
    mine = heads // tensor if heads % tensor == 0 else heads
    if exchange == 'heads' and mine % parts:
        raise ValueError(
            f"exchange: got 'heads', expected 'keys' or 'auto', as {mine} heads do "
            f'not divide by mesh.seq = {parts}'
        )
    return 'keys' if exchange == 'keys' or mine % parts else 'heads'


def _gathers_keys(heads, exchange):
    """Whether GPUs that share the tokens exchange keys in `self_attention`."""
    parts = sharding.num_shards('tokens')
    on_gpus = compilation.backend() == 'gpu' and parts > 1
    return on_gpus and route(heads, parts, exchange, sharding.num_shards('heads')) == 'keys'


def _scale(scale, q):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _spread(function, names, biases, q, k, v, bias):
    """Runs `function` on each device; `biases` are the axis names of a full bias."""
    inputs = (q, k, v) if bias is None else (q, k, v, jnp.asarray(bias))
    names = (*names, biases[len(biases) - inputs[-1].ndim :])[: len(inputs)]
    return sharding.per_device(function, names, 0)(*inputs)


def _keep(k, v, bias, real):
    """Selects the real keys, values and columns of the bias."""
    if real is None:
        return k, v, bias
    if bias is not None and bias.shape[-1] > 1:
        bias = bias[..., real]
    return k[:, real], v[:, real], bias


def _by_heads(q, k, v, bias=None, *, scale, real):
    if q.shape == k.shape:
        q, k, v = sharding.all_to_all(jnp.stack([q, k, v]), 'tokens', split_axis=3, concat_axis=2)
    else:
        q = sharding.all_to_all(q, 'tokens', split_axis=2, concat_axis=1)
        k, v = sharding.all_to_all(jnp.stack([k, v]), 'tokens', split_axis=3, concat_axis=2)
    y = _local(q, *_keep(k, v, bias, real), scale=scale)
    return sharding.all_to_all(y, 'tokens', split_axis=1, concat_axis=2)


def _by_keys(q, k, v, bias=None, *, scale, real):
    k, v = sharding.all_gather(jnp.stack([k, v]), 'tokens', axis=2)
    return _local(q, *_keep(k, v, bias, real), scale=scale)


def _local(q, k, v, bias=None, *, scale):
    return _plain(q, k, v, scale) if bias is None else _dense(q, k, v, bias, scale)


def takes_lengths(q) -> bool:
    """Whether `attention` of queries [... K E] takes the number of filled keys."""
    return _is_fused(q) and sharding.num_shards('tokens') == 1


def _is_fused(q) -> bool:
    """Whether cuDNN has a kernel for queries [... K E]."""
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and compilation.backend() == 'gpu'
    )


def _fused(q, k, v, filled=None, *, scale):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, implementation='cudnn', key_value_seq_lengths=filled
    )


def _plain(q, k, v, scale):
    """Attention without a bias on one device, by its fastest kernel."""
    if _is_fused(q):
        return _fused(q, k, v, scale=scale)
    batch, tokens, heads, _ = q.shape
    size = max(LOGITS // (batch * heads * k.shape[1]), 1)
    if size >= tokens:
        return _dense(q, k, v, None, scale)
    q = jnp.pad(q, ((0, 0), (0, -tokens % size), (0, 0), (0, 0)))
    # Neither the forward nor the backward pass keeps the logits of more than one block.
    one = jax.checkpoint(lambda block: _dense(block, k, v, None, scale), prevent_cse=False)
    y = jax.lax.map(one, rearrange(q, 'b (c n) k e -> c b n k e', n=size))
    return rearrange(y, 'c b n k e -> b (c n) k e')[:, :tokens]


def _dense(q, k, v, bias, scale):
    logits = jnp.einsum('bnke,bske->bkns', q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = softmax(logits)
    # Heads in front of both factors: otherwise the compiler transposes the larger weights, not v.
    y = jnp.einsum('bkns,bkse->bkne', weights.astype(v.dtype), rearrange(v, 'b s k e -> b k s e'))
    return rearrange(y, 'b k n e -> b n k e')


def softmax(logits):
    """Softmax over the last axis, by a name that is counted in compiled programs."""
    with jax.named_scope('attention_softmax'):
        return jax.nn.softmax(logits, axis=-1)


class MultiHead(nn.Module):
    """Multi-head attention with a LayerNorm on each head's queries and keys.

    Attributes:
      heads: number of heads K; the width of the inputs is K*E.
      eps: epsilon of the two head norms.
      dtype: type of the products.
      exchange: how tokens that a mesh splits attend to each other (`route`).
    """

    heads: int
    eps: float = 1e-6
    dtype: Any = jnp.float32
    exchange: str = 'auto'

    @nn.compact
    def __call__(self, x, context=None, bias=None, real=None):
        """Cross-attention to a context, or self-attention.

        Args:
          x: [B N D].
          context: [B S D], replicated over the devices; None = x.
          bias: [B K N S] or None.
          real: positions of the tokens of x that are no padding, for self-attention; None = all.

        Returns:
          [B N D].
        """
        width = x.shape[-1]

        def heads(tokens, name):
            y = Linear(width, dtype=self.dtype, name=name)(tokens)
            return rearrange(y, 'b n (k e) -> b n k e', k=self.heads)

        look = attention
        if context is None:
            context, look = x, partial(self_attention, real=real, exchange=self.exchange)

        if look is not attention and _gathers_keys(self.heads, self.exchange):
            # XLA joins products of equal inputs. Apart from the others, that of the queries runs
            # while keys and values are gathered.
            x = jax.lax.optimization_barrier(x)
        q = LayerNorm(self.eps, name='query_norm')(heads(x, 'query')).astype(self.dtype)
        k = LayerNorm(self.eps, name='key_norm')(heads(context, 'key')).astype(self.dtype)
        v = heads(context, 'value')
        if look is attention and self._few(k):
            return self._attend_few(q, k, v, bias)
        y = look(q, k, v, bias)
        return Linear(width, dtype=self.dtype, name='out')(rearrange(y, 'b n k e -> b n (k e)'))

    def _few(self, k) -> bool:
        """Whether a GPU reads keys [B S K E] without products of queries and keys."""
        on_gpu = compilation.backend() == 'gpu' and not self.is_initializing()
        return on_gpu and k.shape[1] <= FEW_KEYS

    def _attend_few(self, q, k, v, bias):
        """Attention and output layer for few keys: no float32 logits for a softmax in memory.

        Values go through the output layer once per key, in place of once per token.
        """
        params = self.variables['params']['out']
        kernel = params['kernel']
        kernel = kernel.kernel() if isinstance(kernel, Int8) else kernel
        kernel = rearrange(kernel.astype(self.dtype), '(k e) d -> k e d', k=self.heads)
        rows = rearrange(jnp.einsum('bske,ked->bksd', v, kernel), 'b k s d -> b (k s) d')
        keys = rearrange(k, 'b s k e -> b 1 k s e').astype(jnp.float32) * k.shape[-1] ** -0.5
        q = jax.lax.optimization_barrier(q)  # Triton of jax 0.10.2 fails on norm and logits in one
        logits = (q[..., None, :].astype(jnp.float32) * keys).sum(-1)
        if bias is not None:
            logits = logits + jnp.asarray(bias)[:, None]
        weights = rearrange(softmax(logits).astype(self.dtype), 'b n k s -> b n (k s)')
        return jnp.einsum('bns,bsd->bnd', weights, rows) + params['bias'].astype(self.dtype)
