"""Records games to ArrayRecord shards: frames, one control per frame, a caption, telemetry.

    python tools/collect.py CarRacing-v3 --out data/carracing --hours 1

A restart with the same settings goes on after the last finished shard. The same seed writes the
same records, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ENVIRONMENTS = ('CarRacing-v3',)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog='collect.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('env', metavar='ENV', help=' '.join(ENVIRONMENTS))
    parser.add_argument(
        '--out', required=True, type=Path, help='folder of the shards; made if missing'
    )
    parser.add_argument(
        '--hours', type=float, default=1.0, help='of play at 16 frames/s, both splits (default 1)'
    )
    parser.add_argument(
        '--themes', default='all', help="'all', or names with commas: meadow,snow,desert,..."
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--workers', type=int, default=1, help='processes (default 1, about 450 frames/s each)'
    )
    parser.add_argument(
        '--held-out',
        type=float,
        default=0.1,
        metavar='FRACTION',
        help='share of the hours on tracks of their own, in heldout-* shards (default 0.1)',
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    try:
        if args.env not in ENVIRONMENTS:
            raise ValueError(f'ENV: got {args.env!r}, expected one of {", ".join(ENVIRONMENTS)}')
        missing = [
            name for name in ('gymnasium', 'Box2D', 'pygame') if not importlib.util.find_spec(name)
        ]
        if missing:
            raise ValueError(f"{args.env} needs {', '.join(missing)}: pip install -e '.[data]'")
        from matrix_jax.data import collect

        if not math.isfinite(args.hours):
            raise ValueError(f'--hours: got {args.hours}, expected a number above 0')
        plan = collect.plan(args.env, args.hours, args.themes, args.seed, args.held_out)
        frames = collect.run(plan, args.out, args.workers)
    except (ValueError, OSError) as error:
        print(f'collect: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('collect: stopped; the same command goes on from here', file=sys.stderr)
        return 130
    print(f'{args.out}: {frames} frames, {frames / collect.FPS / 3600:.2f} hours')
    return 0


if __name__ == '__main__':
    sys.exit(main())
