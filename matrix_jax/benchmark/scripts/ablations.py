"""Trains and evaluates the recipes of configs/ablations.py in turn, and prints one table.

    python -m matrix_jax.benchmark.scripts.ablations --base runs/base/weights \
        --swin runs/swin/weights --data data/carracing --out runs/ablations
    python -m matrix_jax.benchmark.scripts.ablations ... --only SWIN G2 G8 --steps 100

Call it again after an interruption: an unfinished run resumes, a finished one is only read.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from matrix_jax import recipes


def main(argv):
    """Runs everything; exits with the code of the first command that fails."""
    names = [
        name.partition(':')[2] for name in recipes.list_recipes() if name.startswith('ablations:')
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--base', required=True, help='start weights of SWIN and its variants')
    parser.add_argument('--swin', help='start weights of STREAM and its variants')
    parser.add_argument('--data', required=True, help='recorded clips')
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument(
        '--only',
        nargs='+',
        choices=names,
        default=names,
        metavar='NAME',
        help=f'recipes to run, of {", ".join(names)}',
    )
    parser.add_argument('--steps', type=int, help="updates of each run (default: the recipe's)")
    parser.add_argument(
        '--evaluate',
        nargs=argparse.REMAINDER,
        default=[],
        help='options of `matrix-jax evaluate`; must come last',
    )
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f'--steps: got {args.steps}, expected at least 1')
    if args.swin is None and any(name.startswith('STREAM') for name in args.only):
        parser.error('--swin: the STREAM recipes need the weights of their teacher')
    probe = args.out / 'probe.msgpack'
    for name in args.only:
        run, result = args.out / name / 'run', args.out / name
        recipe = [f'ablations:{name}', '--data', args.data]
        start = args.swin if name.startswith('STREAM') else args.base
        steps = [] if args.steps is None else ['--steps', args.steps]
        if not (run / 'weights').is_dir():
            matrix_jax('train', *recipe, '--out', run, '--weights', start, *steps)
        if not (result / 'report.md').exists():
            if probe.exists():  # the same probe judges all runs
                result.mkdir(parents=True, exist_ok=True)
                (result / probe.name).write_bytes(probe.read_bytes())
            weights = run / 'weights'
            matrix_jax('evaluate', *recipe, '--out', result, '--weights', weights, *args.evaluate)
            probe.write_bytes((result / probe.name).read_bytes())
    matrix_jax('evaluate', '--compare', *(args.out / name for name in args.only))


def matrix_jax(*arguments):
    """Runs a `matrix_jax` command; exits with its code if it fails."""
    done = subprocess.run([sys.executable, '-m', 'matrix_jax', *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == '__main__':
    main(sys.argv[1:])
