"""Shared by all rooflines: convolutions of a decoder, and bytes per number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution of a decoder.

    Attributes:
      inputs, outputs: channels.
      taps: kernel size in time, height and width.
      frames: frames per latent frame.
      scale: pixels per latent pixel in each direction.
    """

    inputs: int
    outputs: int
    taps: tuple[int, int, int]
    frames: int
    scale: int


def convolved(convs: Iterable[Conv], height: int, width: int) -> float:
    """FLOPs of convolutions for one latent frame of `height` x `width`."""
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
    """Bytes that a device sends to decode latent frames split by rows: one row up and one down per
    convolution, for past frames in its kernel too.

    Args:
      convs: convolutions of the decoder.
      frames: latent frames.
      width: latent width.
      dtype: dtype of the convolutions.
    """
    return size_of(dtype) * sum(
        2 * (frames * one.frames + one.taps[0] - 1) * width * one.scale * one.inputs
        for one in convs
        if one.taps[1] > 1
    )


def size_of(dtype: str) -> int:
    """Bytes of a number of a dtype."""
    return 2 if dtype == 'bfloat16' else 4
