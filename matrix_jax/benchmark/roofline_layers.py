"""What the floors of all networks count with: convolutions of a decoder, and bytes of a number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution of a decoder: channels, taps, and its frames and pixels (in each direction) per
    frame and pixel of the latents."""

    inputs: int
    outputs: int
    taps: tuple[int, int, int]
    frames: int
    scale: int


def convolved(convs: Iterable[Conv], height: int, width: int) -> float:
    """FLOPs of convolutions for one latent frame of this size."""
    return sum(
        2
        * one.inputs
        * one.outputs
        * math.prod(one.taps)
        * one.frames
        * one.scale**2
        * height
        * width
        for one in convs
    )


def rows_sent(convs: Iterable[Conv], frames: int, width: int, dtype: str) -> float:
    """Bytes that a device sends while latent frames are decoded at once, whose rows are split: for
    each convolution a row up and a row down, of the past frames that it looks at as well.

    Args:
      convs: of the decoder.
      frames: latent frames.
      width: of a row of the latents.
      dtype: of the convolutions.
    """
    return size_of(dtype) * sum(
        2 * (frames * one.frames + one.taps[0] - 1) * width * one.scale * one.inputs
        for one in convs
        if one.taps[1] > 1
    )


def size_of(dtype: str) -> int:
    """Bytes of a number."""
    return 2 if dtype == 'bfloat16' else 4
