"""PyTorch tensors <-> our parameter trees, by a conversion table.

A table is a tuple of `Row`, `Drop` and entries of `weights.names` at the end of the file that
defines the network. Each torch key matches exactly one row, each of our leaves is written exactly
once, and one error reports all faults, with the nearest names. Everything is numpy and stays on the
host.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from matrix_jax.weights.names import Join, Prefix, Rename, renamed

SHOWN = 12  # faults printed in full; the rest are counted
ALLOWED_BY = ' (--allow-non-finite takes them)'
# Type -> (unsigned integer of its size, bits of the exponent, which are all set if not finite).
EXPONENTS: dict[str, tuple[Any, int]] = {
    'float32': (np.uint32, 0x7F800000),
    'float16': (np.uint16, 0x7C00),
    'bfloat16': (np.uint16, 0x7F80),
}


class ConversionError(ValueError):
    """Names or shapes of tensors do not fit the network."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One torch tensor (or one per layer) and the leaf that it becomes.

    Attributes:
      torch: torch key; '{i}' stands for the layer index.
      path: '/'-joined path of our leaf.
      layout: einops pattern from torch axes to ours. The letters on the right name the axes for
        sharding (see `matrix_jax.parallel.sharding`).
      layers: (start, stop) of '{i}'; our leaf stacks the layers on a new leading axis.
      sizes: sizes of axes that the pattern splits, as ((letter, size), ...) or a dict.
    """

    torch: str
    path: str
    layout: str
    layers: tuple[int, int] | None = None
    sizes: Any = None

    def __post_init__(self) -> None:
        if ('{i}' in self.torch) != (self.layers is not None):
            raise ValueError(f"row {self.torch}: '{{i}}' and layers go together")
        sizes = self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes or ()
        object.__setattr__(self, 'sizes', tuple(sizes))

    def keys(self) -> list[str]:
        """Returns the torch keys of this row, in stacking order."""
        if self.layers is None:
            return [self.torch]
        return [self.torch.replace('{i}', str(i)) for i in range(*self.layers)]

    def inverse(self) -> str:
        """Returns the einops pattern from our axes to torch's."""
        left, right = self.layout.split('->')
        return f'{right.strip()} -> {left.strip()}'

    def axes(self) -> tuple[str, ...]:
        """Returns a letter per axis of our leaf; '_' for a merged axis, 'layers' for the stack."""
        right = self.layout.split('->')[1]
        axes = re.findall(r'\([^)]*\)|\S+', right)
        letters = tuple('_' if axis.startswith('(') else axis for axis in axes)
        return letters if self.layers is None else ('layers', *letters)


@dataclasses.dataclass(frozen=True)
class Drop:
    """A torch key (with '{i}' or '*') that our tree does not need, and why."""

    torch: str
    why: str

    def matches(self, key: str) -> bool:
        return fnmatch.fnmatchcase(key, self.torch.replace('{i}', '*'))


Table = Sequence[Row | Drop | Prefix | Rename | Join]


def to_jax(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping | None = None,
    allow_non_finite: bool = False,
) -> dict[str, Any]:
    """Returns our parameter tree, nested dicts of numpy arrays, made from torch tensors.

    Args:
      table: table of the network.
      tensors: torch name -> array; the dtype stays.
      shapes: tree of objects with `.shape` that the result must match, if given.
      allow_non_finite: whether values may be infinite or not a number.

    Raises:
      ConversionError: tensors are unknown, missing, of a wrong shape or type, or not finite; one
        message names all.
    """
    rows = [entry for entry in table if isinstance(entry, Row)]
    drops = [entry for entry in table if isinstance(entry, Drop)]
    try:
        tensors = renamed(table, tensors)
    except ValueError as error:
        raise ConversionError(f'1 weight fault(s): {error}') from error
    wanted = {key for row in rows for key in row.keys()}
    faults = []
    for key in tensors:
        if key not in wanted and not any(drop.matches(key) for drop in drops):
            faults.append(f'unknown key {key}{_nearest(key, wanted - set(tensors))}')
    expected = None if shapes is None else flatten(shapes)
    leaves = {}
    for row in rows:
        keys = row.keys()
        missing = [key for key in keys if key not in tensors]
        for key in missing:
            faults.append(f'missing key {key}{_nearest(key, set(tensors) - wanted)}')
        if missing or not keys:
            continue
        arrays = [np.asarray(tensors[key]) for key in keys]
        for key, array in zip(keys, arrays):
            if not is_floating(array.dtype):
                faults.append(f'{key}: got {array.dtype}, expected floating-point numbers')
            elif not allow_non_finite and not is_finite(array):
                faults.append(f'{key}: has values that are not finite{ALLOWED_BY}')
        try:
            parts = [rearrange(array, row.layout, **dict(row.sizes)) for array in arrays]
            leaf = np.stack(parts) if row.layers is not None else parts[0]
        except Exception as error:  # einops and numpy name the shapes, not the key
            got = ', '.join(sorted({str(array.shape) for array in arrays}))
            faults.append(
                f'{row.torch}: shape {got} does not fit layout {row.layout!r} '
                f'({str(error).strip().splitlines()[-1]})'
            )
            continue
        if row.path in leaves:
            faults.append(f'{row.path}: written twice (table error at {row.torch})')
        leaves[row.path] = leaf
        if expected is not None and row.path in expected:
            want = tuple(expected[row.path].shape)
            if tuple(leaf.shape) != want:
                faults.append(
                    f'{row.torch}: got {tuple(leaf.shape)} for {row.path}, expected {want}'
                )
    if expected is not None and not faults:
        faults += [f'{path}: no row writes it' for path in sorted(set(expected) - set(leaves))]
        faults += [
            f'{path}: not a parameter of this network'
            for path in sorted(set(leaves) - set(expected))
        ]
    if faults:
        more = f'; and {len(faults) - SHOWN} more' if len(faults) > SHOWN else ''
        raise ConversionError(f'{len(faults)} weight fault(s): ' + '; '.join(faults[:SHOWN]) + more)
    return unflatten(leaves)


def is_floating(dtype: Any) -> bool:
    """Returns whether a type is floating-point, those of `ml_dtypes` included."""
    return np.dtype(dtype).kind == 'f' or np.dtype(dtype).name.startswith(('bfloat', 'float'))


def is_finite(array: np.ndarray, block: int = 2**24) -> bool:
    """Returns whether no value is infinite or not a number."""
    if array.dtype.name not in EXPONENTS:
        return bool(np.isfinite(array.astype(np.float32)).all())
    bits, mask = EXPONENTS[array.dtype.name]
    flat = array.reshape(-1).view(bits)
    return not any(
        (flat[at : at + block] & mask == mask).any() for at in range(0, flat.size, block)
    )


def to_torch(table: Table, params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `to_jax`: returns torch name -> numpy array; the dtype stays.

    Raises:
      ConversionError: the tree has leaves without a row, or rows without a leaf.
    """
    leaves = flatten(params)
    rows = [entry for entry in table if isinstance(entry, Row) and entry.keys()]
    paths = {row.path for row in rows}
    faults = [
        f'{path}: no row writes it{_nearest(path, paths)}' for path in leaves if path not in paths
    ]
    faults += [f'{path}: missing in the tree' for path in sorted(paths - set(leaves))]
    if faults:
        raise ConversionError(f'{len(faults)} weight fault(s): ' + '; '.join(faults[:SHOWN]))
    tensors = {}
    for row in rows:
        leaf = np.asarray(leaves[row.path])
        parts = leaf if row.layers is not None else [leaf]
        sizes = merged_sizes(row, parts[0].shape)
        for key, part in zip(row.keys(), parts, strict=True):
            tensors[key] = np.ascontiguousarray(rearrange(part, row.inverse(), **sizes))
    return tensors


def axes(table: Table) -> dict[str, Any]:
    """Returns a tree of axis letters, one tuple per leaf, for `sharding.param_shardings`."""
    return unflatten({row.path: row.axes() for row in table if isinstance(row, Row) and row.keys()})


def config_faults(
    released: Mapping[str, Any], fixed: Mapping[str, Any], known: Container[str], where: str = ''
) -> list[str]:
    """Returns one text per key of a diffusers config.json that a network cannot follow.

    Args:
      released: the config; null values and keys that start with '_' are ignored.
      fixed: keys with the only value that the network supports.
      known: other keys that the network reads.
      where: text before each key.
    """
    asked = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in released.items()
        if not key.startswith('_') and value is not None
    }
    faults = [
        f'{where}{key} = {asked[key]!r} (expected {want!r})'
        for key, want in fixed.items()
        if asked.get(key, want) != want
    ]
    return faults + [
        f'{where}{key} = {value!r} (unknown key)'
        for key, value in asked.items()
        if key not in fixed and key not in known
    ]


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Any]:
    """Returns {'a/b/c': leaf} of a nested dict."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{name}/'))
        else:
            flat[f'{prefix}{name}'] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{'a/b/c': leaf} -> nested dict."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split('/')
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def merged_sizes(row: Row, shape: Sequence[int]) -> dict[str, int]:
    """Returns the sizes that einops needs for `row.inverse()` on a leaf (or layer) of this shape.

    These are the sizes of axes that our side merges and torch's side keeps apart.
    """
    right = row.layout.split('->')[1]
    groups = re.findall(r'\([^)]*\)|\S+', right)
    known = dict(row.sizes)
    for group, size in zip(groups, shape, strict=True):
        if not group.startswith('('):
            known.setdefault(group, size)
    for group, size in zip(groups, shape, strict=True):
        letters = group.strip('()').split()
        free = [letter for letter in letters if letter not in known]
        if group.startswith('(') and len(free) == 1:
            rest = math.prod(known[letter] for letter in letters if letter in known)
            known[free[0]] = size // rest
    used = set(re.findall(r'[a-z_][a-z0-9_]*', row.layout))
    return {letter: size for letter, size in known.items() if letter in used}


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    return f' (nearest: {close[0]})' if close else ''
