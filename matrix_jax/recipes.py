"""Recipes: named runs in the Python modules of `configs/`, and overrides of their fields.

A recipe is an upper-case `Run` in a module of `configs/`. `load('carracing:SWIN',
['--mesh.seq=4'])` finds it and replaces the named fields. A wrong name or value raises a
`UsageError`. Loading a recipe touches no device and writes no file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matrix_jax.config import Run, UsageError

DEFAULT_WORLD = 'carracing'
BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def load(recipe: str | None = None, overrides: Sequence[str] = ()) -> Run:
    """Returns the run named 'world:RECIPE', with fields replaced.

    Args:
      recipe: 'world:RECIPE'. 'world' alone means its DEFAULT recipe; None means the bundled world.
      overrides: '--field.sub=value', or '--field.sub' followed by 'value'. The prefix 'train.' may
        be left out.

    Raises:
      UsageError: there is no such recipe or field, or a value does not fit its field.
    """
    world, colon, name = (DEFAULT_WORLD if recipe is None else recipe).partition(':')
    if not world or colon and not name:
        raise UsageError(f'RECIPE: got {recipe!r}, expected one of {", ".join(_worlds())}')
    module = _module(world)
    found = _recipes(module)
    name = (name or getattr(module, 'DEFAULT', '')).upper()
    if name not in found:
        raise UsageError(
            f'unknown recipe {world}:{name}{did_you_mean(name, found)}; '
            f'{world} has: {", ".join(found)}'
        )
    run = dataclasses.replace(found[name], name=f'{world}:{name}')
    for field, text in _pairs(run, overrides):
        run = _replace(run, field.split('.'), text, f'--{field}')
    return run


def load_several(names: Sequence[str], overrides: Sequence[str] = ()) -> list[Run]:
    """Returns the runs of several 'RECIPE' or 'RECIPE=WEIGHTS'; no names mean the bundled world.

    Args:
      names: recipes, each at most once.
      overrides: as in `load`; only allowed with a single recipe.

    Raises:
      UsageError: as in `load`, or the recipes cannot be served together.
    """
    several = len(names) > 1
    if several and overrides:
        raise UsageError(
            f'{overrides[0].partition("=")[0]}: got {len(names)} recipes, expected '
            'one with it; RECIPE=WEIGHTS says where the weights of each are'
        )
    runs: dict[str, Run] = {}
    for one in names or [DEFAULT_WORLD]:
        name, equals, weights = one.partition('=')
        run = load(name, [*overrides, f'--weights={weights}'] if equals else overrides)
        if run.name in runs:
            raise UsageError(f'RECIPE: got {run.name} twice, expected each at most once')
        if several and not run.weights:
            raise UsageError(
                f'{run.name}: has no weights, expected {run.name}=WEIGHTS, a '
                'folder in the diffusers layout or a hub repository'
            )
        runs[run.name] = run
    return list(runs.values())


def change(config: Any, fields: Mapping[str, Any]) -> Any:
    """Returns a config dataclass with fields replaced, such as {'stream.steps': 4}.

    Fields of one group change together, so only the result has to be valid.
    """
    values: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for path, value in fields.items():
        name, _, rest = path.partition('.')
        if rest:
            groups.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    values |= {name: change(getattr(config, name), group) for name, group in groups.items()}
    return dataclasses.replace(config, **values)


def list_recipes(world: str | None = None) -> list[str]:
    """Returns the names ('world:RECIPE') of all recipes, or of those of one world."""
    return [
        f'{one}:{name}'
        for one in ([world] if world else _worlds())
        for name in _recipes(_module(one))
    ]


def describe(run: Run) -> str:
    """Returns one line per field that an override can set: name, type, value."""
    rows = [(f'--{path}', _type_name(kind), _show(value)) for path, kind, value in _fields(run)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return '\n'.join(f'  {a:{widths[0]}}  {b:{widths[1]}}  {c}' for a, b, c in rows)


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns ' (did you mean X?)' with the closest of `names`, or '' if none is close."""
    near = difflib.get_close_matches(name, list(names), 1, cutoff)
    return f' (did you mean {near[0]}?)' if near else ''


# --- modules of recipes ----------------------------------------------------------------------


def _folder() -> Path:
    """The recipes: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / 'configs'
    return inside if inside.is_dir() else package.parent / 'configs'


def _worlds() -> list[str]:
    return sorted(path.stem for path in _folder().glob('[a-z]*.py'))


def _module(world: str) -> types.ModuleType:
    if world not in _worlds():
        raise UsageError(
            f'unknown world {world!r}{did_you_mean(world, _worlds())}; '
            f'there are: {", ".join(_worlds())}'
        )
    name = f'matrix_jax_recipes.{world}'
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, _folder() / f'{world}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _recipes(module: types.ModuleType) -> dict[str, Run]:
    return {
        name: value
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, Run)
    }


# --- overrides -------------------------------------------------------------------------------


def _pairs(run: Run, tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields ('field.sub', text) for each override; a boolean flag without a value means true."""
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith('--') or token == '--':
            raise UsageError(f'unexpected argument {token!r}; options are --name value')
        field, given, text = token[2:].partition('=')
        field = field.replace('-', '_')
        first = field.split('.')[0]
        if first not in _names(run) and first in _names(run.train):
            field = f'train.{field}'
        if not given:
            if tokens and not tokens[0].startswith('--'):
                text = tokens.pop(0)
            else:
                text = _flag(run, field)
        yield field, text


def _flag(run: Run, field: str) -> str:
    """The value of an option without one: 'true' for a boolean field, else an error."""
    owner: Any = run
    for part in field.split('.'):
        owner = getattr(owner, _field_name(owner, part, f'--{field}'))
    if isinstance(owner, bool):
        return 'true'
    raise UsageError(f'--{field}: needs a value')


def _replace(owner: Any, path: list[str], text: str, option: str) -> Any:
    """Returns `owner` with the field at `path` set to the value that `text` spells."""
    name, *rest = path
    name = _field_name(owner, name, option)
    value = getattr(owner, name)
    if rest:
        value = _replace(value, rest, text, option)
    elif dataclasses.is_dataclass(value):
        raise UsageError(
            f'{option}: is a group; set one of its fields: '
            + ', '.join(f'{option}.{one}' for one in _names(value))
        )
    else:
        value = _parse(_hints(owner)[name], text, value, option)
    try:
        return dataclasses.replace(owner, **{name: value})
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f'{option} {text}: {error}') from error


def _field_name(owner: Any, name: str, option: str) -> str:
    """The field of `owner` called `name` now, or formerly by its class's `ALIASES`."""
    if not dataclasses.is_dataclass(owner):
        what = 'this recipe has none' if owner is None else f'{owner!r} has no fields'
        raise UsageError(f'{option}: {what}')
    names = _names(owner)
    name = getattr(owner, 'ALIASES', {}).get(name, name)
    if name in names:
        return name
    near = names + (_names(owner.train) if isinstance(owner, Run) else [])
    raise UsageError(
        f'{option}: no field {name!r}{did_you_mean(name, near)}; '
        f'fields of {type(owner).__name__}: {", ".join(names)}'
    )


def _parse(kind: Any, text: str, current: Any, option: str) -> Any:
    """Returns the value of type `kind` that `text` spells."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _parse(type(current), text, current, option)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() == 'none':
            return None
        choices = [one for one in args if one is not type(None)]
        if choices == [str] and not text:
            raise UsageError(f"{option}: got '', expected a value, or none")
        if len(choices) == 1:
            return _parse(choices[0], text, current, option)
    elif origin is Literal:
        by_text = {str(choice): choice for choice in args}
        if text in by_text:
            return by_text[text]
    elif kind is tuple or origin is tuple:
        return _parse_tuple(args, text, option)
    elif kind is bool:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
    elif kind is str:
        return text
    elif kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(text)
            if math.isfinite(number):
                return number
    else:
        raise UsageError(
            f'{option}: a field of type {_type_name(kind)} is set in a recipe, '
            'not on the command line'
        )
    raise UsageError(f'{option}: got {text!r}, expected {_type_name(kind)}')


def _parse_tuple(kinds: tuple, text: str, option: str) -> tuple:
    parts = [part.strip() for part in text.strip('()[] ').split(',') if part.strip()]
    if not kinds or kinds[-1] is ...:
        kinds = (kinds[0] if kinds else str,) * len(parts)
    if len(kinds) != len(parts):
        raise UsageError(
            f'{option}: got {text!r} with {len(parts)} values, '
            f'expected {len(kinds)} separated by commas'
        )
    return tuple(_parse(kind, part, None, option) for kind, part in zip(kinds, parts))


def _fields(owner: Any, prefix: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, type, value) of every leaf field, depth first."""
    hints = _hints(owner)
    for name in _names(owner):
        value = getattr(owner, name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f'{prefix}{name}.')
        elif prefix or name != 'name':
            kind = hints[name]
            yield f'{prefix}{name}', type(value) if kind is Any else kind, value


def _names(owner: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(owner) if field.init]


def _hints(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(type(owner))


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ' | '.join(str(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return ' | '.join(_type_name(one) for one in args)
    if kind is type(None):
        return 'none'
    if origin is tuple:
        return ','.join('...' if one is ... else _type_name(one) for one in args)
    return getattr(kind, '__name__', str(kind))


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ','.join(map(_show, value))
    return 'none' if value is None else str(value)
