"""Makes training data: ArrayRecord shards of clips with frames, controls, a caption, telemetry.

    python tools/collect.py CarRacing-v3 --out data/carracing --hours 1
    python tools/collect.py vizdoom --out data/doom --hours 1
    python tools/collect.py --videos FOLDER --out data/footage
    python tools/collect.py --index FILE.json --out data/labelled --world the_matrix

A game is recorded with the keys that were pressed; ViZDoom with mouse and camera pose as well.
Tracks and maps of held-out shards are in no other. Videos are cut into shots and resized, poor
clips are left out, and nothing is known of their controls; a .txt file beside a video holds its
caption. An index lists videos with captions and one control per frame, as published. `--data A,B`
of tools/train.py mixes folders.

A restart with the same settings goes on after the last finished shard. The same settings write the
same records, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ENVIRONMENTS = ('CarRacing-v3', 'vizdoom')
# What is meant when an option is not given; an option of another source is refused.
GAME = {'hours': 1.0, 'themes': 'all', 'seed': 0}
VIDEOS = {'world': 'carracing', 'caption': '', 'shortest': 2.0}
INDEX = {'world': 'carracing', 'data_root': None, 'frames': 65}


def parse(argv):
    parser = argparse.ArgumentParser(
        prog='collect.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('env', metavar='ENV', nargs='?', help=f'a game: {" ".join(ENVIRONMENTS)}')
    add('--videos', type=Path, metavar='FOLDER', help='unlabelled videos, in folders below too')
    add('--index', type=Path, metavar='FILE', help='index of labelled videos, JSON')
    add('--out', required=True, type=Path, help='folder of the shards; made if missing')
    add('--workers', type=int, default=1,
        help='processes (default 1, some hundred frames/s each of a game)')
    add('--held-out', type=float, default=0.1, metavar='FRACTION',
        help='share of tracks or videos that only heldout-* shards hold (default 0.1)')
    game = parser.add_argument_group('of a game').add_argument
    game('--hours', type=float, help='of play at 16 frames/s, both splits (default 1)')
    game('--themes', help="'all', or names with commas: meadow,snow,... or maze,...")
    game('--seed', type=int)
    files = parser.add_argument_group('of videos and indexes').add_argument
    files('--world', metavar='RECIPE', help='whose size and rate clips get (default carracing)')
    files('--caption', help='of videos without a .txt file (default none)')
    files('--shortest', type=float, metavar='SECONDS', help='that a clip lasts (default 2)')
    files('--data-root', type=Path, metavar='FOLDER',
          help="that paths of an index start from (default the index's own)")
    files('--frames', type=int, help='of each clip of an index (default 65)')
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    try:
        sources = {'ENV': (args.env, GAME, game), '--videos': (args.videos, VIDEOS, videos),
                   '--index': (args.index, INDEX, index)}
        named = [name for name, (value, _, _) in sources.items() if value is not None]
        if len(named) != 1:
            raise ValueError(f'got {" and ".join(named) or "nothing to read"}, expected one of '
                             + ', '.join(sources))
        _, defaults, make = sources[named[0]]
        for name in {**GAME, **VIDEOS, **INDEX}:
            if name not in defaults and getattr(args, name) is not None:
                raise ValueError(f'--{name.replace("_", "-")}: is not an option with {named[0]}')
            if getattr(args, name) is None:
                setattr(args, name, defaults.get(name))
        print(make(args))
    except (ValueError, OSError) as error:
        print(f'collect: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('collect: stopped; the same command goes on from here', file=sys.stderr)
        return 130
    return 0


def game(args) -> str:
    if args.env not in ENVIRONMENTS:
        raise ValueError(f'ENV: got {args.env!r}, expected one of {", ".join(ENVIRONMENTS)}')
    from matrix_jax.data import collect

    needs = collect.GAMES[args.env].NEEDS
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"{args.env} needs {', '.join(missing)}: pip install -e '.[data]'")
    if not math.isfinite(args.hours):
        raise ValueError(f'--hours: got {args.hours}, expected a number above 0')
    plan = collect.plan(args.env, args.hours, args.themes, args.seed, args.held_out)
    frames = collect.run(plan, args.out, args.workers)
    return f'{args.out}: {frames} frames, {frames / plan.fps / 3600:.2f} hours'


def videos(args) -> str:
    from matrix_jax.data import footage, records

    if not 0 < args.shortest < math.inf:
        raise ValueError(f'--shortest: got {args.shortest:g}, expected seconds above 0')
    sources = footage.find(args.videos, args.caption)
    size = _size(args.world)
    step = records.FRAMES_PER_LATENT
    shortest = 1 + step * round(args.shortest * size['fps'] / step)
    settings = footage.Footage(**size, shortest=shortest, held_out=args.held_out)
    return _gather(args, settings, args.videos, sources)


def index(args) -> str:
    from matrix_jax.data.index import Index, read

    settings = Index(**_size(args.world), frames=args.frames, held_out=args.held_out)
    return _gather(args, settings, args.data_root or args.index.parent, read(args.index))


def _size(recipe):
    from matrix_jax import config

    world = config.load(recipe).world
    return {name: getattr(world, name) for name in ('height', 'width', 'fps')}


def _gather(args, settings, root, sources) -> str:
    from matrix_jax.data import gather

    report = gather.run(settings, root, sources, args.out, args.workers)
    text = report.text(settings.fps)
    if not report.clips:
        raise ValueError(f'no clip was kept; {"; ".join(text.splitlines())}')
    return f'{text}\n{args.out}'


if __name__ == '__main__':
    sys.exit(main())
