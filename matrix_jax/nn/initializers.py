"""Fresh parameters by numpy: one draw per leaf and layer, nothing compiled.

Initialising a network through the compiler costs minutes for what is some drawing of numbers; and a
network that does not fit the memory can be drawn leaf by leaf. A leaf follows from the seed and its
path alone, whatever is drawn before it.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np

InitRule = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
InitRules = Sequence[tuple[str, InitRule]]


def zeros(random, shape):
    """All zeros."""
    return np.zeros(shape, np.float32)


def ones(random, shape):
    """All ones."""
    return np.ones(shape, np.float32)


def normal(std: float) -> InitRule:
    """Normal numbers around zero."""
    return lambda random, shape: random.standard_normal(shape, np.float32) * np.float32(std)


def uniform(scale: float = 1.0) -> InitRule:
    """Uniform numbers of variance scale / fan-in, where a kernel's last axis is its output."""
    return lambda random, shape: _uniform(
        random, shape, math.sqrt(3 * scale / math.prod(shape[:-1]))
    )


def xavier(scale: float = 1.0) -> InitRule:
    """Uniform numbers of variance scale / (mean of fan-in and fan-out)."""
    return lambda random, shape: _uniform(random, shape, math.sqrt(6 * scale / sum(shape[-2:])))


def kernel(random, shape):
    """Matrices by Xavier's rule, convolutions by their fan-in."""
    return (xavier() if len(shape) == 2 else uniform())(random, shape)


DEFAULTS: InitRules = (('*bias', zeros), ('*scale', ones), ('*kernel', kernel))


def draw(
    rules: InitRules, path: str, shape: Sequence[int], seed: Sequence[int], layer: int | None = None
):
    """One leaf, float32, or one layer of a stacked one.

    Args:
      rules: (pattern of paths, rule); the first that fits counts, `DEFAULTS` come last.
      path: '/'-joined path of the leaf.
      shape: of the leaf, or of one layer of it.
      seed: numbers that seed the whole tree.
      layer: place in the stack.

    Raises:
      ValueError: no rule fits the path.
    """
    for pattern, rule in (*rules, *DEFAULTS):
        if fnmatch.fnmatchcase(path, pattern):
            name = path if layer is None else f'{path}/{layer}'
            return rule(np.random.default_rng([*seed, zlib.crc32(name.encode())]), tuple(shape))
    raise ValueError(f'{path}: no rule says how it starts')


def _uniform(random, shape, limit):
    return (random.random(shape, np.float32) * 2 - 1) * np.float32(limit)
