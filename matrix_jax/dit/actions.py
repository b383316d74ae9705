"""Control by cross-attention: video tokens look at the control of their own and earlier frames.

The Matrix, arXiv 2412.03568. The reference repeats each control token once per video token and
masks causally over tokens, in raster order. Repeated keys share their logit, so this is the same as
attention over the T distinct controls with the logarithm of their visible count as a bias.
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
from matrix_jax.nn.modulation import PairedAdaLN


def log_counts(tokens: int, controls: int) -> np.ndarray:
    """Bias [N T] of collapsed attention: log of how often token n sees control t, -inf for never.

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
    """Bias [N T] of the attention of video tokens to controls.

    The counts of the reference; with `recency`, minus that much per frame that a control is older
    than the token, the same for all tokens of a frame.
    """
    counts = log_counts(tokens, controls)
    if recency is None:
        return counts
    age = np.arange(tokens)[:, None] // (tokens // controls) - np.arange(controls)
    return np.where(age < 0, -np.inf, -recency * age).astype(np.float32)


class ControlEmbedding(nn.Module):
    """Three linear layers with SiLU between; embeds the control of each latent frame."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, control):
        """[B T A] -> [B T D]."""
        x = Linear(control.shape[-1], dtype=self.dtype, name='linear_1')(control)
        x = Linear(self.features, dtype=self.dtype, name='linear_2')(jax.nn.silu(x))
        return Linear(self.features, dtype=self.dtype, name='linear_3')(jax.nn.silu(x))


class ControlBlock(nn.Module):
    """Gated cross-attention from video to control; text is not touched, control is not updated.

    Attributes:
      heads: attention heads K.
      eps: epsilon of the modulated norm.
      dtype: type of the multiplies and of the residual stream.
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
        return (video + gate * token_layout.unflatten_frames(y, video.shape[1])).astype(self.dtype)
