"""Make training data: ArrayRecord shards of clips with frames, controls, captions, telemetry.

    matrix-jax collect CarRacing-v3 --out data/carracing --hours 1
    matrix-jax collect vizdoom --out data/doom --hours 1
    matrix-jax collect --videos FOLDER --out data/footage
    matrix-jax collect --videos FOLDER --out data/walks --world gallery:MEMORY
    matrix-jax collect --index FILE.json --out data/labelled --world the_matrix
    matrix-jax collect --lerobot FOLDER --actions-map FILE.yaml --out data/robot
    matrix-jax collect --vpt FOLDER --out data/vpt --world matrix_game_2
    matrix-jax collect --gamefactory FOLDER --out data/gamefactory --world matrix_game_2

A game is recorded with its pressed keys; ViZDoom also with mouse and camera pose. Tracks and maps
of held-out shards appear in no other shard. Videos are cut into shots and resized, and poor clips
are left out; their controls are marked as unknown. A .txt file beside a video holds its caption. A
.npz file beside it holds its cameras: extrinsics_c2w [N 4 4] and intrinsics [N 4] of its N frames.
Clips of such videos have poses, and frames are cut to the field of view of the world. An index
lists videos with captions and one control per frame, as published.

Recordings of others keep their actions: LeRobot data sets (2.0, 2.1, 3.0; a file says which columns
press which keys, see docs/records.md), VPT (NAME.mp4 and NAME.jsonl) and GameFactory (video/,
metadata/, annotation.csv). `--data A,B` of matrix-jax train mixes folders.

A restart with the same settings continues after the last finished shard. The same settings write
the same records, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from matrix_jax import config, recipes
from matrix_jax.cli.parser import Parser, path, whole

ENVIRONMENTS = ('CarRacing-v3', 'vizdoom')
# Defaults of the options of each source; an option of another source is refused.
GAME: dict[str, Any] = {'hours': 1.0, 'themes': 'all', 'seed': 0}
VIDEOS: dict[str, Any] = {
    'world': 'carracing',
    'caption': '',
    'shortest': 2.0,
    'camera_units': None,
}
INDEX: dict[str, Any] = {'world': 'carracing', 'data_root': None, 'frames': 65}
MINECRAFT: dict[str, Any] = {'world': 'matrix_game_2', 'caption': '', 'shortest': 2.0}
LEROBOT: dict[str, Any] = {'world': 'carracing', 'actions_map': None, 'shortest': 2.0}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; options that are not given are None."""
    parser = Parser('collect', __doc__)
    add = parser.add_argument
    add('env', metavar='ENV', nargs='?', help=f'a game: {" ".join(ENVIRONMENTS)}')
    add('--videos', type=path, metavar='FOLDER', help='unlabelled videos, also in subfolders')
    add('--index', type=path, metavar='FILE', help='index of labelled videos, JSON')
    add('--lerobot', type=path, metavar='FOLDER', help='a LeRobot data set')
    add('--vpt', type=path, metavar='FOLDER', help="recordings of OpenAI's VPT")
    add('--gamefactory', type=path, metavar='FOLDER', help='recordings of GameFactory')
    add('--out', required=True, type=path, help='folder of the shards; created if missing')
    add(
        '--workers',
        type=whole(1, 256),
        default=1,
        help='processes (default 1; a game gives some hundred frames/s each)',
    )
    add(
        '--held-out',
        type=float,
        default=0.1,
        metavar='FRACTION',
        help='share of tracks or videos that only heldout-* shards hold (default 0.1)',
    )
    game = parser.add_argument_group('of a game').add_argument
    game('--hours', type=float, help='hours of play at 16 frames/s, both splits (default 1)')
    game('--themes', help="'all', or names with commas: meadow,snow,... or maze,gallery,...")
    game('--seed', type=whole(0, 2**32 - 1), help='seed of tracks and keys (default 0)')
    files = parser.add_argument_group('of videos, indexes and recordings').add_argument
    files(
        '--world',
        metavar='RECIPE',
        help='clips get its size and rate (default carracing, for Minecraft matrix_game_2)',
    )
    files('--caption', help='caption of videos without a .txt file (default none)')
    files(
        '--actions-map',
        metavar='FILE',
        help='YAML: the columns of a LeRobot data set; none for frames and captions alone',
    )
    files('--shortest', type=float, metavar='SECONDS', help='least length of a clip (default 2)')
    files(
        '--camera-units',
        type=float,
        metavar='U',
        help='units of a pose per unit of a camera file (default 100, for metres)',
    )
    files(
        '--data-root',
        type=path,
        metavar='FOLDER',
        help="folder that paths of an index start from (default the index's own)",
    )
    files('--frames', type=int, help='frames of each clip of an index (default 65)')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 done, 2 bad input; after 130, Ctrl-C, the same command continues."""
    args = parse(argv)
    with config.usage_errors():
        sources: dict[str, tuple[Any, dict[str, Any], Callable[[argparse.Namespace], str]]] = {
            'ENV': (args.env, GAME, record_game),
            '--videos': (args.videos, VIDEOS, ingest_videos),
            '--index': (args.index, INDEX, ingest_index),
            '--lerobot': (args.lerobot, LEROBOT, ingest_lerobot),
            '--vpt': (args.vpt, MINECRAFT, ingest_minecraft),
            '--gamefactory': (args.gamefactory, MINECRAFT, ingest_minecraft),
        }
        named = [name for name, (value, _, _) in sources.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f'got {" and ".join(named) or "nothing to read"}, expected one of '
                + ', '.join(sources)
            )
        _, defaults, collect = sources[named[0]]
        for name in {**GAME, **VIDEOS, **INDEX, **LEROBOT}:
            if name not in defaults and getattr(args, name) is not None:
                raise ValueError(f'--{name.replace("_", "-")}: is not an option with {named[0]}')
            if getattr(args, name) is None:
                setattr(args, name, defaults.get(name))
        config.check_writable('--out', args.out, folder=True)
        with config.lock_folder('--out', args.out):
            report = collect(args)
        print(report)


def record_game(args: argparse.Namespace) -> str:
    """Records a game; returns a line about the result."""
    if args.env not in ENVIRONMENTS:
        raise ValueError(f'ENV: got {args.env!r}, expected one of {", ".join(ENVIRONMENTS)}')
    from matrix_jax.data import collect

    needs = collect.GAMES[args.env].NEEDS
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"{args.env} needs {', '.join(missing)}: pip install 'matrix_jax[data]'")
    plan = collect.plan(args.env, args.hours, args.themes, args.seed, args.held_out)
    frames = collect.run(plan, args.out, args.workers)
    return f'{args.out}: {frames} frames, {frames / plan.fps / 3600:.2f} hours'


def ingest_videos(args: argparse.Namespace) -> str:
    """Cuts unlabelled videos into clips; returns a report."""
    from matrix_jax.data import footage

    size = _size(args.world)
    shortest = _shortest(args, size['fps'])
    sources = footage.find(args.videos, args.caption)
    camera = getattr(recipes.load(args.world).world.stream, 'camera', None)
    focal: Any = camera.focal[0] if camera else None
    settings = footage.FootageReader(
        **size,
        shortest=shortest,
        held_out=args.held_out,
        focal=focal,
        camera_units=args.camera_units,
    )
    return _ingest(args, settings, args.videos, sources)


def ingest_index(args: argparse.Namespace) -> str:
    """Reads the labelled videos of an index; returns a report."""
    from matrix_jax.data.index import IndexReader, read

    settings = IndexReader(**_size(args.world), frames=args.frames, held_out=args.held_out)
    return _ingest(args, settings, args.data_root or args.index.parent, read(args.index))


def ingest_lerobot(args: argparse.Namespace) -> str:
    """Reads the episodes of a LeRobot data set; returns a report."""
    from matrix_jax.data import lerobot

    lerobot.needs_pyarrow('--lerobot')
    size = _size(args.world)
    settings = lerobot.LeRobotReader(
        **size,
        actions=lerobot.load_map(args.lerobot, args.actions_map),
        shortest=_shortest(args, size['fps']),
        held_out=args.held_out,
    )
    sources = lerobot.find(args.lerobot, settings.actions, settings.fps)
    return _ingest(args, settings, args.lerobot, sources)


def ingest_minecraft(args: argparse.Namespace) -> str:
    """Reads recordings of VPT or GameFactory; returns a report."""
    from matrix_jax.data import minecraft

    size = _size(args.world)
    layout, root = ('vpt', args.vpt) if args.vpt else ('gamefactory', args.gamefactory)
    settings = minecraft.MinecraftReader(
        **size, shortest=_shortest(args, size['fps']), held_out=args.held_out, kind=layout
    )
    return _ingest(args, settings, root, minecraft.find(root, layout, args.caption))


def _shortest(args: argparse.Namespace, fps: int) -> int:
    """Frames of the shortest clip."""
    from matrix_jax.data import records

    if not 0 < args.shortest <= 3600:
        raise ValueError(
            f'--shortest: got {args.shortest:g}, expected seconds above 0, at most 3600'
        )
    step = records.FRAMES_PER_LATENT
    return 1 + step * round(args.shortest * fps / step)


def _size(recipe: str) -> dict[str, Any]:
    world = recipes.load(recipe).world
    return {name: getattr(world, name) for name in ('height', 'width', 'fps')}


def _ingest(args: argparse.Namespace, settings: Any, root: Any, sources: Any) -> str:
    from matrix_jax.data import ingest

    report = ingest.run(settings, root, sources, args.out, args.workers)
    return f'{report.text(settings.fps)}\n{args.out}'
