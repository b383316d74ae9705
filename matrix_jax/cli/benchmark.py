"""Measure how fast a world runs, part by part, and the latency of a key; tables and JSON.

    matrix-jax benchmark carracing
    matrix-jax benchmark the_matrix:MEDIUM --random --vs torch      the same network in PyTorch
    matrix-jax benchmark carracing:SWIN --train --vs torch          an update of a training stage
    matrix-jax benchmark the_matrix:STAGE4 --random --layers 2      at full width, random weights
    matrix-jax benchmark the_matrix:STAGE4 --random --count         FLOPs only; runs nothing
    matrix-jax benchmark matrix_game_2 --random --count             of keyboard and mouse
    matrix-jax benchmark the_matrix:STAGE4 --random --compile-for h200x8     compiles only
    matrix-jax benchmark carracing --int8                           errors of 8-bit layers
    matrix-jax benchmark carracing --sweep mesh                     on 1 to 8 devices

Writes benchmark.json and benchmark.md to --out. Timings need an idle machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matrix_jax import config
from matrix_jax.cli.parser import Parser


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 done, 2 bad input (nothing is measured)."""
    parser = Parser('benchmark', __doc__)
    add = parser.add_argument
    add('--random', action='store_true', help='random weights: speed needs no others')
    add('--layers', type=int, help='layers of a random network, if fewer than the recipe')
    add('--steps', type=int, default=30, help='timed steps of the stream (default 30)')
    add('--warmup', type=int, default=3, help='steps before them (default 3)')
    add('--seed', type=int, default=0, help='seed of noise and random weights (default 0)')
    add(
        '--entries',
        help='when keys bind in the measured latencies: late, early, both with a comma, or none '
        '(default: all that the stream has)',
    )
    add(
        '--peak-tflops',
        type=float,
        help='peak of one device by its data sheet, to print the share that is reached; with '
        '--count what every device reaches (default: 80%% of an H200)',
    )
    add('--vs', choices=('torch',), help='the same network in diffusers, in the same run')
    add('--train', action='store_true', help="with --vs torch: an update of the recipe's stage")
    add('--sweep', choices=('mesh',), help='1, 2, 4 and 8 devices of mesh.seq, and pipelines')
    add('--int8', action='store_true', help='the errors of 8-bit layers; no timings')
    add('--count', action='store_true', help='print the FLOPs of a step and stop')
    add(
        '--compile-for',
        metavar='GPUS',
        help='h200, or h200x8 for eight: compile a step without any GPU, and print its memory, '
        'kernels, layouts and bytes',
    )
    args, run = parser.parse_run(argv)
    modes = [
        name for name in ('vs', 'sweep', 'int8', 'count', 'compile_for') if getattr(args, name)
    ]
    if len(modes) > 1:
        names = ' and --'.join(modes).replace('_', '-')
        raise config.UsageError(f'got --{names}, expected one of them')
    if args.train and modes != ['vs']:
        raise config.UsageError('--train: expected --vs torch with it, and no other mode')
    if args.compile_for:
        with config.usage_errors():
            from matrix_jax.benchmark import compile_for

            print(
                compile_for.streaming(
                    run, args.compile_for, args.random, args.layers, args.peak_tflops
                )
            )
        return
    with config.usage_errors():
        from matrix_jax.benchmark.measure import Settings
        from matrix_jax.benchmark.run import benchmark

        entries: Any = None if args.entries is None else tuple(args.entries.split(','))
        entries = () if entries == ('none',) else entries
        settings = Settings(args.steps, args.warmup, entries, args.seed, args.peak_tflops)
        mode = 'train' if args.train else modes[0] if modes else ''
        text = benchmark(run, settings, args.random, args.layers, mode)
    print(text)
