"""Any training state as a flat dict of plain arrays, and back.

What is on disk then depends on names and shapes alone, not on the classes of the tree, and holds
what orbax does not take as it is: typed PRNG keys, and Python and numpy scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding


def to_plain(tree) -> dict[str, Any]:
    """Leaves by '/'-joined path; keys as their words, scalars as 0-d arrays."""
    return {name: _plain(leaf) for name, leaf in _named(tree)}


def targets(tree) -> dict[str, Any]:
    """What each entry of `to_plain(tree)` is restored into: a ShapeDtypeStruct with a sharding
    (the first device where `tree` says nothing), or a numpy array for what is no jax array."""
    return {name: _target(leaf) for name, leaf in _named(tree)}


def from_plain(tree, flat: Mapping[str, Any]):
    """The inverse of `to_plain`: a tree with the structure and kinds of leaves of `tree`."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [_like(leaf, flat[name]) for name, leaf in _named(tree)]
    )


def _named(tree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _is_key(leaf) -> bool:
    return hasattr(leaf, 'dtype') and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_scalar(leaf) -> bool:
    return not hasattr(leaf, 'dtype') or isinstance(leaf, np.generic)


def _plain(leaf):
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _target(leaf):
    if _is_scalar(leaf) or isinstance(leaf, np.ndarray):
        return np.empty_like(np.asarray(leaf))
    sharding = getattr(leaf, 'sharding', None) or SingleDeviceSharding(jax.devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(leaf, value):
    if _is_key(leaf):
        impl = []  # a ShapeDtypeStruct tells the kind of its keys only to a trace
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        return jax.random.wrap_key_data(value, impl=impl[0])
    return type(leaf)(value[()]) if _is_scalar(leaf) else value
