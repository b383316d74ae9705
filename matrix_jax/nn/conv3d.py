"""Convolutions of video networks: causal in time, and those that change the frame size.

`conv_cpu` has faster forms of the same functions, which replace them on the CPU.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from matrix_jax.nn import conv_cpu
from matrix_jax.nn.conv2d import conv2d
from matrix_jax.parallel import compilation, spatial

# Uniform numbers: normal ones take the compiler longer than the rest of the initialisation.
fan_in = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')


class CausalConv3d(nn.Module):
    """Convolution over past and present frames; stride 1, same frame size.

    Attributes:
      features: output channels.
      kernel: odd sizes (kt, kh, kw).
      dtype: type of the products, of the output and of the carried context.
    """

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        """Convolves a chunk of frames.

        Args:
          x: [B T H W in].
          context: the frames before them [B kt-1 H W in]; None repeats the first frame.

        Returns:
          y [B T H W out] and the context [B kt-1 H W in] of the next chunk.
        """
        kernel = self.param('kernel', fan_in, (*self.kernel, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        x, past = x.astype(self.dtype), self.kernel[0] - 1
        if past:
            if context is None:
                context = jnp.repeat(x[:, :1], past, axis=1)
            x = jnp.concatenate([context.astype(self.dtype), x], axis=1)
            if compilation.backend() == 'gpu':
                # The next context is then cut out of these frames. XLA would compute it anew, and
                # copy the old one first.
                x = lax.optimization_barrier(x)
        y = conv3d(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return y, x[:, x.shape[1] - past :]


class Downsample2d(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2, padded right and below."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B T H W in] -> [B T H/2 W/2 out]."""
        kernel = self.param('kernel', fan_in, (3, 3, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        x, rows = spatial.with_halo(x.astype(self.dtype), 0, 1)
        y = conv2d(x, kernel.astype(self.dtype), (rows, (0, 1)), stride=2)
        return y + bias.astype(self.dtype)


class Upsample2d(nn.Module):
    """Doubles height and width by nearest neighbours and a 3x3 convolution."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B T H W in] -> [B T 2H 2W out]."""
        kernel = self.param('kernel', fan_in, (3, 3, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        y = upsample_conv2d(x.astype(self.dtype), kernel.astype(self.dtype))
        y = y + bias.astype(self.dtype)
        # Otherwise XLA computes parts of the frames more than once.
        return lax.optimization_barrier(y) if compilation.backend() == 'gpu' else y


def conv3d(x, kernel):
    """Convolution without padding in time, zero-padded to the same frame size.

    Args:
      x: [B T+kt-1 H W in].
      kernel: [kt kh kw in out], odd kh and kw.

    Returns:
      [B T H W out].
    """
    kt, kh, kw = kernel.shape[:3]
    if (kt, kh, kw) == (1, 1, 1):
        return x @ kernel[0, 0, 0]
    x, rows = spatial.with_halo(x, kh // 2, kh // 2)
    pad = (rows, (kw // 2, kw // 2))
    if conv_cpu.enabled():
        return conv_cpu.conv3d(x, kernel, pad)
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((0, 0), *pad), dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')
    )


def upsample_conv2d(x, kernel):
    """Nearest neighbours, then a 3x3 convolution: [B T H W in], [3 3 in out] -> [B T 2H 2W out]."""
    on_gpu = compilation.backend() == 'gpu'
    if on_gpu or conv_cpu.enabled() and x.dtype == jnp.float32:
        x, rows = spatial.with_halo(x, 1, 1)
        return upsample_by_quarters(x, kernel, (rows, (1, 1)))
    x = repeat(x, 'b t h w c -> b t (h p) (w q) c', p=2, q=2)
    x, rows = spatial.with_halo(x, 1, 1)
    return conv2d(x, kernel, (rows, (1, 1)))


def upsample_by_quarters(x, kernel, pad):
    """`upsample_conv2d` with explicit zero rows and columns, in 4/9 of the multiplies.

    Two of three neighbouring taps always read the same source pixel. Their weights are summed
    first, which leaves one 2x2 convolution of the small frames for each quarter of the pixels.

    Args:
      x: [B T H W in].
      kernel: [3 3 in out]; its sums are rounded once, to the type of x.
      pad: zero rows (above, below) and columns (left, right).

    Returns:
      [B T 2H 2W out].
    """
    by_kernel = compilation.backend() == 'gpu'
    if not by_kernel:
        x = jnp.pad(x, ((0, 0), (0, 0), *pad, (0, 0)))
        pad = ((0, 0), (0, 0))
    rows, columns = (size + sum(zeros) - 1 for size, zeros in zip(x.shape[2:4], pad, strict=True))
    frames = rearrange(x, 'b t h w c -> (b t) h w c')

    def even_odd(kernel):
        """Taps of the even and of the odd pixels along the first axis."""
        return (
            jnp.stack([kernel[0], kernel[1] + kernel[2]]),
            jnp.stack([kernel[0] + kernel[1], kernel[2]]),
        )

    def convolve(frames, kernel):
        return lax.conv_general_dilated(
            frames, kernel, (1, 1), pad, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def quarter(p, q, kernel):
        kernel = kernel.swapaxes(0, 1).astype(x.dtype)
        if by_kernel:  # pads, so that nothing is copied; a row and a column too many
            made = convolve(frames, kernel)
            return made[:, p : p + rows - 1, q : q + columns - 1]
        return convolve(frames[:, p : p + rows, q : q + columns], kernel)

    quarters = [
        quarter(p, q, part)
        for p, half in enumerate(even_odd(kernel.astype(jnp.float32)))
        for q, part in enumerate(even_odd(half.swapaxes(0, 1)))
    ]
    return rearrange(quarters, '(p q) (b t) h w c -> b t (h p) (w q) c', p=2, b=x.shape[0])
