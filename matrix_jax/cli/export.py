"""Write a world as a folder of static files that plays in a browser tab, without a server of ours.

matrix-jax export carracing --web site                       the bundled world, weights in 16 bits
matrix-jax export doom --web site --bits 8                   a smaller download
matrix-jax export carracing:STREAM --weights DIR --web site  weights of your own
"""

from __future__ import annotations

from collections.abc import Sequence

from matrix_jax.cli.parser import Parser, path


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 done, 2 bad input (nothing is written)."""
    parser = Parser('export', __doc__)
    add = parser.add_argument
    add('--web', type=path, required=True, metavar='DIR', help='folder to write; must not exist')
    add(
        '--bits',
        type=int,
        choices=(8, 16, 32),
        default=16,
        help='bits of a weight (default 16, which loses nothing of the bundled weights)',
    )
    add(
        '--runtime',
        metavar='PATH',
        help='tarball or folder of the npm package onnxruntime-web (default: from npm)',
    )
    args, run = parser.parse_run(argv)
    from matrix_jax.browser import folder

    print(folder.save(run, args.web, args.bits, args.runtime))
