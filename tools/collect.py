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

import importlib.util

from matrix_jax import config
from matrix_jax.cli import arguments

ENVIRONMENTS = ('CarRacing-v3', 'vizdoom')
# What is meant when an option is not given; an option of another source is refused.
GAME = {'hours': 1.0, 'themes': 'all', 'seed': 0}
VIDEOS = {'world': 'carracing', 'caption': '', 'shortest': 2.0}
INDEX = {'world': 'carracing', 'data_root': None, 'frames': 65}


def parse(argv):
    parser = config.Parser(__doc__)
    add = parser.add_argument
    add('env', metavar='ENV', nargs='?', help=f'a game: {" ".join(ENVIRONMENTS)}')
    add(
        '--videos',
        type=arguments.path,
        metavar='FOLDER',
        help='unlabelled videos, in folders below too',
    )
    add('--index', type=arguments.path, metavar='FILE', help='index of labelled videos, JSON')
    add('--out', required=True, type=arguments.path, help='folder of the shards; made if missing')
    add(
        '--workers',
        type=arguments.whole(1, 256),
        default=1,
        help='processes (default 1, some hundred frames/s each of a game)',
    )
    add(
        '--held-out',
        type=float,
        default=0.1,
        metavar='FRACTION',
        help='share of tracks or videos that only heldout-* shards hold (default 0.1)',
    )
    game = parser.add_argument_group('of a game').add_argument
    game('--hours', type=float, help='of play at 16 frames/s, both splits (default 1)')
    game('--themes', help="'all', or names with commas: meadow,snow,... or maze,...")
    game('--seed', type=arguments.whole(0, 2**32 - 1), help='of tracks and keys (default 0)')
    files = parser.add_argument_group('of videos and indexes').add_argument
    files('--world', metavar='RECIPE', help='whose size and rate clips get (default carracing)')
    files('--caption', help='of videos without a .txt file (default none)')
    files('--shortest', type=float, metavar='SECONDS', help='that a clip lasts (default 2)')
    files(
        '--data-root',
        type=arguments.path,
        metavar='FOLDER',
        help="that paths of an index start from (default the index's own)",
    )
    files('--frames', type=int, help='of each clip of an index (default 65)')
    return parser.parse_args(argv)


def main(argv):
    """Exit codes: 0 done, 2 bad input; after 130, Ctrl-C, the same command goes on."""
    args = parse(argv)
    with config.door():
        sources = {
            'ENV': (args.env, GAME, game),
            '--videos': (args.videos, VIDEOS, videos),
            '--index': (args.index, INDEX, index),
        }
        named = [name for name, (value, _, _) in sources.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f'got {" and ".join(named) or "nothing to read"}, expected one of '
                + ', '.join(sources)
            )
        _, defaults, make = sources[named[0]]
        for name in {**GAME, **VIDEOS, **INDEX}:
            if name not in defaults and getattr(args, name) is not None:
                raise ValueError(f'--{name.replace("_", "-")}: is not an option with {named[0]}')
            if getattr(args, name) is None:
                setattr(args, name, defaults.get(name))
        arguments.check_place('--out', args.out, folder=True)
        print(make(args))


def game(args) -> str:
    if args.env not in ENVIRONMENTS:
        raise ValueError(f'ENV: got {args.env!r}, expected one of {", ".join(ENVIRONMENTS)}')
    from matrix_jax.data import collect

    needs = collect.GAMES[args.env].NEEDS
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"{args.env} needs {', '.join(missing)}: pip install -e '.[data]'")
    plan = collect.plan(args.env, args.hours, args.themes, args.seed, args.held_out)
    frames = collect.run(plan, args.out, args.workers)
    return f'{args.out}: {frames} frames, {frames / plan.fps / 3600:.2f} hours'


def videos(args) -> str:
    from matrix_jax.data import footage, records

    if not 0 < args.shortest <= 3600:
        raise ValueError(
            f'--shortest: got {args.shortest:g}, expected seconds above 0, at most 3600'
        )
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
    world = config.load(recipe).world
    return {name: getattr(world, name) for name in ('height', 'width', 'fps')}


def _gather(args, settings, root, sources) -> str:
    from matrix_jax.data import ingest

    report = ingest.run(settings, root, sources, args.out, args.workers)
    return f'{report.text(settings.fps)}\n{args.out}'


if __name__ == '__main__':
    config.main_guard(main)
