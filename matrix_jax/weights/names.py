"""Names of torch tensors that other files of the same network use.

Names are translated when tensors are read; files are written with the names of the table.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prefix that all torch keys of a file may have: the name of a wrapper around the network."""

    text: str

    def names(self, keys: Sequence[str]) -> dict[str, str]:
        """Returns a dict from the key without the prefix to the key in the file."""
        present = bool(keys) and all(key.startswith(self.text) for key in keys)
        return {key.removeprefix(self.text) if present else key: key for key in keys}


@dataclasses.dataclass(frozen=True)
class Rename:
    """Another name of torch tensors.

    Attributes:
      torch: name in those files; '{name}' matches any text without a dot, and at the end any text.
      known: name in the table, with the same parts in braces.
      layout: einops pattern from the axes in those files to those in the table; None = the same.
      tied: whether files may hold both names of one tensor; this name then does not count.
    """

    torch: str
    known: str
    layout: str | None = None
    tied: bool = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression of the torch name."""
        return _pattern(self.torch)

    def name(self, key: str) -> str | None:
        """Returns the name of a key in the table; None if this entry does not match the key."""
        match = self.pattern.fullmatch(key)
        return match and self.known.format(**match.groupdict())


@dataclasses.dataclass(frozen=True)
class Join:
    """A tensor of the table that other files hold in parts, joined along the first axis.

    Attributes:
      parts: names of the parts in those files, as in `Rename`.
      known: name in the table.
    """

    parts: tuple[str, ...]
    known: str

    @functools.cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Regular expressions of the names of the parts."""
        return tuple(map(_pattern, self.parts))

    def place(self, key: str) -> tuple[str, int] | None:
        """Returns (name in the table, number of the part) of a key; None if it is no part."""
        for index, pattern in enumerate(self.patterns):
            if match := pattern.fullmatch(key):
                return self.known.format(**match.groupdict()), index
        return None


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r'\{(\w+)\}', name)  # texts and names in turn
    texts = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            texts.append(re.escape(part))
        else:
            ends_here = index == len(parts) - 2 and not parts[-1]
            texts.append(f'(?P<{part}>{".+" if ends_here else "[^.]+"})')
    return re.compile(''.join(texts))


def renamed(table: Sequence[Any], tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns the tensors under the names of a table.

    Raises:
      ValueError: two tensors have the same name there.
    """
    for prefix in (entry for entry in table if isinstance(entry, Prefix)):
        names = prefix.names(list(tensors))
        tensors = _Renamed(tensors, {known: ((key, None),) for known, key in names.items()})
    renames = [entry for entry in table if isinstance(entry, Rename)]
    joins = [entry for entry in table if isinstance(entry, Join)]
    if not renames and not joins:
        return tensors
    found: dict[str, tuple[tuple[str, str | None], ...]] = {}
    parts: dict[str, dict[int, str]] = {}
    for key in tensors:
        if place := next(filter(None, (join.place(key) for join in joins)), None):
            parts.setdefault(place[0], {})[place[1]] = key
            continue
        rename = next((one for one in renames if one.pattern.fullmatch(key)), None)
        known = (rename and rename.name(key)) or key
        if rename and rename.tied and known in tensors:
            continue
        if known in found:
            raise ValueError(f'{key} and {found[known][0][0]} are the same tensor {known}')
        found[known] = ((key, rename.layout if rename else None),)
    for known, keys in parts.items():
        whole = next(len(join.parts) for join in joins if _pattern(join.known).fullmatch(known))
        if len(keys) == whole and known not in found:
            found[known] = tuple((keys[index], None) for index in range(whole))
        else:  # reported as unknown
            found |= {key: ((key, None),) for key in keys.values()}
    return _Renamed(tensors, found)


class _Renamed(Mapping[str, np.ndarray]):
    """A mapping under other names, and some values joined; values are read on access."""

    def __init__(
        self,
        content: Mapping[str, np.ndarray],
        names: Mapping[str, tuple[tuple[str, str | None], ...]],
    ):
        self._content, self._names = content, names

    def __getitem__(self, name: str) -> np.ndarray:
        arrays = [
            rearrange(self._content[key], layout) if layout else self._content[key]
            for key, layout in self._names[name]
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
