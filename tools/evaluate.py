"""Measure a world: obedience to keys and mouse, reconstruction, drift, speed; tables and pictures.

tools/evaluate.py carracing:SWIN --weights runs/swin/weights --data data/carracing --out eval
tools/evaluate.py doom --weights runs/stream/weights --data data/doom --out eval
tools/evaluate.py --compare eval/teacher eval/student
"""

from matrix_jax import config
from matrix_jax.cli.arguments import SEED, check_place, whole


def main(argv):
    """Exit codes: 0 done, 2 bad input."""
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add('--seconds', type=whole(1), help='length of streams under scripted keys (default 30)')
    add(
        '--drive-seconds',
        type=whole(1),
        help='length of driven streams, or under recorded keys (default 60)',
    )
    add('--long-seconds', type=whole(0), help='length of one more of these (default 0, none)')
    add('--streams', type=whole(1), help='streams per row of the tables (default 6, walking 4)')
    add('--eval-seed', type=whole(0, SEED), help='seed of starts, scripts and noise (default 0)')
    add('--quick', action='store_true', help='a rough look in a few minutes')
    add('--compare', nargs='+', metavar='DIR', help='print finished results side by side')
    options, run = parser.run(argv, recipe='carracing:SWIN')
    if options.compare:
        with config.door():
            from matrix_jax.evals import tables

            print(tables.compare(options.compare))
        return
    if run.data is None:
        raise config.UsageError('--data: needs a folder of recorded clips (tools/collect.py)')
    out = run.out or f'outputs/eval-{run.name.replace(":", "-").lower()}'
    check_place('--out', out, folder=True)
    with config.door():
        from matrix_jax import worlds
        from matrix_jax.evals import report

        given = {
            'seconds': options.seconds,
            'drive_seconds': options.drive_seconds,
            'streams': options.streams,
            'seed': options.eval_seed,
            'long_seconds': options.long_seconds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        cfg = report.settings(worlds.build(run.world), options.quick, **given)
        world, params = worlds.open_run(run)
        report.evaluate(world, params, run.data, out, cfg)
    print(open(f'{out}/report.md', encoding='utf-8').read())


if __name__ == '__main__':
    config.main_guard(main)
