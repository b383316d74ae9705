"""Adaptive layer norms (AdaLN) and the embedding of noise levels, in float32."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from matrix_jax.nn.linear import Linear
from matrix_jax.nn.rope import timestep_code
from matrix_jax.parallel import compilation


class LayerNorm(nn.Module):
    """Affine LayerNorm over the last axis; statistics, parameters and output in float32.

    Attributes:
      eps: epsilon.
      apart: whether a GPU computes the statistics in a kernel of their own. What follows, such as a
        modulation and a join, then reads x itself, and no float32 result is stored.
    """

    eps: float = 1e-5
    apart: bool = False

    @nn.compact
    def __call__(self, x):
        """[... D] -> [... D] float32."""
        scale = self.param('scale', nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param('bias', nn.initializers.zeros_init(), x.shape[-1:])
        x = x.astype(jnp.float32)
        if self.apart and compilation.backend() == 'gpu':
            centred, variance = _statistics(x)
        else:
            centred = x - x.mean(-1, keepdims=True)
            variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.eps) * scale.astype(
            jnp.float32
        ) + bias.astype(jnp.float32)


def _statistics(x):
    """(x minus its mean, variance [... 1]) over the last axis, from one reading of x."""
    # Differences from a sample keep the digits that squares of values would lose.
    sample = jax.lax.stop_gradient(x[..., :1])
    shift, square = (y.mean(-1, keepdims=True) for y in (x - sample, jnp.square(x - sample)))
    variance = jnp.maximum(square - jnp.square(shift), 0)
    mean, variance = jax.lax.optimization_barrier((sample + shift, variance))
    return x - mean, variance


class RMSNorm(nn.Module):
    """RMS norm over the last axis; statistics and output in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        """[... D] -> [... D] float32."""
        scale = self.param('scale', nn.initializers.ones_init(), x.shape[-1:])
        x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        # A GPU computes this order in one kernel.
        return x * factor * scale if compilation.backend() == 'gpu' else x * (factor * scale)


def stored(x):
    """x, stored in its own type on a GPU; XLA would store the float32 sum that it was cast from."""
    return jax.lax.optimization_barrier(x) if compilation.backend() == 'gpu' else x


def modulate(x, shift, scale):
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """Embedding of noise levels: two linear layers on their sinusoidal code.

    Attributes:
      code_width: width of the sinusoidal code.
      features: width P of the embedding.
      guidance: width of a guidance code that is projected and added to the code, or None.
      dtype: type of the code and of the products.
    """

    code_width: int
    features: int
    guidance: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, level, guidance=None):
        """Levels [B T], guidance codes [B T width] or None -> [B T P] float32."""
        code = timestep_code(level, self.code_width).astype(self.dtype)
        if self.guidance is not None:
            if guidance is None:  # keeps the parameters of the layer; adds zero
                guidance = jnp.zeros((1, 1, self.guidance))
            code = code + Linear(
                self.code_width, use_bias=False, dtype=self.dtype, name='guidance'
            )(guidance)
        hidden = jax.nn.silu(Linear(self.features, dtype=self.dtype, name='linear_1')(code))
        return Linear(self.features, dtype=self.dtype, name='linear_2')(hidden).astype(jnp.float32)


class PairedAdaLN(nn.Module):
    """Expert AdaLN: one LayerNorm, with own shift, scale and gate for video and side tokens.

    Attributes:
      eps: epsilon of the norm.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, video, side, time):
        """Normalises and modulates both kinds of tokens.

        Args:
          video: [B T N/T D].
          side: text or control tokens [B L D].
          time: embedded levels [B T P]; T = 1 for one level for all frames.

        Returns:
          video [B T N/T D], side [B L D], gate [B T 1 D], side gate [B 1 D]; all float32.
        """
        width = video.shape[-1]
        parts = Linear(6 * width, name='linear')(jax.nn.silu(time))
        shift, scale, gate = rearrange(parts[..., : 3 * width], 'b t (c d) -> c b t 1 d', c=3)
        # PARITY: tokens without a frame take the level of the last frame, the noisiest one.
        side_shift, side_scale, side_gate = rearrange(
            parts[:, -1, 3 * width :], 'b (c d) -> c b 1 d', c=3
        )
        norm = LayerNorm(self.eps, apart=True, name='norm')
        return (
            modulate(norm(video), shift, scale),
            modulate(norm(side), side_shift, side_scale),
            gate,
            side_gate,
        )
