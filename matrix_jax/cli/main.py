"""`matrix-jax COMMAND ...`: finds the module of a command and runs it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import matrix_jax
from matrix_jax.cli.parser import main_guard
from matrix_jax.config import UsageError
from matrix_jax.recipes import did_you_mean

# Each is a module of this folder with `main(argv)`; imported only when it is run.
COMMANDS = {
    'generate': 'make a video',
    'play': 'play a world in the browser',
    'train': 'train a stage of a world',
    'collect': 'record training data from a game or from videos',
    'export': 'write a world as a static page that plays in a browser tab',
    'convert': 'convert a folder of weights, or write random ones',
    'parity': 'compare with recorded PyTorch tensors',
    'evaluate': 'measure control obedience, drift and fidelity',
    'benchmark': 'measure speed, latency and memory',
    'bundle': 'make a trained world small enough to ship',
}
USAGE = '\n'.join(
    [
        'usage: matrix-jax COMMAND ...',
        '',
        'Interactive video world models in JAX.',
        '',
        *(f'  {name:10} {text}' for name, text in COMMANDS.items()),
        '',
        'matrix-jax COMMAND --help lists the options of a command.',
    ]
)


def dispatch(argv: Sequence[str]) -> int | None:
    """Runs the command that `argv` begins with and returns its exit code."""
    name = argv[0] if argv else '--help'
    if name in ('-h', '--help'):
        print(USAGE)
        return 0
    if name == '--version':
        print(f'matrix-jax {matrix_jax.__version__}')
        return 0
    if name not in COMMANDS:
        raise UsageError(
            f'unknown command {name!r}{did_you_mean(name, COMMANDS)}; '
            f'there are: {", ".join(COMMANDS)}'
        )
    return importlib.import_module(f'matrix_jax.cli.{name}').main(list(argv[1:]))


def main() -> None:
    """The console script."""
    main_guard(dispatch)
