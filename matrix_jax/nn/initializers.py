"""Initial parameters drawn by numpy, leaf by leaf.

A compiled initialisation of a large network takes minutes and needs memory for all of it. Here a
leaf depends on the seed and its path only, so leaves can be drawn one at a time, in any order.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from matrix_jax.weights import conversion

InitRule = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
InitRules = Sequence[tuple[str, InitRule]]


def zeros(random, shape):
    """All zeros."""
    return np.zeros(shape, np.float32)


def ones(random, shape):
    """All ones."""
    return np.ones(shape, np.float32)


def normal(std: float) -> InitRule:
    """Normal numbers with mean 0."""
    return lambda random, shape: random.standard_normal(shape, np.float32) * np.float32(std)


def uniform(scale: float = 1.0) -> InitRule:
    """Uniform numbers of variance scale / fan-in; the last axis of a kernel is its output."""
    return lambda random, shape: _uniform(
        random, shape, math.sqrt(3 * scale / math.prod(shape[:-1]))
    )


def xavier(scale: float = 1.0) -> InitRule:
    """Uniform numbers of variance scale / mean(fan-in, fan-out)."""
    return lambda random, shape: _uniform(random, shape, math.sqrt(6 * scale / sum(shape[-2:])))


def kernel(random, shape):
    """Matrices by Xavier's rule, convolutions by their fan-in."""
    return (xavier() if len(shape) == 2 else uniform())(random, shape)


DEFAULTS: InitRules = (('*bias', zeros), ('*scale', ones), ('*kernel', kernel))


def draw(
    rules: InitRules, path: str, shape: Sequence[int], seed: Sequence[int], layer: int | None = None
):
    """Draws one leaf, or one layer of a stacked leaf, in float32.

    Args:
      rules: (pattern of paths, rule); the first that fits counts, `DEFAULTS` come last.
      path: '/'-joined path of the leaf.
      shape: shape of the leaf, or of one layer of it.
      seed: seed of the whole tree.
      layer: index of the layer.

    Raises:
      ValueError: no rule fits the path.
    """
    for pattern, rule in (*rules, *DEFAULTS):
        if fnmatch.fnmatchcase(path, pattern):
            name = path if layer is None else f'{path}/{layer}'
            return rule(np.random.default_rng([*seed, zlib.crc32(name.encode())]), tuple(shape))
    raise ValueError(f'{path}: no rule for its initial values')


def draw_tree(rules: InitRules, shapes, seed: int) -> dict:
    """Draws all leaves of a tree of ShapeDtypeStructs, as numpy float32 arrays."""
    flat = conversion.flatten(shapes)
    return conversion.unflatten(
        {path: draw(rules, path, leaf.shape, (seed,)) for path, leaf in flat.items()}
    )


def _uniform(random, shape, limit):
    return (random.random(shape, np.float32) * 2 - 1) * np.float32(limit)
