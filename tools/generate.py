"""Generate a video: no arguments give 8 seconds of the bundled world under random keys.

tools/generate.py --control "D,D,DL,DL,DR" --pad hold --seed 3 --out drive.mp4
tools/generate.py doom --actions "W*24,W+right*48" --pad hold
"""

from matrix_jax import config
from matrix_jax.cli.arguments import SEED, whole


def main(argv):
    """Exit codes: 0 done, 2 bad input (nothing is written)."""
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add('--prompt', help="what the world looks like (default: the world's own)")
    add(
        '--control',
        '--actions',
        metavar='CONTROLS',
        help='The Matrix: one symbol per quarter '
        'second, D B N, each alone or with L or R. Matrix-Game: actions such as W*24,W+right*12, '
        'JSON, a file of either, or benchmark',
    )
    add(
        '--control-seed',
        type=whole(0, SEED),
        default=42,
        help='seed of random controls (default 42)',
    )
    add('--pad', choices=('random', 'hold'), help='how to go on where the controls end')
    add(
        '--length',
        type=whole(1, 86400, 'whole seconds'),
        help='seconds (default: as many '
        'as the controls last; without controls or with --pad 8, or the longest whole clip)',
    )
    add('--seed', type=whole(0, SEED), default=42, help='seed of all noise (default 42)')
    add('--image', help='picture to start from')
    add('--video', help='clip to start from')
    add('--replay', help='session.json of tools/play.py: makes that very video again')
    add('--no-overlay', action='store_true', help='do not draw the keys on the frames')
    add('--summary', action='store_true', help='print the sizes of the recipe and stop')
    options, run = parser.run(argv, chosen=recipe_of_log)
    from matrix_jax.pipelines import generate

    with config.door():
        if options.summary:
            print(generate.summary(run))
            return
        path, clip, count = generate.to_file(run, options)
    fps = count / clip.run_seconds
    print(f'{path}: {count} frames, {fps:.1f} fps, compile {clip.compile_seconds:.1f} s')


def recipe_of_log(options):
    """The recipe of --replay, or None."""
    from matrix_jax.pipelines import generate

    return generate.recipe_of_log(options) if options.replay else None


if __name__ == '__main__':
    config.main_guard(main)
