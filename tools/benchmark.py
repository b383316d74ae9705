"""Measure how fast a world runs, part by part, and what a key has to wait for; tables and JSON.

    tools/benchmark.py carracing
    tools/benchmark.py the_matrix:MEDIUM --random --vs torch        the same network in PyTorch
    tools/benchmark.py the_matrix:STAGE4 --random --layers 2        at full width, random weights
    tools/benchmark.py the_matrix:STAGE4 --random --count           FLOPs only; runs nothing
    tools/benchmark.py matrix_game_2 --random --count               of keyboard and mouse
    tools/benchmark.py carracing --int8                             errors of 8-bit layers
    tools/benchmark.py carracing --sweep mesh                       on 1 to 8 devices

Writes benchmark.json and benchmark.md to --out. Clocks need an idle machine.
"""

from matrix_jax import config


def main(argv):
    """Exit codes: 0 done, 2 bad input (nothing is measured)."""
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add('--random', action='store_true', help='draw the weights: for speed alone, no folder needed')
    add('--layers', type=int, help='of a random network, if fewer than the recipe')
    add('--steps', type=int, default=30, help='timed steps of the stream (default 30)')
    add('--warmup', type=int, default=3, help='steps before them (default 3)')
    add('--seed', type=int, default=0, help='of noise and random weights (default 0)')
    add(
        '--entries',
        help='where keys bind, for their latency: tail, head, both with a comma, or '
        'none (default: all that the stream has)',
    )
    add(
        '--peak-tflops',
        type=float,
        help='of one device by its data sheet, for the share that is '
        'reached; with --count what every device reaches (default: 80%% of an H200)',
    )
    add('--vs', choices=('torch',), help='the same network in diffusers, in the same run')
    add('--sweep', choices=('mesh',), help='1, 2, 4 and 8 devices of mesh.seq, and pipelines')
    add('--int8', action='store_true', help='the errors of 8-bit layers; no clocks')
    add('--count', action='store_true', help='print the FLOPs of a step and stop')
    options, run = parser.run(argv)
    chosen = [name for name in ('vs', 'sweep', 'int8', 'count') if getattr(options, name)]
    if len(chosen) > 1:
        raise config.UsageError(f'got --{" and --".join(chosen)}, expected one of them')
    with config.door():
        from matrix_jax.benchmark import run as calls

        entries = None if options.entries is None else tuple(options.entries.split(','))
        entries = () if entries == ('none',) else entries
        settings = calls.Settings(
            options.steps, options.warmup, entries, options.seed, options.peak_tflops
        )
        text = calls.benchmark(
            run, settings, options.random, options.layers, chosen[0] if chosen else ''
        )
    print(text)


if __name__ == '__main__':
    config.main_guard(main)
