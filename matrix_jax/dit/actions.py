"""Control blocks of The Matrix (arXiv 2412.03568): cross-attention from video tokens to controls.

The reference repeats each control once per video token of its frame and masks causally over tokens
in raster order. Repeated keys have equal logits, so this equals attention over the T controls with
the logarithm of the number of visible copies as a bias: c exp(l) = exp(l + log c).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.nn import token_layout
from matrix_jax.nn.attention import MultiHead
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import PairedAdaLN, stored


def log_counts(tokens: int, controls: int) -> np.ndarray:
    """Bias [N T]: log of the number of copies of control t that token n sees, -inf for none.

    Raises:
      ValueError: the tokens are not a multiple of the controls.
    """
    if tokens % controls:
        raise ValueError(
            f'control: got {controls} frames of control for {tokens} video tokens, '
            'expected one per latent frame'
        )
    repeats = tokens // controls
    seen = np.arange(tokens)[:, None] + 1 - np.arange(controls) * repeats
    with np.errstate(divide='ignore'):
        return np.log(np.clip(seen, 0, repeats)).astype(np.float32)


def visibility(tokens: int, controls: int, recency: float | None = None) -> np.ndarray:
    """Attention bias [N T] of video tokens to controls.

    `log_counts` as in the reference, or with `recency`: -recency * (age of the control in frames).
    """
    counts = log_counts(tokens, controls)
    if recency is None:
        return counts
    age = np.arange(tokens)[:, None] // (tokens // controls) - np.arange(controls)
    return np.where(age < 0, -np.inf, -recency * age).astype(np.float32)


class ControlEmbedding(nn.Module):
    """Embedding of the control of each latent frame: three linear layers with SiLU between."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, control):
        """[B T A] -> [B T D]."""
        x = Linear(control.shape[-1], dtype=self.dtype, name='linear_1')(control)
        x = Linear(self.features, dtype=self.dtype, name='linear_2')(jax.nn.silu(x))
        return Linear(self.features, dtype=self.dtype, name='linear_3')(jax.nn.silu(x))


class ControlBlock(nn.Module):
    """Gated cross-attention from video to control; does not change text and control.

    Attributes:
      heads: attention heads K.
      eps: epsilon of the modulated norm.
      dtype: type of the products and of the residual stream.
    """

    heads: int
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, video, control, time, bias):
        """Adds what each token reads from the controls that it sees.

        Args:
          video: [B T N/T D].
          control: embedded control [B T D]; the batch may be 1.
          time: embedded levels [B T P].
          bias: `visibility` [N T], in the order of `token_layout.flatten_frames`.

        Returns:
          video [B T N/T D].
        """
        normed, keys, gate, _ = PairedAdaLN(self.eps, name='norm1')(video, control, time)
        queries = token_layout.flatten_frames(normed)
        keys = jnp.broadcast_to(keys, queries.shape[:1] + keys.shape[1:])
        y = MultiHead(self.heads, dtype=self.dtype, name='attention')(queries, keys, bias)
        video = video + gate * token_layout.unflatten_frames(y, video.shape[1])
        return stored(video.astype(self.dtype))
