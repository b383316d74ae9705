"""Runs as data: frozen dataclasses, recipes in `configs/`, and overrides by field name.

A recipe is an upper-case `Run` in a Python module of `configs/`; `load('carracing:SWIN',
['--mesh.seq=4'])` finds it and replaces the named fields. Parsing has no side effect, imports
nothing heavy, and every wrong name or value is a `UsageError`: one clear line at the door.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from matrix_jax.parallel.mesh import Mesh

DEFAULT_WORLD = 'carracing'


class UsageError(ValueError):
    """What the user gave cannot be used; the message is one line that says why."""


def at_least(field: str, value, lowest):
    """Raises ValueError unless value >= lowest."""
    if not value >= lowest:
        raise ValueError(f'{field}: got {value}, expected at least {lowest}')


# --- what a run is ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Train:
    """What the training loop does, whatever the stage; `keep` counts saved steps, and an update
    takes `accumulate` batches one after the other."""

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    keep: int = 3

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            at_least(f'train.{name}', value, 0 if name in ('steps', 'seed') else 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """One runnable thing: a world, what to do with it, and where.

    Attributes:
      world: the config dataclass of a world; nothing here looks inside.
      stage: the config dataclass of a training stage, or None.
      mesh: devices per mesh axis, or of each part of a stream.
      train: the training loop.
      weights: folder in the released layout, bundled name or hub repository; None = fresh.
      lora: file of an adapter in peft's names, or a folder with one, merged into the weights.
      lora_scale: factor of the adapter.
      data: folder of recorded clips, for training and evaluation; several with commas.
      out: folder or file to write; None = the tool's default.
      keep_programs: whether compiled programs are kept in the user's cache folder.
      name: 'world:RECIPE', filled in by `load`.
    """

    world: Any
    stage: Any = None
    mesh: Mesh = Mesh()
    train: Train = Train()
    weights: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    data: str | None = None
    out: str | None = None
    keep_programs: bool = True
    name: str = ''


# --- recipes ---------------------------------------------------------------------------------


def load(recipe: str | None = None, overrides: Sequence[str] = ()) -> Run:
    """The run of 'world:RECIPE' with fields replaced.

    Args:
      recipe: 'world:RECIPE'; a bare 'world' means its DEFAULT recipe, None the bundled world.
      overrides: '--field.sub=value' or '--field.sub', 'value'. A field of `Train` may be named
        without its 'train.'.

    Raises:
      UsageError: no such recipe or field, or a value that does not fit.
    """
    world, colon, name = (DEFAULT_WORLD if recipe is None else recipe).partition(':')
    if not world or colon and not name:
        raise UsageError(f'RECIPE: got {recipe!r}, expected one of {", ".join(_worlds())}')
    module = _module(world)
    found = _recipes(module)
    name = (name or getattr(module, 'DEFAULT', '')).upper()
    if name not in found:
        raise UsageError(
            f'unknown recipe {world}:{name}{_nearest(name, found)}; {world} has: {", ".join(found)}'
        )
    run = dataclasses.replace(found[name], name=f'{world}:{name}')
    for field, text in _pairs(run, overrides):
        run = _replace(run, field.split('.'), text, f'--{field}')
    return run


def list_recipes(world: str | None = None) -> list[str]:
    """Names of all recipes ('world:RECIPE'), or of one world's."""
    return [
        f'{one}:{name}'
        for one in ([world] if world else _worlds())
        for name in _recipes(_module(one))
    ]


def describe(run: Run) -> str:
    """One line per field that an override can name: name, type, value."""
    rows = [(f'--{path}', _type_name(kind), _show(value)) for path, kind, value in _fields(run)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return '\n'.join(f'  {a:{widths[0]}}  {b:{widths[1]}}  {c}' for a, b, c in rows)


def _folder() -> Path:
    """An installed wheel carries its recipes inside the package, a checkout at its root."""
    package = Path(__file__).parent
    inside = package / 'configs'
    return inside if inside.is_dir() else package.parent / 'configs'


def _worlds() -> list[str]:
    return sorted(path.stem for path in _folder().glob('[a-z]*.py'))


def _module(world: str) -> types.ModuleType:
    if world not in _worlds():
        raise UsageError(
            f'unknown world {world!r}{_nearest(world, _worlds())}; '
            f'there are: {", ".join(_worlds())}'
        )
    name = f'matrix_jax_recipes.{world}'
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _folder() / f'{world}.py')
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
    """('field.sub', text) of each override; a lone boolean flag means true."""
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith('--') or token == '--':
            raise UsageError(f'unexpected argument {token!r}; options are --name value')
        field, given, text = token[2:].partition('=')
        field = field.replace('-', '_')
        if field.split('.')[0] not in _names(run) and field.split('.')[0] in _names(run.train):
            field = f'train.{field}'
        if not given:
            if tokens and not tokens[0].startswith('--'):
                text = tokens.pop(0)
            else:
                text = _alone(run, field)
        yield field, text


def _alone(run: Run, field: str) -> str:
    """What an option without a value means: true for a boolean field, an error for others."""
    owner = run
    for part in field.split('.'):
        _check_name(owner, part, f'--{field}')
        owner = getattr(owner, part)
    if isinstance(owner, bool):
        return 'true'
    raise UsageError(f'--{field}: needs a value')


def _replace(owner, path: list[str], text: str, option: str):
    """`owner` with the field at `path` set to the value that `text` spells."""
    name, *rest = path
    _check_name(owner, name, option)
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


def _check_name(owner, name: str, option: str):
    if not dataclasses.is_dataclass(owner):
        what = 'this recipe has none' if owner is None else f'{owner!r} has no fields'
        raise UsageError(f'{option}: {what}')
    names = _names(owner)
    if name not in names:
        near = names + (_names(owner.train) if isinstance(owner, Run) else [])
        raise UsageError(
            f'{option}: no field {name!r}{_nearest(name, near)}; '
            f'fields of {type(owner).__name__}: {", ".join(names)}'
        )


def _parse(kind, text: str, current, option: str):
    """The value of type `kind` that `text` spells."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _parse(type(current), text, current, option)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() == 'none':
            return None
        options = [one for one in args if one is not type(None)]
        if options == [str] and not text:
            raise UsageError(f"{option}: got '', expected a value, or none")
        if len(options) == 1:
            return _parse(options[0], text, current, option)
    elif origin is Literal:
        by_text = {str(choice): choice for choice in args}
        if text in by_text:
            return by_text[text]
    elif kind is tuple or origin is tuple:
        return _parse_tuple(args, text, option)
    elif kind is bool:
        by_text = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}
        if text.lower() in by_text:
            return by_text[text.lower()]
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


def _parse_tuple(kinds, text: str, option: str) -> tuple:
    parts = [part.strip() for part in text.strip('()[] ').split(',') if part.strip()]
    if not kinds or kinds[-1] is ...:
        kinds = (kinds[0] if kinds else str,) * len(parts)
    if len(kinds) != len(parts):
        raise UsageError(
            f'{option}: got {text!r} with {len(parts)} values, '
            f'expected {len(kinds)} separated by commas'
        )
    return tuple(_parse(kind, part, None, option) for kind, part in zip(kinds, parts))


def _fields(owner, prefix: str = '') -> Iterator[tuple[str, Any, Any]]:
    """(path, type, value) of every leaf field, depth first."""
    hints = _hints(owner)
    for name in _names(owner):
        value = getattr(owner, name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f'{prefix}{name}.')
        elif prefix or name != 'name':
            kind = hints[name]
            yield f'{prefix}{name}', type(value) if kind is Any else kind, value


def _names(owner) -> list[str]:
    return [field.name for field in dataclasses.fields(owner) if field.init]


def _hints(owner) -> dict[str, Any]:
    return typing.get_type_hints(type(owner))


def _type_name(kind) -> str:
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


def _show(value) -> str:
    if isinstance(value, tuple):
        return ','.join(map(_show, value))
    return 'none' if value is None else str(value)


def _nearest(name: str, names) -> str:
    near = difflib.get_close_matches(name, list(names), 1)
    return f' (did you mean {near[0]}?)' if near else ''


# --- the command line ------------------------------------------------------------------------


# What argparse says, and how all else here says it.
SAID = (
    ('^argument (.*?): invalid (int|float) value: (.*)', r'\1: got \3, expected \2'),
    (
        r'^argument (.*?): invalid choice: (.*) \(choose from (.*)\)',
        r'\1: got \2, expected one of \3',
    ),
    ('^argument (.*?): expected (.*)', r'\1: got nothing, expected \2'),
    ('^the following arguments are required: (.*)', r'\1: got nothing, expected a value'),
    ('^argument ', ''),
)


class Parser(argparse.ArgumentParser):
    """argparse for a tool, whose errors are `UsageError` (for `main_guard`).

    A tool of runs calls `run(argv)`: its own options by `add_argument` as usual, then an optional
    RECIPE, and overrides of the recipe's fields. Any other tool calls `parse_args(argv)`.
    """

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def run(
        self,
        argv: Sequence[str],
        recipe: str | None = None,
        chosen: Callable = lambda options: None,
        many: Callable | None = None,
    ) -> tuple[Any, Any]:
        """(options, run) of a command line; `recipe` is what no RECIPE means, unless
        `chosen(options)` gives another; with `many`, `many(list of RECIPE, overrides)`."""
        self.add_argument(
            'recipe',
            nargs='*' if many else '?',
            default=recipe,
            metavar='RECIPE',
            help='world:NAME from configs/' + (', or several' if many else ''),
        )
        known, mine, overrides = self._option_string_actions, [], []
        bucket = mine
        for token in argv:
            if token.partition('=')[0] in known:
                bucket = mine
            elif token.startswith('--'):
                bucket = overrides
            bucket.append(token)
        if {'-h', '--help'} & set(mine):
            run = load(recipe if argv[0].startswith('-') else argv[0])
            self.epilog = (
                f'recipes: {", ".join(list_recipes())}\n\n'
                f'fields of {run.name}, set with --field value:\n{describe(run)}'
            )
        options = self.parse_args(mine)
        try:
            return options, (many or load)(chosen(options) or options.recipe, overrides)
        except UsageError as error:
            # An option of the tool has no dot; a field of a group is no misspelled one.
            wrong = [
                name
                for token in overrides
                if '.' not in (name := token.partition('=')[0]) and name.startswith('--')
            ]
            near = [
                near
                for name in wrong
                for near in difflib.get_close_matches(name, list(known), 1, 0.75)
            ]
            hint = f' (the tool has an option {near[0]})' if near else ''
            raise UsageError(f'{error}{hint}') from error

    def error(self, message: str):
        for pattern, said in SAID:
            message = re.sub(pattern, said, message, flags=re.DOTALL)
        raise UsageError(message)


@contextlib.contextmanager
def door():
    """Turns a ValueError about what the user gave into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def main_guard(main, argv: Sequence[str] | None = None):
    """Runs `main(argv)` of a tool and exits: 2 after one line for a user's error, 130 on Ctrl-C.

    A user's error is a `ValueError` of a class of this package's own, or an `OSError`; anything
    else is a bug and keeps its traceback.
    """
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        ours = type(error).__module__.partition('.')[0] == __name__.partition('.')[0]
        if isinstance(error, ValueError) and not ours:
            raise
        print(
            'error: ' + '; '.join(filter(None, map(str.strip, str(error).splitlines()))),
            file=sys.stderr,
        )
        code = 2
    raise SystemExit(code or 0)
