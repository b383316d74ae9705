"""Convolutions of video networks: causal in time, and the two that change the frame size."""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from matrix_jax.nn import winograd
from matrix_jax.parallel import spatial

# Uniform: drawing normal numbers takes the compiler longer than all the rest.
fan_in = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')

_detours: contextvars.ContextVar[bool] = contextvars.ContextVar('detours', default=True)


@contextlib.contextmanager
def native():
    """Within it, programs are traced with the convolutions of an accelerator, also on the CPU: to
    be counted, not run."""
    token = _detours.set(False)
    try:
        yield
    finally:
        _detours.reset(token)


def on_cpu() -> bool:
    """Whether convolutions take the detours that pay on the CPU."""
    return jax.default_backend() == 'cpu' and _detours.get()


class CausalConv3d(nn.Module):
    """Convolution of the past and present frames, stride 1, same frame size.

    Attributes:
      features: output channels.
      kernel: odd sizes (kt, kh, kw).
      dtype: type of the multiply, of the output and of the carried context.
    """

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        """Frames and the kt-1 frames before them.

        Args:
          x: [B T H W in].
          context: [B kt-1 H W in], or None at the start: the first frame is then repeated.

        Returns:
          y [B T H W out] and the context [B kt-1 H W in] of the frames that follow.
        """
        kernel = self.param('kernel', fan_in, (*self.kernel, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        x, past = x.astype(self.dtype), self.kernel[0] - 1
        if past:
            if context is None:
                context = jnp.repeat(x[:, :1], past, axis=1)
            x = jnp.concatenate([context.astype(self.dtype), x], axis=1)
        y = conv3d(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return y, x[:, x.shape[1] - past :]


class Downsample2d(nn.Module):
    """Halves height and width: a 3x3 convolution of stride 2, padded on the right and bottom."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B T H W in] -> [B T H/2 W/2 out]."""
        kernel = self.param('kernel', fan_in, (3, 3, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), ((0, 1), (0, 1)), stride=2)
        return y + bias.astype(self.dtype)


class Upsample2d(nn.Module):
    """Doubles height and width: nearest neighbours, then a 3x3 convolution."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B T H W in] -> [B T 2H 2W out]."""
        kernel = self.param('kernel', fan_in, (3, 3, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        return doubled2d(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


def conv3d(x, kernel):
    """Convolution, unpadded in time and zero-padded to the same frame size.

    XLA's 3-D convolution is several times slower than its 2-D one on the CPU, backwards as well.
    There time is Winograd's where that pays (`winograd`, exact to rounding), and else the taps are
    stacked on the channels.

    Args:
      x: [B T+kt-1 H W in].
      kernel: [kt kh kw in out], odd kh and kw.

    Returns:
      [B T H W out].
    """
    kt, kh, kw = kernel.shape[:3]
    if (kt, kh, kw) == (1, 1, 1):
        return x @ kernel[0, 0, 0]
    x, height = spatial.with_halo(x, kh // 2, kh // 2)
    pad = (height, (kw // 2, kw // 2))
    if not on_cpu():
        return lax.conv_general_dilated(
            x, kernel, (1, 1, 1), ((0, 0), *pad), dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')
        )
    frames = x.shape[1] - kt + 1
    m = winograd.best(frames)
    # Few channels are copied more than multiplied, and bfloat16 has too few digits for differences.
    if kt == winograd.TAPS and m > 1 and x.shape[-1] > 16 and x.dtype == jnp.float32:
        return winograd.convolve(x, kernel, m, lambda x, kernel: conv2d(x, kernel, pad))
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(kt)], axis=-1)
    return conv2d(x, rearrange(kernel, 't h w i o -> h w (t i) o'), pad)


def doubled2d(x, kernel):
    """Nearest neighbours, then a 3x3 convolution: [B T H W in], [3 3 in out] -> [B T 2H 2W out].

    Of three neighbouring taps two always see the same pixel. On the CPU their weights are summed
    first (exact to rounding): one 2x2 convolution of the small frames for each quarter of the
    pixels, 4/9 of the multiplies.
    """
    if not on_cpu() or x.dtype != jnp.float32:
        x = repeat(x, 'b t h w c -> b t (h p) (w q) c', p=2, q=2)
        return conv2d(x, kernel, ((1, 1), (1, 1)))
    rows_, columns = x.shape[2:4]
    x, height = spatial.with_halo(x, 1, 1)
    x = jnp.pad(x, ((0, 0), (0, 0), height, (1, 1), (0, 0)))

    def halves(kernel):  # of the first axis: for the even and for the odd pixels
        return (
            jnp.stack([kernel[0], kernel[1] + kernel[2]]),
            jnp.stack([kernel[0] + kernel[1], kernel[2]]),
        )

    quarters = [
        lax.conv_general_dilated(
            rearrange(x[:, :, p : p + rows_ + 1, q : q + columns + 1], 'b t h w c -> (b t) h w c'),
            part.swapaxes(0, 1),
            (1, 1),
            'VALID',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        for p, half in enumerate(halves(kernel))
        for q, part in enumerate(halves(half.swapaxes(0, 1)))
    ]
    return rearrange(quarters, '(p q) (b t) h w c -> b t (h p) (w q) c', p=2, b=x.shape[0])


def conv2d(x, kernel, pad, stride=1):
    """Frame by frame: [B T H W in], [kh kw in out] -> [B T H' W' out]."""
    x, height = spatial.with_halo(x, *pad[0])
    y = lax.conv_general_dilated(
        rearrange(x, 'b t h w c -> (b t) h w c'),
        kernel,
        (stride, stride),
        (height, pad[1]),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return rearrange(y, '(b t) h w c -> b t h w c', b=x.shape[0])
