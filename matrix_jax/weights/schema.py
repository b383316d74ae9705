"""Checks of configs: the values of a config.json, and the fields of a config dataclass.

A config comes from a file that anybody may have written, and sizes decide how much is built. So
types and ranges are checked first: numbers are finite and of a size that a network can have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LARGEST = 2**17  # of a whole number in a config
# Fields -> their largest whole number, if it is another one.
LARGEST_OF = (
    (re.compile(r'vocab'), 2**24),
    (re.compile(r'layers|start|end|blocks|heads'), 1024),
    (re.compile(r'patch.*|layers_per_block|mlp_ratio'), 64),
)
LONGEST = 4096  # values of a list, and characters of a text
POSITIVE = re.compile(r'.*(eps|scale|scaling_factor|stds|period|snr_shift|beta_start|beta_end)')


def check_fields(cfg: Any, where: str = '', zero: Sequence[str] = ()) -> None:
    """Checks the fields of a config dataclass by the types of their annotations, and their ranges.

    Whole numbers are at least 1 and at most `LARGEST` or what `LARGEST_OF` says; other numbers are
    finite, factors, periods and epsilons are positive, and epsilons at most 1.

    Args:
      cfg: the config dataclass.
      where: text before the field's name.
      zero: fields that may be 0.

    Raises:
      ValueError: a value has another type, or is out of range.
    """
    cls: Any = type(cfg)
    for name, kind in _annotations(cls).items():
        value = getattr(cfg, name)
        if not _fits(value, kind):
            raise ValueError(f'{where}{name}: got {shown(value)}, expected {_described(kind)}')
        lowest = int(name not in zero)
        highest = next((most for rule, most in LARGEST_OF if rule.fullmatch(name)), LARGEST)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, (bool, str)) or not isinstance(one, numbers.Real):
                continue
            if isinstance(one, numbers.Integral) and 'int' in str(kind):
                if int(one) < lowest:
                    raise ValueError(f'{where}{name}: got {value}, expected at least {lowest}')
                if int(one) > highest:
                    raise ValueError(f'{where}{name}: got {value}, expected at most {highest}')
            elif not math.isfinite(float(one)):
                raise ValueError(f'{where}{name}: got {value}, expected finite numbers')
            elif POSITIVE.fullmatch(name) and float(one) <= 0:
                raise ValueError(f'{where}{name}: got {value}, expected more than 0')
            elif name.endswith('eps') and float(one) > 1:
                raise ValueError(f'{where}{name}: got {value}, expected at most 1')


def check_values(released: Mapping[str, Any]) -> None:
    """Checks that the values of a config.json are of sizes that a config can have.

    Raises:
      ValueError: a number, text or list is too large; one line names all.
    """
    if faults := list(_oversized(released, '')):
        raise ValueError('; '.join(faults[:5]))


def shown(value: Any) -> str:
    """Returns a value for a message, cut to one short line."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _oversized(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, (dict, list, str)) and len(value) > LONGEST:
        yield f'{where}: got {len(value)} values, expected at most {LONGEST}'
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _oversized(one, f'{where}.{key}' if where else str(key)[:60])
    elif isinstance(value, list):
        for one in value:
            yield from _oversized(one, where)
    elif isinstance(value, int) and abs(value) >= 2**31:
        yield f'{where}: got a number of {len(str(abs(value)))} digits, expected less than 2**31'


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real)
    return isinstance(value, type(None) if kind is None else kind)


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f'one of {", ".join(map(str, typing.get_args(kind)))}'
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
