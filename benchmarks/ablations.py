"""Trains and measures the recipes of configs/ablations.py one after the other, and prints a table.

    python benchmarks/ablations.py --base runs/base/weights --swin runs/swin/weights \
        --data data/carracing --out runs/ablations
    python benchmarks/ablations.py ... --only SWIN G2 G8 --steps 100

What is done already stays: a stopped run goes on, a finished one is only read.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv):
    """Exit code: that of the first command that fails."""
    sys.path.insert(0, str(ROOT))
    from matrix_jax import config

    names = [
        name.partition(':')[2] for name in config.list_recipes() if name.startswith('ablations:')
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--base', required=True, help='weights that SWIN and its variants start at')
    parser.add_argument('--swin', help='weights that STREAM and its variants start at')
    parser.add_argument('--data', required=True, help='recorded clips')
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument(
        '--only',
        nargs='+',
        choices=names,
        default=names,
        metavar='NAME',
        help=f'of {", ".join(names)}',
    )
    parser.add_argument('--steps', type=int, help='updates of each (default: as in the recipe)')
    parser.add_argument(
        '--evaluate',
        nargs=argparse.REMAINDER,
        default=[],
        help='options of tools/evaluate.py, last on the line',
    )
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f'--steps: got {options.steps}, expected at least 1')
    if options.swin is None and any(name.startswith('STREAM') for name in options.only):
        parser.error('--swin: the STREAM recipes need the weights of their teacher')
    probe = options.out / 'probe.msgpack'
    for name in options.only:
        run, result = options.out / name / 'run', options.out / name
        start = options.swin if name.startswith('STREAM') else options.base
        steps = [] if options.steps is None else ['--steps', str(options.steps)]
        if not (run / 'weights').is_dir():
            tool(
                'train',
                f'ablations:{name}',
                '--data',
                options.data,
                '--out',
                run,
                '--weights',
                start,
                *steps,
            )
        if not (result / 'report.md').exists():
            if probe.exists():  # one judge for all
                result.mkdir(parents=True, exist_ok=True)
                (result / probe.name).write_bytes(probe.read_bytes())
            tool(
                'evaluate',
                f'ablations:{name}',
                '--data',
                options.data,
                '--out',
                result,
                '--weights',
                run / 'weights',
                *options.evaluate,
            )
            probe.write_bytes((result / probe.name).read_bytes())
    tool('evaluate', '--compare', *(options.out / name for name in options.only))


def tool(name, *arguments):
    """Runs a command-line tool; its failure is ours."""
    done = subprocess.run([sys.executable, ROOT / 'tools' / f'{name}.py', *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == '__main__':
    main(sys.argv[1:])
