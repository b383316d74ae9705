"""The argument parser of the commands, whose errors are one line."""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from matrix_jax import recipes
from matrix_jax.config import Run, UsageError

SEED = 2**63 - 1  # the largest seed

# Messages of argparse, and the same in the form 'OPTION: got X, expected Y'.
MESSAGES = (
    ('^argument (.*?): invalid (int|float) value: (.*)', r'\1: got \3, expected \2'),
    (
        r'^argument (.*?): invalid choice: (.*) \(choose from (.*)\)',
        r'\1: got \2, expected one of \3',
    ),
    ('^argument (.*?): expected (.*)', r'\1: got nothing, expected \2'),
    ('^the following arguments are required: (.*)', r'\1: got nothing, expected a value'),
    ('^argument ', ''),
)


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UsageError`, and which knows recipes and their fields.

    A command that takes a recipe declares its own options with `add_argument` and calls
    `parse_run`; others call `parse_args`.

    Args:
      command: its name after `matrix-jax`.
      description: text of its `--help`.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f'matrix-jax {command}',
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_run(
        self,
        argv: Sequence[str],
        default: str | None = None,
        choose: Callable[[argparse.Namespace], str | None] = lambda args: None,
    ) -> tuple[argparse.Namespace, Run]:
        """Parses options, an optional RECIPE, and overrides of the recipe's fields.

        Args:
          argv: command line without the program's name.
          default: recipe if the command line names none; None means the bundled world.
          choose: a recipe that the options themselves imply, or None.
        """
        return self._parse(
            argv,
            '?',
            default,
            lambda args, fields: recipes.load(choose(args) or args.recipe, fields),
        )

    def parse_runs(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[Run]]:
        """Like `parse_run`, with any number of RECIPE or RECIPE=WEIGHTS."""
        return self._parse(
            argv, '*', None, lambda args, fields: recipes.load_several(args.recipe, fields)
        )

    def _parse(self, argv: Sequence[str], count: str, default: str | None, load: Callable) -> Any:
        """(arguments, what `load(arguments, overrides)` returns) of a command line."""
        self.add_argument(
            'recipe',
            nargs=count,
            default=default,
            metavar='RECIPE',
            help='world:NAME from configs/' + (', or several' if count == '*' else ''),
        )
        options = self._option_string_actions
        own: list[str] = []
        overrides: list[str] = []
        bucket = own
        for token in argv:
            if token.partition('=')[0] in options:
                bucket = own
            elif token.startswith('--'):
                bucket = overrides
            bucket.append(token)
        if {'-h', '--help'} & set(own):
            run = recipes.load(default if argv[0].startswith('-') else argv[0])
            self.epilog = (
                f'recipes: {", ".join(recipes.list_recipes())}\n\n'
                f'fields of {run.name}, set with --field value:\n{recipes.describe(run)}'
            )
        args = self.parse_args(own)
        try:
            return args, load(args, overrides)
        except UsageError as error:
            raise UsageError(f'{error}{self._near_option(overrides)}') from error

    def _near_option(self, overrides: Sequence[str]) -> str:
        """A hint if an override looks like a misspelled option; a field of a group has a dot."""
        for token in overrides:
            name = token.partition('=')[0]
            if name.startswith('--') and '.' not in name:
                for near in difflib.get_close_matches(
                    name, list(self._option_string_actions), 1, 0.75
                ):
                    return f' (the command has an option {near})'
        return ''

    def error(self, message: str) -> NoReturn:
        for pattern, text in MESSAGES:
            message = re.sub(pattern, text, message, flags=re.DOTALL)
        raise UsageError(message)


def whole(
    lowest: int, highest: int | None = None, what: str = 'a whole number'
) -> Callable[[str], int]:
    """Returns the `type` of an option that is a whole number from `lowest` to `highest`."""
    limits = f'of at least {lowest}' if highest is None else f'from {lowest} to {highest}'

    def parse(text: str) -> int:
        shown = repr(text) if len(text) <= 40 else f"'{text[:37]}...'"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'got {shown}, expected {what} {limits}') from None
        if number < lowest or highest is not None and number > highest:
            raise argparse.ArgumentTypeError(f'got {shown[1:-1]}, expected {what} {limits}')
        return number

    return parse


def path(text: str) -> Path:
    """The `type` of an option that is a path; an empty text is refused."""
    if not text:
        raise argparse.ArgumentTypeError("got '', expected a path")
    return Path(text)


def main_guard(
    main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs `main(argv)` and exits with its code, 2 after a user's error, 130 after Ctrl-C, or 143
    after SIGTERM, which ends a command as Ctrl-C does: unfinished files are removed.

    A user's error prints one line. It is an `OSError` or a `ValueError` of one of this package's
    own classes; any other exception is a bug and keeps its traceback.
    """
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
    except Terminated:
        print('terminated', file=sys.stderr)
        code = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        code = 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        ours = type(error).__module__.partition('.')[0] == __name__.partition('.')[0]
        if isinstance(error, ValueError) and not ours:
            raise
        lines = filter(None, map(str.strip, str(error).splitlines()))
        print('error: ' + '; '.join(lines), file=sys.stderr)
        code = 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    raise SystemExit(code or 0)


def _raise_terminated(*_: object) -> NoReturn:
    raise Terminated
