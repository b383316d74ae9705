"""Measure a world: obedience to keys and mouse, reconstruction, drift, speed; tables and plots.

matrix-jax evaluate carracing:SWIN --weights runs/swin/weights --data data/carracing --out eval
matrix-jax evaluate doom --weights runs/stream/weights --data data/doom --out eval
matrix-jax evaluate carracing --data data/carracing --blind 20 --out eval
matrix-jax evaluate gallery:MEMORY_DMD --weights runs/memory/weights --data data/gallery --out eval
matrix-jax evaluate --compare eval/teacher eval/student
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matrix_jax import config
from matrix_jax.cli.parser import SEED, Parser, whole


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 done, 2 bad input."""
    parser = Parser('evaluate', __doc__)
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
    add(
        '--minutes',
        type=_minutes,
        metavar='M,M',
        help='when worlds with memory turn away and back (default 1,5,20)',
    )
    add('--quick', action='store_true', help='rough figures in a few minutes')
    add(
        '--blind',
        type=whole(1, 100),
        metavar='PAIRS',
        help='only write a page that asks which of two clips is generated',
    )
    add('--compare', nargs='+', metavar='DIR', help='print finished results side by side')
    args, run = parser.parse_run(argv, 'carracing:SWIN')
    if args.compare:
        with config.usage_errors():
            from matrix_jax.evals import tables

            print(tables.compare(args.compare))
        return
    if run.data is None:
        raise config.UsageError('--data: needs a folder of recorded clips (matrix-jax collect)')
    out = run.out or f'outputs/eval-{run.name.replace(":", "-").lower()}'
    config.check_writable('--out', out, folder=True)
    with config.usage_errors():
        from matrix_jax import worlds
        from matrix_jax.evals import report

        given = {
            'seconds': args.seconds,
            'drive_seconds': args.drive_seconds,
            'streams': args.streams,
            'seed': args.eval_seed,
            'long_seconds': args.long_seconds,
            'minutes': args.minutes,
        }
        given = {name: value for name, value in given.items() if value is not None}
        cfg = report.settings(worlds.build(run.world), args.quick, **given)
        world, params = worlds.open_run(run)
        if args.blind:
            print(report.blind(world, params, run.data, out, cfg, args.blind))
            return
        report.evaluate(world, params, run.data, out, cfg)
    print(Path(out, 'report.md').read_text(encoding='utf-8'))


def _minutes(text: str) -> tuple[float, ...]:
    """Parses numbers with commas."""
    try:
        return tuple(float(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'got {text!r}, expected numbers with commas, such as 1,5,20'
        ) from None
