"""Released PyTorch tensors <-> our parameter trees, by table and strictly.

A table is a tuple of `Row`, `Drop` and `Prefix` that stands at the end of the file that defines the
network. Each torch key hits exactly one row, each of our leaves is written exactly once, and every
fault is reported in one go, with the nearest names. Numpy only: no device is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

SHOWN = 12  # faults printed in full; the rest are counted


class ConversionError(ValueError):
    """Names or shapes of a checkpoint do not fit the network."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One torch tensor (or one per layer) and where it lives in our tree.

    Attributes:
      torch: torch key; '{i}' stands for the layer index.
      path: '/'-joined path of our leaf.
      layout: einops pattern from torch axes to ours. The letters on the right name the axes for
        sharding (see `matrix_jax.parallel.sharding`).
      layers: (start, stop) of '{i}'; our leaf then stacks them on a new leading axis.
      sizes: sizes of axes that the pattern splits, as ((letter, size), ...) or a dict.
    """

    torch: str
    path: str
    layout: str
    layers: tuple[int, int] | None = None
    sizes: Any = None

    def __post_init__(self):
        if ('{i}' in self.torch) != (self.layers is not None):
            raise ValueError(f"row {self.torch}: '{{i}}' and layers go together")
        sizes = self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes or ()
        object.__setattr__(self, 'sizes', tuple(sizes))

    def keys(self) -> list[str]:
        """The torch keys of this row, in stacking order."""
        if self.layers is None:
            return [self.torch]
        return [self.torch.replace('{i}', str(i)) for i in range(*self.layers)]

    def inverse(self) -> str:
        """The einops pattern from our axes to torch's."""
        left, right = self.layout.split('->')
        return f'{right.strip()} -> {left.strip()}'

    def axes(self) -> tuple[str, ...]:
        """One letter per axis of our leaf; '_' for a merged axis, 'layers' for the stack."""
        right = self.layout.split('->')[1]
        names = re.findall(r'\([^)]*\)|\S+', right)
        names = tuple('_' if name.startswith('(') else name for name in names)
        return names if self.layers is None else ('layers',) + names


@dataclasses.dataclass(frozen=True)
class Drop:
    """A torch key (with '{i}' or '*') that has no place in our tree, and why."""

    torch: str
    why: str

    def matches(self, key: str) -> bool:
        return fnmatch.fnmatchcase(key, self.torch.replace('{i}', '*'))


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What all torch keys of a file may begin with: the name of a wrapper around the network. It is
    taken off in reading, and not written."""

    text: str

    def names(self, keys) -> dict[str, str]:
        """Plain key -> key of the file."""
        worn = bool(keys) and all(key.startswith(self.text) for key in keys)
        return {key.removeprefix(self.text) if worn else key: key for key in keys}


Table = Sequence[Row | Drop | Prefix]


def to_jax(table: Table, tensors: Mapping[str, np.ndarray], shapes=None) -> dict:
    """Builds our parameter tree from torch tensors.

    Args:
      table: rows and drops of the network.
      tensors: torch name -> array; any dtype, kept.
      shapes: optional tree of things with `.shape` to check against, complete.

    Returns:
      Nested dict of numpy arrays.

    Raises:
      ConversionError: unknown, missing or misshapen tensors; all of them in one message.
    """
    rows = [entry for entry in table if isinstance(entry, Row)]
    drops = [entry for entry in table if isinstance(entry, Drop)]
    for prefix in (entry for entry in table if isinstance(entry, Prefix)):
        tensors = _Renamed(tensors, prefix.names(list(tensors)))
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
        try:
            parts = [
                rearrange(np.asarray(tensors[key]), row.layout, **dict(row.sizes)) for key in keys
            ]
            leaf = np.stack(parts) if row.layers is not None else parts[0]
        except Exception as error:  # einops and numpy name the shapes, not the key
            got = ', '.join(sorted({str(tuple(tensors[key].shape)) for key in keys}))
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


class _Renamed(Mapping):
    """A mapping by other names; values are read on access."""

    def __init__(self, content, names):
        self._content, self._names = content, names

    def __getitem__(self, name):
        return self._content[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def to_torch(table: Table, params: Mapping) -> dict[str, np.ndarray]:
    """The exact inverse of `to_jax`: torch name -> numpy array, dtype kept.

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


def axes(table: Table) -> dict:
    """Tree of axis letters, one tuple per leaf; for `sharding.param_shardings`."""
    return unflatten({row.path: row.axes() for row in table if isinstance(row, Row) and row.keys()})


def config_faults(released: Mapping, fixed: Mapping, known, where: str = '') -> list[str]:
    """What a released config.json asks for that a network does not do, one text a fault.

    Args:
      released: keys and values; those of null, and keys that start with '_', ask for nothing.
      fixed: keys with the one value that the network does.
      known: the other keys.
      where: goes before each key.
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


def check_sizes(cfg, where: str = '', zero: Sequence[str] = ()):
    """ValueError if a whole number in a config of a network is below 1.

    Args:
      where: goes before the field's name.
      zero: fields that may be 0.
    """
    for field in dataclasses.fields(cfg):
        value, lowest = getattr(cfg, field.name), int(field.name not in zero)
        sizes = value if isinstance(value, tuple) else (value,)
        if 'int' in str(field.type) and any(type(size) is int and size < lowest for size in sizes):
            raise ValueError(f'{where}{field.name}: got {value}, expected at least {lowest}')


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}."""
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
    """Sizes that einops needs for `row.inverse()` on a leaf (or a layer of it) of this shape: those
    of axes that our side merges and torch's side has apart."""
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


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    return f' (nearest: {close[0]})' if close else ''
