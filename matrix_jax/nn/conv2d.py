"""Convolution of single frames."""

from __future__ import annotations

from einops import rearrange
from jax import lax


def conv2d(x, kernel, pad, stride: int = 1):
    """Convolves frame by frame.

    Args:
      x: [B T H W in].
      kernel: [kh kw in out].
      pad: zero rows (above, below) and columns (left, right).
      stride: step along rows and columns.

    Returns:
      [B T H' W' out].
    """
    y = lax.conv_general_dilated(
        rearrange(x, 'b t h w c -> (b t) h w c'),
        kernel,
        (stride, stride),
        pad,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return rearrange(y, '(b t) h w c -> b t h w c', b=x.shape[0])
