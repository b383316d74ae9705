"""Play a world in the browser: hold a key and the next frames obey.

matrix-jax play                                  the bundled world, on this machine
matrix-jax play --host 0.0.0.0 --token SECRET12  for other machines; players need the token
matrix-jax play --ray --worlds 1-4               many players: worlds on a Ray cluster, as needed
matrix-jax play carracing doom:DMD=FOLDER        several worlds, one with weights of its own
"""

from __future__ import annotations

from collections.abc import Sequence

from matrix_jax import config
from matrix_jax.cli.parser import Parser, whole


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 stopped, 2 bad input."""
    from matrix_jax.serve.cluster import ray_serve
    from matrix_jax.serve.web import server

    parser, default, cluster = Parser('play', __doc__), server.Config(), ray_serve.Config()
    add = parser.add_argument
    add(
        '--players',
        type=whole(1, 1024),
        default=default.players,
        help=f'players per world, fixed at the start (default {default.players})',
    )
    add('--host', default=default.host, help='address to listen on (default: this machine only)')
    add(
        '--port', type=int, default=default.port, help=f'default {default.port}; 0 takes a free one'
    )
    add(
        '--root-path',
        default=default.root_path,
        metavar='PATH',
        help='path of the page behind a reverse proxy that keeps it, such as /matrix',
    )
    add('--token', help='secret that players must know; required for other addresses')
    add(
        '--entry',
        type=lambda text: {'head': 'early', 'tail': 'late'}.get(text, text),
        choices=('early', 'late'),
        default=default.control_binding,
        help='when keys bind: early (or head) is seen soonest, late (or tail) is as published '
        '(default early)',
    )
    add(
        '--together',
        type=whole(1, 1024),
        default=default.together,
        help='players computed in one batch, for accelerators (default 1)',
    )
    add(
        '--ray',
        action='store_true',
        help='join the Ray cluster of RAY_ADDRESS or of this machine, or start one',
    )
    add(
        '--worlds',
        metavar='N-M',
        help='with --ray: copies of the world, each for --players players; more start while '
        f'players wait (default {cluster.fewest}-{cluster.most})',
    )
    add('--gpus', type=float, help='with --ray: GPUs per world (default: as its mesh, if any)')
    add(
        '--drain',
        type=float,
        help=f'with --ray: seconds for players to finish (default {cluster.drain:.0f})',
    )
    args, runs = parser.parse_runs(argv)
    given = {
        name: value
        for name in ('worlds', 'gpus', 'drain')
        if (value := getattr(args, name)) is not None
    }
    if given and not args.ray:
        raise config.UsageError(
            ' and '.join(f'--{name}: got {value}' for name, value in given.items())
            + ', expected --ray with it'
        )
    if args.ray and len(runs) > 1:
        raise config.UsageError(f'--ray: got {len(runs)} recipes, expected one with it')
    if args.together > args.players:
        raise config.UsageError(
            f'--together: got {args.together}, expected 1 to the players, {args.players}'
        )
    with config.usage_errors():
        cfg = server.Config(
            players=args.players,
            together=args.together,
            control_binding=args.entry,
            host=args.host,
            port=args.port,
            token=args.token,
            root_path=args.root_path,
        )
        if args.ray:
            if 'worlds' in given:
                given['fewest'], given['most'] = ray_serve.parse_worlds(given.pop('worlds'))
            ray_serve.serve(runs[0], cfg, ray_serve.Config(**given))
        else:
            server.serve(runs, cfg)
