"""Replay recorded PyTorch tensors through this library and compare.

    matrix-jax parity tests/goldens/the_matrix/*.safetensors tests/goldens/the_matrix/*.json

Prints for every recorded output the largest difference, the same relative to the largest recorded
value, and the tolerance. Exit codes: 0 all outputs hold, 1 some do not, 2 a file is not readable or
not a known recording.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrix_jax.cli.parser import Parser, path


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser('parity', __doc__)
    parser.add_argument(
        'files', nargs='+', metavar='FILE', type=path, help='recordings, safetensors or JSON'
    )
    args = parser.parse_args(argv)
    from matrix_jax import parity

    return parity.run(args.files)
