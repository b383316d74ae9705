"""Replay recorded PyTorch tensors through this library and compare.

    tools/parity.py tests/goldens/the_matrix/*.safetensors tests/goldens/the_matrix/*.json

Prints, for every recorded output, the largest difference, the same relative to the largest recorded
value, and the tolerance. Exit codes: 0 all outputs hold, 1 some do not, 2 a file is not readable or
not a known recording.
"""

from matrix_jax import config
from matrix_jax.cli.arguments import path


def main(argv):
    """The exit code."""
    parser = config.Parser(__doc__)
    parser.add_argument(
        'files', nargs='+', metavar='FILE', type=path, help='recordings, safetensors or JSON'
    )
    options = parser.parse_args(argv)
    from matrix_jax import parity

    return parity.run(options.files)


if __name__ == '__main__':
    config.main_guard(main)
