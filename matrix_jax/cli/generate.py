"""Make a video; without arguments, 8 seconds of the bundled world, driven by its own frames.

matrix-jax generate --control "D,D,DL,DL,DR" --pad hold --seed 3 --out drive.mp4
matrix-jax generate doom --actions "W*24,W+right*48" --pad hold
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from matrix_jax import config
from matrix_jax.cli.parser import SEED, Parser, whole


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 bad input (nothing is written), 130 or 143 stopped by Ctrl-C or
    SIGTERM (the video has the frames made so far)."""
    parser = Parser('generate', __doc__)
    add = parser.add_argument
    add('--prompt', help="what the world looks like (default: the world's own)")
    add(
        '--control',
        '--actions',
        metavar='CONTROLS',
        help='driver (sees only frames; the default where it can drive), random, or controls. The '
        'Matrix: one symbol per quarter second, D B N, each alone or with L or R, such as '
        'D*12,DL*3. Matrix-Game: actions such as W*24,W+right*12, or benchmark. JSON and the name '
        'of a file serve as well',
    )
    add(
        '--control-seed',
        type=whole(0, SEED),
        default=42,
        help='seed of random controls (default 42)',
    )
    add('--pad', choices=('random', 'hold'), help='what follows the last control')
    add(
        '--length',
        type=whole(1, 86400, 'whole seconds'),
        help='seconds (default: as many as the controls last; without controls or with --pad 8, '
        'or the longest whole clip)',
    )
    add(
        '--iterations',
        type=whole(1, 86400),
        help='steps of a stream, instead of --length (Matrix-Game 3.0: segments)',
    )
    add('--seed', type=whole(0, SEED), default=42, help='seed of all noise (default 42)')
    add('--image', help='image to start from')
    add('--video', help='clip to start from')
    add('--replay', help='session.json of matrix-jax play; makes the same video again')
    add('--no-overlay', action='store_true', help='do not draw the keys on the frames')
    add('--summary', action='store_true', help='print the sizes of the recipe and stop')
    args, run = parser.parse_run(argv, choose=recipe_of_log)
    from matrix_jax.pipelines import generate

    with config.usage_errors():
        if args.summary:
            print(generate.summary(run))
            return 0
        path, clip, count = generate.to_file(run, args)
    fps = count / clip.run_seconds
    stopped = ', stopped early' if clip.stopped_by else ''
    print(f'{path}: {count} frames{stopped}, {fps:.1f} fps, compile {clip.compile_seconds:.1f} s')
    return 128 + clip.stopped_by if clip.stopped_by else 0


def recipe_of_log(args: argparse.Namespace) -> str | None:
    """The recipe of `--replay`, or None."""
    from matrix_jax.pipelines import generate

    return generate.recipe_of_log(args) if args.replay else None
